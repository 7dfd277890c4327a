//! The agent: what is started, in which order, and what depends on what.
//!
//! 1. Registration: the Node is read, the CiliumNode written.
//! 2. Claim: nothing goes on before the ledger confirms a block of each family.
//! 3. View: journal and kernel are read, the directory is followed until it is complete.
//! 4. Datapath: the first comparison adopts what is in place and mends the rest. Before that nothing is changed, so a
//!    restart loses no packet.
//! 5. Endpoints: those from before are announced again, or removed; deletes that were queued are carried out.
//! 6. Service: the socket is opened, plugin and configuration are installed.

mod adopt;
pub mod pump;
pub mod report;
pub mod routine;
pub mod store;

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use basal_cni::api::{Component, ComponentState, NodeReport};
use basal_crds::directory::Directory;
use basal_datapath::{
    kernel::{Kernel, Observed},
    plan::{NodePlan, Routers},
    program::Object,
    routing::{Routing, Tunnel},
};
use basal_ipam::{
    addresses::{AddressRefusal, Owner},
    prefix::Family,
};
use basal_kvstore::directory::NoNodeAddress;
use basal_objects::{
    cache::{Cache, Source},
    events::{EventRecorder, Reporter},
    object::{
        ObjectKey,
        resources::{CILIUM_NODE, NAMESPACE, NODE, POD},
    },
    port::{Objects, Scope},
};
use basal_runtime::{
    env::{SharedEnv, TaskFuture, TaskHandle},
    readiness::{Guard, Readiness},
};
use futures::stream::BoxStream;
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use self::{
    pump::{KnownIdentities, Pump},
    report::{AgentReports, ipnet_of},
    store::{Opened, Store},
};
use crate::{
    config::Settings,
    endpoint::{Endpoints, EndpointsOptions, record::Addresses, restore, state::State},
    flows::FlowCollector,
    identity::task::Identities,
    journal::{Journal, JournalError},
    metrics::AgentMetrics,
    node::{
        facts::{NodeFacts, Underlay},
        registration::{OwnAddresses, ThisRun},
        watch::{CiliumNodeFacts, ClaimReport, ClaimWatch, Registration},
    },
    pods::{PodInfo, namespace_labels},
    policy::Policies,
    publish::task::Publisher,
    server::{self, Server},
    sync::Datapath,
    view::{View, ids::NodeIds},
};

/// What the agent reaches the world through.
#[derive(Clone)]
pub struct Ports {
    /// Clock, randomness, tasks.
    pub env: SharedEnv,
    /// The API server.
    pub objects: Arc<dyn Objects>,
    /// Where the cluster's records are.
    pub store: Store,
    /// The kernel.
    pub kernel: Arc<dyn Kernel>,
    /// The memory on disk.
    pub journal: Arc<dyn Journal>,
}

/// Why the agent ended. It is started again, from the beginning.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The Node has no address that other nodes could tunnel to.
    #[error("Node {0} has no InternalIP or ExternalIP; kubelet's --node-ip and the cloud provider set them")]
    NoAddress(String),
    /// The same, from the directory.
    #[error(transparent)]
    NoNodeAddress(#[from] NoNodeAddress),
    /// No address for the node itself.
    #[error("no {owner} address: {refusal}")]
    OwnAddress {
        /// `router` or `health`.
        owner: &'static str,
        /// Why.
        refusal: AddressRefusal,
    },
    /// The journal cannot be read.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The kernel cannot be read.
    #[error(transparent)]
    Kernel(#[from] basal_datapath::kernel::ReadError),
    /// No device has the node's address.
    #[error("no network device has the node's address {0}; does the agent run in the host's network namespace?")]
    NoDevice(IpAddr),
    /// The socket.
    #[error("cannot listen on {path}: {source}")]
    Socket {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The delete queue.
    #[error(transparent)]
    DeleteQueue(#[from] basal_cni::delete_queue::QueueError),
    /// The plugin or its configuration.
    #[error(transparent)]
    Install(#[from] crate::install::InstallError),
    /// It was stopped while it started.
    #[error("stopped while starting")]
    Stopped,
}

/// The agent of one node.
pub struct Agent {
    ports: Ports,
    settings: Settings,
    boot_id: String,
    readiness: Readiness,
    metrics: AgentMetrics,
    stop: CancellationToken,
    /// Of the datapath and of the socket. They are there from the beginning, so that the agent is never ready before.
    guards: Option<(Guard, Guard)>,
    tasks: Vec<TaskHandle>,
}

/// What is known of the node before it has a block.
struct Registered {
    node: Cache<NodeFacts>,
    cilium_node: Cache<CiliumNodeFacts>,
    underlay: watch::Sender<Underlay>,
    own: watch::Sender<OwnAddresses>,
    claim: watch::Receiver<ClaimReport>,
    guard: Guard,
}

impl Agent {
    /// An agent that has not begun.
    #[must_use]
    pub fn new(
        ports: Ports,
        settings: Settings,
        boot_id: String,
        readiness: Readiness,
        metrics: AgentMetrics,
        stop: CancellationToken,
    ) -> Self {
        let guards = Some((readiness.guard("datapath"), readiness.guard("cni")));
        Self { ports, settings, boot_id, readiness, metrics, stop, guards, tasks: Vec::new() }
    }

    /// Runs until it is stopped.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn run(mut self) -> Result<(), AgentError> {
        let result = self.start_and_serve().await;
        self.stop.cancel();
        for task in std::mem::take(&mut self.tasks) {
            task.join().await;
        }
        match result {
            Err(AgentError::Stopped) => Ok(()),
            other => other,
        }
    }

    async fn start_and_serve(&mut self) -> Result<(), AgentError> {
        let Some(guards) = self.guards.take() else { return Ok(()) };
        let reporter = Reporter { controller: "cilium.io/basal-agent", instance: self.settings.node.to_string() };
        let (events, _task) = EventRecorder::start(Arc::clone(&self.ports.objects), &self.ports.env, reporter);
        let registered = self.register().await?;

        // From here on the node has blocks.
        let observed = self.ports.kernel.read().await?;
        let mut restored = restore::sort(self.ports.journal.load().await?, &observed, &self.boot_id);
        let mut state = State::new(self.settings.families.clone(), self.settings.ip_release_delay);
        state.serve(&registered.claim.borrow().confirmed);
        adopt::keep(&mut restored, &mut state);
        let own = self.own_addresses(&mut state, &registered, &observed)?;
        registered.own.send_replace(own);

        let plan = self.node_plan(&registered, own, &observed)?;
        if let Some(problem) = plan.mtu_problem() {
            tracing::warn!(problem, "datapath");
        }
        let underlay = registered.underlay.borrow().clone();
        let options = EndpointsOptions { host_ip: underlay.tunnel_ip, boot_id: self.boot_id.clone() };
        let key = (self.settings.cluster.name().clone(), self.settings.node.clone());
        let mut view = View::new(key, plan, NodeIds::restore(routine::node_ids(&observed)));
        if self.settings.mtu.is_none() {
            view.take_mtu_of(underlay.tunnel_ip);
        }
        adopt::put_restored(&restored, &mut view);
        if adopt::of_another_mtu(&observed, view.local()) {
            view.renew_pods();
        }

        let Opened { directory, vanished, status } =
            self.ports.store.open(&self.ports.env, &self.ports.objects, &self.settings, underlay.ips())?;
        let known = KnownIdentities::default();
        self.spawn("identities", known.clone().run(directory.identities(), self.metrics.clone()));
        let mut pump = Pump::new(directory.nodes(), directory.ips(), self.metrics.clone());
        guards.0.not_ready("waiting for the nodes and addresses of the cluster");
        self.until_stopped(pump.fill(&mut view, &routine::known_blocks(&observed))).await?;
        drop(observed);

        let (datapath, task) = Datapath::start(
            &self.ports.env,
            Arc::clone(&self.ports.kernel),
            view,
            self.metrics.datapath.clone(),
            self.stop.clone(),
        );
        self.tasks.push(task);
        self.spawn("directory", pump.run(datapath.clone()));
        let began = Instant::now();
        let endpoints = Endpoints::new(
            Arc::clone(&self.ports.env),
            Arc::clone(&self.ports.journal),
            Arc::clone(&directory),
            datapath.clone(),
            options,
            state,
            began,
        );
        self.until_stopped(routine::first_pass(datapath.report(), &guards.0)).await?;

        let pods = self.follow_pods().await?;
        let policies = Policies::default();
        let watched = policies.watch(&self.ports.env, &self.ports.objects, &events, &self.metrics, &self.stop);
        drop(watched);
        self.spawn_publishers(&directory, &endpoints, pods, &registered, vanished);
        self.until_stopped(endpoints.adopt(&restored)).await?;
        match directory.withdraw_leftover_ips().await {
            Ok(0) => {}
            Ok(count) => tracing::info!(count, "ip records of an earlier run were withdrawn"),
            Err(error) => tracing::warn!(error, "ip records of an earlier run may be left"),
        }

        let reports = AgentReports {
            settings: self.settings.clone(),
            readiness: self.readiness.clone(),
            endpoints: endpoints.clone(),
            datapath: datapath.clone(),
            sync: datapath.report(),
            claim: registered.claim.clone(),
            kvstore: Arc::new(Mutex::new(Component::new(ComponentState::Warning, "not looked at yet"))),
            kubernetes: Arc::new(Mutex::new(Component::new(ComponentState::Ok, "watched"))),
            identities: known,
            policies,
            node: self.node_report(&registered, own),
            underlay: registered.underlay.subscribe(),
        };
        let queue = self.settings.cni.state_dir.join("deleteQueue");
        let socket = self.settings.cni.state_dir.join("basal.sock");
        // Plugins that find no agent wait for this lock; when they get it the socket is there.
        let consumer = routine::replay_deletes(&queue, &endpoints).await?;
        let listener = server::listen(&socket).map_err(|source| AgentError::Socket { path: socket.clone(), source })?;
        drop(consumer);
        let reports = Arc::new(reports);
        let server = Server {
            env: Arc::clone(&self.ports.env),
            endpoints: endpoints.clone(),
            reports: Arc::clone(&reports) as Arc<dyn server::Reports>,
            metrics: self.metrics.clone(),
        };
        self.spawn("agent socket", server.run(listener, self.stop.clone()));
        routine::install(&self.settings, &socket, &queue)?;
        guards.1.ready();
        tracing::info!("the agent is ready");

        self.spawn("kvstore status", status.run(Arc::clone(&reports)));
        if self.settings.bpf_masquerade.is_some() || !self.settings.datapath.enable_host_legacy_routing {
            let (kernel, metrics) = (Arc::clone(&self.ports.kernel), self.metrics.flows.clone());
            let every =
                Some(self.settings.datapath.masquerade.conntrack_gc_interval.0).filter(|every| !every.is_zero());
            self.spawn("flows", FlowCollector { kernel, metrics, every }.run());
        }
        let routine = routine::Routine {
            endpoints,
            datapath,
            reports,
            claim: registered.claim,
            node: registered.node,
            underlay: registered.underlay,
            directory,
            podcidr: registered.guard,
            datapath_guard: guards.0,
            metrics: self.metrics.clone(),
        };
        let stop = self.stop.clone();
        stop.run_until_cancelled(routine.run()).await;
        // The guard of the socket holds until here.
        drop(guards.1);
        Ok(())
    }

    fn spawn(&mut self, name: &'static str, future: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        let stoppable: TaskFuture = Box::pin(async move { stop.run_until_cancelled(future).await.unwrap_or_default() });
        self.tasks.push(self.ports.env.spawn(name, stoppable));
    }

    async fn until_stopped<T>(&self, future: impl Future<Output = T>) -> Result<T, AgentError> {
        self.stop.run_until_cancelled(future).await.ok_or(AgentError::Stopped)
    }

    fn follow<T: Send + Sync + 'static>(
        &self,
        resource: basal_objects::object::Resource,
        scope: &Scope,
        parse: basal_objects::cache::Parse<T>,
        guard: &'static str,
    ) -> Cache<T> {
        let (objects, env, ready) = (&self.ports.objects, &*self.ports.env, self.readiness.guard(guard));
        Cache::follow(Source { objects, env, resource, scope: scope.clone(), parse, ready }).0
    }

    /// Steps 1 and 2.
    async fn register(&mut self) -> Result<Registered, AgentError> {
        let name = self.settings.node.to_string();
        let mine = Scope { fields: Some(format!("metadata.name={name}")), ..Scope::default() };
        let node = self.follow(NODE, &mine, NodeFacts::parse, "node");
        let cilium_node = self.follow(CILIUM_NODE, &mine, CiliumNodeFacts::parse, "ciliumnode");
        let (own, own_changes) = watch::channel(OwnAddresses::default());
        let registration = Registration {
            env: Arc::clone(&self.ports.env),
            objects: Arc::clone(&self.ports.objects),
            node: node.clone(),
            cilium_node: cilium_node.clone(),
            own: own_changes,
            this_run: ThisRun { boot_id: self.boot_id.clone(), store: self.ports.store.kind() },
            name: name.clone(),
        };
        self.spawn("registration", registration.run(self.stop.clone()));
        let (report, mut claim) = watch::channel(ClaimReport {
            problem: Some("the Node has not been read yet".to_owned()),
            ..ClaimReport::default()
        });
        let claims = ClaimWatch {
            confirm: self.ports.store.confirm(&self.ports.env, &self.settings, &node, &cilium_node),
            node: node.clone(),
            cilium_node: cilium_node.clone(),
            name: name.clone(),
            families: self.settings.families.clone(),
            report,
        };
        self.spawn("claim", claims.run(self.stop.clone()));

        let guard = self.readiness.guard("podcidr");
        let granted = async {
            loop {
                let problem = claim.borrow_and_update().problem.clone();
                match problem {
                    None => return,
                    Some(problem) => guard.not_ready(problem),
                }
                if claim.changed().await.is_err() {
                    return;
                }
            }
        };
        self.until_stopped(granted).await?;
        guard.ready();

        let cached = node.get(&ObjectKey::cluster(name.clone()));
        let facts = cached.as_ref().and_then(|cached| cached.valid()).cloned();
        let underlay = facts.and_then(|facts| facts.underlay(&self.settings.families));
        let underlay = underlay.ok_or(AgentError::NoAddress(name))?;
        Ok(Registered { node, cilium_node, underlay: watch::Sender::new(underlay), own, claim, guard })
    }

    /// Router and health addresses: those that the kernel holds, or else new ones.
    fn own_addresses(
        &self,
        state: &mut State,
        registered: &Registered,
        observed: &Observed,
    ) -> Result<OwnAddresses, AgentError> {
        let now = std::time::Duration::ZERO;
        let mut take = |owner: Owner, name, earlier: &[IpAddr]| -> Result<Addresses, AgentError> {
            state.own(&owner, earlier, now).map_err(|refusal| AgentError::OwnAddress { owner: name, refusal })
        };
        let key = ObjectKey::cluster(self.settings.node.to_string());
        let cilium_node = registered.cilium_node.get(&key);
        let health = cilium_node.as_ref().and_then(|cached| cached.valid()).map(|facts| facts.health.clone());
        let earlier = adopt::own_addresses(observed, &health.unwrap_or_default());
        let router = take(Owner::router(), "router", &earlier.router.iter().collect::<Vec<_>>())?;
        let health = take(Owner::health(), "health", &earlier.health.iter().collect::<Vec<_>>())?;
        Ok(OwnAddresses { router, health })
    }

    fn node_plan(
        &self,
        registered: &Registered,
        own: OwnAddresses,
        observed: &Observed,
    ) -> Result<NodePlan, AgentError> {
        let underlay = registered.underlay.borrow();
        let (_, device) = observed.device_with(underlay.tunnel_ip).ok_or(AgentError::NoDevice(underlay.tunnel_ip))?;
        let claim = registered.claim.borrow();
        let keys = &self.settings.datapath;
        let has = |family| self.settings.families.contains(&family);
        Ok(NodePlan {
            routers: Routers { v4: own.router.v4, v6: own.router.v6 },
            health_ips: own.health.iter().collect(),
            local_cidrs: claim.confirmed.iter().chain(&claim.lost).map(ipnet_of).collect(),
            node_ips: underlay.ips(),
            device_mtu: self.settings.mtu.unwrap_or(device.mtu),
            routing: match self.settings.routing {
                Routing::Tunnel(tunnel) => Routing::Tunnel(Tunnel { ipv6: underlay.tunnel_ip.is_ipv6(), ..tunnel }),
                native @ Routing::Native(_) => native,
            },
            native_networks: self.settings.native_networks.clone(),
            remote_nodes: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            peers: BTreeMap::new(),
            legacy_routing: keys.enable_host_legacy_routing,
            dual_stack: self.settings.families.len() == 2,
            masquerade_ipv4: keys.masquerade.enable_ipv4_masquerade && has(Family::V4),
            masquerade_ipv6: keys.masquerade.enable_ipv6_masquerade && has(Family::V6),
            bpf_masquerade: self.settings.bpf_masquerade.clone(),
            object: Object::built_in(),
        })
    }

    async fn follow_pods(&self) -> Result<Pods, AgentError> {
        let mine = Scope { fields: Some(format!("spec.nodeName={}", self.settings.node)), ..Scope::default() };
        let pods = self.follow(POD, &mine, PodInfo::parse, "pods");
        let namespaces = self.follow(NAMESPACE, &Scope::default(), namespace_labels, "namespaces");
        self.until_stopped(pods.wait_synced()).await?;
        self.until_stopped(namespaces.wait_synced()).await?;
        Ok(Pods { pods, namespaces })
    }

    fn spawn_publishers(
        &mut self,
        directory: &Arc<dyn Directory>,
        endpoints: &Endpoints,
        pods: Pods,
        registered: &Registered,
        vanished: BoxStream<'static, ObjectKey>,
    ) {
        let identities = Identities {
            env: Arc::clone(&self.ports.env),
            directory: Arc::clone(directory),
            endpoints: endpoints.clone(),
            pods: pods.pods.clone(),
            namespaces: pods.namespaces,
            filter: self.settings.filter.clone(),
            cluster: self.settings.cluster.name().to_string(),
        };
        self.spawn("pod identities", identities.run(self.stop.clone()));
        let publisher = Publisher {
            env: Arc::clone(&self.ports.env),
            objects: Arc::clone(&self.ports.objects),
            endpoints: endpoints.clone(),
            pods: pods.pods,
            underlay: registered.underlay.subscribe(),
            claim: registered.claim.clone(),
            metrics: self.metrics.clone(),
        };
        self.spawn("ciliumendpoints", publisher.run(vanished, self.stop.clone()));
    }

    fn node_report(&self, registered: &Registered, own: OwnAddresses) -> NodeReport {
        NodeReport {
            cluster: self.settings.cluster.name().to_string(),
            name: self.settings.node.to_string(),
            local: true,
            // These may change.
            internal_ips: Vec::new(),
            router_ips: own.router.iter().collect(),
            pod_cidrs: registered.claim.borrow().confirmed.iter().map(ipnet_of).collect(),
            tunnel_endpoint: None,
        }
    }
}

/// What is known of pods.
struct Pods {
    pods: Cache<PodInfo>,
    namespaces: Cache<BTreeMap<String, String>>,
}
