//! The same over the kernel of the machine that this runs on: needs root. `FAULTS_EVERY=1` tries every fault.

use super::{
    laboratory::{Laboratory, Place},
    number,
    scenario::Scenario,
};
use crate::{
    linux::{LinuxMachine, with_machines},
    world::Source,
};

/// Of all faults every so many-th is tried; `FAULTS_EVERY` says otherwise.
const EVERY: usize = 61;

fn explore(scenario: Scenario, node: &[Source]) {
    with_machines(|| {
        let mut laboratory = Laboratory::<LinuxMachine>::new(number("FAULTS_EVERY", EVERY));
        Place::of(scenario, node).for_each(|place| laboratory.explore(place));
    });
}

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
