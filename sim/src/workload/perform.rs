//! Carries a schedule out.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use basal_ipam::config::PoolConfig;
use basal_objects::object::{Object, ObjectKey, resources};
use basal_runtime::sync::lock;
use serde_json::Value;
use tokio::time::Instant;

use super::{
    ByHand, Leaders, Pool, Replica, Schedule, Step, Store,
    machines::Hands,
    node_name,
    verdict::{Final, Judged},
};
use crate::{
    safety::BlockSafety,
    world::{Trouble, World},
};

/// How long anything may take in virtual time.
pub(super) const LIMIT: Duration = Duration::from_secs(900);

/// How long nobody may write before a cluster counts as done: longer than a quarantine, a pause after a refusal, and the
/// time that a write is waited for in a cache.
const QUIET: Duration = Duration::from_secs(45);

/// How long until an operator at rest has made each of its calls again: it asks every five seconds whether its servers are
/// there.
const ROUND: Duration = Duration::from_secs(6);

/// How long until everything was listed again, however little the watches told: an operator does it every five minutes.
const FULL_PASS: Duration = Duration::from_secs(310);

/// Between two steps, so that something can come of each.
const PACE: Duration = Duration::from_millis(700);

/// How long kube-controller-manager takes to see that an owner is gone.
const GARBAGE: Duration = Duration::from_secs(1);

/// Pods that a node can have: its blocks have room for so many.
const PODS: u8 = 2;

/// Which operator to start.
#[derive(Debug, Clone)]
pub struct Start<'a> {
    /// The name of its process.
    pub name: &'a str,
    /// Where it keeps the claims.
    pub store: Store,
    /// The Lease that it stands for.
    pub lease: &'a str,
    /// Its pool.
    pub pool: &'a PoolConfig,
}

/// The operators that a schedule is carried out over.
#[derive(Debug, Clone, Copy)]
pub struct Operators {
    /// Puts what they need into the servers, before anything starts.
    pub prepare: fn(&World),
    /// Starts one in the world.
    pub start: fn(&World, &Start<'_>),
    /// The name of the cluster.
    pub cluster: &'static str,
    /// How long their blocks rest.
    pub quarantine: Duration,
    /// How long they leave a CiliumNode alone that never had a Node.
    pub node_gc: Duration,
}

/// What came of a schedule.
#[derive(Debug)]
pub struct Ended {
    /// The state at the end.
    pub state: Final,
    /// When the last change came of it, and each call that is made over and over was made once more, since the run began.
    /// What goes wrong later happens to a cluster at rest.
    pub busy_until: Duration,
}

#[derive(Debug, Default)]
struct Machine {
    runs: bool,
    pods: u8,
}

struct Stage<'a> {
    world: &'a World,
    hands: Hands<'a>,
    operators: &'a Operators,
    schedule: &'a Schedule,
    safety: Arc<Mutex<BlockSafety>>,
    pool: Pool,
    machines: BTreeMap<u8, Machine>,
    saved: BTreeMap<u8, Object>,
}

/// Carries a schedule out, up to the moment when nobody writes any more, and then starts fresh operators to see whether
/// they leave all as it is.
///
/// # Errors
/// What went wrong.
pub async fn perform(world: &World, operators: &Operators, schedule: &Schedule) -> Result<Ended, Trouble> {
    let begun = Instant::now();
    (operators.prepare)(world);
    let safety = Arc::new(Mutex::new(BlockSafety::new(operators.cluster, operators.quarantine)));
    watch_over(world, &safety);
    let mut stage = Stage {
        world,
        hands: Hands::new(world),
        operators,
        schedule,
        safety,
        pool: Pool::First,
        machines: BTreeMap::new(),
        saved: BTreeMap::new(),
    };
    for replica in Replica::ALL {
        stage.start(replica.name())?;
    }
    for step in &schedule.steps {
        stage.step(step).await?;
        world.pass(PACE).await?;
    }
    let mut left = None;
    if schedule.leaders == Leaders::Two {
        // Two that take the fence from each other for ever are never done.
        stage.stop(Replica::B.name()).await?;
        left = stage.judged().fence();
    }
    let state = stage.wait_until_done(left).await?;
    let busy_until = begun.elapsed().saturating_sub(QUIET) + ROUND;
    stage.begin_again().await?;
    Ok(Ended { state, busy_until })
}

fn watch_over(world: &World, safety: &Arc<Mutex<BlockSafety>>) {
    let safety = Arc::clone(safety);
    let mut rollbacks = 0;
    world.watch_over(Box::new(move |world| {
        let mut safety = lock(&safety);
        if std::mem::replace(&mut rollbacks, world.rollbacks()) != world.rollbacks() {
            safety.put_back();
        }
        safety.look(world.kv(), world.objects()).map_err(|breach| breach.to_string())
    }));
}

impl Stage<'_> {
    fn config(&self) -> Result<PoolConfig, Trouble> {
        self.pool.config(self.schedule.families).map_err(|error| broken(&error.to_string()))
    }

    fn start(&self, name: &str) -> Result<(), Trouble> {
        let pool = self.config()?;
        let lease = match self.schedule.leaders {
            Leaders::One => "operator",
            Leaders::Two => name,
        };
        (self.operators.start)(self.world, &Start { name, store: self.schedule.store, lease, pool: &pool });
        Ok(())
    }

    async fn stop(&self, name: &str) -> Result<(), Trouble> {
        self.world.stop(name);
        let ends = |world: &World| !world.runs(name);
        self.world.until(&format!("the end of {name}"), LIMIT, ends).await
    }

    async fn step(&mut self, step: &Step) -> Result<(), Trouble> {
        match *step {
            Step::Join(number) => {
                self.machines.entry(number).or_default().runs = true;
                self.hands.register(&node_name(number), number).await;
            }
            Step::Leave(number) => {
                let name = node_name(number);
                lock(&self.safety).pods_end(&name);
                self.hands.delete(resources::NODE, &ObjectKey::cluster(&name)).await;
                self.world.pass(GARBAGE).await?;
                self.hands.collect_garbage();
                self.end_pods(number).await;
                self.machines.remove(&number);
            }
            Step::Forget(number) => {
                self.hands.delete(resources::NODE, &ObjectKey::cluster(node_name(number))).await;
                self.world.pass(GARBAGE).await?;
                self.hands.collect_garbage();
            }
            Step::StartPod(number) => self.start_pod(number).await,
            Step::EndPods(number) => self.end_pods(number).await,
            Step::Pool(pool) => {
                self.pool = pool;
                for replica in Replica::ALL {
                    self.stop(replica.name()).await?;
                    self.start(replica.name())?;
                    self.world.pass(PACE).await?;
                }
            }
            Step::Edit(number, by_hand) => self.edit(number, by_hand).await,
            Step::DeleteCiliumNode(number) => {
                self.hands.delete(resources::CILIUM_NODE, &ObjectKey::cluster(node_name(number))).await;
            }
            Step::Save(number) => {
                if let Some(object) = self.hands.get(resources::CILIUM_NODE, &node_name(number)).await {
                    self.saved.insert(number, object);
                }
            }
            Step::PutBack(number) => self.put_back(number).await,
            Step::Kill(replica) => self.world.kill(replica.name()),
            Step::Wait(time) => self.world.pass(time).await?,
        }
        Ok(())
    }

    /// Starts a pod where an agent would: in blocks that the CiliumNode lists and the ledger holds for this very Node.
    async fn start_pod(&mut self, number: u8) {
        let name = node_name(number);
        let (Some(node), Some(cilium_node)) =
            (self.hands.get(resources::NODE, &name).await, self.hands.get(resources::CILIUM_NODE, &name).await)
        else {
            return;
        };
        let listed = pod_cidrs(&cilium_node);
        let usable = lock(&self.safety).usable(&name, node.uid());
        let blocks: Vec<_> = usable.into_iter().filter(|block| listed.contains(&block.to_string())).collect();
        let Some(machine) = self.machines.get_mut(&number).filter(|machine| machine.runs && machine.pods < PODS) else {
            return;
        };
        if blocks.is_empty() {
            return;
        }
        for block in &blocks {
            lock(&self.safety).pods_run(&name, *block);
        }
        self.hands.start_pod(&name, machine.pods, &blocks).await;
        machine.pods += 1;
    }

    async fn end_pods(&mut self, number: u8) {
        let name = node_name(number);
        let pods = self.machines.get_mut(&number).map(|machine| std::mem::take(&mut machine.pods)).unwrap_or_default();
        lock(&self.safety).pods_end(&name);
        for pod in 0..pods {
            self.hands.end_pod(&name, pod).await;
        }
    }

    async fn edit(&self, number: u8, by_hand: ByHand) {
        let name = node_name(number);
        let Some(seen) = self.hands.get(resources::CILIUM_NODE, &name).await else { return };
        let rest = || pod_cidrs(&seen).into_iter().skip(1);
        let list: Vec<String> = match by_hand {
            ByHand::Foreign => ["192.168.0.0/24".to_owned()].into_iter().chain(rest()).collect(),
            ByHand::Free => ["10.0.0.12/30".to_owned()].into_iter().chain(rest()).collect(),
            ByHand::Garbage => ["garbage".to_owned()].into_iter().chain(rest()).collect(),
            ByHand::Others(other) => {
                let other = self.hands.get(resources::CILIUM_NODE, &node_name(other)).await;
                other.as_ref().map(pod_cidrs).unwrap_or_default()
            }
            ByHand::Emptied => Vec::new(),
        };
        lock(&self.safety).wish(&name, list.clone());
        self.hands.write_pod_cidrs(&name, &list).await;
    }

    async fn put_back(&self, number: u8) {
        let Some(saved) = self.saved.get(&number) else { return };
        let (name, list) = (node_name(number), pod_cidrs(saved));
        lock(&self.safety).wish(&name, list.clone());
        if self.hands.get(resources::CILIUM_NODE, &name).await.is_some() {
            return self.hands.write_pod_cidrs(&name, &list).await;
        }
        let mut object = saved.0.clone();
        if let Some(Value::Object(metadata)) = object.get_mut("metadata") {
            metadata.retain(|field, _| field == "name" || field == "labels" || field == "annotations");
        }
        self.hands.create(resources::CILIUM_NODE, object).await;
    }

    /// Lets the operators work until nothing is left to do. `left` is the fence as a leader found it whose rival stopped.
    async fn wait_until_done(&self, left: Option<String>) -> Result<Final, Trouble> {
        let pool = self.config()?;
        let judged = self.judged();
        let unserved = || judged.unserved(&lock(&self.safety), &pool);
        self.world.settle(QUIET, LIMIT).await?;
        let mut unnoticed = left.is_some() && judged.fence() == left;
        let mut rollbacks = 0;
        let mut waited_under = None;
        loop {
            let known = std::mem::replace(&mut rollbacks, self.world.rollbacks());
            let term = Some(judged.fence());
            let dangles = waited_under != term && judged.state(&lock(&self.safety), &pool).has_strays();
            if !(std::mem::take(&mut unnoticed) || known != rollbacks || dangles) {
                break;
            }
            if dangles {
                waited_under = term;
            }
            // Where etcd was put back, or a rival has the fence, and nobody had anything to write, only the next full pass
            // notices. A CiliumNode that no Node is known to have stood behind has its time until one joins, and each leader
            // counts anew.
            self.world.pass(FULL_PASS.max(self.operators.node_gc)).await?;
            self.world.settle(QUIET, LIMIT).await?;
        }
        if unserved().is_some() {
            // So does it where no event tells of a change.
            let mut seen = self.world.revisions();
            let served = |world: &World| {
                let changed = std::mem::replace(&mut seen, world.revisions()) != world.revisions();
                changed && unserved().is_none()
            };
            let waited = self.world.until("every node is served", LIMIT, served).await;
            if let Some(why) = unserved() {
                waited
                    .map_err(|trouble| if let Trouble::TimedOut { .. } = trouble { broken(&why) } else { trouble })?;
            }
            self.world.settle(QUIET, LIMIT).await?;
        }
        Ok(judged.state(&lock(&self.safety), &pool))
    }

    fn judged(&self) -> Judged<'_> {
        Judged { world: self.world, cluster: self.operators.cluster, store: self.schedule.store }
    }

    /// Starts a fresh operator on what the others left: it has nothing to write.
    async fn begin_again(&self) -> Result<(), Trouble> {
        // What goes wrong from now on would give it work; while the others stop, too.
        self.world.calm();
        for replica in Replica::ALL {
            self.stop(replica.name()).await?;
        }
        let judged = self.judged();
        let (fence, before) = (judged.fence(), judged.written());
        self.start("fresh")?;
        let begun = |_: &World| judged.fence() != fence;
        self.world.until("the term of a fresh operator", LIMIT, begun).await?;
        self.world.pass(Duration::from_secs(10)).await?;
        let same = before.same(&judged.written());
        same.map_err(|what| broken(&format!("a fresh operator wrote {what} though nothing changed")))
    }
}

fn broken(what: &str) -> Trouble {
    Trouble::Unsafe { what: what.to_owned(), after: "the end".to_owned() }
}

/// The blocks that a CiliumNode lists.
pub(super) fn pod_cidrs(object: &Object) -> Vec<String> {
    let list = object.0.pointer("/spec/ipam/podCIDRs").and_then(Value::as_array);
    list.into_iter().flatten().filter_map(|cidr| cidr.as_str().map(str::to_owned)).collect()
}
