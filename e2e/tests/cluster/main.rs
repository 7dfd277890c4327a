//! The end-to-end tests. One cluster is booted once, with Basal installed by its chart; the scenarios run on it one
//! after another, each in a file of its own. `BASAL_E2E_KEEP=1` keeps the cluster, and uses one that was kept.

mod api_nodes;
mod boot;
mod churn;
mod cni;
mod daemons;
mod faults;
mod flow;
mod honesty;
mod install;
mod kills;
mod masquerade;
mod native;
mod observer;
mod pool;
mod random;
mod rights;
mod services;
mod steps;
mod store;
mod suite;
mod tampering;
mod traffic;
mod unattended;
mod upgrade;
mod view;
mod without_etcd;
mod workload;

use std::process::ExitCode;

use basal_e2e::say::say;
use libtest_mimic::Arguments;

use suite::{Suite, have_the_machine, timed};

fn main() -> ExitCode {
    basal_e2e::cluster::run_if_asked();
    let mut arguments = Arguments::from_args();
    // They share one cluster, and two cores.
    arguments.test_threads = Some(1);
    let Ok(name) = "e2e".parse() else { return ExitCode::FAILURE };
    let machine = if arguments.list { Ok(None) } else { have_the_machine().map(Some) };
    let Ok(_machine) = machine.inspect_err(|error| say(format!("{error:#}"))) else { return ExitCode::FAILURE };
    let suite = Suite::new(name);
    let mut trials = vec![
        timed("a_cluster_boots_and_leaves_nothing", boot::boots_and_leaves_nothing),
        timed("a_start_cut_short_is_cleaned_up", boot::cut_short),
        timed("without_etcd_records_are_custom_resources", without_etcd::records_are_objects),
        suite.trial("every_node_is_served", install::every_node_is_served),
        suite.trial("everybody_talks", traffic::everybody_talks),
        suite.trial("forwarding_goes_on_without_an_agent", unattended::forwarding_goes_on),
        suite.trial("pods_leave_nothing", churn::pods_leave_nothing),
        suite.trial("cnitool_drives_the_plugin", cni::cnitool_drives_the_plugin),
        suite.trial("policies_are_said_not_to_be_enforced", honesty::policies_are_said_not_to_be_enforced),
        suite.trial("nodes_come_and_go", pool::nodes_come_and_go),
        suite.trial("an_exhausted_pool_says_so", pool::an_exhausted_pool_says_so),
        suite.trial("kills_and_cuts_break_nothing", kills::nothing_breaks),
        suite.trial("a_missing_right_is_named", rights::a_missing_right_is_named),
        suite.trial("a_refused_key_stops_the_start", honesty::a_refused_key_stops_the_start),
    ];
    if store::is_asked() {
        trials.push(timed("the_store_changes_under_pods", store::there_and_back));
        trials.push(timed("packets_travel_without_a_tunnel", native::everybody_talks));
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    let clean = suite.end();
    if conclusion.has_failed() || !clean { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
