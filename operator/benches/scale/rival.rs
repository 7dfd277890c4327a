//! kube-controller-manager's own node IPAM, which gives podCIDRs to Nodes.

use std::{collections::BTreeSet, process::Command, time::Duration};

use anyhow::Context as _;
use basal_e2e::{parts, process::Process};
use basal_objects::{
    object::{Object, resources},
    port::{ObjectEvent, Objects, Scope},
};
use futures::{StreamExt as _, TryStreamExt as _};
use tokio::runtime::Runtime;

use super::{
    meter::{Cost, Meter},
    servers::{Servers, create_nodes, limit, within},
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
    pub(crate) served: usize,
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
    let servers = Servers::start()?;
    let clients = runtime.block_on(servers.clients())?;
    let manager = start(&servers, rate)?;
    let objects = clients.objects.as_ref();
    let mut served = BTreeSet::new();
    within(runtime, "the manager's start", limit(0), serve(objects, 0..1, &mut served))?;
    served.clear();
    let meter = Meter::start(&servers, Some(manager.pid()))?;
    match rate {
        Rate::Raised => {
            within(runtime, "the manager's grants", limit(nodes), serve(objects, 1..nodes + 1, &mut served))?;
        }
        Rate::Default => {
            let all = serve(objects, 1..nodes + 1, &mut served);
            match runtime.block_on(async { tokio::time::timeout(BOUND, all).await }) {
                Ok(all) => all?,
                Err(_bounded) => {}
            }
        }
    }
    let mut cost = meter.stop()?;
    if served.len() < usize::try_from(nodes)? {
        let (part, all) = (u32::try_from(served.len())?, nodes);
        cost.wall *= f64::from(all) / f64::from(part.max(1));
    }
    manager.stop(Duration::from_secs(20))?;
    Ok(Found { cost, served: served.len() })
}

/// Makes Nodes and waits until each has its blocks.
async fn serve(
    objects: &dyn Objects,
    numbers: std::ops::Range<u32>,
    served: &mut BTreeSet<String>,
) -> anyhow::Result<()> {
    let enough = numbers.len();
    let (first, mut events) = (super::servers::name(0), objects.watch(resources::NODE, &Scope::default()));
    let alone = enough == 1;
    let made = create_nodes(objects, numbers).try_for_each(async |_| Ok(()));
    let seen = async {
        while served.len() < enough {
            let event = events.next().await.context("the watch of the Nodes ended")?;
            if let Ok(ObjectEvent::Listed(node) | ObjectEvent::Applied(node)) = event
                && has_blocks(&node)
                && (alone || node.name() != first)
            {
                served.insert(node.name().to_owned());
            }
        }
        Ok(())
    };
    futures::try_join!(made, seen).map(drop)
}

fn has_blocks(node: &Object) -> bool {
    node.0.pointer("/spec/podCIDRs").is_some_and(serde_json::Value::is_array)
}
