//! The end-to-end tests. One cluster is booted once, with Basal installed by its chart; the scenarios run on it one
//! after another, each in a file of its own. `BASAL_E2E_KEEP=1` keeps the cluster, and uses one that was kept.

mod boot;
mod suite;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

fn main() -> ExitCode {
    basal_e2e::cluster::run_if_asked();
    let mut arguments = Arguments::from_args();
    // They share one cluster, and two cores.
    arguments.test_threads = Some(1);
    let trials = vec![
        Trial::test("a_cluster_boots_and_leaves_nothing", || suite::outcome(boot::boots_and_leaves_nothing())),
        Trial::test("a_start_cut_short_is_cleaned_up", || suite::outcome(boot::cut_short())),
    ];
    libtest_mimic::run(&arguments, trials).exit_code()
}
