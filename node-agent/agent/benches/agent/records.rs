//! How long a record takes from etcd into the BPF maps of all nodes, while many change.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{
        Mutex,
        mpsc::{Receiver, channel},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail};
use aya::maps::{LpmTrie, Map, MapData, lpm_trie::Key};
use basal_crds::{
    identity::IdentityId,
    kvstore::{
        IpTarget,
        keys::{self, IPS_PREFIX},
    },
};
use basal_e2e::{bench::Row, say::say, wait::Stopwatch};
use basal_kvstore::kv::{Keys, Op, Range, Txn};
use basal_maps::ipcache::{IpcacheKey, RemoteEndpointInfo};
use basal_runtime::sync::lock;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use tokio::time::{MissedTickBehavior, interval};
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::{
    cluster::{Cluster, Store, done},
    figures::Samples,
    load,
    node::Node,
};

/// Changes in all: 20 s of them.
const CHANGES: u16 = 10_000;
/// The time between two.
const PACE: Duration = Duration::from_millis(2);
/// Writes that may be under way at the same time.
const AT_ONCE: usize = 64;
/// The pause between two looks at the maps.
const LOOK: Duration = Duration::from_micros(200);
/// How long a change may take to arrive.
const PATIENCE: Duration = Duration::from_secs(30);
/// Identities of changed and new records begin here.
const NEW_IDENTITY: u32 = 20_000;

/// One change, and what the maps say after it.
#[derive(Debug, Clone)]
struct Change {
    node: u16,
    ip: IpAddr,
    /// The identity that the address has afterwards; `None`: the record is deleted.
    after: Option<IdentityId>,
    /// The identity before.
    before: Option<IdentityId>,
}

/// Each is of an address of its own, so that each is to be seen: every third is a new one, every third gets another
/// identity, every third is deleted. The addresses that are there lie in the first ten pods of a node.
fn changes() -> impl Iterator<Item = Change> {
    (0..CHANGES).map(|number| {
        let (round, turn) = (number / 3, number % 3);
        let (node, pod) = (round % load::NODES, (round / load::NODES).to_be_bytes()[1]);
        let of = |pod: u8| (load::pod_ips(node, pod)[usize::from(round % 2)], Some(load::identity(node, pod)));
        let new = Some(IdentityId::new(NEW_IDENTITY + u32::from(number)));
        let (ip, before, after) = match turn {
            0 => (of(100 + pod).0, None, new),
            1 => (of(1 + pod).0, of(1 + pod).1, new),
            _ => (of(6 + pod).0, of(6 + pod).1, None),
        };
        Change { node, ip, after, before }
    })
}

/// The addresses' rows of a node's map.
type Ipcache = LpmTrie<MapData, [u8; 20], [u8; 24]>;

/// A change that is on its way.
struct UnderWay {
    change: Change,
    begin: Stopwatch,
    /// Nodes that do not have it yet, by index.
    missing: Vec<usize>,
}

/// Measures two nodes with these numbers, both with etcd, in a cluster with the load.
pub(crate) fn run(cluster: &Cluster, numbers: [u8; 2]) -> anyhow::Result<Vec<Row>> {
    let [first, second] = numbers;
    let mut nodes = [Node::join(cluster, first, Store::Etcd)?, Node::join(cluster, second, Store::Etcd)?];
    for node in &mut nodes {
        node.start()?;
        load::wait_seen(node)?;
    }
    let maps: Vec<Ipcache> = nodes.iter().map(open).collect::<anyhow::Result<_>>()?;
    let busy = |node: &Node<'_>| anyhow::Ok(node.usage()?.cpu_seconds);
    let before = [busy(&nodes[0])?, busy(&nodes[1])?];
    let found = measure(cluster, &maps)?;
    let cpu = (busy(&nodes[0])? - before[0]).max(busy(&nodes[1])? - before[1]);
    say(format!("  {CHANGES} changes in {:.1} s", found.seconds));
    let method = "10,000 changes of ip records in etcd, one every 2 ms: new, another identity, deleted in turn, each of an \
                  address of its own, with 1,000 nodes and 30,000 addresses there; from before the write until the row is \
                  in the pinned maps of both agents, looked up every 0.2 ms; the watcher: a client in the bench's process \
                  that sees the event of the same write";
    let mut rows = Vec::new();
    for (name, percent) in [("p50", 50.0), ("p99", 99.0), ("longest", 100.0)] {
        let row =
            Row::new(format!("record to the rows of two nodes, {name}"), found.maps.percentile(percent), "ms", method);
        rows.push(row.against("bare etcd watch", found.events.percentile(percent)));
    }
    let method = "user and system time of /proc/PID/stat over the same time, of the agent that took more";
    rows.push(Row::new("CPU at 500 records/s", 100.0 * cpu / found.seconds, "% of a core", method));
    Ok(rows)
}

/// What was found.
struct Found {
    /// Until all maps have it.
    maps: Samples,
    /// Until the bare watch has it.
    events: Samples,
    /// How long the changes took.
    seconds: f64,
}

fn measure(cluster: &Cluster, maps: &[Ipcache]) -> anyhow::Result<Found> {
    let begins: Mutex<BTreeMap<String, Stopwatch>> = Mutex::default();
    let (sender, inbox) = channel();
    thread::scope(|scope| {
        let follower = scope.spawn(|| follow(maps, inbox));
        let written = cluster.wait("changing records", async {
            let range = Range { keys_only: true, limit: 1, ..Range::prefix(IPS_PREFIX) };
            let from = cluster.kv.range(range).await?.header.revision + 1;
            let watch = Stopwatch::start();
            let write = async {
                // It goes with the last write: then the follower ends when it has seen all.
                let sender = sender;
                let mut pace = interval(PACE);
                pace.set_missed_tick_behavior(MissedTickBehavior::Burst);
                stream::unfold((changes(), pace), async |(mut changes, mut pace)| {
                    let change = changes.next()?;
                    pace.tick().await;
                    Some((change, (changes, pace)))
                })
                .map(|change| {
                    let key = keys::ip(IpTarget::Host(change.ip));
                    let begin = Stopwatch::start();
                    lock(&begins).insert(key.clone(), begin);
                    let sent =
                        sender.send(UnderWay { change: change.clone(), begin, missing: (0..maps.len()).collect() });
                    async move {
                        sent.map_err(|_closed| anyhow!("nobody follows the maps any more"))?;
                        let op = match change.after {
                            Some(identity) => {
                                Op::Put { key, value: load::record(change.node, change.ip, identity), lease: 0 }
                            }
                            None => Op::Delete(Keys::One(key)),
                        };
                        done(cluster.kv.txn(Txn { then: vec![op], ..Txn::default() }).await).map(drop)
                    }
                })
                .buffer_unordered(AT_ONCE)
                .try_collect::<()>()
                .await?;
                anyhow::Ok(watch.elapsed().as_secs_f64())
            };
            futures::try_join!(write, see_events(cluster, from, &begins))
        });
        let maps = follower.join().map_err(|_panic| anyhow!("the thread that follows the maps panicked"))?;
        let (seconds, events) = written?;
        Ok(Found { maps: maps?, events, seconds })
    })
}

/// The baseline: a watch that does nothing with what it is told.
async fn see_events(
    cluster: &Cluster,
    from: i64,
    begins: &Mutex<BTreeMap<String, Stopwatch>>,
) -> anyhow::Result<Samples> {
    let mut batches = cluster.kv.watch(IPS_PREFIX, from);
    let mut samples = Samples::default();
    let mut left = CHANGES;
    while left > 0 {
        for event in batches.next().await.context("the watch of the records ended")??.events {
            // Agents announce addresses of their own.
            if let Some(begin) = lock(begins).remove(event.key()) {
                samples.add(begin.elapsed());
                left -= 1;
            }
        }
    }
    Ok(samples)
}

/// Looks at the maps until every change that was sent is in all of them.
fn follow(maps: &[Ipcache], inbox: Receiver<UnderWay>) -> anyhow::Result<Samples> {
    let mut samples = Samples::default();
    let mut under_way: Vec<UnderWay> = Vec::new();
    let mut is_open = true;
    while is_open || !under_way.is_empty() {
        loop {
            match inbox.try_recv() {
                Ok(change) => under_way.push(change),
                Err(std::sync::mpsc::TryRecvError::Empty) => break,
                Err(std::sync::mpsc::TryRecvError::Disconnected) => {
                    is_open = false;
                    break;
                }
            }
        }
        for one in &mut under_way {
            let mut missing = Vec::new();
            for node in one.missing.drain(..) {
                if !has(&maps[node], &one.change)? {
                    missing.push(node);
                }
            }
            one.missing = missing;
            if one.missing.is_empty() {
                samples.add(one.begin.elapsed());
            } else if one.begin.elapsed() > PATIENCE {
                bail!("not in the maps after {} s: {:?}", PATIENCE.as_secs(), one.change);
            }
        }
        under_way.retain(|one| !one.missing.is_empty());
        thread::sleep(LOOK);
    }
    Ok(samples)
}

fn open(node: &Node<'_>) -> anyhow::Result<Ipcache> {
    let path = node.maps().join(basal_maps::spec::IPCACHE.name);
    let data = MapData::from_pin(&path).with_context(|| format!("opening {}", path.display()))?;
    Ok(LpmTrie::try_from(Map::LpmTrie(data))?)
}

/// Whether a map shows that a change has arrived. Where an address has no row, the longest match is that of its node's
/// block, which has an identity that no pod has.
fn has(map: &Ipcache, change: &Change) -> anyhow::Result<bool> {
    let bits = if change.ip.is_ipv4() { 32 } else { 128 };
    let key = IpcacheKey::new(change.ip, bits);
    let bytes: [u8; 20] = key.prefix.as_bytes().try_into().context("the layout of the ipcache's key")?;
    let found = match map.get(&Key::new(key.prefixlen, bytes), 0) {
        Ok(value) => {
            let info = RemoteEndpointInfo::read_from_bytes(&value).map_err(|_size| anyhow!("the layout of a row"))?;
            Some(IdentityId::new(info.sec_identity))
        }
        Err(aya::maps::MapError::KeyNotFound) => None,
        Err(error) => return Err(error).context("looking up an address"),
    };
    Ok(match change.after {
        Some(identity) => found == Some(identity),
        None => found != change.before,
    })
}
