//! One node with its agent, and what surrounds it.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use basal_agent::{
    agent::{Agent, AgentError, Ports, store::Store},
    config::AgentConfig,
    journal::file::FileJournal,
    metrics::{AgentMetrics, PREFIX},
};
use basal_cni::{
    api::{Ack, AddRequest, AddResult, Answer, Attachment, Call, DelRequest, PodRef, Request},
    frame,
};
use basal_ipam::{
    cell::{Block, BlockState, Cell, CellId},
    names::{NodeName, NodeUid},
    prefix::PodCidr,
};
use basal_kvstore::{
    kv::{Kv as _, Op, Txn},
    ledger::LedgerKeys,
};
use basal_objects::{
    object::{Object, ObjectKey, Resource, resources},
    port::{MergePatch, Objects as _, Preconditions},
};
use basal_runtime::{
    config::{REFUSALS, Sources, load},
    env::{SeededEnv, SharedEnv},
    metrics::Metrics,
    outcome::Outcome,
    readiness::Readiness,
};
use basal_sim::{kv::ModelKv, objects::ModelObjects};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use crate::{
    faulty::{Faulty, MortalEnv, Script, Wire, until_dead},
    kernel::ModelKernel,
    machine::Machine,
};

/// How long anything may take in virtual time.
const LIMIT: Duration = Duration::from_secs(300);

/// Where the cluster's records are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Etcd,
    CustomResources,
}

/// A node whose kernel is a model, or another machine.
pub(crate) struct World<M = Arc<ModelKernel>> {
    source: Source,
    pub(crate) env: SharedEnv,
    /// Nobody talks to it where the records are in custom resources.
    pub(crate) kv: Arc<ModelKv>,
    pub(crate) objects: Arc<ModelObjects>,
    pub(crate) kernel: M,
    folder: TempDir,
    /// Further arguments of the next agent.
    pub(crate) arguments: Vec<&'static str>,
    agent: Option<Running>,
    /// How often the machine was started.
    boots: u32,
    pub(crate) readiness: Readiness,
    /// What goes wrong between agent and surroundings.
    pub(crate) script: Arc<Script>,
}

struct Running {
    stop: CancellationToken,
    task: JoinHandle<Option<Result<(), AgentError>>>,
}

impl World {
    /// A cluster with etcd and one Node, `n1`, and no agent.
    pub(crate) async fn new() -> Self {
        Self::with(Source::Etcd).await
    }

    /// A cluster with one Node, `n1`, and no agent.
    pub(crate) async fn with(source: Source) -> Self {
        Self::on(Machine::boot(), source).await
    }

    /// A cluster with etcd and an agent that is ready, and has blocks 10.0.1.0/24 and fd00::/120.
    pub(crate) async fn ready() -> Self {
        Self::ready_with(Source::Etcd).await
    }

    /// A cluster with an agent that is ready, and has blocks 10.0.1.0/24 and fd00::/120.
    pub(crate) async fn ready_with(source: Source) -> Self {
        Self::ready_on(Machine::boot(), source).await
    }
}

impl<M: Machine> World<M> {
    /// A cluster with one Node, `n1`, on a machine, and no agent.
    async fn on(kernel: M, source: Source) -> Self {
        let env: SharedEnv = Arc::new(SeededEnv::new(7));
        let objects = Arc::new(ModelObjects::new(Arc::clone(&env)));
        let world = Self {
            source,
            kv: Arc::new(ModelKv::new(1)),
            kernel,
            objects,
            env,
            arguments: Vec::new(),
            folder: folder(),
            agent: None,
            boots: 1,
            readiness: Readiness::new(),
            script: Arc::default(),
        };
        for definition in basal_crds::resources::crds() {
            world.create(resources::CRD, definition.object).await;
        }
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1", "labels": {"zone": "a"}},
            "status": {"addresses": [
                {"type": "InternalIP", "address": "172.18.0.1"}, {"type": "InternalIP", "address": "fc00::1"}]}});
        world.create(resources::NODE, node).await;
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": "shop", "labels": {"kubernetes.io/metadata.name": "shop"}}});
        world.create(resources::NAMESPACE, namespace).await;
        world
    }

    /// A cluster with an agent on a machine that is ready, and has blocks 10.0.1.0/24 and fd00::/120.
    pub(crate) async fn ready_on(kernel: M, source: Source) -> Self {
        let mut world = Self::on(kernel, source).await;
        world.start();
        world.grant(&["10.0.1.0/24", "fd00::/120"]).await;
        world.until_ready().await;
        world.kernel.has_an_agent();
        world
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Starts the agent.
    pub(crate) fn start(&mut self) {
        std::fs::write(self.path("plugin"), "plugin").unwrap();
        let flag = |name: &str, path: &str| format!("--{name}={}", self.path(path).display());
        let kvstore = if self.source == Source::Etcd { "etcd" } else { "" };
        let arguments = [
            "basal-agent".to_owned(),
            "--node-name=n1".to_owned(),
            format!("--kvstore={kvstore}"),
            "--kvstore-opt=etcd.config=unused".to_owned(),
            flag("state-dir", "run"),
            flag("cni-plugin", "plugin"),
            flag("cni-bin-dir", "bin"),
            flag("write-cni-conf-when-ready", "net.d/05-cilium.conflist"),
        ];
        let more = self.arguments.iter().map(Into::into);
        let arguments = arguments.map(Into::into).into_iter().chain(more).collect();
        let sources = Sources { arguments, ..Sources::default() };
        let settings = load::<AgentConfig>(&sources, REFUSALS).unwrap().config.settings().unwrap();
        let dead = CancellationToken::new();
        let wire = Wire::new(&self.script, &dead);
        let store = match &settings.etcd {
            Some(keys) => {
                Store::Etcd { kv: Faulty::new(Arc::clone(&self.kv), &wire), keys: keys.clone(), status: None }
            }
            None => Store::CustomResources,
        };
        let journal = FileJournal::open(&self.path("run/state/endpoints")).unwrap();
        let ports = Ports {
            env: Arc::new(MortalEnv { env: Arc::clone(&self.env), dead: dead.clone() }),
            objects: Faulty::new(Arc::clone(&self.objects), &wire),
            store,
            kernel: Faulty::new(self.kernel.port(&self.env), &wire),
            journal: Faulty::new(Arc::new(journal), &wire),
        };
        self.readiness = Readiness::new();
        let metrics = Metrics::new(PREFIX).register(AgentMetrics::register);
        let stop = CancellationToken::new();
        let agent =
            Agent::new(ports, settings, format!("boot-{}", self.boots), self.readiness.clone(), metrics, stop.clone());
        #[expect(clippy::disallowed_methods, reason = "the test awaits the agent's result")]
        let task = tokio::spawn(async move { until_dead(&dead, agent.run()).await });
        self.agent = Some(Running { stop, task });
    }

    /// Stops the agent; an error of its fails the test.
    pub(crate) async fn stop(&mut self) {
        let running = self.agent.take().unwrap();
        running.stop.cancel();
        running.task.await.unwrap().unwrap().unwrap();
    }

    /// Waits until nothing is left of any endpoint, and stops the agent.
    pub(crate) async fn stop_clean(&mut self) {
        self.until("nothing is left", || self.leftovers().is_empty()).await;
        self.stop().await;
    }

    /// Starts the machine anew, without an agent: what the kernel held is gone.
    pub(crate) fn reboot(&mut self) {
        self.boots += 1;
        self.kernel = self.kernel.reboot();
    }

    /// Waits until an agent that died or gave up is gone, with all that it had sent on its way.
    pub(crate) async fn bury(&mut self) {
        let running = self.agent.take().unwrap();
        drop(running.task.await.unwrap());
        self.script.arrived().await;
    }

    pub(crate) fn is_ready(&self) -> bool {
        let conflist = self.path("net.d/05-cilium.conflist");
        conflist.exists() && self.readiness.is_ready() && self.readiness.holding().contains(&"cni")
    }

    pub(crate) async fn until_ready(&self) {
        self.until("the agent is ready", || self.is_ready()).await;
    }

    /// Waits for something; time is virtual.
    pub(crate) async fn until(&self, what: &str, holds: impl Fn() -> bool) {
        let waited = tokio::time::timeout(LIMIT, async {
            while !holds() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        if waited.await.is_err() {
            let ended = self.agent.as_ref().is_some_and(|running| running.task.is_finished());
            panic!("not within {LIMIT:?}: {what}; pending: {:?}; agent ended: {ended}", self.readiness.pending());
        }
    }

    pub(crate) async fn create(&self, resource: Resource, object: Value) -> Object {
        match self.objects.create(resource, Object(object)).await {
            Outcome::Done(object) => object,
            other => panic!("not created: {other:?}"),
        }
    }

    pub(crate) async fn get(&self, resource: Resource, key: &ObjectKey) -> Option<Object> {
        self.objects.get(resource, key).await.unwrap()
    }

    /// Applies a merge patch.
    pub(crate) async fn patch(
        &self,
        resource: Resource,
        key: &ObjectKey,
        subresource: Option<&'static str>,
        body: Value,
    ) {
        let seen = self.get(resource, key).await.unwrap();
        let patch = MergePatch {
            resource_version: seen.resource_version().to_owned(),
            uid: seen.uid().to_owned(),
            subresource,
            body,
        };
        let outcome = self.objects.patch(resource, key, patch).await;
        assert!(outcome.is_done(), "{outcome:?}");
    }

    /// What etcd holds of an address.
    pub(crate) fn ip_record(&self, ip: &str) -> Option<Value> {
        let contents = self.kv.contents();
        serde_json::from_slice(contents.get(&format!("cilium/state/ip/v1/default/{ip}"))?).ok()
    }

    /// Whether the agent that was started last still runs.
    pub(crate) fn runs(&self) -> bool {
        self.agent.as_ref().is_some_and(|running| !running.task.is_finished())
    }

    pub(crate) async fn cilium_node(&self) -> Object {
        self.get(resources::CILIUM_NODE, &ObjectKey::cluster("n1")).await.unwrap()
    }

    /// What the operator does: claims in the ledger, blocks in the CiliumNode, and without etcd its word for them in the
    /// status.
    pub(crate) async fn grant(&self, blocks: &[&str]) {
        let exists = || !self.objects.all(&resources::CILIUM_NODE).is_empty();
        self.until("the CiliumNode exists", exists).await;
        for block in blocks {
            self.claim(block, BlockState::Granted).await;
        }
        self.list(blocks).await;
        if self.source == Source::CustomResources {
            for block in blocks {
                self.confirm(block, json!({"status": "in-use"})).await;
            }
        }
    }

    /// What the operator says of a block in the status; null takes it back.
    pub(crate) async fn confirm(&self, block: &str, said: Value) {
        let body = json!({"status": {"ipam": {"pod-cidrs": {block: said}}}});
        self.patch(resources::CILIUM_NODE, &ObjectKey::cluster("n1"), Some("status"), body).await;
    }

    /// Lists blocks in the CiliumNode.
    pub(crate) async fn list(&self, blocks: &[&str]) {
        let body = json!({"spec": {"ipam": {"podCIDRs": blocks}}});
        self.patch(resources::CILIUM_NODE, &ObjectKey::cluster("n1"), None, body).await;
    }

    /// Deletes an object.
    pub(crate) async fn delete(&self, resource: Resource, key: &ObjectKey) {
        let seen = self.get(resource, key).await.unwrap();
        let (uid, resource_version) = (seen.uid().to_owned(), seen.resource_version().to_owned());
        assert!(self.objects.delete(resource, key, Preconditions { uid, resource_version }).await.is_done());
    }

    /// Writes the claim of `n1` to a block.
    pub(crate) async fn claim(&self, block: &str, state: BlockState) {
        let uid = self.get(resources::NODE, &ObjectKey::cluster("n1")).await.unwrap().uid().to_owned();
        self.claim_of(block, state, &uid).await;
    }

    /// Writes the claim of a Node with this uid to a block.
    pub(crate) async fn claim_of(&self, block: &str, state: BlockState, uid: &str) {
        let block: PodCidr = block.parse().unwrap();
        let id = CellId::new(block.supernet(block.prefix_len() - 8));
        let mut cell = Cell::new(id, id.prefix(), block.prefix_len()).unwrap();
        let claim = Block { state, node: NodeName::new("n1").unwrap(), uid: Some(NodeUid::new(uid).unwrap()) };
        cell.set(block, claim).unwrap();
        let key = LedgerKeys::new("default").cell(id);
        self.put(&key, &cell.to_json().unwrap()).await;
    }

    pub(crate) async fn put(&self, key: &str, value: &[u8]) {
        let put = Op::Put { key: key.to_owned(), value: value.to_vec(), lease: 0 };
        assert!(self.kv.txn(Txn { then: vec![put], ..Txn::default() }).await.is_done());
    }

    /// The keys in etcd that begin so.
    pub(crate) fn keys(&self, prefix: &str) -> Vec<String> {
        self.kv.contents().into_keys().filter(|key| key.starts_with(prefix)).collect()
    }

    /// Creates a pod of this node.
    pub(crate) async fn pod(&self, name: &str, labels: Value) -> PodRef {
        let pod = json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "shop", "labels": labels},
            "spec": {"nodeName": "n1", "serviceAccountName": "default", "containers": [{"name": "c", "image": "i"}]}});
        let pod = self.create(resources::POD, pod).await;
        PodRef { namespace: "shop".into(), name: name.into(), uid: Some(pod.uid().to_owned()) }
    }

    /// Connects to the agent and asks.
    pub(crate) async fn call(&self, request: Request) -> io::Result<(UnixStream, Answer)> {
        let mut stream = UnixStream::connect(self.path("run/basal.sock")).await?;
        stream.write_all(&frame::encode(&Call::new(request)).unwrap()).await?;
        let answer = receive(&mut stream).await?;
        Ok((stream, answer))
    }

    pub(crate) async fn ask(&self, request: Request) -> Answer {
        self.call(request).await.unwrap().1
    }

    /// ADD up to the agent's offer.
    pub(crate) async fn offer(&self, container: &str, pod: Option<PodRef>) -> (UnixStream, Answer) {
        self.call(Request::Add(add_request(container, pod))).await.unwrap()
    }

    /// ADD, acknowledged.
    pub(crate) async fn add(&self, container: &str, pod: Option<PodRef>) -> AddResult {
        let (result, answer) = self.try_add(container, pod).await;
        assert_eq!(answer, Answer::Committed);
        result
    }

    /// ADD, acknowledged, with what the agent says to that.
    pub(crate) async fn try_add(&self, container: &str, pod: Option<PodRef>) -> (AddResult, Answer) {
        let (stream, answer) = self.offer(container, pod).await;
        let Answer::Added(result) = answer else { panic!("no result: {answer:?}") };
        (result, acknowledge(stream).await.unwrap())
    }

    pub(crate) async fn del(&self, container: &str) -> Answer {
        self.ask(Request::Del(DelRequest { attachment: attachment(container) })).await
    }

    /// Everything of endpoints that there is: records, objects, journal, and where none of them is left, interfaces and rows.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let keys = self.keys("cilium/state/ip/").into_iter().chain(self.keys("cilium/state/identities/v1/value/"));
        let objects = self.objects.all(&resources::CILIUM_ENDPOINT).into_iter().map(|o| format!("object {}", o.key()));
        let journal = std::fs::read_dir(self.path("run/state/endpoints")).unwrap();
        let journal = journal.map(|entry| format!("journal {:?}", entry.unwrap().file_name()));
        let recorded: Vec<_> = keys.chain(objects).chain(journal).collect();
        // To look into a real kernel takes longer than all that.
        if recorded.is_empty() { self.kernel.left() } else { recorded }
    }
}

/// A folder for the agent's files; in memory where there is such a place, because the journal waits for the disk.
fn folder() -> TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_none| tempfile::tempdir().unwrap())
}

pub(crate) fn attachment(container: &str) -> Attachment {
    Attachment { container_id: container.into(), ifname: "eth0".into() }
}

pub(crate) fn add_request(container: &str, pod: Option<PodRef>) -> AddRequest {
    AddRequest { attachment: attachment(container), netns: format!("/run/netns/{container}"), pod, ips: vec![] }
}

/// Tells the agent that its offer was taken; its answer.
pub(crate) async fn acknowledge(mut stream: UnixStream) -> io::Result<Answer> {
    stream.write_all(&frame::encode(&Ack::Received).unwrap()).await?;
    receive(&mut stream).await
}

async fn receive(stream: &mut UnixStream) -> io::Result<Answer> {
    let mut header = [0; 4];
    stream.read_exact(&mut header).await?;
    let mut body = vec![0; frame::body_len(header).unwrap()];
    stream.read_exact(&mut body).await?;
    Ok(serde_json::from_slice(&body).unwrap())
}
