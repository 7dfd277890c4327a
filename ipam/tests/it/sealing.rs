//! The seal of a ledger that is left, in every order of steps: what is granted out of the old ledger is in the new one when
//! that becomes the active one, whoever wakes up late and whatever is called off and asked for again meanwhile.
//!
//! The steps are those of the operator (its `moving` module): each is one request to one of two servers. The object that says
//! which store is the active one has a version that counts every write.

use basal_ipam::{
    cell::{Block, BlockState, Cell, CellId},
    ledger::{CellSwap, FenceAnswer, FenceSeen, LedgerState, SwapAnswer},
    names::TermId,
    transfer::transfer,
};
use stateright::{Checker, Model, Property};

use crate::support::{LIMITS, cidr, node};

/// What stands in the two servers.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Servers {
    old: LedgerState,
    new: LedgerState,
    /// Version, whether a move is asked for, whether the new store is the active one.
    object: (u64, bool, bool),
}

/// A leader of the old store: the step that comes next, with what it saw.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Leader {
    ReadFence,
    TakeFence(FenceSeen),
    /// And whether it took the fence from a seal.
    ReadObject(bool),
    Grant,
    Done,
}

/// A mover, likewise.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Mover {
    ReadObject,
    ReadFence,
    Seal(FenceSeen),
    /// In custom resources, the old ones or the new ones, a fence stands in the object: a mover writes it.
    TouchObject,
    Copy,
    ReadObjectAgain,
    LookAtSeal(u64),
    Activate(u64),
    Done,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct State {
    servers: Servers,
    leaders: Vec<Leader>,
    movers: Vec<Mover>,
    /// Requests and withdrawals that the administrator has left.
    turns: u8,
    /// Claims of the old ledger that the new one lacked when it became the active one, or that came afterwards.
    lost: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Leader(usize),
    Mover(usize),
    Admin,
}

struct Sealing {
    /// Whether a leader looks at the object after it took the fence.
    leaders_look_again: bool,
    /// Whether the fence of the old ledger stands in the object, so that who takes it writes that.
    fence_in_object: bool,
}

fn term(leader: usize) -> TermId {
    TermId::from_random(1, leader as u64)
}

fn seal(mover: usize) -> TermId {
    TermId::seal(2, mover as u64)
}

fn copy(mover: usize) -> TermId {
    TermId::from_random(3, mover as u64)
}

/// The one cell, in which each leader that granted has a block.
fn grant(old: &LedgerState, leader: usize) -> CellSwap {
    let id = CellId::new(cidr("10.0.0.0/24"));
    let empty = || Cell::new(id, cidr("10.0.0.0/16"), 28).unwrap();
    let mut new = old.cells.get(&id).map_or_else(empty, |(_, cell)| cell.clone());
    let block = Block { state: BlockState::Granted, node: node(&format!("n{leader}")), uid: None };
    new.set(cidr(&format!("10.0.0.{}/28", leader * 16)), block).unwrap();
    CellSwap { expected: old.version(id), new }
}

impl State {
    fn lacks(&self) -> bool {
        transfer(&self.servers.old.load(), &self.servers.new.load()) != Ok(Vec::new())
    }

    fn lead(&mut self, at: usize, rules: &Sealing) {
        let Sealing { leaders_look_again: look_again, fence_in_object } = *rules;
        let Servers { old, object, .. } = &mut self.servers;
        let (_, asked, moved) = *object;
        self.leaders[at] = match self.leaders[at].clone() {
            // Over a seal only when nobody asks for a move.
            Leader::ReadFence if moved || asked && (old.fence.is_sealed() || !fence_in_object) => Leader::Done,
            Leader::ReadFence => Leader::TakeFence(old.fence.clone()),
            Leader::TakeFence(seen) => match old.take_fence(&seen, &term(at)) {
                FenceAnswer::Taken => {
                    object.0 += u64::from(fence_in_object);
                    if look_again { Leader::ReadObject(seen.is_sealed()) } else { Leader::Grant }
                }
                _ => Leader::Done,
            },
            Leader::ReadObject(sealed) if moved || asked && (sealed || !fence_in_object) => Leader::Done,
            Leader::ReadObject(_) => Leader::Grant,
            Leader::Grant => {
                let granted = old.commit(&term(at), &[grant(old, at)], LIMITS);
                self.lost |= moved && matches!(granted, SwapAnswer::Done(_));
                Leader::Done
            }
            Leader::Done => Leader::Done,
        };
    }

    fn go_on(&mut self, at: usize) {
        let Servers { old, new, object } = &mut self.servers;
        let (version, asked, moved) = *object;
        self.movers[at] = match self.movers[at].clone() {
            Mover::ReadObject if asked && !moved => Mover::ReadFence,
            Mover::ReadFence => Mover::Seal(old.fence.clone()),
            Mover::Seal(seen) => match old.take_fence(&seen, &seal(at)) {
                FenceAnswer::Taken => Mover::TouchObject,
                _ => Mover::Done,
            },
            Mover::TouchObject if asked && !moved => {
                *object = (version + 1, asked, moved);
                let seen = new.fence.clone();
                assert_eq!(new.take_fence(&seen, &copy(at)), FenceAnswer::Taken);
                Mover::Copy
            }
            Mover::Copy => match transfer(&old.load(), &new.load()) {
                Ok(swaps) if old.fence.holds(&seal(at)) && !swaps.is_empty() => {
                    match new.commit(&copy(at), &swaps, LIMITS) {
                        SwapAnswer::Done(_) => Mover::ReadObjectAgain,
                        _ => Mover::Done,
                    }
                }
                _ => Mover::ReadObjectAgain,
            },
            Mover::ReadObjectAgain if asked && !moved => Mover::LookAtSeal(version),
            Mover::LookAtSeal(version) if old.fence.holds(&seal(at)) => Mover::Activate(version),
            Mover::Activate(seen) => {
                if seen == version {
                    *object = (version + 1, false, true);
                    self.lost |= self.lacks();
                }
                Mover::Done
            }
            _ => Mover::Done,
        };
    }
}

impl Model for Sealing {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let servers = Servers { old: LedgerState::default(), new: LedgerState::default(), object: (0, false, false) };
        let (leaders, movers) = (vec![Leader::ReadFence; 2], vec![Mover::ReadObject; 2]);
        vec![State { servers, leaders, movers, turns: 3, lost: false }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let leaders = state.leaders.iter().enumerate().filter(|(_, one)| **one != Leader::Done);
        actions.extend(leaders.map(|(at, _)| Action::Leader(at)));
        // A mover that nobody asked has not begun.
        let begun = |one: &Mover| *one != Mover::ReadObject || state.servers.object.1;
        let movers = state.movers.iter().enumerate().filter(|(_, one)| **one != Mover::Done && begun(one));
        actions.extend(movers.map(|(at, _)| Action::Mover(at)));
        if state.turns > 0 && !state.servers.object.2 {
            actions.push(Action::Admin);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Leader(at) => state.lead(at, self),
            Action::Mover(at) => state.go_on(at),
            Action::Admin => {
                let (version, asked, moved) = state.servers.object;
                state.servers.object = (version + 1, !asked, moved);
                state.turns -= 1;
            }
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("no claim is left behind", |_, state: &State| !state.lost),
            Property::sometimes("claims are moved", |_, state: &State| {
                state.servers.object.2 && !state.servers.new.cells.is_empty()
            }),
            Property::sometimes("a move that is called off is followed by a grant", |_, state: &State| {
                state.turns == 1 && state.leaders[1] == Leader::Done && !state.servers.old.cells.is_empty()
            }),
        ]
    }
}

#[test]
fn no_claim_is_left_behind_in_any_order_of_steps() {
    for fence_in_object in [false, true] {
        Sealing { leaders_look_again: true, fence_in_object }.checker().spawn_bfs().join().assert_properties();
    }
}

/// The model would notice.
#[test]
fn a_leader_that_does_not_look_again_loses_a_claim() {
    let checker = Sealing { leaders_look_again: false, fence_in_object: false }.checker().spawn_bfs().join();
    assert!(checker.discovery("no claim is left behind").is_some());
}
