//! A ledger in memory (the pure semantics of the port) with an allocator over it.

use std::time::Duration;

use basal_ipam::{
    allocator::{Allocator, Batch, Grant, Next, Refusal, Settled},
    config::{FamilySettings, PoolConfig, PoolSettings},
    ledger::{LedgerState, Limits, SwapAnswer},
    names::{NodeName, NodeUid, TermId},
    prefix::PodCidr,
};

pub(crate) const LIMITS: Limits = Limits { cells: 127, bytes: 1 << 20 };
/// Of a store that writes one cell at a time.
pub(crate) const ONE_CELL: Limits = Limits { cells: 1, ..LIMITS };
pub(crate) const REST: Duration = Duration::from_secs(300);

pub(crate) fn cidr(text: &str) -> PodCidr {
    text.parse().unwrap()
}

pub(crate) fn node(name: &str) -> NodeName {
    NodeName::new(name).unwrap()
}

/// A uid for a node, the same each time.
pub(crate) fn uid(name: &str) -> NodeUid {
    NodeUid::new(&format!("uid-{name}")).unwrap()
}

pub(crate) fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

pub(crate) fn family(cidrs: &[&str], mask_size: u8) -> FamilySettings {
    FamilySettings { enabled: true, cidrs: cidrs.iter().map(|&cidr| cidr.to_owned()).collect(), mask_size }
}

pub(crate) fn ipv4(cidrs: &[&str], mask: u8) -> PoolConfig {
    PoolConfig::new(&PoolSettings { ipv4: family(cidrs, mask), ipv6: FamilySettings::default() }).unwrap()
}

pub(crate) fn dual(v4: &[&str], mask4: u8, v6: &[&str], mask6: u8) -> PoolConfig {
    PoolConfig::new(&PoolSettings { ipv4: family(v4, mask4), ipv6: family(v6, mask6) }).unwrap()
}

#[derive(Debug, Clone)]
pub(crate) struct Rig {
    pub(crate) ledger: LedgerState,
    pub(crate) allocator: Allocator,
    pub(crate) limits: Limits,
    terms: u64,
}

impl Rig {
    pub(crate) fn new(config: PoolConfig) -> Self {
        Self::over(LedgerState::default(), config)
    }

    /// Over a store that writes one cell at a time.
    pub(crate) fn one_cell(config: PoolConfig) -> Self {
        Self { limits: ONE_CELL, ..Self::new(config) }
    }

    /// A first term over a ledger.
    pub(crate) fn over(mut ledger: LedgerState, config: PoolConfig) -> Self {
        let allocator = begin(&mut ledger, config, 1, secs(0));
        Self { ledger, allocator, limits: LIMITS, terms: 1 }
    }

    /// The next leader's term, under this pool.
    pub(crate) fn next_term(&mut self, config: PoolConfig) {
        self.terms += 1;
        self.allocator = begin(&mut self.ledger, config, self.terms, secs(0));
    }

    pub(crate) fn grant(&mut self, name: &str) -> Result<Grant, Refusal> {
        self.allocator.grant(&node(name), &uid(name), secs(0))
    }

    /// Grants and writes; answers the blocks.
    pub(crate) fn serve(&mut self, name: &str) -> Vec<String> {
        self.grant(name).unwrap();
        self.write(secs(0));
        self.held(name)
    }

    /// Releases and writes.
    pub(crate) fn drop(&mut self, name: &str, now: Duration) {
        self.allocator.release(&node(name), Some(&uid(name))).unwrap();
        self.write(now);
    }

    /// Writes everything that waits.
    pub(crate) fn write(&mut self, now: Duration) {
        while self.write_once(now) {}
    }

    /// Writes one batch; whether there was one.
    pub(crate) fn write_once(&mut self, now: Duration) -> bool {
        let Some(batch) = self.allocator.next_batch(self.limits) else { return false };
        let answer = self.commit(&batch);
        assert!(matches!(answer, SwapAnswer::Done(_)), "{answer:?}");
        assert_eq!(self.allocator.settle(batch.id, &answer, now).next, Next::Continue);
        true
    }

    pub(crate) fn commit(&mut self, batch: &Batch) -> SwapAnswer {
        self.ledger.commit(&self.allocator.term().clone(), &batch.swaps, self.limits)
    }

    /// What the ledger holds: block, node and state.
    pub(crate) fn written(&self) -> Vec<String> {
        let blocks = self.ledger.cells.values().flat_map(|(_, cell)| cell.blocks());
        blocks.map(|(at, block)| format!("{at} {} {}", block.node, block.state.as_str())).collect()
    }

    pub(crate) fn reload(&mut self, now: Duration) -> Settled {
        self.allocator.reload(&self.ledger.load(), now)
    }

    /// The node's confirmed blocks as texts.
    pub(crate) fn held(&self, name: &str) -> Vec<String> {
        self.allocator.confirmed(&node(name)).iter().map(ToString::to_string).collect()
    }
}

pub(crate) fn begin(ledger: &mut LedgerState, config: PoolConfig, term: u64, now: Duration) -> Allocator {
    let term = TermId::from_random(term, 0);
    let _taken = ledger.take_fence(&ledger.fence.clone(), &term);
    Allocator::start(term, config, REST, &ledger.load(), now)
}
