//! Two operators that serve three nodes from four blocks, in every order of their steps, over the functions that ship.
//!
//! An operator does here what the real one does, in the same order, one read or write at a time; between any two
//! steps it may crash, lose the Lease while it goes on, or lose the answer to a swap (which then took effect, did not,
//! or does later). One that makes no step while the others make theirs is paused, for as long as that; when it goes on,
//! it knows of nothing that happened meanwhile. Time is one bit: a block that rests may leave quarantine at any later
//! moment.

use std::{hash::Hash, sync::Arc};

use basal_ipam::{
    allocator::{Allocator, Batch, Carried, CarriedBlock, Next},
    config::PoolConfig,
    ledger::{CellSwap, FenceAnswer, FenceSeen, LedgerState, SwapAnswer},
    names::TermId,
    prefix::PodCidr,
};
use stateright::{Model, Property};

use crate::{
    cast::{
        self, Budget, Claims, LATECOMER, NODES, OPERATORS, WANDERER, are_disjoint, exists, name, skipped_quarantine,
        uid,
    },
    support::{LIMITS, REST, ipv4, node, secs},
};

/// A node with everything that is stored under its name outside the ledger, and what its agent uses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct Machine {
    generation: u8,
    /// `spec.ipam.podCIDRs` of the CiliumNode, which lives and dies with the Node.
    spec: Option<PodCidr>,
    /// The CiliumNode's resourceVersion.
    resource_version: u8,
    /// The node record in etcd. It stays when the Node goes.
    record: Option<PodCidr>,
    /// The block that the agent gives to pods.
    using: Option<PodCidr>,
}

impl Machine {
    fn exists(&self) -> bool {
        exists(self.generation)
    }
}

/// What an operator is going to write about a node, after what it read.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Work {
    /// Into its CiliumNode: the patch carries generation (uid) and resourceVersion.
    Patch { machine: usize, generation: u8, resource_version: u8, block: PodCidr },
    /// Into its node record.
    Publish { machine: usize, block: PodCidr },
    /// Its node record is taken back.
    Withdraw { machine: usize },
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
enum Operator {
    #[default]
    Standby,
    /// Won the Lease.
    Elected,
    /// Read the fence.
    SawFence(FenceSeen),
    /// Looked at the Lease again and still had it.
    Sure(FenceSeen),
    /// Took the fence.
    Fenced(TermId),
    Leading(Arc<Leader>),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Leader {
    allocator: Allocator,
    /// Sent, not answered.
    sent: Option<Sent>,
    work: Option<Work>,
    /// What became of the last swap is not known: the ledger is read before the next one, and other work goes on.
    reload: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Sent {
    id: basal_ipam::allocator::BatchId,
    swaps: Vec<Swap>,
}

/// [`CellSwap`] with a hash.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Swap {
    expected: basal_ipam::cell::Version,
    new: basal_ipam::cell::Cell,
}

impl Sent {
    fn new(batch: Batch) -> Self {
        let swaps = batch.swaps.into_iter().map(|swap| Swap { expected: swap.expected, new: swap.new }).collect();
        Self { id: batch.id, swaps }
    }

    fn swaps(&self) -> Vec<CellSwap> {
        self.swaps.iter().map(|swap| CellSwap { expected: swap.expected, new: swap.new.clone() }).collect()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    ledger: LedgerState,
    machines: Vec<Machine>,
    operators: Vec<Operator>,
    lease: Option<usize>,
    terms: u64,
    /// A swap whose sender gave it up, still on its way.
    late: Option<(TermId, Sent)>,
    budget: Budget,
    /// A block went from one owner to another, or to nobody, without quarantine.
    broken: bool,
    reused: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Action {
    Join(usize),
    Leave(usize),
    Use(usize),
    Win(usize),
    ReadFence(usize),
    LookAgain(usize),
    TakeFence(usize),
    Begin(usize),
    Send(usize),
    Deliver(usize),
    LoseAnswer(usize),
    LoseRequest(usize),
    DeliverLate,
    Read(usize),
    Write(usize),
    Reload(usize),
    Crash(usize),
}

struct Cluster {
    config: PoolConfig,
    budget: Budget,
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

    /// The owners that the ledger knows, those in quarantine included.
    fn claims(&self) -> Claims {
        cast::claims(self.ledger.cells.values().map(|(_, cell)| cell))
    }

    /// The ledger takes a swap. Notes a change that quarantine should have come before.
    fn commit(&mut self, term: &TermId, swaps: &[CellSwap]) -> SwapAnswer {
        let before = self.claims();
        let answer = self.ledger.commit(term, swaps, LIMITS);
        self.broken |= skipped_quarantine(&before, &self.claims());
        answer
    }

    /// Whether a leader that stood still since it read, or sent, goes on next, while another one leads that granted blocks.
    fn wakes_late(&self) -> bool {
        let fence = &self.ledger.fence;
        let leads = |leader: &Leader| fence.holds(leader.allocator.term()) && leader.allocator.nodes().next().is_some();
        let sleeps =
            |leader: &Leader| !fence.holds(leader.allocator.term()) && (leader.work.is_some() || leader.sent.is_some());
        let all = || (0..OPERATORS).filter_map(|operator| self.leader(operator));
        all().any(leads) && all().any(sleeps)
    }

    fn end_term(&mut self, operator: usize) {
        self.operators[operator] = Operator::Standby;
        if self.lease == Some(operator) {
            self.lease = None;
        }
    }

    /// Reads the ledger after a lost or conflicting swap.
    fn reload(&mut self, operator: usize) {
        let loaded = self.ledger.load();
        let Some(leader) = self.leader_mut(operator) else { return };
        leader.reload = false;
        if leader.allocator.reload(&loaded, secs(0)).next == Next::EndTerm {
            self.end_term(operator);
        }
    }

    /// Whether anything outside the ledger still names the block as this node's.
    fn is_named(&self, machine: usize, at: PodCidr) -> bool {
        let machine = &self.machines[machine];
        [machine.spec, machine.record, machine.using].contains(&Some(at))
    }

    /// One pass over all nodes, as the controller makes it: returns the batch.
    fn plan(&self, operator: usize) -> Option<(Allocator, Batch)> {
        let mut allocator = self.leader(operator)?.allocator.clone();
        for (index, machine) in self.machines.iter().enumerate() {
            let name = name(index);
            if machine.exists() {
                // Refusals are not this model's subject.
                let _granted = allocator.grant(&name, &uid(index, machine.generation), secs(0));
            } else if machine.spec.is_none() {
                let seen = allocator.claims(&name).first().and_then(|claim| claim.block.uid.clone());
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
        let batch = allocator.next_batch(LIMITS)?;
        Some((allocator, batch))
    }
}

impl World {
    /// What the leader's worker does next: it takes back, publishes and patches, node by node. It reads the objects and
    /// claims of a node in one step and writes in another.
    fn next_work(&self, operator: usize) -> Option<Work> {
        let all = || 0..NODES.len();
        all()
            .find_map(|machine| self.to_withdraw(operator, machine))
            .or_else(|| all().find_map(|machine| self.to_publish(operator, machine)))
            .or_else(|| all().find_map(|machine| self.to_patch(operator, machine)))
    }

    /// The CiliumNode lists another block than the one that the ledger holds for this very Node, read at quorum.
    fn to_patch(&self, operator: usize, index: usize) -> Option<Work> {
        let (allocator, machine) = (&self.leader(operator)?.allocator, &self.machines[index]);
        let block = *allocator.confirmed(&name(index)).first()?;
        let mine = machine.exists() && self.holds(index, block);
        let (generation, resource_version) = (machine.generation, machine.resource_version);
        (mine && machine.spec != Some(block)).then_some(Work::Patch {
            machine: index,
            generation,
            resource_version,
            block,
        })
    }

    /// A record is published for the Node that the claim is for, as the leader knows it.
    fn to_publish(&self, operator: usize, index: usize) -> Option<Work> {
        let (allocator, machine) = (&self.leader(operator)?.allocator, &self.machines[index]);
        let block = *allocator.confirmed(&name(index)).first()?;
        let mine = allocator.block(block)?.uid == Some(uid(index, machine.generation));
        (mine && machine.record != Some(block)).then_some(Work::Publish { machine: index, block })
    }

    /// The record of a block that rests is taken back.
    fn to_withdraw(&self, operator: usize, index: usize) -> Option<Work> {
        let (allocator, block) = (&self.leader(operator)?.allocator, self.machines[index].record?);
        let rests = allocator.quarantined().any(|(at, owner)| at == block && owner.as_str() == NODES[index]);
        rests.then_some(Work::Withdraw { machine: index })
    }

    /// Whether the ledger holds a block for this very Node.
    fn holds(&self, index: usize, at: PodCidr) -> bool {
        self.claims().remove(&at).is_some_and(|block| {
            let same = block.uid == Some(uid(index, self.machines[index].generation));
            same && block.node == name(index) && block.state.is_usable()
        })
    }

    /// What the agent may use: the block that its CiliumNode lists, if the ledger holds it for this very Node.
    fn usable(&self, index: usize) -> Option<PodCidr> {
        let machine = &self.machines[index];
        let at = machine.spec?;
        self.holds(index, at).then_some(at)
    }

    /// Writes what was read. `None` when the leader no longer has what the write rests on: it reads again then.
    fn write(&mut self, operator: usize, work: &Work) -> Option<()> {
        let allocator = &self.leader(operator)?.allocator;
        let (index, guard) = match work {
            Work::Patch { machine, generation, resource_version, block } => {
                let target = &mut self.machines[*machine];
                if target.generation == *generation && target.resource_version == *resource_version {
                    target.spec = Some(*block);
                    target.resource_version += 1;
                }
                if *machine != WANDERER
                    && let Some(at) = self.usable(*machine)
                {
                    self.machines[*machine].using = Some(at);
                }
                return Some(());
            }
            Work::Publish { machine, block } => {
                let guard =
                    allocator.guard(&name(*machine)).filter(|_| allocator.confirmed(&name(*machine)) == [*block]);
                (*machine, guard?)
            }
            Work::Withdraw { machine } => (*machine, allocator.quarantine_guard(&name(*machine))?),
        };
        if self.ledger.allows(&guard) {
            self.machines[index].record = match work {
                Work::Publish { block, .. } => Some(*block),
                Work::Withdraw { .. } | Work::Patch { .. } => None,
            };
        } else {
            self.reload(operator);
        }
        Some(())
    }
}

impl Model for Cluster {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World {
            ledger: LedgerState::default(),
            machines: (0..NODES.len())
                .map(|index| Machine { generation: u8::from(index != LATECOMER), ..Machine::default() })
                .collect(),
            operators: vec![Operator::default(); OPERATORS],
            lease: None,
            terms: 0,
            late: None,
            budget: self.budget.clone(),
            broken: false,
            reused: false,
        }]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        for (index, machine) in world.machines.iter().enumerate() {
            if !machine.exists() {
                actions.push(Action::Join(index));
            }
            if machine.exists() && index == WANDERER && world.budget.departures > 0 {
                actions.push(Action::Leave(index));
            }
            if machine.exists() && machine.spec.is_some() && machine.using != machine.spec && index == WANDERER {
                actions.push(Action::Use(index));
            }
        }
        for (index, operator) in world.operators.iter().enumerate() {
            if world.lease != Some(index) && world.budget.elections > 0 && *operator == Operator::Standby {
                actions.push(Action::Win(index));
            }
            if *operator != Operator::Standby && world.budget.crashes > 0 {
                actions.push(Action::Crash(index));
            }
            match operator {
                Operator::Standby => {}
                Operator::Elected => actions.push(Action::ReadFence(index)),
                Operator::SawFence(_) => actions.push(Action::LookAgain(index)),
                Operator::Sure(_) => actions.push(Action::TakeFence(index)),
                Operator::Fenced(_) => actions.push(Action::Begin(index)),
                Operator::Leading(leader) => {
                    if leader.sent.is_some() {
                        actions.push(Action::Deliver(index));
                        if world.budget.losses > 0 {
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
                (machine.spec, machine.using) = (None, None);
            }
            Action::Use(index) => world.machines[index].using = Some(last.usable(index)?),
            Action::Win(index) => {
                world.budget.elections -= 1;
                world.lease = Some(index);
                world.operators[index] = Operator::Elected;
            }
            Action::ReadFence(index) => world.operators[index] = Operator::SawFence(last.ledger.fence.clone()),
            Action::LookAgain(index) => {
                let Operator::SawFence(seen) = &last.operators[index] else { return None };
                let still = last.lease == Some(index);
                world.operators[index] = if still { Operator::Sure(seen.clone()) } else { Operator::Standby };
            }
            Action::TakeFence(index) => {
                let Operator::Sure(seen) = &last.operators[index] else { return None };
                world.terms += 1;
                let term = TermId::from_random(world.terms, 0);
                match world.ledger.take_fence(seen, &term) {
                    FenceAnswer::Taken => world.operators[index] = Operator::Fenced(term),
                    _ => world.end_term(index),
                }
            }
            Action::Begin(index) => {
                let Operator::Fenced(term) = &last.operators[index] else { return None };
                let loaded = last.ledger.load();
                let mut allocator = Allocator::start(term.clone(), self.config.clone(), REST, &loaded, secs(0));
                let carried: Vec<Carried> = (0..NODES.len())
                    .filter_map(|machine| {
                        let at = last.machines[machine].spec?;
                        let uid = Some(uid(machine, last.machines[machine].generation));
                        let live = last.machines[machine].using == Some(at);
                        Some(Carried { node: name(machine), uid, blocks: vec![CarriedBlock { at, live }] })
                    })
                    .collect();
                allocator.adopt(&carried);
                world.operators[index] =
                    Operator::Leading(Arc::new(Leader { allocator, sent: None, work: None, reload: false }));
            }
            Action::Send(index) => {
                let (allocator, batch) = last.plan(index)?;
                let leader = world.leader_mut(index)?;
                leader.allocator = allocator;
                leader.sent = Some(Sent::new(batch));
            }
            Action::Deliver(index) => {
                let leader = world.leader_mut(index)?;
                let (sent, term) = (leader.sent.take()?, leader.allocator.term().clone());
                let answer = world.commit(&term, &sent.swaps());
                match world.leader_mut(index)?.allocator.settle(sent.id, &answer, secs(0)).next {
                    Next::Continue => {}
                    Next::Reload => world.leader_mut(index)?.reload = true,
                    Next::EndTerm => world.end_term(index),
                }
            }
            Action::LoseAnswer(index) | Action::LoseRequest(index) => {
                world.budget.losses -= 1;
                let leader = world.leader_mut(index)?;
                let (sent, term) = (leader.sent.take()?, leader.allocator.term().clone());
                leader.allocator.settle(sent.id, &SwapAnswer::Unknown("lost".into()), secs(0));
                leader.reload = true;
                if matches!(action, Action::LoseAnswer(_)) {
                    let _answer = world.commit(&term, &sent.swaps());
                } else {
                    world.late = Some((term, sent));
                }
            }
            Action::Reload(index) => world.reload(index),
            Action::DeliverLate => {
                let (term, sent) = world.late.take()?;
                let _answer = world.commit(&term, &sent.swaps());
            }
            Action::Read(index) => world.leader_mut(index)?.work = Some(last.next_work(index)?),
            Action::Write(index) => {
                let work = world.leader_mut(index)?.work.take()?;
                world.write(index, &work);
            }
            Action::Crash(index) => {
                world.budget.crashes -= 1;
                // What was sent may be on its way still.
                if let Some(leader) = world.leader_mut(index)
                    && let Some(sent) = leader.sent.take()
                    && world.late.is_none()
                {
                    let term = last.leader(index)?.allocator.term().clone();
                    world.late = Some((term, sent));
                }
                world.operators[index] = Operator::Standby;
                if world.lease == Some(index) {
                    world.lease = None;
                }
            }
        }
        if world == *last {
            return None;
        }
        world.reused |= is_reused(&world, last);
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("no block has two owners", |_, world: &World| {
                let claims = world.claims();
                NODES.iter().enumerate().all(|(index, name)| {
                    let machine = &world.machines[index];
                    [machine.spec, machine.record, machine.using].into_iter().flatten().all(|at| {
                        let others = (0..NODES.len()).filter(|other| *other != index);
                        let claimed = claims.get(&at).is_none_or(|block| block.node == node(name));
                        claimed && !others.into_iter().any(|other| world.is_named(other, at))
                    })
                })
            }),
            Property::always("no block in use is free", |_, world: &World| {
                let claims = world.claims();
                (0..NODES.len()).all(|index| {
                    let machine = &world.machines[index];
                    let using = machine.using.into_iter().all(|at| {
                        claims.get(&at).is_some_and(|block| block.node == name(index) && block.state.is_usable())
                    });
                    using && [machine.spec, machine.record].into_iter().flatten().all(|at| claims.contains_key(&at))
                })
            }),
            Property::always("quarantine comes before another owner", |_, world: &World| !world.broken),
            Property::always("the ledger's blocks are disjoint", |_, world: &World| are_disjoint(&world.claims())),
            Property::sometimes("all nodes use blocks", |_, world: &World| {
                world.machines.iter().all(|machine| machine.using.is_some())
            }),
            Property::sometimes("a block is used by a second node", |_, world: &World| world.reused),
            Property::sometimes("two operators lead", |_, world: &World| {
                world.operators.iter().all(|operator| matches!(operator, Operator::Leading(_)))
            }),
            Property::sometimes("a leader wakes up in another's term, about to write", |_, world: &World| {
                world.wakes_late()
            }),
            Property::sometimes("a late swap takes effect", |_, world: &World| {
                world.late.is_some() && world.claims().len() == 3
            }),
        ]
    }
}

/// A block left the ledger: the next node may get it.
fn is_reused(world: &World, last: &World) -> bool {
    world.claims().len() < last.claims().len()
}

fn explore(budget: Budget) -> usize {
    cast::check(Cluster { config: ipv4(&["10.0.0.0/28"], 30), budget })
}

#[test]
fn a_crash_after_any_step() {
    println!("{} states", explore(Budget { elections: 2, crashes: 1, losses: 0, departures: 1, ends: 0 }));
}

#[test]
fn a_lost_answer_to_any_swap() {
    println!("{} states", explore(Budget { elections: 2, crashes: 0, losses: 1, departures: 1, ends: 0 }));
}
