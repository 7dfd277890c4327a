//! The same over the kernel of the machine that this runs on: needs root. `FAULTS_EVERY=1` tries every fault.

use super::{
    every_scenario,
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

every_scenario!();
