//! Draws schedules and faults from a seed.

use std::time::Duration;

use super::{ByHand, Families, Leaders, Pool, Replica, Schedule, Step, Store};
use crate::{
    dice::Dice,
    fault::{Fault, FaultPlan},
    trace::Call,
};

const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Every kind of fault, with the times and distances that make a difference: shorter and longer than a request may take,
/// than a term lasts, than a quarantine.
const FAULTS: [Fault; 28] = [
    Fault::CrashBefore,
    Fault::CrashAfter,
    Fault::LoseRequest,
    Fault::LoseAnswer,
    Fault::Overtake,
    Fault::Conflict,
    Fault::Unavailable,
    Fault::Throttle,
    Fault::Delay(secs(3)),
    Fault::Delay(secs(12)),
    Fault::Stall(secs(12)),
    Fault::Stall(secs(60)),
    Fault::Lag(secs(20)),
    Fault::Gap(secs(0)),
    Fault::Gap(secs(15)),
    Fault::DropEvent,
    Fault::FailOver(3),
    Fault::FailOver(20),
    Fault::LoseLease(secs(8)),
    Fault::EndLeases,
    Fault::ClockJump(-3600),
    Fault::ClockJump(3600),
    Fault::NewEtcdLeader,
    Fault::Compact,
    Fault::Restore(2),
    Fault::Restore(10),
    Fault::Rewind(2),
    Fault::Rewind(10),
];

/// The most nodes of a schedule. Both CIDRs of the pool together have room for eight.
const NODES: u8 = 6;

/// The faults that make a difference where claims lie in this store.
#[must_use]
pub fn faults_over(store: Store) -> Vec<Fault> {
    FAULTS.into_iter().filter(|fault| store == Store::Etcd || !fault.is_of_etcd()).collect()
}

/// Draws a schedule without faults.
#[must_use]
pub fn schedule(seed: u64, store: Store) -> Schedule {
    let dice = Dice::new(seed);
    let leaders = if dice.one_in(4) { Leaders::Two } else { Leaders::One };
    let families = if dice.one_in(3) { Families::Both } else { Families::One };
    let mut steps = vec![Step::Join(1)];
    // Numbers of the machines that were ever there.
    let mut known = vec![1];
    for _ in 0..3 + dice.below(9) {
        steps.push(step(&dice, &mut known));
    }
    Schedule { seed, store, leaders, families, steps, faults: FaultPlan::none() }
}

fn step(dice: &Dice, known: &mut Vec<u8>) -> Step {
    let node = dice.pick(known).copied().unwrap_or(1);
    match dice.below(24) {
        0..=5 => {
            let new = u8::try_from(known.len()).unwrap_or(NODES) + 1;
            if new > NODES {
                return Step::Join(node);
            }
            known.push(new);
            Step::Join(new)
        }
        6 | 7 => Step::Join(node),
        8..=10 => Step::Leave(node),
        11 => Step::Forget(node),
        12..=14 => Step::StartPod(node),
        15 => Step::EndPods(node),
        16 => {
            Step::Pool(*dice.pick(&[Pool::First, Pool::Appended, Pool::Shrunk, Pool::Remasked]).unwrap_or(&Pool::First))
        }
        17 | 18 => {
            let other = dice.pick(known).copied().unwrap_or(1);
            let all = [ByHand::Foreign, ByHand::Free, ByHand::Others(other), ByHand::Emptied, ByHand::Garbage];
            Step::Edit(node, *dice.pick(&all).unwrap_or(&ByHand::Emptied))
        }
        19 => Step::DeleteCiliumNode(node),
        20 => Step::Save(node),
        21 => Step::PutBack(node),
        22 => Step::Kill(*dice.pick(&Replica::ALL).unwrap_or(&Replica::A)),
        _ => Step::Wait(secs(1 + dice.below(40))),
    }
}

/// Draws so many faults at calls of a run.
#[must_use]
pub fn faults(seed: u64, count: u64, store: Store, calls: &[Call]) -> FaultPlan {
    let (dice, faults) = (Dice::new(seed), faults_over(store));
    let mut plan = FaultPlan::none();
    for _ in 0..count {
        let (Some(call), Some(fault)) = (dice.pick(calls), dice.pick(&faults)) else { break };
        if let Some(number) = call.number.filter(|_| fault.concerns(call)) {
            plan = plan.and(number, *fault);
        }
    }
    plan
}
