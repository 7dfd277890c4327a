//! The CNI contract when something goes wrong: every fault at every call that the agent makes.

mod laboratory;
mod linux;
mod node;
mod scenario;

use std::sync::Arc;

use basal_runtime::env::SeededEnv;

use self::{
    laboratory::{Laboratory, Place},
    scenario::Scenario,
};
use crate::{faulty::Side, kernel::ModelKernel, world::Source};

/// A test for each scenario, over the machines of the module's `explore`.
macro_rules! every_scenario {
    () => {
        #[test]
        fn one_pod() {
            explore(Scenario::Add, &[Source::CustomResources]);
        }

        #[test]
        fn a_second_add() {
            explore(Scenario::AddTwice, &[Source::Etcd]);
        }

        #[test]
        fn two_pods_of_one_name() {
            explore(Scenario::OneName, &[Source::Etcd]);
        }

        #[test]
        fn deletes_of_nothing() {
            explore(Scenario::DelAlone, &[Source::Etcd]);
        }

        #[test]
        fn a_runtime_that_is_killed() {
            explore(Scenario::NoRuntime, &[Source::Etcd]);
        }

        #[test]
        fn a_collection() {
            explore(Scenario::Gc, &[Source::Etcd]);
        }

        #[test]
        fn a_restart() {
            explore(Scenario::Restart, &[Source::Etcd, Source::CustomResources]);
        }

        #[test]
        fn a_reboot() {
            explore(Scenario::Reboot, &[Source::Etcd]);
        }
    };
}
use every_scenario;

fn laboratory() -> Laboratory<Arc<ModelKernel>> {
    Laboratory::new(1)
}

fn explore(scenario: Scenario, node: &[Source]) {
    Place::of(scenario, node).for_each(|place| laboratory().explore(place));
}

every_scenario!();

fn number<T: std::str::FromStr>(variable: &str, default: T) -> T {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// `FAULTS_PAIRS` says how many for each scenario and store, `FAULTS_SEED` which.
#[test]
fn pairs_of_faults() {
    let (pairs, env) = (number("FAULTS_PAIRS", 6), SeededEnv::new(number("FAULTS_SEED", 1)));
    let (mut laboratory, mut failures) = (laboratory(), Vec::new());
    for scenario in Scenario::ALL {
        for source in [Source::Etcd, Source::CustomResources] {
            let place = Place { scenario, source, sides: &[Side::Node, Side::Servers] };
            let calls = laboratory.calls(place).len();
            failures.extend((0..pairs).filter_map(|_| laboratory.pair(place, &env, calls).err()));
        }
    }
    assert!(failures.is_empty(), "{} runs failed:\n{}", failures.len(), failures.join("\n"));
}
