//! The CNI contract when something goes wrong: every fault at every call that the agent makes.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    panic::AssertUnwindSafe,
    time::Duration,
};

use basal_cni::api::{AddResult, Answer, CheckRequest, DelRequest, PodRef, Request};
use futures::{FutureExt as _, future::BoxFuture};
use serde_json::json;

use crate::{
    faulty::{Call, Fault},
    world::{Source, World, acknowledge, add_request, attachment},
};

/// How long a run may take in virtual time.
const LIMIT: Duration = Duration::from_secs(3600);

/// Longer than the leases of agents.
const LEASE: Duration = Duration::from_secs(20 * 60);

/// What is done while something goes wrong.
#[derive(Debug, Clone, Copy)]
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
    /// What the runtime has, by container.
    added: BTreeMap<String, AddResult>,
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
    async fn add(&mut self, container: &str, pod: &str) {
        let added = add(&self.world, container, self.pods.get(pod)).await;
        self.take(container, added).await;
    }

    async fn take(&mut self, container: &str, added: io::Result<AddResult>) {
        match added {
            Ok(result) => drop(self.added.insert(container.to_owned(), result)),
            Err(_) => self.del(container).await,
        }
    }

    /// What the runtime has is intact, and no address has two owners.
    async fn check(&mut self) {
        let mut owners = BTreeMap::new();
        for (container, result) in self.added.clone() {
            for address in &result.addresses {
                let other = owners.insert(address.address, container.clone());
                assert_eq!(other, None, "{} is {container}'s too", address.address);
            }
            let addresses = result.addresses.iter().map(|address| address.address).collect();
            let request = CheckRequest { attachment: attachment(&container), netns: result.netns, addresses };
            self.until_answered(Request::Check(request), |answer| *answer == Answer::Intact).await;
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
        self.revive().await;
        self.until_clean().await;
        let calls = self.world.script.disarm();

        self.revive().await;
        let Answer::Ipam(report) = self.world.ask(Request::Ipam).await else { panic!("no report") };
        let owners: BTreeSet<_> = report.addresses.iter().map(|used| used.owner.as_str()).collect();
        assert_eq!(owners, BTreeSet::from(["router", "health"]));
        self.world.stop().await;
        self.world.kernel.take_log();
        self.world.start();
        self.world.until_ready().await;
        assert_eq!(self.world.kernel.take_log(), []);
        self.world.stop().await;
        calls
    }
}

impl Node {
    /// Waits until nothing is left: what an agent that died had in etcd may stay as long as its lease.
    async fn until_clean(&self) {
        let waited = async {
            while !self.world.leftovers().is_empty() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        if tokio::time::timeout(LEASE, waited).await.is_err() {
            panic!("left: {:?}", self.world.leftovers());
        }
    }
}

async fn add(world: &World, container: &str, pod: Option<&PodRef>) -> io::Result<AddResult> {
    let (stream, answer) = world.call(Request::Add(add_request(container, pod.cloned()))).await?;
    let Answer::Added(result) = answer else { return Err(io::Error::other(format!("{answer:?}"))) };
    match acknowledge(stream).await? {
        Answer::Committed => Ok(result),
        other => Err(io::Error::other(format!("{other:?}"))),
    }
}

/// One run from the beginning, in a runtime of its own; answers the calls that were numbered, or why it failed.
fn run(scenario: Scenario, source: Source, plan: Option<(usize, Fault)>) -> Result<Vec<Call>, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    let ran = runtime.block_on(async {
        let whole = async {
            let mut node = Node::new(source).await;
            (scenario.before)(&mut node).await;
            node.world.script.arm(plan);
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

/// Every fault at every call of a scenario.
#[expect(clippy::print_stdout, reason = "tells those who look how much was tried")]
fn explore(scenario: Scenario, source: Source) {
    let name = scenario.name;
    let calls =
        run(scenario, source, None).unwrap_or_else(|why| panic!("{name} over {source:?} without a fault: {why}"));
    let (mut runs, mut failures) = (0, Vec::new());
    for (number, call) in calls.iter().enumerate() {
        for fault in Fault::at(call) {
            runs += 1;
            if let Err(why) = run(scenario, source, Some((number, *fault))) {
                failures.push(format!("{name} over {source:?}, {fault:?} at call {number} ({call}): {why}"));
            }
        }
    }
    println!("{name} over {source:?}: {} calls, {runs} runs", calls.len());
    assert!(failures.is_empty(), "{} of {runs} runs failed:\n{}", failures.len(), failures.join("\n"));
}

fn nothing(_: &mut Node) -> BoxFuture<'_, ()> {
    async {}.boxed()
}

const ADD: Scenario =
    Scenario { name: "ADD, CHECK, DEL", before: nothing, step: |node| async { node.add("c1", "web-0").await }.boxed() };

#[test]
fn one_pod() {
    explore(ADD, Source::Etcd);
    explore(ADD, Source::CustomResources);
}
