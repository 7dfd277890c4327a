//! The CNI contract when something goes wrong: every fault at every call that the agent makes.

use std::{collections::BTreeMap, fmt, io, panic::AssertUnwindSafe, time::Duration};

use basal_cni::api::{AddResult, Answer, CheckRequest, DelRequest, PodRef, Request};
use basal_objects::object::resources;
use basal_runtime::env::{Env, SeededEnv};
use futures::{FutureExt as _, future::BoxFuture, join};
use serde_json::json;
use tokio::time::Instant;

use crate::{
    faulty::{Call, Planned, Side},
    world::{Source, World, acknowledge, add_request, attachment},
};

/// How long a run may take in virtual time.
const LIMIT: Duration = Duration::from_secs(3600);

/// Longer than the leases of agents.
const LEASE: Duration = Duration::from_secs(20 * 60);

/// What is done while something goes wrong.
#[derive(Clone, Copy)]
struct Scenario {
    name: &'static str,
    /// What there is before.
    before: Step,
    step: Step,
}

type Step = for<'a> fn(&'a mut Node) -> BoxFuture<'a, ()>;

/// A node whose agent may die, and its container runtime.
struct Node {
    world: World,
    /// What the runtime has, by container: the pod, and what ADD answered.
    added: BTreeMap<String, (&'static str, AddResult)>,
    pods: BTreeMap<&'static str, PodRef>,
}

impl Node {
    async fn new(source: Source) -> Self {
        let world = World::ready_with(source).await;
        let mut pods = BTreeMap::new();
        for name in ["web-0", "web-1"] {
            pods.insert(name, world.pod(name, json!({"app": "web"})).await);
        }
        Self { world, added: BTreeMap::new(), pods }
    }

    /// The kubelet's part: an agent that ended is started again.
    async fn revive(&mut self) {
        loop {
            if !self.world.runs() {
                self.world.bury().await;
                self.world.start();
            }
            if self.world.is_ready() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Asks until there is the answer that ends it.
    async fn until_answered(&mut self, request: Request, ends: impl Fn(&Answer) -> bool) -> Answer {
        loop {
            match self.world.call(request.clone()).await {
                Ok((_, answer)) if ends(&answer) => return answer,
                // The runtime tries again later.
                Ok(_) => tokio::time::sleep(Duration::from_secs(1)).await,
                Err(_) => self.revive().await,
            }
        }
    }

    async fn del(&mut self, container: &str) {
        self.added.remove(container);
        let request = Request::Del(DelRequest { attachment: attachment(container) });
        self.until_answered(request, |answer| *answer == Answer::Deleted).await;
    }

    /// ADD as the runtime does it: what has no good answer is deleted.
    async fn add(&mut self, container: &str, pod: &'static str) {
        let added = add(&self.world, container, &self.pods[pod]).await;
        self.take(container, pod, added).await;
    }

    async fn take(&mut self, container: &str, pod: &'static str, added: io::Result<AddResult>) {
        match added {
            Ok(result) => drop(self.added.insert(container.to_owned(), (pod, result))),
            Err(_) => self.del(container).await,
        }
    }

    /// GC: the runtime has these containers only.
    async fn collect(&mut self, containers: &[&str]) {
        self.added.retain(|container, _| containers.contains(&container.as_str()));
        let request = Request::Gc { valid: containers.iter().map(|container| attachment(container)).collect() };
        self.until_answered(request, |answer| matches!(answer, Answer::Collected { .. })).await;
    }

    /// What the runtime has is intact, no address has two owners, and its pods have their objects.
    async fn check(&mut self) {
        let mut owners = BTreeMap::new();
        for (container, (pod, result)) in self.added.clone() {
            for address in &result.addresses {
                let other = owners.insert(address.address, container.clone());
                assert_eq!(other, None, "{} is {container}'s too", address.address);
            }
            let addresses = result.addresses.iter().map(|address| address.address).collect();
            let request = CheckRequest { attachment: attachment(&container), netns: result.netns, addresses };
            self.until_answered(Request::Check(request), |answer| *answer == Answer::Intact).await;
            self.revive().await;
            let has_object = || self.world.objects.all(&resources::CILIUM_ENDPOINT).iter().any(|o| o.name() == pod);
            self.world.until("the pod has its object", has_object).await;
        }
    }

    /// Waits until nothing is left, and nobody has an address but the node: what an agent that died had in etcd may stay
    /// as long as its lease.
    async fn until_clean(&mut self) {
        let began = Instant::now();
        loop {
            self.revive().await;
            let mut left = self.world.leftovers();
            if let (true, Ok((_, Answer::Ipam(report)))) = (left.is_empty(), self.world.call(Request::Ipam).await) {
                let used = report.addresses.into_iter().map(|used| used.owner);
                left.extend(used.filter(|owner| !["router", "health"].contains(&owner.as_str())));
                if left.is_empty() {
                    return;
                }
            }
            assert!(began.elapsed() < LEASE, "left: {left:?}");
            tokio::time::sleep(Duration::from_secs(10)).await;
        }
    }

    /// Deletes what there is; nothing is left then, and another agent finds nothing to do.
    async fn end(&mut self) -> Vec<Call> {
        self.revive().await;
        self.check().await;
        let containers: Vec<_> = self.added.keys().cloned().collect();
        for container in containers {
            self.del(&container).await;
        }
        self.until_clean().await;
        let calls = self.world.script.disarm();
        self.world.stop().await;
        self.world.kernel.take_log();
        self.world.start();
        self.world.until_ready().await;
        assert_eq!(self.world.kernel.take_log(), []);
        self.world.stop().await;
        calls
    }
}

async fn add(world: &World, container: &str, pod: &PodRef) -> io::Result<AddResult> {
    let (stream, answer) = world.call(Request::Add(add_request(container, Some(pod.clone())))).await?;
    let Answer::Added(result) = answer else { return Err(io::Error::other(format!("{answer:?}"))) };
    match acknowledge(stream).await? {
        Answer::Committed => Ok(result),
        other => Err(io::Error::other(format!("{other:?}"))),
    }
}

/// What is done where, and where something goes wrong.
#[derive(Clone, Copy)]
struct Place {
    scenario: Scenario,
    source: Source,
    sides: &'static [Side],
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} over {:?}, faults at {:?}", self.scenario.name, self.source, self.sides)
    }
}

impl Place {
    /// One run from the beginning, in a runtime of its own; answers the calls that were numbered, or why it failed.
    fn run(self, plan: &[Planned]) -> Result<Vec<Call>, String> {
        let Self { scenario, source, sides } = self;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        let ran = runtime.block_on(async {
            let whole = async {
                let mut node = Node::new(source).await;
                (scenario.before)(&mut node).await;
                node.world.script.arm(sides, plan);
                (scenario.step)(&mut node).await;
                node.end().await
            };
            AssertUnwindSafe(tokio::time::timeout(LIMIT, whole)).catch_unwind().await
        });
        match ran {
            Ok(Ok(calls)) => Ok(calls),
            Ok(Err(_elapsed)) => Err(format!("it did not end within {LIMIT:?}")),
            Err(payload) => Err(payload.downcast_ref::<String>().cloned().unwrap_or_else(|| "a panic".to_owned())),
        }
    }

    /// The calls of a run in which nothing goes wrong.
    fn calls(self) -> Vec<Call> {
        self.run(&[]).unwrap_or_else(|why| panic!("{self}, without one: {why}"))
    }

    /// Every fault at every call.
    #[expect(clippy::print_stdout, reason = "tells those who look how much was tried")]
    fn explore(self) {
        let calls = self.calls();
        let (mut runs, mut failures) = (0, Vec::new());
        for (call, text) in calls.iter().enumerate() {
            for fault in 0..text.faults.len() {
                runs += 1;
                let planned = Planned { call, fault };
                let why = match self.run(&[planned]) {
                    // Files and the socket are real, so timers fall differently in each run, and one may end before a late call
                    // that another made.
                    Ok(made) if made.len() > call || 2 * made.len() >= calls.len() => continue,
                    Ok(made) => format!("there were {} calls only", made.len()),
                    Err(why) => why,
                };
                failures.push(format!("{:?} at call {call} ({text}): {why}", planned.at(text)));
            }
        }
        println!("{self}: {} calls, {runs} runs", calls.len());
        assert!(failures.is_empty(), "{self}: {} of {runs} runs failed:\n{}", failures.len(), failures.join("\n"));
    }

    /// Two faults in one run: the first anywhere, the second soon after it, wherever that leads.
    fn pair(self, env: &dyn Env, calls: usize) -> Result<(), String> {
        let below = |limit: usize| usize::try_from(env.random_u64() % limit as u64).unwrap();
        let first = Planned { call: below(calls), fault: below(60) };
        let second = Planned { call: first.call + 1 + below(calls), fault: below(60) };
        self.run(&[first, second]).map(drop).map_err(|why| format!("{self}: {first:?}, {second:?}: {why}"))
    }
}

fn nothing(_: &mut Node) -> BoxFuture<'_, ()> {
    async {}.boxed()
}

fn two_pods(node: &mut Node) -> BoxFuture<'_, ()> {
    async {
        node.add("c1", "web-0").await;
        node.add("c2", "web-1").await;
    }
    .boxed()
}

const ADD: Scenario = Scenario {
    name: "ADD",
    before: nothing,
    step: |node| {
        async {
            node.add("c1", "web-0").await;
        }
        .boxed()
    },
};

const ADD_TWICE: Scenario = Scenario {
    name: "ADD twice for one container",
    before: nothing,
    step: |node| {
        async {
            node.add("c1", "web-0").await;
            node.add("c1", "web-0").await;
        }
        .boxed()
    },
};

/// As of a StatefulSet, whose next pod may come up before the runtime has done with the one before.
const ONE_NAME: Scenario = Scenario {
    name: "two containers of one pod name at once",
    before: nothing,
    step: |node| {
        async {
            let pod = &node.pods["web-0"];
            let (one, two) = join!(add(&node.world, "c1", pod), add(&node.world, "c2", pod));
            node.take("c1", "web-0", one).await;
            node.take("c2", "web-0", two).await;
            node.check().await;
            node.del("c1").await;
        }
        .boxed()
    },
};

const DEL_ALONE: Scenario = Scenario {
    name: "DEL without ADD, and twice",
    before: |node| node.add("c1", "web-0").boxed(),
    step: |node| {
        async {
            node.del("c9").await;
            node.del("c1").await;
            node.del("c1").await;
        }
        .boxed()
    },
};

/// The runtime is killed between the agent's answer to ADD and its own acknowledgement, and knows of nothing.
const NO_RUNTIME: Scenario = Scenario {
    name: "ADD of a runtime that is killed",
    before: nothing,
    step: |node| {
        async {
            let request = add_request("c1", Some(node.pods["web-0"].clone()));
            drop(node.world.call(Request::Add(request)).await);
        }
        .boxed()
    },
};

const GC: Scenario =
    Scenario { name: "GC", before: two_pods, step: |node| async { node.collect(&["c2"]).await }.boxed() };

const RESTART: Scenario = Scenario {
    name: "restart",
    before: |node| {
        async {
            two_pods(node).await;
            node.world.stop().await;
        }
        .boxed()
    },
    step: |node| {
        async {
            node.world.start();
            node.revive().await;
        }
        .boxed()
    },
};

const REBOOT: Scenario = Scenario {
    name: "reboot, GC",
    before: |node| {
        async {
            two_pods(node).await;
            node.world.stop().await;
            node.world.reboot();
        }
        .boxed()
    },
    step: |node| {
        async {
            node.world.start();
            node.revive().await;
            node.collect(&[]).await;
        }
        .boxed()
    },
};

const ALL: [Scenario; 8] = [ADD, ADD_TWICE, ONE_NAME, DEL_ALONE, NO_RUNTIME, GC, RESTART, REBOOT];

/// Faults of the node where the scenario's store makes no difference are tried over one of them.
fn explore(scenario: Scenario, node: &[Source]) {
    for source in node {
        Place { scenario, source: *source, sides: &[Side::Node] }.explore();
    }
    for source in [Source::Etcd, Source::CustomResources] {
        Place { scenario, source, sides: &[Side::Servers] }.explore();
    }
}

#[test]
fn one_pod() {
    explore(ADD, &[Source::CustomResources]);
}

#[test]
fn a_second_add() {
    explore(ADD_TWICE, &[Source::Etcd]);
}

#[test]
fn two_pods_of_one_name() {
    explore(ONE_NAME, &[Source::Etcd]);
}

#[test]
fn deletes_of_nothing() {
    explore(DEL_ALONE, &[Source::Etcd]);
}

#[test]
fn a_runtime_that_is_killed() {
    explore(NO_RUNTIME, &[Source::Etcd]);
}

#[test]
fn a_collection() {
    explore(GC, &[Source::Etcd]);
}

#[test]
fn a_restart() {
    explore(RESTART, &[Source::Etcd, Source::CustomResources]);
}

#[test]
fn a_reboot() {
    explore(REBOOT, &[Source::Etcd]);
}

/// `FAULTS_PAIRS` says how many for each scenario and store, `FAULTS_SEED` which.
#[test]
fn pairs_of_faults() {
    let number = |name: &str, default| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    let (pairs, env) = (number("FAULTS_PAIRS", 6), SeededEnv::new(number("FAULTS_SEED", 1)));
    let mut failures = Vec::new();
    for scenario in ALL {
        for source in [Source::Etcd, Source::CustomResources] {
            let place = Place { scenario, source, sides: &[Side::Node, Side::Servers] };
            let calls = place.calls().len();
            failures.extend((0..pairs).filter_map(|_| place.pair(&env, calls).err()));
        }
    }
    assert!(failures.is_empty(), "{} runs failed:\n{}", failures.len(), failures.join("\n"));
}
