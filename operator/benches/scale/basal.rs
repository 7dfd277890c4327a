//! The operator itself, as a process.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use basal_crds::{kvstore::keys, names::ClusterName};
use basal_e2e::{
    process::{self, Process},
    servers::free_port,
    wait::Stopwatch,
};
use basal_kvstore::kv::{Kv, Range, Revision, WatchEvent};
use basal_objects::{
    object::resources,
    port::{Freshness, Scope},
};
use futures::{StreamExt as _, TryStreamExt as _};
use tokio::runtime::Runtime;

use super::{
    meter::{Cost, Counts, Meter},
    servers::{Clients, Servers, create_nodes, limit, name, within},
};

/// A node beside those that are measured: it shows that the operator leads.
const WARM_UP: u32 = 0;

/// How long an operator may take to end, and to serve one node.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a quiet cluster is watched.
const QUIET: Duration = Duration::from_secs(120);

/// How long events are still written after the last grant.
const SETTLE: Duration = Duration::from_secs(20);

/// Whether a cluster is also looked at when all is done.
#[derive(Debug, Clone, Copy)]
pub(crate) struct After {
    /// Restart the operator.
    pub(crate) restart: bool,
    /// Watch it doing nothing.
    pub(crate) idle: bool,
}

/// What was found.
pub(crate) struct Found {
    /// The cost of serving all nodes.
    pub(crate) cost: Cost,
    /// Seconds from the start of a fresh operator until it has served a new node.
    pub(crate) restart: Option<f64>,
    /// Requests a minute of a quiet operator, to the API server and to etcd.
    pub(crate) idle: Option<[f64; 2]>,
}

/// The pool: 65,536 blocks of each family.
const POOL: [&str; 4] = [
    "--cluster-pool-ipv4-cidr=10.0.0.0/8",
    "--cluster-pool-ipv4-mask-size=24",
    "--cluster-pool-ipv6-cidr=fd00::/104",
    "--cluster-pool-ipv6-mask-size=120",
];

fn start(servers: &Servers) -> anyhow::Result<Process> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_basal-operator"));
    command
        .args(POOL)
        .arg(format!("--k8s-kubeconfig-path={}", servers.kubeconfig()?.display()))
        .arg(format!("--kvstore-opt=etcd.config={}", servers.etcd_config()?.display()))
        .arg(format!("--operator-api-serve-addr=127.0.0.1:{}", free_port(IpAddr::V4(Ipv4Addr::LOCALHOST))?));
    Process::start("basal-operator", command, &servers.api.dir().join("basal-operator.log"))
}

/// Serves so many nodes and measures it.
pub(crate) fn run(runtime: &Runtime, nodes: u32, after: After) -> anyhow::Result<Found> {
    let servers = Servers::start()?;
    let clients = runtime.block_on(servers.clients())?;
    let operator = start(&servers)?;
    let said = || process::tail(operator.log());
    serve_one(runtime, &clients, WARM_UP).with_context(said)?;
    let meter = Meter::start(&servers, Some(operator.pid()))?;
    within(runtime, "serving all nodes", limit(nodes), serve(&clients, 1..nodes + 1)).with_context(said)?;
    let cost = meter.stop()?;
    within(runtime, "looking at the CiliumNodes", PATIENCE, check(&clients, nodes + 1))?;
    let idle = after.idle.then(|| quiet(&servers)).transpose()?;
    operator.stop(PATIENCE)?;
    let idle = match idle {
        Some(busy) => {
            let alone = requests_a_minute(&servers, QUIET / 4)?;
            Some([busy[0] - alone[0], busy[1] - alone[1]])
        }
        None => None,
    };
    let restart = if after.restart {
        let watch = Stopwatch::start();
        let operator = start(&servers)?;
        serve_one(runtime, &clients, nodes + 1)?;
        let took = watch.elapsed().as_secs_f64();
        operator.stop(PATIENCE)?;
        Some(took)
    } else {
        None
    };
    Ok(Found { cost, restart, idle })
}

fn serve_one(runtime: &Runtime, clients: &Clients, number: u32) -> anyhow::Result<()> {
    within(runtime, "serving one node", PATIENCE, serve(clients, number..number + 1))
}

/// Makes Nodes and waits until each has its record, which is written last.
async fn serve(clients: &Clients, numbers: std::ops::Range<u32>) -> anyhow::Result<()> {
    let prefix = keys::nodes_of(&ClusterName::new("default")?);
    let before = clients.kv.range(Range { keys_only: true, ..Range::prefix(&prefix) }).await?;
    let missing = numbers.clone().map(|number| format!("{prefix}{}", name(number))).collect();
    let made = create_nodes(clients.objects.as_ref(), numbers).try_for_each(async |_| Ok(()));
    futures::try_join!(made, wait_written(clients.kv.as_ref(), &prefix, before.header.revision + 1, missing)).map(drop)
}

/// Waits until each key was written.
pub(crate) async fn wait_written(
    kv: &dyn Kv,
    prefix: &str,
    from: Revision,
    mut missing: BTreeSet<String>,
) -> anyhow::Result<()> {
    let mut batches = kv.watch(prefix, from);
    while !missing.is_empty() {
        for event in batches.next().await.context("the watch of the node records ended")??.events {
            if let WatchEvent::Put(kv) = event {
                missing.remove(&kv.key);
            }
        }
    }
    Ok(())
}

/// Every CiliumNode has a block of each family, and none twice.
pub(crate) async fn check(clients: &Clients, nodes: u32) -> anyhow::Result<()> {
    let list = clients.objects.list(resources::CILIUM_NODE, &Scope::default(), Freshness::Quorum).await?;
    let blocks = list.items.iter().filter_map(|object| object.0.pointer("/spec/ipam/podCIDRs")?.as_array());
    let blocks: Vec<&str> = blocks.flatten().filter_map(serde_json::Value::as_str).collect();
    let distinct: BTreeSet<&str> = blocks.iter().copied().collect();
    let expected = 2 * usize::try_from(nodes)?;
    ensure!(blocks.len() == expected, "{expected} blocks were expected in CiliumNodes, {} found", blocks.len());
    ensure!(distinct.len() == expected, "blocks were handed out twice");
    Ok(())
}

fn quiet(servers: &Servers) -> anyhow::Result<[f64; 2]> {
    thread::sleep(SETTLE);
    requests_a_minute(servers, QUIET)
}

/// Requests to the API server and to Basal's etcd.
fn requests_a_minute(servers: &Servers, time: Duration) -> anyhow::Result<[f64; 2]> {
    let before = Counts::read(servers)?;
    thread::sleep(time);
    let counts = Counts::read(servers)?.since(&before);
    let minutes = time.as_secs_f64() / 60.0;
    Ok([counts.requests() / minutes, (counts.etcd("txn") + counts.etcd("range")) / minutes])
}
