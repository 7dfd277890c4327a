//! The allocator alone: what a grant, a release and an adoption cost with so many blocks in the ledger.
//!
//! Each measures a change as the operator makes it: planned, put into a batch with others, and settled. The figures also
//! go to `target/bench/ipam.json`.

#![expect(clippy::unwrap_used, reason = "a bench that cannot go on fails")]

use std::{fs, hint::black_box, path::PathBuf, process, time::Duration};

use anyhow::Context as _;
use basal_e2e::{
    bench::{self, Row},
    process::usage,
    say::say,
};
use basal_ipam::{
    allocator::{Allocator, Carried, CarriedBlock},
    config::{FamilySettings, PoolConfig, PoolSettings},
    ledger::{LedgerState, Limits, SwapAnswer},
    names::{NodeName, NodeUid, TermId},
    prefix::PodCidr,
};
use criterion::{BatchSize, BenchmarkId, Criterion};
use serde_json::Value;

const LIMITS: Limits = Limits { cells: 127, bytes: 1 << 20 };
const SIZES: [u32; 3] = [1 << 10, 1 << 16, 1 << 20];
const REST: Duration = Duration::from_secs(300);

/// Changes in one batch.
const CHANGES: u32 = 64;

const GROUP: &str = "allocator";
const GRANT: &str = "grant";
const RELEASE: &str = "release and take back";
const ADOPT: &str = "start and adopt all";

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
    let mut group = criterion.benchmark_group(GROUP);
    group.sample_size(10);
    for blocks in SIZES {
        let (ledger, full) = filled(blocks);
        let (mut grown, mut granting) = (ledger.clone(), full.clone());
        let mut next = blocks;
        group.bench_function(BenchmarkId::new(GRANT, blocks), |bencher| {
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
        group.bench_function(BenchmarkId::new(RELEASE, blocks), |bencher| {
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
        group.bench_function(BenchmarkId::new(ADOPT, blocks), |bencher| {
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

/// Memory of an allocator over so many blocks, in bytes for each: what a copy of it adds to the process.
fn memory(blocks: u32) -> anyhow::Result<f64> {
    let (_ledger, full) = filled(blocks);
    // The first copy takes up what was freed meanwhile, so that the second one has to be new memory.
    let first = full.clone();
    let before = usage(process::id())?.rss;
    let second = full.clone();
    let after = usage(process::id())?.rss;
    black_box((first, second));
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    Ok(after.saturating_sub(before) as f64 / f64::from(blocks))
}

/// The mean that Criterion found, in microseconds for each block.
fn found(what: &str, blocks: u32, each: u32) -> anyhow::Result<f64> {
    let path = criterion_folder().join(format!("{GROUP}/{what}/{blocks}/new/estimates.json"));
    let text = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    let estimates: Value = serde_json::from_slice(&text)?;
    let mean = estimates.pointer("/mean/point_estimate").and_then(Value::as_f64);
    Ok(mean.with_context(|| format!("{} holds no mean", path.display()))? / 1e3 / f64::from(each))
}

fn criterion_folder() -> PathBuf {
    bench::folder().join("criterion")
}

/// The figures, each held against the smallest ledger's.
fn rows(memory: &[(u32, f64)]) -> anyhow::Result<Vec<Row>> {
    let smallest = SIZES[0];
    let baseline = format!("{smallest} blocks");
    let mut rows = Vec::new();
    for (what, method) in [
        (GRANT, "mean by Criterion; 64 grants planned, swapped in a ledger in memory, and settled, for each grant"),
        (RELEASE, "the same; 64 blocks released and granted again to their nodes, for each of them"),
        (ADOPT, "the same; an allocator started from the ledger and told what every node carries, for each block"),
    ] {
        let each = |blocks| if what == ADOPT { blocks } else { CHANGES };
        let at = |blocks| found(what, blocks, each(blocks));
        for blocks in SIZES {
            let row = Row::new(format!("{what}, {blocks} blocks"), at(blocks)?, "µs", method);
            rows.push(row.against(&baseline, at(smallest)?));
        }
    }
    let method = "VmRSS that a copy of the allocator adds, for each block; names and uids of nodes are part of it";
    for (blocks, bytes) in memory {
        rows.push(Row::new(format!("memory, {blocks} blocks"), *bytes, "bytes", method));
    }
    Ok(rows)
}

fn main() -> anyhow::Result<()> {
    // First, while the process has freed little. A thousand blocks are fewer pages than the counter's error.
    let memory: Vec<(u32, f64)> =
        SIZES[1..].iter().map(|blocks| Ok((*blocks, memory(*blocks)?))).collect::<anyhow::Result<_>>()?;
    let mut criterion = Criterion::default().output_directory(&criterion_folder()).configure_from_args();
    allocator(&mut criterion);
    criterion.final_summary();
    let rows = rows(&memory)?;
    say(bench::table(&rows));
    say(format!("written to {}", bench::write("ipam", &rows)?.display()));
    Ok(())
}
