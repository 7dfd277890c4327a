//! kube-controller-manager's own node IPAM, which gives podCIDRs to Nodes.

use std::{process::Command, sync::atomic::AtomicUsize, time::Duration};

use anyhow::Context as _;
use basal_e2e::{
    parts,
    process::{self, Process},
};
use basal_objects::{
    object::{Object, resources},
    port::Objects,
};
use futures::TryStreamExt as _;
use tokio::runtime::Runtime;

use super::{
    meter::{Cost, Meter},
    nodes::{Made, make, name, until},
    servers::{Servers, limit, within},
};

/// How long the manager is watched at its default rate.
const BOUND: Duration = Duration::from_secs(60);

/// How fast the manager may send requests.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Rate {
    /// 20 requests a second, 30 at once: `--kube-api-qps` and `--kube-api-burst` as they are.
    Default,
    /// Far more than the API server takes.
    Raised,
}

/// What was found.
pub(crate) struct Found {
    /// The cost; `wall` is extrapolated where `served` is below the number of nodes.
    pub(crate) cost: Cost,
    /// Nodes that got their blocks within the time.
    pub(crate) served: u32,
}

fn start(servers: &Servers, rate: Rate) -> anyhow::Result<Process> {
    let mut command = Command::new(parts::binary("kube-controller-manager")?);
    let kubeconfig = servers.kubeconfig()?;
    command
        .arg(format!("--kubeconfig={}", kubeconfig.display()))
        .args(["--controllers=node-ipam-controller", "--allocate-node-cidrs", "--leader-elect=false"])
        .args(["--cluster-cidr=10.0.0.0/8,fd00::/104", "--service-cluster-ip-range=10.96.0.0/16,fd00:10:96::/112"])
        .args(["--node-cidr-mask-size-ipv4=24", "--node-cidr-mask-size-ipv6=120", "--secure-port=0"]);
    if let Rate::Raised = rate {
        command.args(["--kube-api-qps=5000", "--kube-api-burst=10000"]);
    }
    Process::start("kube-controller-manager", command, &servers.api.dir().join("kube-controller-manager.log"))
}

/// Lets the manager serve so many nodes and measures it.
pub(crate) fn run(runtime: &Runtime, nodes: u32, rate: Rate) -> anyhow::Result<Found> {
    let servers = Servers::start(None)?;
    let clients = runtime.block_on(servers.clients())?;
    let manager = start(&servers, rate)?;
    let said = || process::tail(manager.log());
    let objects = clients.ports.objects.as_ref();
    within(runtime, "the manager's start", limit(0), serve(objects, 0..1, &AtomicUsize::new(0))).with_context(said)?;
    let meter = Meter::start(&servers, Some(manager.pid()))?;
    let served = AtomicUsize::new(0);
    let all = serve(objects, 1..nodes + 1, &served);
    match rate {
        Rate::Raised => within(runtime, "the manager's grants", limit(nodes), all).with_context(said)?,
        Rate::Default => match runtime.block_on(async { tokio::time::timeout(BOUND, all).await }) {
            Ok(all) => all?,
            Err(_bounded) => {}
        },
    }
    let mut cost = meter.stop()?;
    let served = u32::try_from(served.into_inner())?;
    if served < nodes {
        cost.wall *= f64::from(nodes) / f64::from(served.max(1));
    }
    manager.stop(Duration::from_secs(20))?;
    Ok(Found { cost, served })
}

/// Makes Nodes and waits until each has its blocks; `served` counts them on the way.
async fn serve(objects: &dyn Objects, numbers: std::ops::Range<u32>, served: &AtomicUsize) -> anyhow::Result<()> {
    let missing = numbers.clone().map(name).collect();
    let made = make(objects, numbers, Made::Node).try_for_each(async |_| Ok(()));
    futures::try_join!(made, until(objects, resources::NODE, missing, served, has_blocks)).map(drop)
}

fn has_blocks(node: &Object) -> bool {
    node.0.pointer("/spec/podCIDRs").is_some_and(serde_json::Value::is_array)
}
