//! The laboratory finds operators that do not do their work, and says so in the shortest way.

use std::time::Duration;

use basal_objects::object::resources;
use basal_sim::{
    laboratory::{baselines, replay},
    process::{ProcessPorts, Restart},
    workload::{
        Schedule, Step, named,
        perform::{Operators, Start},
    },
    world::World,
};

/// An operator that only waits to be stopped.
fn idle(world: &World, start: &Start<'_>) {
    world.start(start.name, Restart::Never, async |ports: ProcessPorts| ports.stop.cancelled().await);
}

fn prepare(world: &World) {
    world.objects().define(&resources::CILIUM_NODE, true).unwrap();
    world.objects().define(&resources::CILIUM_ENDPOINT, false).unwrap();
}

const IDLE: Operators = Operators {
    prepare,
    start: idle,
    cluster: "default",
    quarantine: Duration::from_secs(20),
    node_gc: Duration::from_secs(300),
};

#[test]
fn a_failure_is_shrunk_and_its_text_replays_it() {
    let report = baselines(&IDLE, &[named::returns()]).unwrap_err();
    assert_eq!(report.found, named::returns());
    let joins = report.schedule.steps.iter().all(|step| matches!(step, Step::Join(_)));
    assert!(joins && report.schedule.steps.len() == 1, "{}", report.schedule);
    assert!(report.trouble.contains("is not served though it could be"), "{}", report.trouble);
    let again: Schedule = report.schedule.to_string().parse().unwrap();
    assert_eq!(replay(&IDLE, &again).unwrap_err().trouble, report.trouble);
}
