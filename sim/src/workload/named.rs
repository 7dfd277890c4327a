//! Schedules that are always the same.

use std::time::Duration;

use super::{ByHand, Families, Leaders, Pool, Replica, Schedule, Step, Store};
use crate::fault::FaultPlan;

fn schedule(seed: u64, leaders: Leaders, families: Families, steps: Vec<Step>) -> Schedule {
    Schedule { seed, store: Store::Etcd, leaders, families, steps, faults: FaultPlan::none() }
}

const fn wait(seconds: u64) -> Step {
    Step::Wait(Duration::from_secs(seconds))
}

/// The life of a block: granted, used, released, at rest, granted again. Small, so that every single fault can be tried at
/// every one of its calls.
#[must_use]
pub fn life_of_a_block() -> Schedule {
    use Step::{Join, Leave, StartPod};
    let steps = vec![Join(2), Join(1), wait(2), StartPod(1), Leave(2), Join(3)];
    schedule(1, Leaders::One, Families::Both, steps)
}

/// Nodes return under their old name: while their pods run, and after a while.
#[must_use]
pub fn returns() -> Schedule {
    use Step::{EndPods, Forget, Join, Leave, StartPod};
    let steps = vec![
        Join(1),
        Join(2),
        wait(2),
        StartPod(1),
        StartPod(2),
        Forget(1),
        Join(1),
        wait(3),
        StartPod(1),
        Leave(2),
        wait(5),
        Join(2),
        Forget(1),
        wait(30),
        EndPods(1),
    ];
    schedule(2, Leaders::One, Families::One, steps)
}

/// The pool is used up, grown, cut and given another mask.
#[must_use]
pub fn pools() -> Schedule {
    use Step::{Join, Leave, StartPod};
    let steps = vec![
        Join(1),
        Join(2),
        Join(3),
        Join(4),
        wait(2),
        StartPod(1),
        Join(5),
        Step::Pool(Pool::Appended),
        Step::Pool(Pool::Shrunk),
        Leave(2),
        Step::Pool(Pool::Remasked),
        Join(6),
    ];
    schedule(3, Leaders::One, Families::One, steps)
}

/// Somebody edits, deletes and puts back CiliumNodes.
#[must_use]
pub fn by_hand() -> Schedule {
    use Step::{DeleteCiliumNode, Edit, Join, PutBack, Save, StartPod};
    let steps = vec![
        Join(1),
        Join(2),
        wait(2),
        Save(1),
        StartPod(1),
        Edit(1, ByHand::Foreign),
        Edit(1, ByHand::Others(2)),
        Edit(2, ByHand::Emptied),
        DeleteCiliumNode(1),
        PutBack(1),
        Edit(2, ByHand::Free),
        Edit(2, ByHand::Garbage),
    ];
    schedule(4, Leaders::One, Families::Both, steps)
}

/// Two leaders throughout.
#[must_use]
pub fn two_leaders() -> Schedule {
    use Step::{Join, Leave, StartPod};
    let steps = vec![Join(1), Join(2), StartPod(1), Leave(2), Join(3), Step::Kill(Replica::A), Join(2)];
    schedule(5, Leaders::Two, Families::One, steps)
}

/// A node leaves at once, and others want all there is, its block too. Small, so that a late wake-up can be tried at every
/// one of its calls.
#[must_use]
pub fn full_pool() -> Schedule {
    use Step::{Join, Leave};
    let steps = vec![Join(1), Leave(1), Join(2), Join(3), Join(4), Join(5)];
    schedule(6, Leaders::One, Families::One, steps)
}

/// All of them, with their names.
#[must_use]
pub fn all() -> [(&'static str, Schedule); 6] {
    [
        ("a full pool", full_pool()),
        ("the life of a block", life_of_a_block()),
        ("returns", returns()),
        ("pools", pools()),
        ("by hand", by_hand()),
        ("two leaders", two_leaders()),
    ]
}
