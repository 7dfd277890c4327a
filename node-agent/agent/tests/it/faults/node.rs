//! One node: an agent that may die, and the test as kubelet and container runtime.

use std::{collections::BTreeMap, io, time::Duration};

use basal_agent::sync::task::FULL_PASS_INTERVAL;
use basal_cni::api::{AddResult, Answer, CheckRequest, DelRequest, PodRef, Request};
use basal_objects::object::resources;
use serde_json::json;
use tokio::time::Instant;

use crate::{
    faulty::Call,
    machine::Machine,
    world::{Source, World, acknowledge, add_request, attachment},
};

/// How long anything may take in virtual time: longer than the leases of agents.
const PATIENCE: Duration = Duration::from_secs(20 * 60);

/// A node whose agent may die, and its container runtime.
pub(super) struct Node<M> {
    pub(super) world: World<M>,
    /// What the runtime has, by container: the pod, and what ADD answered.
    added: BTreeMap<String, (&'static str, AddResult)>,
    pub(super) pods: BTreeMap<&'static str, PodRef>,
}

impl<M: Machine> Node<M> {
    pub(super) async fn new(machine: M, source: Source) -> Self {
        let world = World::ready_on(machine, source).await;
        let mut pods = BTreeMap::new();
        for name in ["web-0", "web-1"] {
            pods.insert(name, world.pod(name, json!({"app": "web"})).await);
        }
        Self { world, added: BTreeMap::new(), pods }
    }

    /// The kubelet's part: an agent that ended is started again.
    pub(super) async fn revive(&mut self) {
        let began = Instant::now();
        loop {
            if !self.world.runs() {
                self.world.bury().await;
                self.world.start();
            }
            if self.world.is_ready() {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "not ready: {:?}", self.world.readiness.pending());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Asks until there is the answer that ends it.
    async fn until_answered(&mut self, request: Request, ends: impl Fn(&Answer) -> bool) -> Answer {
        let began = Instant::now();
        loop {
            match self.world.call(request.clone()).await {
                Ok((_, answer)) if ends(&answer) => return answer,
                Ok((_, answer)) => {
                    assert!(began.elapsed() < PATIENCE, "{request:?} is answered with {answer:?}");
                    // The runtime tries again later.
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                Err(_) => self.revive().await,
            }
        }
    }

    /// DEL. The namespace stays, so that nothing is gone but what the agent removed.
    pub(super) async fn del(&mut self, container: &str) {
        self.added.remove(container);
        let request = Request::Del(DelRequest { attachment: attachment(container) });
        self.until_answered(request, |answer| *answer == Answer::Deleted).await;
    }

    /// ADD as the runtime does it: what has no good answer is deleted.
    pub(super) async fn add(&mut self, container: &str, pod: &'static str) {
        let added = add(&self.world, container, &self.pods[pod]).await;
        self.take(container, pod, added).await;
    }

    pub(super) async fn take(&mut self, container: &str, pod: &'static str, added: io::Result<AddResult>) {
        match added {
            Ok(result) => drop(self.added.insert(container.to_owned(), (pod, result))),
            Err(_) => self.del(container).await,
        }
    }

    /// GC: the runtime has these containers only; the others' namespaces are gone already.
    pub(super) async fn collect(&mut self, containers: &[&str]) {
        for (gone, _) in self.added.extract_if(.., |container, _| !containers.contains(&container.as_str())) {
            self.world.kernel.end(&gone);
        }
        let request = Request::Gc { valid: containers.iter().map(|container| attachment(container)).collect() };
        self.until_answered(request, |answer| matches!(answer, Answer::Collected { .. })).await;
    }

    /// What the runtime has is intact and reaches its gateways, no address has two owners, and its pods have their objects.
    pub(super) async fn check(&mut self) {
        let mut owners = BTreeMap::new();
        for (container, (pod, result)) in self.added.clone() {
            for address in &result.addresses {
                let other = owners.insert(address.address, container.clone());
                assert_eq!(other, None, "{} is {container}'s too", address.address);
            }
            let gateways: Vec<_> = result.addresses.iter().map(|address| address.gateway).collect();
            let addresses = result.addresses.iter().map(|address| address.address).collect();
            let request = CheckRequest { attachment: attachment(&container), netns: result.netns, addresses };
            self.until_answered(Request::Check(request), |answer| *answer == Answer::Intact).await;
            for gateway in gateways {
                self.world.kernel.ping(&container, gateway).unwrap();
            }
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
            assert!(began.elapsed() < PATIENCE, "left: {left:?}");
            tokio::time::sleep(Duration::from_secs(10)).await;
        }
    }

    /// Deletes what there is; nothing is left then, and another agent finds nothing to do.
    pub(super) async fn end(&mut self) -> Vec<Call> {
        self.revive().await;
        self.check().await;
        let containers: Vec<_> = self.added.keys().cloned().collect();
        for container in containers {
            self.del(&container).await;
        }
        self.until_clean().await;
        self.has_no_drift().await;
        let calls = self.world.script.disarm();
        self.world.stop().await;
        self.world.kernel.take_log();
        self.world.start();
        self.world.until_ready().await;
        tokio::time::sleep(FULL_PASS_INTERVAL * 2).await;
        self.has_no_drift().await;
        assert_eq!(self.world.kernel.take_log(), []);
        self.world.stop().await;
        calls
    }

    /// No comparison found what the agent had not left behind.
    async fn has_no_drift(&self) {
        let Answer::Status(status) = self.world.ask(Request::Status).await else { panic!("no status") };
        assert_eq!(status.drift, 0, "of {:#?}", self.world.kernel.take_log());
    }
}

/// ADD of a container that is up; its good answer.
pub(super) async fn add<M: Machine>(world: &World<M>, container: &str, pod: &PodRef) -> io::Result<AddResult> {
    world.kernel.run(container);
    let (stream, answer) = world.call(Request::Add(add_request(container, Some(pod.clone())))).await?;
    let Answer::Added(result) = answer else { return Err(io::Error::other(format!("{answer:?}"))) };
    match acknowledge(stream).await? {
        Answer::Committed => Ok(result),
        other => Err(io::Error::other(format!("{other:?}"))),
    }
}
