//! An agent that dies in the middle of a change, before one system call or another, and what the next one makes of what it
//! left.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use basal_datapath::{
    kernel::{Kernel as _, PodDevice},
    names::IfName,
    plan::NodePlan,
    state::NodeState,
};

use crate::{
    adoption::another_object,
    dying::dies_before,
    harness::{Netns, Node, masquerading, pair, sandbox},
};

/// All that a node has, whichever way it came to it: numbers of devices are left out.
#[derive(Debug, PartialEq, Eq)]
struct Everything {
    state: NodeState,
    /// Every pin and folder of pins.
    pins: BTreeSet<PathBuf>,
    /// The device in the pod.
    pod: Option<PodDevice>,
}

impl Everything {
    fn of(node: &Node, pod: &Netns) -> Self {
        let mut state = node.read().state;
        state.maps.values_mut().flat_map(|rows| rows.values_mut()).for_each(Vec::clear);
        let (netns, eth0) = (pod.path(), IfName::new("eth0").unwrap());
        let mut pod = node.with(async |kernel| kernel.pod_device(&netns, &eth0).await.unwrap());
        if let Some(PodDevice { device, .. }) = &mut pod {
            (device.index, device.peer) = (0, None);
            // The kernel gives it one of the link in its own time.
            device.addresses.retain(|address| !address.to_string().starts_with("fe80"));
        }
        Self { state, pins: node.pins(), pod }
    }
}

/// Of all ways to die every so many-th is tried; the variable says otherwise.
const EVERY: usize = 37;
const VARIABLE: &str = "FAULTS_EVERY";

/// Goes from one plan to the other and back, and dies on the way before one call or another. The next agent has the plan
/// of the one that died, or the plan of before: either way it leaves what an agent leaves that lives.
fn die_on_the_way(node: &mut Node, plans: &[NodePlan; 2], pod: &Netns) {
    let every = std::env::var(VARIABLE).map_or(EVERY, |every| every.parse().unwrap());
    let go_to = |node: &mut Node, plan: usize| {
        node.plan = plans[plan].clone();
        node.converge();
        Everything::of(node, pod)
    };
    // The first one makes folders that stay.
    go_to(node, 1);
    let expected = [0, 1].map(|plan| go_to(node, plan));
    let mut on_the_way = [true; 2];
    for way in (0..).step_by(every) {
        let (call, to, next) = (way / 4, way / 2 % 2, way % 2);
        go_to(node, 1 - to);
        node.plan = plans[to].clone();
        on_the_way[to] &= dies_before(call, || drop(node.converge()));
        assert_eq!(
            go_to(node, next),
            expected[next],
            "on the way to {to} it died before call {call}, and {next} came next"
        );
        if on_the_way == [false; 2] {
            assert!(call > 20, "it came to its end after {call} calls");
            return;
        }
    }
}

/// A node with a pod, which knows another.
fn with_a_pod(bpffs: &Path, test: impl FnOnce(&mut Node, &Netns)) {
    let (mut one, _two) = pair(bpffs);
    let pod = one.add_pod(7, 1111);
    test(&mut one, &pod);
}

#[test]
fn an_upgrade_may_die_anywhere() {
    sandbox(|bpffs| {
        with_a_pod(bpffs, |one, pod| {
            let plans = [one.plan.clone(), NodePlan { object: another_object(), ..one.plan.clone() }];
            die_on_the_way(one, &plans, pod);
        });
    });
}

#[test]
fn an_agent_may_die_anywhere_while_a_pod_comes_or_goes() {
    sandbox(|bpffs| {
        with_a_pod(bpffs, |one, pod| {
            let without = NodePlan { endpoints: Default::default(), ..one.plan.clone() };
            let plans = [without, one.plan.clone()];
            die_on_the_way(one, &plans, pod);
        });
    });
}

#[test]
fn an_agent_may_die_anywhere_while_programs_begin_or_cease_to_masquerade() {
    sandbox(|bpffs| {
        with_a_pod(bpffs, |one, pod| {
            let by_programs = NodePlan { bpf_masquerade: masquerading(&["u0"]), ..one.plan.clone() };
            let plans = [one.plan.clone(), by_programs];
            die_on_the_way(one, &plans, pod);
        });
    });
}
