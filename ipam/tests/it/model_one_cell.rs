//! Two operators over a store that writes one record at a time, in every order of their steps: two families, four blocks,
//! three nodes. What [`crate::model`] says of crashes and lost answers holds here too; how a fence is won is its subject.
//!
//! The store is that of custom resources, step by step: a term is put into the fence, then every cell is stamped, unless the
//! term before noted its end with all its writes answered; a swap looks at the fence first, a new cell is put on the list
//! while the fence holds the term, and the write itself compares nothing but the cell's version. An agent uses what its
//! CiliumNode lists and confirms; the two are written one after the other.

mod store;

use std::{hash::Hash, sync::Arc};

use basal_ipam::{
    allocator::{Allocator, BatchId, Carried, CarriedBlock, Next},
    cell::{BlockState, CellId, Version},
    config::PoolConfig,
    ledger::SwapAnswer,
    names::TermId,
    prefix::PodCidr,
};
use stateright::{Model, Property};

use self::store::{Store, Write};
use crate::{
    cast::{self, Budget, LATECOMER, NODES, OPERATORS, WANDERER, are_disjoint, exists, name, skipped_quarantine, uid},
    support::{ONE_CELL, REST, dual, node, secs},
};

/// A block of each family, or none.
type Blocks = [Option<PodCidr>; 2];

/// A node with its CiliumNode, which lives and dies with it, and what its agent uses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct Machine {
    generation: u8,
    spec: Blocks,
    confirmed: Blocks,
    resource_version: u8,
    using: Blocks,
}

impl Machine {
    fn exists(&self) -> bool {
        exists(self.generation)
    }

    /// What the agent may use.
    fn usable(&self) -> Blocks {
        if self.spec == self.confirmed { self.spec } else { Blocks::default() }
    }
}

/// How far a swap is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Stage {
    /// The fence is looked at next.
    Begun,
    /// The cell is new and has to be put on the list.
    Unlisted,
    /// Only the write is left.
    OnItsWay,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Sent {
    id: BatchId,
    stage: Stage,
    write: Write,
}

/// What an operator is going to write about a node, after what it read.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Work {
    machine: usize,
    generation: u8,
    resource_version: u8,
    blocks: Blocks,
    /// Into the status; else into the specification, and then into the status.
    confirms: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
enum Operator {
    #[default]
    Standby,
    /// Took the fence. With nothing to stamp when the term before had ended.
    Fenced(TermId, bool),
    /// Stamps these cells, at these versions.
    Stamping(TermId, Vec<(CellId, Version)>),
    Leading(Arc<Leader>),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Leader {
    allocator: Allocator,
    sent: Option<Sent>,
    work: Option<Work>,
    reload: bool,
    /// Whether a write got no answer.
    unanswered: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    store: Store,
    machines: Vec<Machine>,
    operators: Vec<Operator>,
    terms: u64,
    /// A write whose sender gave it up, still on its way.
    late: Option<Write>,
    budget: Budget,
    broken: bool,
    overtaken: bool,
    reused: bool,
    took_over_a_half: bool,
    /// A term had nothing to stamp.
    spared: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Action {
    Join(usize),
    Leave(usize),
    Use(usize),
    TakeFence(usize),
    List(usize),
    Stamp(usize),
    Begin(usize),
    Send(usize),
    Check(usize),
    PutOnList(usize),
    Deliver(usize),
    LoseAnswer(usize),
    LoseRequest(usize),
    DeliverLate,
    Read(usize),
    Write(usize),
    Reload(usize),
    End(usize),
    Crash(usize),
}

struct Cluster {
    config: PoolConfig,
    budget: Budget,
}

fn pair(blocks: &[PodCidr]) -> Option<Blocks> {
    match blocks {
        [v4, v6] => Some([Some(*v4), Some(*v6)]),
        _ => None,
    }
}

impl World {
    fn leader(&self, operator: usize) -> Option<&Leader> {
        match &self.operators[operator] {
            Operator::Leading(leader) => Some(leader),
            _ => None,
        }
    }

    fn leader_mut(&mut self, operator: usize) -> Option<&mut Leader> {
        match &mut self.operators[operator] {
            Operator::Leading(leader) => Some(Arc::make_mut(leader)),
            _ => None,
        }
    }

    /// A write reaches the store. Notes a change that quarantine should have come before, and one to a cell that the leader
    /// of a later term knows.
    fn deliver(&mut self, write: &Write) -> SwapAnswer {
        let before = self.store.claims();
        let answer = self.store.write(write);
        self.broken |= skipped_quarantine(&before, &self.store.claims());
        let mut leaders = (0..OPERATORS).filter_map(|operator| self.leader(operator));
        let was_there = write.expected != Version::ABSENT;
        self.overtaken |= matches!(answer, SwapAnswer::Done(_))
            && was_there
            && leaders.any(|leader| *leader.allocator.term() > write.term);
        answer
    }

    fn settle(&mut self, operator: usize, batch: BatchId, answer: &SwapAnswer) -> Option<()> {
        let leader = self.leader_mut(operator)?;
        match leader.allocator.settle(batch, answer, secs(0)).next {
            Next::Continue => {}
            Next::Reload => leader.reload = true,
            Next::EndTerm => self.operators[operator] = Operator::Standby,
        }
        Some(())
    }

    /// Whether anything outside the ledger still names the block as this node's.
    fn is_named(&self, machine: usize, at: PodCidr) -> bool {
        let machine = &self.machines[machine];
        [machine.spec, machine.confirmed, machine.using].concat().contains(&Some(at))
    }

    /// One pass over all nodes, as the controller makes it.
    fn plan(&self, operator: usize) -> Option<(Allocator, Sent)> {
        let mut allocator = self.leader(operator)?.allocator.clone();
        for (index, machine) in self.machines.iter().enumerate() {
            let name = name(index);
            if machine.exists() {
                // Refusals are not this model's subject.
                let _granted = allocator.grant(&name, &uid(index, machine.generation), secs(0));
            } else {
                let held = allocator.claims(&name).into_iter().filter(|c| c.block.state != BlockState::Quarantined);
                let seen = held.into_iter().find_map(|claim| claim.block.uid);
                let _released = allocator.release(&name, seen.as_ref());
            }
        }
        for at in allocator.due(REST) {
            let owner = allocator.block(at).map(|block| block.node.clone());
            let index = NODES.iter().position(|name| owner == Some(node(name)));
            if index.is_some_and(|index| !self.is_named(index, at)) {
                let _freed = allocator.free(at, REST);
            }
        }
        let batch = allocator.next_batch(ONE_CELL)?;
        let swap = batch.swaps.into_iter().next()?;
        let write = Write { term: allocator.term().clone(), expected: swap.expected, new: swap.new };
        Some((allocator, Sent { id: batch.id, stage: Stage::Begun, write }))
    }

    /// What the leader's worker does next. It looks at the objects and the fence in one step and writes in another.
    fn next_work(&self, operator: usize) -> Option<Work> {
        let leader = self.leader(operator)?;
        (0..NODES.len()).find_map(|machine| {
            let seen = &self.machines[machine];
            // What a grant would answer without anything to write, without the cost of asking.
            let blocks = seen.exists().then(|| leader.allocator.confirmed(&name(machine)))?;
            let own = Some(uid(machine, seen.generation));
            let granted = |at: &PodCidr| leader.allocator.block(*at).is_some_and(|block| block.uid == own);
            let blocks = pair(&blocks).filter(|_| blocks.iter().all(granted))?;
            let (generation, resource_version) = (seen.generation, seen.resource_version);
            let confirms = seen.spec == blocks;
            let done = confirms && seen.confirmed == blocks;
            (!done).then_some(Work { machine, generation, resource_version, blocks, confirms })
        })
    }

    /// Writes what was read, if the object is still the same.
    fn write(&mut self, operator: usize) -> Option<()> {
        let work = self.leader_mut(operator)?.work.take()?;
        let machine = &mut self.machines[work.machine];
        if machine.generation != work.generation || machine.resource_version != work.resource_version {
            return Some(());
        }
        machine.resource_version += 1;
        if work.confirms {
            machine.confirmed = work.blocks;
            if work.machine != WANDERER {
                machine.using = machine.usable();
            }
        } else {
            machine.spec = work.blocks;
            let resource_version = machine.resource_version;
            self.leader_mut(operator)?.work = Some(Work { resource_version, confirms: true, ..work });
        }
        Some(())
    }

    /// One step of what was sent; `None` when this is not the step.
    fn step_of(&self, operator: usize) -> Option<Action> {
        let sent = self.leader(operator)?.sent.as_ref()?;
        Some(match sent.stage {
            Stage::Begun => Action::Check(operator),
            Stage::Unlisted => Action::PutOnList(operator),
            Stage::OnItsWay => Action::Deliver(operator),
        })
    }

    fn look_at_fence(&mut self, operator: usize) -> Option<()> {
        let leader = self.leader(operator)?;
        let (term, sent) = (leader.allocator.term().clone(), leader.sent.clone()?);
        let id = sent.write.new.id();
        if !self.store.holds(&term) {
            self.leader_mut(operator)?.sent = None;
            return self.settle(operator, sent.id, &SwapAnswer::FenceLost);
        }
        let new = sent.write.expected == Version::ABSENT;
        if new && self.store.list.iter().any(|cell| *cell != id && cell.prefix().overlaps(&id.prefix())) {
            self.leader_mut(operator)?.sent = None;
            return self.settle(operator, sent.id, &SwapAnswer::Conflict([id].into()));
        }
        let listed = !new || self.store.list.contains(&id);
        self.leader_mut(operator)?.sent.as_mut()?.stage = if listed { Stage::OnItsWay } else { Stage::Unlisted };
        Some(())
    }

    fn put_on_list(&mut self, operator: usize) -> Option<()> {
        let leader = self.leader(operator)?;
        let (term, sent) = (leader.allocator.term().clone(), leader.sent.clone()?);
        // The patch is at the resourceVersion at which the fence held the term.
        if !self.store.holds(&term) {
            self.leader_mut(operator)?.sent = None;
            return self.settle(operator, sent.id, &SwapAnswer::FenceLost);
        }
        self.store.list.insert(sent.write.new.id());
        self.leader_mut(operator)?.sent.as_mut()?.stage = Stage::OnItsWay;
        Some(())
    }

    fn begin(&mut self, operator: usize, term: &TermId, config: &PoolConfig) {
        let loaded = self.store.load();
        self.took_over_a_half |= self.store.claims().values().any(|block| block.state == BlockState::Pending);
        let mut allocator = Allocator::start(term.clone(), config.clone(), REST, &loaded, secs(0));
        let carried = self.machines.iter().enumerate().filter(|(_, machine)| machine.exists());
        let carried: Vec<Carried> = carried
            .map(|(index, machine)| {
                let blocks = machine.spec.iter().flatten();
                let blocks =
                    blocks.map(|at| CarriedBlock { at: *at, live: machine.using.contains(&Some(*at)) }).collect();
                Carried { node: name(index), uid: Some(uid(index, machine.generation)), blocks }
            })
            .collect();
        allocator.adopt(&carried);
        let leader = Leader { allocator, sent: None, work: None, reload: false, unanswered: false };
        self.operators[operator] = Operator::Leading(Arc::new(leader));
    }
}

impl Model for Cluster {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World {
            store: Store::default(),
            machines: (0..NODES.len())
                .map(|index| Machine { generation: u8::from(index != LATECOMER), ..Machine::default() })
                .collect(),
            operators: vec![Operator::default(); OPERATORS],
            terms: 0,
            late: None,
            budget: self.budget.clone(),
            broken: false,
            overtaken: false,
            reused: false,
            took_over_a_half: false,
            spared: false,
        }]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        for (index, machine) in world.machines.iter().enumerate() {
            // Before anybody left there is no block for it.
            let in_time = index != LATECOMER || world.budget.departures == 0;
            if !machine.exists() && in_time {
                actions.push(Action::Join(index));
            }
            if machine.exists() && index == WANDERER {
                if world.budget.departures > 0 && machine.spec != Blocks::default() {
                    actions.push(Action::Leave(index));
                }
                if machine.using != machine.usable() {
                    actions.push(Action::Use(index));
                }
            }
        }
        for (index, operator) in world.operators.iter().enumerate() {
            if *operator == Operator::Standby {
                if world.budget.elections > 0 {
                    actions.push(Action::TakeFence(index));
                }
                continue;
            }
            if world.budget.crashes > 0 {
                actions.push(Action::Crash(index));
            }
            match operator {
                Operator::Standby => {}
                Operator::Fenced(..) => actions.push(Action::List(index)),
                Operator::Stamping(_, cells) if cells.is_empty() => actions.push(Action::Begin(index)),
                Operator::Stamping(..) => actions.push(Action::Stamp(index)),
                Operator::Leading(leader) => {
                    // Stopped in order, between two batches.
                    if world.budget.ends > 0 && leader.sent.is_none() && leader.work.is_none() {
                        actions.push(Action::End(index));
                    }
                    if let Some(step) = world.step_of(index) {
                        actions.push(step);
                        if matches!(step, Action::Deliver(_)) && world.budget.losses > 0 {
                            actions.push(Action::LoseAnswer(index));
                            if world.late.is_none() {
                                actions.push(Action::LoseRequest(index));
                            }
                        }
                    } else if leader.work.is_some() {
                        actions.push(Action::Write(index));
                    } else if world.next_work(index).is_some() {
                        actions.push(Action::Read(index));
                    } else if leader.reload {
                        actions.push(Action::Reload(index));
                    } else {
                        actions.push(Action::Send(index));
                    }
                }
            }
        }
        if world.late.is_some() {
            actions.push(Action::DeliverLate);
        }
    }

    fn next_state(&self, last: &World, action: Action) -> Option<World> {
        let mut world = last.clone();
        match action {
            Action::Join(index) => world.machines[index].generation += 1,
            Action::Leave(index) => {
                world.budget.departures -= 1;
                let machine = &mut world.machines[index];
                machine.generation += 1;
                (machine.spec, machine.confirmed, machine.using) = Default::default();
            }
            Action::Use(index) => world.machines[index].using = last.machines[index].usable(),
            Action::TakeFence(index) => {
                world.budget.elections -= 1;
                world.terms += 1;
                let term = TermId::from_random(world.terms, 0);
                let ended = world.store.has_ended();
                world.spared |= ended;
                world.store.fence = Some(term.clone());
                world.operators[index] = Operator::Fenced(term, ended);
            }
            Action::List(index) => {
                let Operator::Fenced(term, ended) = &last.operators[index] else { return None };
                let cells = last.store.cells.iter().filter(|_| !ended);
                let cells = cells.map(|(id, (version, _))| (*id, *version)).collect();
                world.operators[index] = Operator::Stamping(term.clone(), cells);
            }
            Action::Stamp(index) => {
                let Operator::Stamping(term, cells) = &mut world.operators[index] else { return None };
                let (id, expected) = *cells.first()?;
                let stored = world.store.cells.get_mut(&id)?;
                if stored.0 == expected {
                    world.store.revision += 1;
                    stored.0 = Version(world.store.revision);
                    cells.remove(0);
                } else if world.store.fence.as_ref() == Some(term) {
                    // A former leader wrote: read again.
                    cells[0].1 = stored.0;
                } else {
                    world.operators[index] = Operator::Standby;
                }
            }
            Action::Begin(index) => {
                let Operator::Stamping(term, _) = &last.operators[index] else { return None };
                if last.store.holds(term) {
                    world.begin(index, term, &self.config);
                } else {
                    world.operators[index] = Operator::Standby;
                }
            }
            Action::Send(index) => {
                let (allocator, sent) = last.plan(index)?;
                let leader = world.leader_mut(index)?;
                (leader.allocator, leader.sent) = (allocator, Some(sent));
            }
            Action::Check(index) => world.look_at_fence(index)?,
            Action::PutOnList(index) => world.put_on_list(index)?,
            Action::Deliver(index) => {
                let sent = world.leader_mut(index)?.sent.take()?;
                let answer = world.deliver(&sent.write);
                world.settle(index, sent.id, &answer)?;
            }
            Action::LoseAnswer(index) | Action::LoseRequest(index) => {
                world.budget.losses -= 1;
                let sent = world.leader_mut(index)?.sent.take()?;
                world.leader_mut(index)?.unanswered = true;
                world.settle(index, sent.id, &SwapAnswer::Unknown("lost".into()))?;
                if matches!(action, Action::LoseAnswer(_)) {
                    let _answer = world.deliver(&sent.write);
                } else {
                    world.late = Some(sent.write);
                }
            }
            Action::Reload(index) => {
                let leader = world.leader_mut(index)?;
                leader.reload = false;
                if leader.allocator.reload(&last.store.load(), secs(0)).next == Next::EndTerm {
                    world.operators[index] = Operator::Standby;
                }
            }
            Action::DeliverLate => {
                let write = world.late.take()?;
                let _answer = world.deliver(&write);
            }
            Action::Read(index) => {
                if last.store.holds(last.leader(index)?.allocator.term()) {
                    world.leader_mut(index)?.work = Some(last.next_work(index)?);
                } else {
                    world.operators[index] = Operator::Standby;
                }
            }
            Action::Write(index) => world.write(index)?,
            Action::End(index) => {
                world.budget.ends -= 1;
                let leader = last.leader(index)?;
                let term = leader.allocator.term();
                if last.store.holds(term) && !leader.unanswered {
                    world.store.ended = Some(term.clone());
                }
                world.operators[index] = Operator::Standby;
            }
            Action::Crash(index) => {
                world.budget.crashes -= 1;
                // What was sent may be on its way still.
                if let Some(sent) = world.leader_mut(index).and_then(|leader| leader.sent.take())
                    && sent.stage == Stage::OnItsWay
                    && world.late.is_none()
                {
                    world.late = Some(sent.write);
                }
                world.operators[index] = Operator::Standby;
            }
        }
        if world == *last {
            return None;
        }
        world.reused |= world.store.claims().len() < last.store.claims().len();
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("no block has two owners", |_, world: &World| {
                let claims = world.store.claims();
                (0..NODES.len()).all(|index| {
                    let machine = &world.machines[index];
                    [machine.spec, machine.confirmed, machine.using].into_iter().flatten().flatten().all(|at| {
                        let claimed = claims.get(&at).is_some_and(|block| block.node == name(index));
                        claimed && !(0..NODES.len()).any(|other| other != index && world.is_named(other, at))
                    })
                })
            }),
            Property::always("what is confirmed or in use is claimed for use", |_, world: &World| {
                let claims = world.store.claims();
                world.machines.iter().all(|machine| {
                    [machine.confirmed, machine.using]
                        .into_iter()
                        .flatten()
                        .flatten()
                        .all(|at| claims.get(&at).is_some_and(|block| block.state.is_usable()))
                })
            }),
            Property::always("both families or none", |_, world: &World| {
                world.machines.iter().all(|machine| machine.using[0].is_some() == machine.using[1].is_some())
            }),
            Property::always("quarantine comes before another owner", |_, world: &World| !world.broken),
            Property::always("nobody changes what a later leader knows", |_, world: &World| !world.overtaken),
            Property::always("the ledger's blocks are disjoint", |_, world: &World| {
                are_disjoint(&world.store.claims())
            }),
            Property::sometimes("two nodes use blocks", |_, world: &World| {
                world.machines.iter().filter(|machine| machine.using[0].is_some()).count() == 2
            }),
            Property::sometimes("a block is free again", |cluster: &Self, world: &World| {
                world.reused || cluster.budget.departures == 0
            }),
            Property::sometimes("two operators lead", |_, world: &World| {
                world.operators.iter().all(|operator| matches!(operator, Operator::Leading(_)))
            }),
            Property::sometimes("a leader takes over a half", |_, world: &World| world.took_over_a_half),
            Property::sometimes("a term follows one that ended", |cluster: &Self, world: &World| {
                world.spared || cluster.budget.ends == 0
            }),
            Property::sometimes("a write comes late", |cluster: &Self, world: &World| {
                cluster.budget.losses + cluster.budget.crashes == 0 || world.late.is_some()
            }),
        ]
    }
}

fn explore(budget: Budget) -> usize {
    cast::check(Cluster { config: dual(&["10.0.0.0/29"], 30, &["fd00::/125"], 126), budget })
}

#[test]
fn a_crash_after_any_step() {
    println!("{} states", explore(Budget { elections: 2, crashes: 1, losses: 0, departures: 1, ends: 0 }));
}

#[test]
fn a_lost_answer_to_any_write() {
    println!("{} states", explore(Budget { elections: 2, crashes: 0, losses: 1, departures: 0, ends: 0 }));
}

#[test]
fn an_end_in_order_among_lost_answers() {
    println!("{} states", explore(Budget { elections: 2, crashes: 0, losses: 1, departures: 0, ends: 1 }));
}
