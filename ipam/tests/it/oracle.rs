//! The allocator against an oracle that knows only a list of blocks and looks through all of it each time.

use std::collections::BTreeMap;

use basal_ipam::{
    allocator::{Carried, CarriedBlock, Counts, StateCounts},
    cell::{Block, BlockState},
    config::PoolConfig,
    ledger::SwapAnswer,
    names::NodeName,
    prefix::{Family, PodCidr},
};
use proptest::prelude::*;

use crate::support::{ONE_CELL, REST, Rig, cidr, dual, ipv4, node, secs, uid};

/// The pools that a run goes through: grown, shrunk, re-masked, moved, of one family or two. The IPv4 ones lie in
/// 10.0.0.0/20; all are small.
fn pools() -> Vec<PoolConfig> {
    vec![
        ipv4(&["10.0.0.0/22"], 25),
        ipv4(&["10.0.0.0/22", "10.0.8.0/24"], 25),
        ipv4(&["10.0.0.0/22"], 26),
        ipv4(&["10.0.0.0/22"], 23),
        ipv4(&["10.0.2.0/23"], 25),
        ipv4(&["10.0.0.0/21"], 24),
        ipv4(&["10.0.1.0/24", "10.0.4.0/22"], 27),
        dual(&["10.0.0.0/22"], 25, &["fd00::/118"], 121),
        dual(&["10.0.2.0/23", "10.0.8.0/24"], 25, &["fd00::/119", "fd00::1:0/120"], 122),
    ]
}

#[derive(Debug, Clone)]
enum Step {
    Grant(u8),
    Release(u8),
    Free(u8),
    Adopt(u8, u8, u8),
    Write,
    Refuse,
    Lose(bool),
    NewTerm(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => any::<u8>().prop_map(Step::Grant),
        4 => any::<u8>().prop_map(Step::Release),
        3 => any::<u8>().prop_map(Step::Free),
        3 => (any::<u8>(), any::<u8>(), 23_u8..=28).prop_map(|(node, at, len)| Step::Adopt(node, at, len)),
        8 => Just(Step::Write),
        1 => Just(Step::Refuse),
        2 => any::<bool>().prop_map(Step::Lose),
        1 => (0..9_u8).prop_map(Step::NewTerm),
    ];
    prop::collection::vec(step, 1..120)
}

fn name(number: u8) -> String {
    format!("n{}", number % 12)
}

/// What the ledger holds.
fn written(rig: &Rig) -> BTreeMap<PodCidr, Block> {
    let cells = rig.ledger.cells.values();
    cells.flat_map(|(_, cell)| cell.blocks().iter().map(|(at, block)| (*at, block.clone()))).collect()
}

/// Every block of the mask in the pool that shares no address with a block in the list.
fn free(config: &PoolConfig, taken: &BTreeMap<PodCidr, Block>) -> Vec<PodCidr> {
    let mut free = Vec::new();
    for (_, pool) in config.families() {
        for cidr in pool.cidrs() {
            let all = (0..cidr.count(pool.mask())).map(|index| cidr.nth(pool.mask(), index));
            free.extend(all.filter(|block| !taken.keys().any(|other| other.overlaps(block))));
        }
    }
    free
}

/// The blocks that the allocator takes for not free: by name, so that the index is compared as well.
fn taken(rig: &Rig) -> BTreeMap<PodCidr, Block> {
    let names: Vec<NodeName> = rig.allocator.nodes().cloned().collect();
    names.iter().flat_map(|name| rig.allocator.claims(name)).map(|claim| (claim.at, claim.block)).collect()
}

fn check(rig: &Rig) -> Result<(), TestCaseError> {
    let (written, taken) = (written(rig), taken(rig));
    let blocks: Vec<&PodCidr> = taken.keys().collect();
    for pair in blocks.windows(2) {
        prop_assert!(!pair[0].overlaps(pair[1]), "{} overlaps {}", pair[0], pair[1]);
    }
    for (at, block) in &written {
        prop_assert!(taken.get(at).is_some_and(|known| known.node == block.node), "{at} was forgotten");
    }
    let cells: Vec<PodCidr> = rig.ledger.cells.keys().map(|id| id.prefix()).collect();
    for pair in cells.windows(2) {
        prop_assert!(!pair[0].overlaps(&pair[1]), "cell {} overlaps {}", pair[0], pair[1]);
    }
    let config = rig.allocator.config();
    let counts = rig.allocator.counts();
    if rig.allocator.problems().is_empty() {
        let free = free(config, &taken);
        for pool in &counts.pools {
            let expected = free.iter().filter(|at| pool.pool.contains(at)).count() as u128;
            prop_assert_eq!(pool.free, expected, "free in {}", pool.pool);
        }
    }
    for state in BlockState::ALL {
        let outside = |at: &PodCidr| !counts.pools.iter().any(|pool| pool.pool.contains(at));
        for pool in &counts.pools {
            let expected = taken.iter().filter(|(at, block)| pool.pool.contains(at) && block.state == state).count();
            prop_assert_eq!(pool.states.get(state), expected as u64);
        }
        let expected = taken.iter().filter(|(at, block)| outside(at) && block.state == state).count();
        prop_assert_eq!(counts.outside.iter().map(|(_, states)| states.get(state)).sum::<u64>(), expected as u64);
    }
    for (at, name) in rig.allocator.quarantined() {
        prop_assert!(written.get(&at).is_some_and(|block| &block.node == name));
    }
    Ok(())
}

fn run(rig: &mut Rig, step: &Step) -> Result<(), TestCaseError> {
    match step {
        Step::Grant(number) => {
            let name = name(*number);
            let had: Vec<PodCidr> =
                taken(rig).into_iter().filter(|(_, b)| b.node == node(&name)).map(|(at, _)| at).collect();
            let free = free(rig.allocator.config(), &taken(rig));
            let families: Vec<Family> = rig.allocator.config().families().map(|(family, _)| family).collect();
            let has = |family: Family| had.iter().any(|at| at.family() == family);
            match rig.grant(&name) {
                Ok(grant) => {
                    // While other blocks of the node are written it is not asked yet which ones it lacks.
                    for family in families.iter().filter(|_| had.is_empty() || grant.confirmed) {
                        prop_assert!(grant.blocks.iter().any(|at| at.family() == *family), "{name} has no {family}");
                    }
                    for at in grant.blocks {
                        let fresh = !has(at.family()) && free.contains(&at);
                        prop_assert!(had.contains(&at) || fresh, "{at} for {name}");
                    }
                }
                Err(refusal) if refusal.reason() == "WriteInProgress" => {}
                Err(refusal) => {
                    let none = |family: &&Family| !has(**family) && free.iter().all(|at| at.family() != **family);
                    let unusable = !rig.allocator.problems().is_empty();
                    let lacks = families.iter().any(|family| !has(*family));
                    prop_assert!(lacks && (families.iter().find(none).is_some() || unusable), "{refusal}");
                }
            }
        }
        Step::Release(number) => {
            let name = name(*number);
            let _released_or_busy = rig.allocator.release(&node(&name), Some(&uid(&name)));
        }
        Step::Free(number) => {
            let due = rig.allocator.due(REST);
            if let Some(at) = due.get(usize::from(*number) % due.len().max(1)) {
                rig.allocator.free(*at, REST).unwrap();
            }
        }
        Step::Adopt(number, at, len) => {
            let at = cidr("10.0.0.0/20").nth(*len, u128::from(*at));
            let (before, name) = (taken(rig), node(&name(*number)));
            let blocks = vec![CarriedBlock { at, live: false }];
            let adoption =
                rig.allocator.adopt(&[Carried { uid: Some(uid(name.as_str())), node: name.clone(), blocks }]);
            let owner = before.get(&at).map(|block| &block.node);
            if owner.is_some() && owner != Some(&name) {
                prop_assert_eq!(adoption.lost[0].refusal.reason(), "PodCIDRAlreadyAllocated");
            } else if owner.is_none() {
                let in_pool = rig.allocator.counts().pools.iter().any(|pool| pool.pool.contains(&at));
                let overlaps = before.keys().any(|other| other.overlaps(&at));
                // Cells of an earlier, narrower mask may be in the way of a wide block.
                let kept = !adoption.kept.is_empty();
                prop_assert!(!kept || (in_pool && !overlaps));
                prop_assert!(kept || !in_pool || overlaps || adoption.lost[0].refusal.reason() == "PodCIDRTooWide");
            }
        }
        Step::Write => rig.write(secs(0)),
        Step::Refuse => {
            if let Some(batch) = rig.allocator.next_batch(rig.limits) {
                let refusal = basal_ipam::ledger::SwapRefusal::Store("full".into());
                rig.allocator.settle(batch.id, &SwapAnswer::Refused(refusal), secs(0));
            }
        }
        Step::Lose(took_effect) => {
            if let Some(batch) = rig.allocator.next_batch(rig.limits) {
                if *took_effect {
                    prop_assert!(matches!(rig.commit(&batch), SwapAnswer::Done(_)));
                }
                rig.allocator.settle(batch.id, &SwapAnswer::Unknown("lost".into()), secs(0));
                rig.reload(secs(0));
            }
        }
        Step::NewTerm(pool) => rig.next_term(pools().swap_remove(usize::from(*pool))),
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]
    #[test]
    fn agrees_with_a_list_of_blocks(steps in steps(), pool in 0..9_usize, one_cell in any::<bool>()) {
        let mut rig = Rig::new(pools().swap_remove(pool));
        if one_cell {
            rig.limits = ONE_CELL;
        }
        for step in &steps {
            run(&mut rig, step)?;
            check(&rig)?;
        }
        // What was asked for is written in the end, and a new leader sees the same.
        rig.reload(secs(0));
        rig.write(secs(0));
        prop_assert_eq!(written(&rig), taken(&rig));
        // A family that is not enabled any more stands in the counts until its last block is free.
        let counts = |rig: &Rig| {
            let Counts { pools, mut outside } = rig.allocator.counts();
            outside.retain(|(_, states)| *states != StateCounts::default());
            (pools, outside)
        };
        let (config, before) = (rig.allocator.config().clone(), counts(&rig));
        rig.next_term(config);
        rig.write(secs(0));
        prop_assert_eq!(counts(&rig), before);
        // Whatever was left in halves is completed forward, for nodes that can have all of their families.
        let pending = |rig: &Rig| -> Vec<(PodCidr, Block)> {
            written(rig).into_iter().filter(|(_, block)| block.state == BlockState::Pending).collect()
        };
        for (at, block) in pending(&rig) {
            let granted = rig.allocator.grant(&block.node, &uid(block.node.as_str()), secs(0)).is_ok();
            rig.write(secs(0));
            let now = written(&rig).remove(&at);
            prop_assert_eq!(now.as_ref().map(|now| &now.node), Some(&block.node));
            prop_assert_eq!(now.is_some_and(|now| now.state.is_usable()), granted, "{}", at);
        }
    }
}
