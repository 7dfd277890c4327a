//! The allocator alone: what a grant, a release and an adoption cost with so many blocks in the ledger.
//!
//! Each measures a change as the operator makes it: planned, put into a batch with others, and settled.

#![expect(clippy::unwrap_used, reason = "a bench that cannot go on fails")]

use std::{hint::black_box, time::Duration};

use basal_ipam::{
    allocator::{Allocator, Carried, CarriedBlock},
    config::{FamilySettings, PoolConfig, PoolSettings},
    ledger::{LedgerState, Limits, SwapAnswer},
    names::{NodeName, NodeUid, TermId},
    prefix::PodCidr,
};
use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};

const LIMITS: Limits = Limits { cells: 127, bytes: 1 << 20 };
const SIZES: [u32; 3] = [1 << 10, 1 << 16, 1 << 20];
const REST: Duration = Duration::from_secs(300);

/// Changes in one batch.
const CHANGES: u32 = 64;

fn pool() -> PoolConfig {
    let ipv4 = FamilySettings { enabled: true, cidrs: vec!["10.0.0.0/8".into()], mask_size: 30 };
    PoolConfig::new(&PoolSettings { ipv4, ipv6: FamilySettings::default() }).unwrap()
}

fn block(index: u32) -> PodCidr {
    pool().families().next().map(|(_, pool)| pool.cidrs()[0].nth(pool.mask(), u128::from(index))).unwrap()
}

fn name(index: u32) -> NodeName {
    NodeName::new(&format!("node-{index}")).unwrap()
}

fn uid(index: u32) -> NodeUid {
    NodeUid::new(&format!("6b1c0e4e-7f2c-4d39-9c2e-{index:012x}")).unwrap()
}

fn carried(index: u32) -> Carried {
    let blocks = vec![CarriedBlock { at: block(index), live: false }];
    Carried { node: name(index), uid: Some(uid(index)), blocks }
}

fn write(ledger: &mut LedgerState, allocator: &mut Allocator) {
    while let Some(batch) = allocator.next_batch(LIMITS) {
        let answer = ledger.commit(&allocator.term().clone(), &batch.swaps, LIMITS);
        assert!(matches!(answer, SwapAnswer::Done(_)), "{answer:?}");
        allocator.settle(batch.id, &answer, Duration::ZERO);
    }
}

/// A ledger with so many granted blocks, and an allocator over it.
fn filled(blocks: u32) -> (LedgerState, Allocator) {
    let mut ledger = LedgerState::default();
    let term = TermId::from_random(1, 1);
    let _taken = ledger.take_fence(&ledger.fence.clone(), &term);
    let mut allocator = Allocator::start(term, pool(), REST, &ledger.load(), Duration::ZERO);
    let all: Vec<Carried> = (0..blocks).map(carried).collect();
    assert!(allocator.adopt(&all).lost.is_empty());
    write(&mut ledger, &mut allocator);
    (ledger, allocator)
}

fn allocator(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("allocator");
    group.sample_size(10);
    for blocks in SIZES {
        let (ledger, full) = filled(blocks);
        let (mut grown, mut granting) = (ledger.clone(), full.clone());
        let mut next = blocks;
        group.bench_function(BenchmarkId::new("grant", blocks), |bencher| {
            bencher.iter(|| {
                for _ in 0..CHANGES {
                    black_box(granting.grant(&name(next), &uid(next), Duration::ZERO)).unwrap();
                    next += 1;
                }
                write(&mut grown, &mut granting);
            });
        });
        let (mut shrunk, mut releasing) = (ledger.clone(), full.clone());
        let mut first = 0;
        group.bench_function(BenchmarkId::new("release and take back", blocks), |bencher| {
            bencher.iter(|| {
                let some = (0..CHANGES).map(|index| (first + index) % blocks);
                for index in some.clone() {
                    black_box(releasing.release(&name(index), Some(&uid(index)))).unwrap();
                }
                write(&mut shrunk, &mut releasing);
                for index in some {
                    black_box(releasing.grant(&name(index), &uid(index), Duration::ZERO)).unwrap();
                }
                write(&mut shrunk, &mut releasing);
                first += CHANGES;
            });
        });
        let loaded = ledger.load();
        let all: Vec<Carried> = (0..blocks).map(carried).collect();
        group.bench_function(BenchmarkId::new("start and adopt all", blocks), |bencher| {
            bencher.iter_batched(
                || TermId::from_random(2, 2),
                |term| {
                    let mut allocator = Allocator::start(term, pool(), REST, &loaded, Duration::ZERO);
                    assert!(allocator.adopt(&all).lost.is_empty());
                    allocator
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, allocator);
criterion_main!(benches);
