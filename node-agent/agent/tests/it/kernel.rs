//! A kernel in memory: it holds what ops put there, and nothing in it goes wrong.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use basal_agent::{
    sync::core::Core,
    view::{View, ids::NodeIds},
};
use basal_crds::names::ClusterName;
use basal_datapath::{
    check::pod_routes,
    flows::MapUse,
    kernel::{Device, Kernel, KernelEvent, Observed, OpError, PodDevice, ReadError},
    names::IfName,
    op::Op,
    plan::{NodePlan, Routers},
    program::Object,
    routing::{Routing, Tunnel},
    rows::MapId,
    state::{Link, LinkKind, PodSide},
};
use basal_ipam::names::NodeName;
use basal_runtime::{env::SharedEnv, outcome::Outcome};
use futures::{StreamExt as _, stream, stream::BoxStream};
use ipnet::IpNet;
use tokio::sync::watch;

use crate::machine::{Machine, NODE_ADDRESSES};

/// The kernel of one node.
pub(crate) struct ModelKernel {
    // What an op does to what is known is written down there already.
    core: Mutex<Core>,
    log: Mutex<Vec<Op>>,
    pods: Mutex<Pods>,
    reads: AtomicUsize,
    /// How long an endpoint's interface takes.
    making: Mutex<Duration>,
    at_work: Mutex<AtWork>,
    /// What the verifier says to every program, if it refuses them.
    verifier: Mutex<Option<&'static str>>,
    news: watch::Sender<()>,
}

/// The devices in pods, by namespace and name.
type Pods = BTreeMap<(PathBuf, IfName), PodDevice>;

/// Interfaces that are being made.
#[derive(Default)]
struct AtWork {
    now: Vec<IfName>,
    most: usize,
}

impl ModelKernel {
    /// A kernel with one device, which has these addresses.
    fn new(addresses: &[&str]) -> Self {
        let plan = NodePlan {
            routers: Routers::default(),
            health_ips: Default::default(),
            local_cidrs: Default::default(),
            node_ips: Default::default(),
            device_mtu: 1500,
            routing: Routing::Tunnel(Tunnel { port: 8472, ipv6: false }),
            native_networks: Default::default(),
            remote_nodes: Default::default(),
            endpoints: Default::default(),
            peers: Default::default(),
            legacy_routing: true,
            dual_stack: true,
            masquerade_ipv4: true,
            masquerade_ipv6: true,
            bpf_masquerade: None,
            object: Object::new(b"model"),
        };
        let mut observed = Observed::default();
        let addresses: Vec<IpNet> = addresses.iter().map(|address| address.parse().unwrap()).collect();
        observed.networks = addresses.iter().map(|address| (address.trunc(), IfName::new("eth0").ok())).collect();
        let eth0 = Device { index: 2, mtu: 1500, up: true, addresses, ..Device::default() };
        observed.devices.insert(IfName::new("eth0").unwrap(), eth0);
        let key = (ClusterName::default(), NodeName::new("model").unwrap());
        let core = Core::new(View::new(key, plan, NodeIds::default()), observed);
        Self {
            core: Mutex::new(core),
            log: Mutex::default(),
            pods: Mutex::default(),
            reads: AtomicUsize::new(0),
            making: Mutex::default(),
            at_work: Mutex::default(),
            verifier: Mutex::default(),
            news: watch::Sender::new(()),
        }
    }

    /// From now on each endpoint's interface takes so long.
    pub(crate) fn make_slowly(&self, making: Duration) {
        *self.making.lock().unwrap() = making;
    }

    /// From now on the verifier refuses programs with these words, or takes them.
    pub(crate) fn refuse_programs(&self, verifier: Option<&'static str>) {
        *self.verifier.lock().unwrap() = verifier;
    }

    /// How many interfaces were made at the same time at most.
    pub(crate) fn most_at_work(&self) -> usize {
        self.at_work.lock().unwrap().most
    }

    /// How often everything was read.
    pub(crate) fn reads(&self) -> usize {
        self.reads.load(Ordering::Relaxed)
    }

    /// Changes a device and tells of it.
    pub(crate) fn change_device(&self, name: &str, change: impl FnOnce(&mut Device)) {
        let name = IfName::new(name).unwrap();
        let mut core = self.core.lock().unwrap();
        let mut device = core.known().devices[&name].clone();
        change(&mut device);
        core.saw_device(name, device);
        drop(core);
        self.news.send_replace(());
    }

    /// Changes the device in a container, and what leads over it.
    pub(crate) fn change_pod(&self, container: &str, change: impl FnOnce(&mut PodDevice)) {
        change(self.pods.lock().unwrap().get_mut(&pod_key(container)).unwrap());
    }

    /// The device in a container.
    pub(crate) fn pod(&self, container: &str) -> PodDevice {
        self.pods.lock().unwrap()[&pod_key(container)].clone()
    }

    /// Makes both ends of an endpoint's pair.
    async fn make(&self, name: &IfName, link: &Link, pod: &PodSide) {
        {
            let mut at_work = self.at_work.lock().unwrap();
            assert!(!at_work.now.contains(name), "{name} is made twice at the same time");
            at_work.now.push(name.clone());
            at_work.most = at_work.most.max(at_work.now.len());
        }
        // The host's end is there from the beginning.
        let index = self.index_of(name);
        let making = *self.making.lock().unwrap();
        tokio::time::sleep(making).await;
        let device = Device {
            index: 2,
            peer: Some(index),
            mac: Some(pod.mac),
            mtu: link.mtu,
            up: true,
            kind: Some("veth".into()),
            addresses: pod.addresses.iter().map(|address| address.ip.into()).collect(),
        };
        let found = PodDevice { device, routes: pod_routes(pod).collect() };
        self.pods.lock().unwrap().insert((pod.netns.clone(), pod.name.clone()), found);
        self.at_work.lock().unwrap().now.retain(|other| other != name);
    }

    /// The index of a device, which is made if there is none.
    fn index_of(&self, name: &IfName) -> u32 {
        let mut core = self.core.lock().unwrap();
        if let Some(device) = core.known().devices.get(name) {
            return device.index;
        }
        let index = 10 + core.known().devices.values().map(|device| device.index).max().unwrap_or_default();
        let peer = name.is_endpoint().then_some(2);
        core.saw_device(name.clone(), Device { index, peer, mtu: 1500, up: true, ..Device::default() });
        if name.is_endpoint() {
            let bare = Link { kind: LinkKind::Endpoint(None), mtu: 1500, up: false, arp: true };
            core.applied(&Op::SetLink(name.clone(), bare));
        }
        index
    }

    pub(crate) fn observed(&self) -> Observed {
        self.core.lock().unwrap().known().clone()
    }

    /// The ops since the last call.
    pub(crate) fn take_log(&self) -> Vec<Op> {
        std::mem::take(&mut self.log.lock().unwrap())
    }

    /// Changes something behind the agent's back.
    pub(crate) fn tamper(&self, op: &Op) {
        self.core.lock().unwrap().applied(op);
    }
}

impl Machine for Arc<ModelKernel> {
    type Port = ModelKernel;

    fn boot() -> Self {
        Self::new(ModelKernel::new(&NODE_ADDRESSES))
    }

    fn reboot(&self) -> Self {
        Self::boot()
    }

    fn port(&self, _env: &SharedEnv) -> Arc<Self::Port> {
        Self::clone(self)
    }

    fn take_log(&self) -> Vec<Op> {
        ModelKernel::take_log(self)
    }

    fn left(&self) -> Vec<String> {
        let state = self.observed().state;
        let links = state.links.keys().filter(|name| name.is_endpoint()).map(|name| format!("link {name}"));
        let hooks = state.hooks.keys().filter(|hook| hook.link().is_none_or(|name| name.is_endpoint()));
        let hooks = hooks.map(|hook| format!("hook {hook}"));
        let rows = &state.maps[&MapId::Endpoints];
        // Router, health and node have two addresses each.
        let rows = (rows.len() != 6).then(|| format!("{} rows of endpoints", rows.len()));
        links.chain(hooks).chain(rows).collect()
    }
}

#[async_trait]
impl Kernel for ModelKernel {
    async fn read(&self) -> Result<Observed, ReadError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        Ok(self.observed())
    }

    async fn read_without_ipcache(&self) -> Result<Observed, ReadError> {
        let mut observed = self.observed();
        observed.state.maps.remove(&MapId::Ipcache);
        Ok(observed)
    }

    async fn device(&self, name: &IfName) -> Result<Option<Device>, ReadError> {
        Ok(self.core.lock().unwrap().known().devices.get(name).cloned())
    }

    async fn pod_device(&self, netns: &Path, name: &IfName) -> Result<Option<PodDevice>, ReadError> {
        Ok(self.pods.lock().unwrap().get(&(netns.to_owned(), name.clone())).cloned())
    }

    async fn apply(&self, op: &Op) -> Outcome<(), OpError> {
        self.log.lock().unwrap().push(op.clone());
        match op {
            Op::SetLink(name, link) => match &link.kind {
                LinkKind::Endpoint(Some(pod)) => self.make(name, link, pod).await,
                _ => drop(self.index_of(name)),
            },
            Op::DeleteLinks(names) => {
                let gone: Vec<_> = names.iter().map(|name| Some(self.index_of(name))).collect();
                self.pods.lock().unwrap().retain(|_, pod| !gone.contains(&pod.device.peer));
            }
            Op::AddAddress(address) if !self.observed().devices.contains_key(&address.link) => {
                return Outcome::Refused(OpError::NoLink { op: op.to_string(), link: address.link.clone() });
            }
            Op::LoadPrograms { .. } => {
                if let Some(words) = *self.verifier.lock().unwrap() {
                    let (op, message) = (op.to_string(), words.to_owned());
                    return Outcome::Refused(OpError::ProgramRefused { op, program: "cil_from_container", message });
                }
            }
            _ => {}
        }
        let mut core = self.core.lock().unwrap();
        core.applied(op);
        if let Op::AddAddress(address) = op {
            let mut device = core.known().devices[&address.link].clone();
            device.addresses.push(address.net);
            core.saw_device(address.link.clone(), device);
        }
        Outcome::Done(())
    }

    async fn collect_flows(&self) -> Result<Vec<MapUse>, ReadError> {
        Ok(Vec::new())
    }

    fn events(&self) -> BoxStream<'static, KernelEvent> {
        let mut news = self.news.subscribe();
        news.mark_unchanged();
        stream::unfold(news, |mut news| async move {
            news.changed().await.ok()?;
            Some((KernelEvent::Link, news))
        })
        .boxed()
    }
}

fn pod_key(container: &str) -> (PathBuf, IfName) {
    (format!("/run/netns/{container}").into(), IfName::new("eth0").unwrap())
}
