//! A client without logic that makes the operator's writes: the ceiling.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::{Context as _, bail, ensure};
use basal_crds::{
    address::{AddressType, NodeAddress},
    kvstore::NodeRecord,
    resources::LedgerStore,
};
use basal_ipam::{
    allocator::Allocator,
    cell::Version,
    config::{FamilySettings, PoolConfig, PoolSettings},
    ledger::{CellSwap, FenceAnswer, Guard, LedgerState, SwapAnswer},
    names::{NodeName, NodeUid, TermId},
    prefix::PodCidr,
};
use basal_objects::{
    ledger::activate,
    object::{Object, ObjectKey, resources},
    port::MergePatch,
};
use basal_operator::{ports::Ports, store::RecordChange};
use futures::{StreamExt as _, TryStreamExt as _, channel::mpsc};
use serde_json::{Map, Value, json};
use tokio::{
    runtime::Runtime,
    sync::{Mutex, OnceCell},
};

use super::{
    basal::check,
    meter::{Cost, Meter},
    nodes::{Made, addresses, labels, make, name, wait_served},
    servers::{Clients, Servers, Store, done, limit, within},
};

/// Nodes whose claims go into one batch of the ledger, and nodes that are written at the same time: as in the operator.
/// A batch fills whole cells, so none is written twice.
const BATCH: u32 = 256;
const WRITES_AT_ONCE: usize = 32;

/// Everything that is written, made before the clock runs.
struct Script {
    term: TermId,
    /// What is written to the ledger for each batch of nodes, swap by swap.
    claims: Vec<Vec<Vec<CellSwap>>>,
    /// Each is written when its first node was made; the guard of its nodes' records comes out of it.
    written: Vec<OnceCell<Guard>>,
    /// One batch at a time, as in the operator.
    turn: Mutex<()>,
    /// What each node is given.
    nodes: Vec<Given>,
}

struct Given {
    name: NodeName,
    blocks: Vec<PodCidr>,
    record: String,
}

/// Writes as much for so many nodes as the operator does, and measures it.
pub(crate) fn run(runtime: &Runtime, store: Store, nodes: u32) -> anyhow::Result<Cost> {
    let servers = Servers::start(Some(store))?;
    let clients = runtime.block_on(servers.clients())?;
    let script = script(&clients.ports, nodes)?;
    within(runtime, "preparing the servers", Duration::from_secs(120), prepare(&clients.ports, store, &script.term))?;
    let meter = Meter::start(&servers, None)?;
    within(runtime, "the ceiling", limit(nodes), play(&clients, store, &script))?;
    let cost = meter.stop()?;
    within(runtime, "looking at the CiliumNodes", Duration::from_secs(60), check(&clients, nodes))?;
    Ok(cost)
}

async fn prepare(ports: &Ports, store: Store, term: &TermId) -> anyhow::Result<()> {
    let kind = match store {
        Store::Etcd => LedgerStore::Etcd,
        Store::CustomResources => LedgerStore::CustomResources,
    };
    activate(ports.objects.as_ref(), ports.cluster.name().as_str(), kind).await?;
    let seen = ports.ledger.begin().await?;
    let taken = ports.ledger.take_fence(&seen, term).await;
    ensure!(taken == FenceAnswer::Taken, "the ceiling's fence is not taken: {taken:?}");
    // It remembers the version of what it read.
    ports.ledger.load().await.map(drop).map_err(Into::into)
}

async fn play(clients: &Clients, store: Store, script: &Script) -> anyhow::Result<()> {
    let nodes = u32::try_from(script.nodes.len())?;
    let objects = Arc::clone(&clients.ports.objects);
    let served = wait_served(clients, 0..nodes).await?;
    let (made, inbox) = mpsc::unbounded();
    // By a channel: nodes go on being made while the writes for earlier ones use up what may run at once.
    let make = async move {
        make(objects.as_ref(), 0..nodes, Made::Both)
            .try_for_each(async |node| made.unbounded_send(node).context("nobody serves the nodes any more"))
            .await?;
        // The inbox ends.
        drop(made);
        Ok(())
    };
    let serve = inbox
        .map(Ok)
        .try_for_each_concurrent(WRITES_AT_ONCE, |(number, object)| serve(clients, store, script, number, object));
    futures::try_join!(make, serve, served).map(drop)
}

async fn serve(
    clients: &Clients,
    store: Store,
    script: &Script,
    number: u32,
    object: Option<Object>,
) -> anyhow::Result<()> {
    let (ports, batch) = (&clients.ports, usize::try_from(number / BATCH)?);
    let guard = script.written[batch].get_or_try_init(|| claim(ports, script, batch)).await?;
    let given = &script.nodes[usize::try_from(number)?];
    let object = object.context("somebody else made the CiliumNode")?;
    let texts: Vec<String> = given.blocks.iter().map(ToString::to_string).collect();
    let object = patch(ports, &object, None, json!({ "spec": { "ipam": { "podCIDRs": texts } } })).await?;
    match store {
        Store::Etcd => {
            let change = RecordChange::Publish(given.record.clone());
            ports.store.write(&given.name, guard, change).await.map(drop).map_err(Into::into)
        }
        Store::CustomResources => {
            let entries: Map<String, Value> =
                texts.into_iter().map(|block| (block, json!({ "status": "in-use" }))).collect();
            let body = json!({ "status": { "ipam": { "pod-cidrs": entries } } });
            patch(ports, &object, Some("status"), body).await.map(drop)
        }
    }
}

async fn patch(
    ports: &Ports,
    object: &Object,
    subresource: Option<&'static str>,
    body: Value,
) -> anyhow::Result<Object> {
    let (uid, resource_version) = (object.uid().to_owned(), object.resource_version().to_owned());
    let patch = MergePatch { resource_version, uid, subresource, body };
    done(ports.objects.patch(resources::CILIUM_NODE, &ObjectKey::cluster(object.name()), patch).await)
}

async fn claim(ports: &Ports, script: &Script, batch: usize) -> anyhow::Result<Guard> {
    let _turn = script.turn.lock().await;
    let mut guard = Guard { term: script.term.clone(), cells: BTreeMap::new() };
    for swaps in &script.claims[batch] {
        let version = |swap: &CellSwap| guard.cells.get(&swap.new.id()).copied().unwrap_or(Version::ABSENT);
        let swaps: Vec<CellSwap> =
            swaps.iter().map(|swap| CellSwap { expected: version(swap), new: swap.new.clone() }).collect();
        match ports.ledger.swap(&script.term, &swaps).await {
            SwapAnswer::Done(cells) => guard.cells.extend(cells),
            answer => bail!("the ceiling's claims are refused: {answer:?}"),
        }
    }
    Ok(guard)
}

/// Lets the allocator decide beforehand, in the batches that the operator would make at best.
fn script(ports: &Ports, nodes: u32) -> anyhow::Result<Script> {
    let family = |cidr: &str, mask_size| FamilySettings { enabled: true, cidrs: vec![cidr.into()], mask_size };
    let pool = PoolSettings { ipv4: family("10.0.0.0/8", 24), ipv6: family("fd00::/104", 120) };
    let term = TermId::from_random(1, 1);
    let mut ledger = LedgerState::default();
    let _taken = ledger.take_fence(&ledger.fence.clone(), &term);
    let rest = Duration::from_secs(300);
    let mut allocator = Allocator::start(term.clone(), PoolConfig::new(&pool)?, rest, &ledger.load(), Duration::ZERO);
    let limits = ports.ledger.limits();
    let mut script =
        Script { term, claims: Vec::new(), written: Vec::new(), turn: Mutex::default(), nodes: Vec::new() };
    for first in (0..nodes).step_by(usize::try_from(BATCH)?) {
        let numbers = first..nodes.min(first + BATCH);
        for number in numbers.clone() {
            let uid = NodeUid::new(&format!("00000000-0000-4000-8000-{number:012x}"))?;
            allocator.grant(&NodeName::new(&name(number))?, &uid, Duration::ZERO)?;
        }
        let mut claims = Vec::new();
        while let Some(batch) = allocator.next_batch(limits) {
            let answer = ledger.commit(&script.term, &batch.swaps, limits);
            allocator.settle(batch.id, &answer, Duration::ZERO);
            claims.push(batch.swaps);
        }
        script.claims.push(claims);
        script.written.push(OnceCell::new());
        for number in numbers {
            script.nodes.push(given(ports, &allocator, number)?);
        }
    }
    Ok(script)
}

fn given(ports: &Ports, allocator: &Allocator, number: u32) -> anyhow::Result<Given> {
    let node = NodeName::new(&name(number))?;
    let blocks = allocator.confirmed(&node);
    ensure!(blocks.len() == 2, "{node} has {} blocks", blocks.len());
    let mut record = NodeRecord::new(node.clone(), ports.cluster.name().clone(), ports.cluster.id());
    let address = |text: String| anyhow::Ok(NodeAddress { kind: AddressType::InternalIp, ip: text.parse()? });
    record.addresses = addresses(number).into_iter().map(address).collect::<anyhow::Result<_>>()?;
    record.labels = labels(number).into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    for block in &blocks {
        match block.to_string().parse()? {
            ipnet::IpNet::V4(net) => record.ipv4_cidrs.push(net),
            ipnet::IpNet::V6(net) => record.ipv6_cidrs.push(net),
        }
    }
    Ok(Given { name: node, blocks, record: record.to_json() })
}
