//! The operator itself, as a process.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use basal_e2e::{
    process::{self, Process},
    servers::free_port,
    wait::Stopwatch,
};
use basal_objects::{
    object::resources,
    port::{Freshness, Scope},
};
use tokio::runtime::Runtime;

use super::{
    meter::{Cost, Counts, Meter},
    nodes::make_and_wait,
    servers::{Clients, Servers, Store, limit, within},
};

/// A node beside those that are measured: it shows that the operator leads.
const WARM_UP: u32 = 0;

/// How long an operator may take to end, and to serve one node.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a quiet cluster is watched: exactly one full pass of the operator falls into it.
const QUIET: Duration = Duration::from_secs(300);

/// How long the servers are watched without an operator.
const ALONE: Duration = Duration::from_secs(30);

/// How long status and events are still written after the last grant.
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
    /// A restart.
    pub(crate) restart: Option<Restart>,
    /// Requests a minute of a quiet operator, to the API server and to etcd.
    pub(crate) idle: Option<[f64; 2]>,
}

/// What a restart took.
pub(crate) struct Restart {
    /// Seconds from the start of a fresh operator until it has served a new node.
    pub(crate) seconds: f64,
    /// The peak of its resident memory by then, in MB (10⁶ bytes).
    pub(crate) rss: f64,
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
    let port = || anyhow::Ok(format!("127.0.0.1:{}", free_port(IpAddr::V4(Ipv4Addr::LOCALHOST))?));
    command
        .args(POOL)
        .arg(format!("--k8s-kubeconfig-path={}", servers.kubeconfig()?.display()))
        .arg(format!("--operator-api-serve-addr={}", port()?))
        .arg(format!("--operator-prometheus-serve-addr={}", port()?));
    if let Some(config) = servers.etcd_config()? {
        command.arg("--kvstore=etcd").arg(format!("--kvstore-opt=etcd.config={}", config.display()));
    }
    Process::start("basal-operator", command, &servers.api.dir().join("basal-operator.log"))
}

/// Serves so many nodes and measures it.
pub(crate) fn run(runtime: &Runtime, store: Store, nodes: u32, after: After) -> anyhow::Result<Found> {
    let servers = Servers::start(Some(store))?;
    let clients = runtime.block_on(servers.clients())?;
    let operator = start(&servers)?;
    let said = || process::tail(operator.log());
    serve_one(runtime, &clients, WARM_UP).with_context(said)?;
    let meter = Meter::start(&servers, Some(operator.pid()))?;
    within(runtime, "serving all nodes", limit(nodes), make_and_wait(&clients, 1..nodes + 1)).with_context(said)?;
    let cost = meter.stop()?;
    within(runtime, "looking at the CiliumNodes", PATIENCE, check(&clients, nodes + 1))?;
    let idle = after.idle.then(|| quiet(&servers)).transpose()?;
    operator.stop(PATIENCE)?;
    let idle = match idle {
        Some(busy) => {
            let alone = requests_a_minute(&servers, ALONE)?;
            Some([busy[0] - alone[0], busy[1] - alone[1]])
        }
        None => None,
    };
    let restart = after.restart.then(|| restart(runtime, &servers, &clients, nodes + 1)).transpose()?;
    Ok(Found { cost, restart, idle })
}

fn restart(runtime: &Runtime, servers: &Servers, clients: &Clients, number: u32) -> anyhow::Result<Restart> {
    let watch = Stopwatch::start();
    let operator = start(servers)?;
    serve_one(runtime, clients, number).with_context(|| process::tail(operator.log()))?;
    let seconds = watch.elapsed().as_secs_f64();
    let rss = process::usage(operator.pid())?.peak_megabytes();
    operator.stop(PATIENCE)?;
    Ok(Restart { seconds, rss })
}

fn serve_one(runtime: &Runtime, clients: &Clients, number: u32) -> anyhow::Result<()> {
    within(runtime, "serving one node", PATIENCE, make_and_wait(clients, number..number + 1))
}

/// Every CiliumNode has a block of each family, and none twice.
pub(crate) async fn check(clients: &Clients, nodes: u32) -> anyhow::Result<()> {
    let list = clients.ports.objects.list(resources::CILIUM_NODE, &Scope::default(), Freshness::Quorum).await?;
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
    Ok([counts.requests() / minutes, (counts.etcd_writes() + counts.etcd_reads()) / minutes])
}
