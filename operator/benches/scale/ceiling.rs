//! A client without logic that makes the operator's writes: the ceiling.

use std::{collections::BTreeMap, pin::pin, time::Duration};

use anyhow::{Context as _, bail, ensure};
use basal_crds::{
    address::{AddressType, NodeAddress},
    kvstore::{NodeRecord, keys},
    names::{ClusterId, ClusterName},
    resources::crds,
};
use basal_ipam::{
    allocator::Allocator,
    config::{FamilySettings, PoolConfig, PoolSettings},
    ledger::{LedgerState, Limits, SwapAnswer},
    names::{NodeName, NodeUid, TermId},
    prefix::PodCidr,
};
use basal_kvstore::{
    kv::{Compare, Is, Kv, Op, Txn},
    ledger::LedgerKeys,
};
use basal_objects::{
    crd_install,
    object::{Object, resources},
};
use basal_runtime::outcome::Outcome;
use futures::{StreamExt as _, TryStreamExt as _, channel::mpsc};
use serde_json::json;
use tokio::{runtime::Runtime, sync::OnceCell};

use super::{
    basal::check,
    meter::{Cost, Meter},
    servers::{Clients, Servers, addresses, create_nodes, done, labels, limit, name, within},
};

/// Nodes whose claims go into one transaction, and nodes that are written at the same time: as in the operator.
const BATCH: u32 = 256;
const WRITES_AT_ONCE: usize = 32;

const CLUSTER: &str = "default";
const LIMITS: Limits = Limits { cells: 127, bytes: 1 << 20 };

/// Everything that is written, made before the clock runs.
struct Script {
    /// One transaction of the ledger for each batch of nodes.
    ledger: Vec<OnceCell<()>>,
    claims: Vec<Vec<Op>>,
    /// What each node is given.
    nodes: Vec<Given>,
    /// The condition of all transactions: the fence, and that the cells exist.
    fence: Compare,
}

struct Given {
    blocks: Vec<PodCidr>,
    guard: Vec<Compare>,
    record: String,
}

/// Writes as much for so many nodes as the operator does, and measures it.
pub(crate) fn run(runtime: &Runtime, nodes: u32) -> anyhow::Result<Cost> {
    let script = script(nodes)?;
    let servers = Servers::start()?;
    let clients = runtime.block_on(servers.clients())?;
    within(runtime, "preparing the servers", Duration::from_secs(120), prepare(&clients, &script))?;
    let meter = Meter::start(&servers, None)?;
    within(runtime, "the ceiling", limit(nodes), play(&clients, &script, nodes))?;
    let cost = meter.stop()?;
    within(runtime, "looking at the CiliumNodes", Duration::from_secs(60), check(&clients, nodes))?;
    Ok(cost)
}

async fn prepare(clients: &Clients, script: &Script) -> anyhow::Result<()> {
    let definitions: Vec<Object> = crds().into_iter().map(|definition| Object(definition.object)).collect();
    crd_install::install(clients.objects.as_ref(), clients.env.as_ref(), &definitions, Duration::from_secs(60)).await?;
    let Is::Value(value) = script.fence.is.clone() else { return Ok(()) };
    write(clients.kv.as_ref(), Vec::new(), vec![Op::Put { key: script.fence.key.clone(), value, lease: 0 }]).await
}

async fn play(clients: &Clients, script: &Script, nodes: u32) -> anyhow::Result<()> {
    let (made, inbox) = mpsc::unbounded();
    // By a channel: Nodes go on being made while the writes for earlier ones use up what may run at once.
    let make = async move {
        let mut created = pin!(create_nodes(clients.objects.as_ref(), 0..nodes));
        while let Some(node) = created.try_next().await? {
            made.unbounded_send(node).context("nobody serves the Nodes any more")?;
        }
        Ok(())
    };
    let serve =
        inbox.map(Ok).try_for_each_concurrent(WRITES_AT_ONCE, |(number, node)| serve(clients, script, number, node));
    futures::try_join!(make, serve).map(drop)
}

async fn serve(clients: &Clients, script: &Script, number: u32, node: Object) -> anyhow::Result<()> {
    let batch = usize::try_from(number / BATCH)?;
    let claim = || write(clients.kv.as_ref(), vec![script.fence.clone()], script.claims[batch].clone());
    script.ledger[batch].get_or_try_init(claim).await?;
    let given = &script.nodes[usize::try_from(number)?];
    let [v4, v6] = addresses(number);
    let labels: BTreeMap<_, _> = labels(number).into();
    let object = json!({
        "apiVersion": "cilium.io/v2", "kind": "CiliumNode",
        "metadata": { "name": name(number), "labels": labels, "ownerReferences": [
            { "apiVersion": "v1", "kind": "Node", "name": name(number), "uid": node.uid() },
        ] },
        "spec": {
            "addresses": [{ "type": "InternalIP", "ip": v4 }, { "type": "InternalIP", "ip": v6 }],
            "ipam": { "podCIDRs": given.blocks.iter().map(ToString::to_string).collect::<Vec<_>>() },
        },
    });
    done(clients.objects.create(resources::CILIUM_NODE, Object(object)).await)?;
    let key = format!("{}{}", keys::nodes_of(&ClusterName::new(CLUSTER)?), name(number));
    let put = Op::Put { key, value: given.record.clone().into_bytes(), lease: 0 };
    write(clients.kv.as_ref(), given.guard.clone(), vec![put]).await
}

async fn write(kv: &dyn Kv, when: Vec<Compare>, then: Vec<Op>) -> anyhow::Result<()> {
    match kv.txn(Txn { when, then, or_else: Vec::new() }).await {
        Outcome::Done(answer) => {
            ensure!(answer.succeeded, "a condition of the ceiling's transaction does not hold");
            Ok(())
        }
        other => bail!("the ceiling's transaction failed: {other:?}"),
    }
}

/// Lets the allocator decide beforehand, in the batches that the operator would make at best.
fn script(nodes: u32) -> anyhow::Result<Script> {
    let family = |cidr: &str, mask_size| FamilySettings { enabled: true, cidrs: vec![cidr.into()], mask_size };
    let pool = PoolSettings { ipv4: family("10.0.0.0/8", 24), ipv6: family("fd00::/104", 120) };
    let (keys, term) = (LedgerKeys::new(CLUSTER), TermId::from_random(1, 1));
    let mut ledger = LedgerState::default();
    let _taken = ledger.take_fence(&ledger.fence.clone(), &term);
    let rest = Duration::from_secs(300);
    let mut allocator = Allocator::start(term.clone(), PoolConfig::new(&pool)?, rest, &ledger.load(), Duration::ZERO);
    let fence = Compare::new(keys.fence(), Is::Value(term.as_str().into()));
    let mut script = Script { ledger: Vec::new(), claims: Vec::new(), nodes: Vec::new(), fence };
    for first in (0..nodes).step_by(usize::try_from(BATCH)?) {
        let numbers = first..nodes.min(first + BATCH);
        for number in numbers.clone() {
            let uid = NodeUid::new(&format!("6b1c0e4e-7f2c-4d39-9c2e-{number:012x}"))?;
            allocator.grant(&NodeName::new(&name(number))?, &uid, Duration::ZERO)?;
        }
        let mut puts = BTreeMap::new();
        while let Some(batch) = allocator.next_batch(LIMITS) {
            for swap in &batch.swaps {
                puts.insert(keys.cell(swap.new.id()), swap.new.to_json()?);
            }
            let answer = ledger.commit(&term, &batch.swaps, LIMITS);
            ensure!(matches!(answer, SwapAnswer::Done(_)), "the ceiling's claims are refused: {answer:?}");
            allocator.settle(batch.id, &answer, Duration::ZERO);
        }
        script.claims.push(puts.into_iter().map(|(key, value)| Op::Put { key, value, lease: 0 }).collect());
        script.ledger.push(OnceCell::new());
        for number in numbers {
            script.nodes.push(given(&allocator, &keys, &script.fence, number)?);
        }
    }
    Ok(script)
}

fn given(allocator: &Allocator, keys: &LedgerKeys, fence: &Compare, number: u32) -> anyhow::Result<Given> {
    let node = NodeName::new(&name(number))?;
    let guard = allocator.guard(&node).context("a node without blocks")?;
    let cells = guard.cells.keys().map(|cell| Compare::new(keys.cell(*cell), Is::Present));
    let blocks = allocator.confirmed(&node);
    let mut record = NodeRecord::new(node.clone(), ClusterName::new(CLUSTER)?, ClusterId::new(0));
    let address = |text: String| anyhow::Ok(NodeAddress { kind: AddressType::InternalIp, ip: text.parse()? });
    record.addresses = addresses(number).into_iter().map(address).collect::<anyhow::Result<_>>()?;
    record.labels = labels(number).into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    for block in &blocks {
        match block.to_string().parse()? {
            ipnet::IpNet::V4(net) => record.ipv4_cidrs.push(net),
            ipnet::IpNet::V6(net) => record.ipv6_cidrs.push(net),
        }
    }
    let guard = std::iter::once(fence.clone()).chain(cells).collect();
    Ok(Given { blocks, guard, record: record.to_json() })
}
