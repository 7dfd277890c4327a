//! What [`Ledger`] promises: to do what [`LedgerState`] does.

use std::{collections::BTreeMap, sync::Arc};

use basal_ipam::{
    cell::{Block, BlockState, Cell, CellId, Version},
    ledger::{
        CellSwap, FenceAnswer, FenceSeen, Ledger, LedgerChange, LedgerError, LedgerState, Loaded, StoredCell,
        SwapAnswer, SwapRefusal,
    },
    names::{NodeName, TermId},
    prefix::PodCidr,
};
use basal_runtime::env::{Env as _, SeededEnv};
use futures::stream::BoxStream;

use super::{Case, Departure, Verdict, cases as case_list, holds, next, read, same};

/// Steps of the case that compares with the pure ledger.
const STEPS: u64 = 300;

/// Two operators' views of one empty ledger.
#[expect(missing_debug_implementations, reason = "holds trait objects")]
pub struct LedgerFixture {
    one: Arc<dyn Ledger>,
    other: Arc<dyn Ledger>,
}

impl LedgerFixture {
    /// Both must reach the same ledger, which must be empty.
    #[must_use]
    pub fn new(one: Arc<dyn Ledger>, other: Arc<dyn Ledger>) -> Self {
        Self { one, other }
    }

    /// Puts a term into the fence.
    async fn term(&self, number: u64) -> Verdict<TermId> {
        let (seen, term) = (read("begin", self.one.begin().await)?, term_id(number));
        same("take the fence", self.one.take_fence(&seen, &term).await, FenceAnswer::Taken)?;
        Ok(term)
    }

    async fn load(&self) -> Verdict<Loaded> {
        read("load", self.other.load().await)
    }

    /// Swaps, which must be done, in as many steps as the store needs; answers the version of each cell.
    async fn swap(&self, term: &TermId, batch: &[CellSwap]) -> Verdict<Vec<Version>> {
        let mut all = Vec::new();
        for part in batch.chunks(self.one.limits().cells) {
            match self.one.swap(term, part).await {
                SwapAnswer::Done(versions) => {
                    let of = |swap: &CellSwap| versions.get(&swap.new.id()).copied();
                    all.extend(part.iter().filter_map(of));
                }
                other => return Err(Departure(format!("swap: {other:?}"))),
            }
        }
        same("versions", all.len(), batch.len())?;
        Ok(all)
    }

    async fn swap_one(&self, term: &TermId, swap: CellSwap) -> Verdict<Version> {
        let versions = self.swap(term, &[swap]).await?;
        versions.into_iter().next().ok_or_else(|| Departure("no version".to_owned()))
    }

    /// Whether the store writes so many cells at once.
    fn takes(&self, cells: usize) -> bool {
        self.one.limits().cells >= cells
    }
}

/// The suite.
#[must_use]
pub fn cases() -> Vec<Case<LedgerFixture>> {
    case_list![
        an_empty_ledger_has_no_fence_and_no_cells,
        a_fence_that_was_seen_is_taken_once,
        a_swap_without_a_fence_is_refused,
        a_swap_of_an_earlier_term_is_refused,
        a_swapped_cell_is_there_for_all,
        a_cell_at_another_version_conflicts_and_nothing_is_written,
        a_lost_fence_counts_before_a_conflict,
        a_sealed_ledger_refuses_every_swap,
        a_batch_must_fit,
        a_watch_begins_where_the_load_ended,
        a_watch_tells_of_fence_and_cells_in_order,
        a_random_run_goes_as_in_the_pure_ledger,
    ]
}

fn term_id(number: u64) -> TermId {
    TermId::from_random(0, number)
}

/// The cell 10.`number`.0.0/16.
fn cell_id(number: u8) -> Verdict<CellId> {
    read("a prefix", format!("10.{number}.0.0/16").parse().map(CellId::new))
}

/// A cell in which `node` has the first block.
fn cell(number: u8, node: &str) -> Verdict<Cell> {
    let pool: PodCidr = read("a prefix", "10.0.0.0/8".parse())?;
    let mut cell = read("a cell", Cell::new(cell_id(number)?, pool, 24))?;
    let block = Block { state: BlockState::Granted, node: read("a name", NodeName::new(node))?, uid: None };
    read("a block", cell.set(read("a prefix", format!("10.{number}.0.0/24").parse())?, block))?;
    Ok(cell)
}

fn swap_of(number: u8, expected: Version, node: &str) -> Verdict<CellSwap> {
    Ok(CellSwap { expected, new: cell(number, node)? })
}

async fn an_empty_ledger_has_no_fence_and_no_cells(f: &LedgerFixture) -> Verdict {
    let loaded = f.load().await?;
    same("fence", &loaded.fence, &FenceSeen::default())?;
    same("cells", loaded.cells.len(), 0)?;
    same("fence at the begin of a term", read("begin", f.one.begin().await)?, FenceSeen::default())?;
    same("fence alone", read("read the fence", f.one.read_fence().await)?, FenceSeen::default())
}

async fn a_fence_that_was_seen_is_taken_once(f: &LedgerFixture) -> Verdict {
    let seen = read("read the fence", f.one.read_fence().await)?;
    same("first", f.one.take_fence(&seen, &term_id(1)).await, FenceAnswer::Taken)?;
    same("second", f.other.take_fence(&seen, &term_id(2)).await, FenceAnswer::Lost)?;
    let seen = read("read the fence", f.other.read_fence().await)?;
    holds("the fence holds the first term", seen.holds(&term_id(1)))?;
    same("with a fresh look", f.other.take_fence(&seen, &term_id(3)).await, FenceAnswer::Taken)?;
    same("with the old look", f.one.take_fence(&seen, &term_id(4)).await, FenceAnswer::Lost)?;
    holds("the fence holds the third term", f.load().await?.fence.holds(&term_id(3)))
}

async fn a_swap_without_a_fence_is_refused(f: &LedgerFixture) -> Verdict {
    let batch = [swap_of(0, Version::ABSENT, "a")?];
    same("swap", f.one.swap(&term_id(1), &batch).await, SwapAnswer::FenceLost)?;
    same("cells", f.load().await?.cells.len(), 0)
}

async fn a_swap_of_an_earlier_term_is_refused(f: &LedgerFixture) -> Verdict {
    let first = f.term(1).await?;
    f.term(2).await?;
    same("swap", f.one.swap(&first, &[swap_of(0, Version::ABSENT, "a")?]).await, SwapAnswer::FenceLost)?;
    same("cells", f.load().await?.cells.len(), 0)
}

async fn a_swapped_cell_is_there_for_all(f: &LedgerFixture) -> Verdict {
    let term = f.term(1).await?;
    let before = f.load().await?.mark;
    let first = f.swap(&term, &[swap_of(0, Version::ABSENT, "a")?, swap_of(1, Version::ABSENT, "a")?]).await?;
    let second = f.swap_one(&term, swap_of(1, first[1], "b")?).await?;
    holds("versions grow", second > first[1])?;
    let loaded = f.load().await?;
    let wanted = BTreeMap::from([
        (cell_id(0)?, StoredCell { version: first[0], cell: Ok(cell(0, "a")?) }),
        (cell_id(1)?, StoredCell { version: second, cell: Ok(cell(1, "b")?) }),
    ]);
    same("cells", &loaded.cells, &wanted)?;
    same("strays", loaded.strays, Vec::<String>::new())?;
    same("store", loaded.mark.store, before.store)?;
    holds("the mark grows", loaded.mark.revision > before.revision)
}

async fn a_cell_at_another_version_conflicts_and_nothing_is_written(f: &LedgerFixture) -> Verdict {
    let term = f.term(1).await?;
    let first = f.swap(&term, &[swap_of(0, Version::ABSENT, "a")?, swap_of(1, Version::ABSENT, "a")?]).await?;
    f.swap_one(&term, swap_of(1, first[1], "b")?).await?;
    let before = f.load().await?;
    if f.takes(3) {
        // Of these the first is current, the second old, the third really new.
        let batch = [swap_of(0, first[0], "c")?, swap_of(1, first[1], "c")?, swap_of(2, Version::ABSENT, "c")?];
        let stale = [cell_id(1)?].into();
        same("swap", f.one.swap(&term, &batch).await, SwapAnswer::Conflict(stale))?;
        let batch = [swap_of(0, Version::ABSENT, "c")?, swap_of(1, Version::ABSENT, "c")?];
        let stale = [cell_id(0)?, cell_id(1)?].into();
        same("swap of new cells", f.one.swap(&term, &batch).await, SwapAnswer::Conflict(stale))?;
    }
    for (what, number, expected) in
        [("an old cell", 1, first[1]), ("a cell that is not new", 0, Version::ABSENT), ("no cell", 7, first[0])]
    {
        let stale = [cell_id(number)?].into();
        let answer = f.one.swap(&term, &[swap_of(number, expected, "c")?]).await;
        same(&format!("swap of {what}"), answer, SwapAnswer::Conflict(stale))?;
    }
    same("cells", f.load().await?.cells, before.cells)
}

async fn a_lost_fence_counts_before_a_conflict(f: &LedgerFixture) -> Verdict {
    let term = f.term(1).await?;
    f.swap_one(&term, swap_of(0, Version::ABSENT, "a")?).await?;
    f.term(2).await?;
    same("swap", f.one.swap(&term, &[swap_of(0, Version::ABSENT, "b")?]).await, SwapAnswer::FenceLost)
}

async fn a_sealed_ledger_refuses_every_swap(f: &LedgerFixture) -> Verdict {
    let term = f.term(1).await?;
    f.swap_one(&term, swap_of(0, Version::ABSENT, "a")?).await?;
    let (seen, seal) = (read("begin", f.other.begin().await)?, TermId::seal(0, 2));
    same("seal", f.other.take_fence(&seen, &seal).await, FenceAnswer::Taken)?;
    holds("the fence is sealed", read("read the fence", f.one.read_fence().await)?.is_sealed())?;
    let loaded = f.load().await?;
    let version = loaded.cells.get(&cell_id(0)?).map_or(Version::ABSENT, |stored| stored.version);
    for swap in [swap_of(0, version, "b")?, swap_of(1, Version::ABSENT, "b")?] {
        for ledger in [&f.one, &f.other] {
            same("swap", ledger.swap(&term, std::slice::from_ref(&swap)).await, SwapAnswer::FenceLost)?;
        }
    }
    same("take the fence by an old look", f.one.take_fence(&seen, &term_id(3)).await, FenceAnswer::Lost)?;
    same("contents", f.load().await?.cells, loaded.cells)?;
    // Called off: a term that saw the seal begins over it.
    let term = f.term(4).await?;
    let version = f.load().await?.cells.get(&cell_id(0)?).map_or(Version::ABSENT, |stored| stored.version);
    f.swap_one(&term, swap_of(0, version, "c")?).await.map(drop)
}

async fn a_batch_must_fit(f: &LedgerFixture) -> Verdict {
    let term = f.term(1).await?;
    let most = u8::try_from(f.one.limits().cells).unwrap_or(u8::MAX);
    let batch = |cells: u8| (0..cells).map(|i| swap_of(i, Version::ABSENT, "a")).collect::<Verdict<Vec<_>>>();
    let twice = vec![swap_of(0, Version::ABSENT, "a")?, swap_of(0, Version::ABSENT, "b")?];
    for bad in [Vec::new(), twice, batch(most.saturating_add(1))?] {
        let answer = f.one.swap(&term, &bad).await;
        holds("refused", matches!(answer, SwapAnswer::Refused(SwapRefusal::Batch(_))))?;
    }
    f.swap(&term, &batch(most)?).await?;
    same("cells", f.load().await?.cells.len(), usize::from(most))
}

type Watch = BoxStream<'static, Result<LedgerChange, LedgerError>>;

async fn change(watch: &mut Watch) -> Verdict<LedgerChange> {
    read("watch", next("watch", watch).await?)
}

async fn a_watch_begins_where_the_load_ended(f: &LedgerFixture) -> Verdict {
    let term = f.term(1).await?;
    let first = f.swap_one(&term, swap_of(0, Version::ABSENT, "a")?).await?;
    let mark = f.load().await?.mark;
    let second = f.swap_one(&term, swap_of(0, first, "b")?).await?;
    let wanted = LedgerChange::Cell(cell_id(0)?, StoredCell { version: second, cell: Ok(cell(0, "b")?) });
    same("change", change(&mut f.other.watch(mark)).await?, wanted)
}

/// Cells come in order. A store that keeps fence and cells in records of different kinds may tell of the fence earlier or
/// later.
async fn a_watch_tells_of_fence_and_cells_in_order(f: &LedgerFixture) -> Verdict {
    let mut watch = f.other.watch(f.load().await?.mark);
    let term = f.term(1).await?;
    let versions = f.swap(&term, &[swap_of(1, Version::ABSENT, "a")?, swap_of(0, Version::ABSENT, "a")?]).await?;
    let (mut fences, mut cells) = (Vec::new(), Vec::new());
    for place in 0..3 {
        match change(&mut watch).await? {
            LedgerChange::Fence(fence) => {
                holds("the fence comes first", place == 0 || !f.takes(2))?;
                fences.push(fence.value);
            }
            other => cells.push(other),
        }
    }
    same("fences", fences, vec![Some(term.as_str().to_owned())])?;
    let cell = |i, version| Ok(LedgerChange::Cell(cell_id(i)?, StoredCell { version, cell: Ok(cell(i, "a")?) }));
    let mut wanted = vec![cell(1, versions[0])?, cell(0, versions[1])?];
    if !f.takes(2) {
        // A list at the start of the watch is in the order of names, and what is in it was written before.
        cells.sort_by_key(|change| matches!(change, LedgerChange::Cell(id, _) if Ok(*id) == cell_id(0)));
        wanted.sort_by_key(|change| matches!(change, LedgerChange::Cell(id, _) if Ok(*id) == cell_id(0)));
    }
    same("cells", cells, wanted)
}

/// The same run against [`LedgerState`]: versions differ, everything else must not.
async fn a_random_run_goes_as_in_the_pure_ledger(f: &LedgerFixture) -> Verdict {
    let random = SeededEnv::new(7);
    let draw = |below: u64| random.random_u64() % below;
    let mut twin = Twin::default();
    for step in 0..STEPS {
        let ledger = if draw(2) == 0 { &f.one } else { &f.other };
        match draw(10) {
            0 => {
                let seen = read("begin", ledger.begin().await)?;
                same("fence", &seen.value, &twin.state.fence.value)?;
                twin.looks.push((seen, twin.state.fence.clone()));
            }
            1 => {
                let Some((real, pure)) = twin.looks.get(usize::try_from(draw(4)).unwrap_or(0)).cloned() else {
                    continue;
                };
                let term = term_id(step);
                same("take", ledger.take_fence(&real, &term).await, twin.state.take_fence(&pure, &term))?;
                twin.take_versions(&read("load", ledger.load().await)?);
                twin.terms.push(term);
                twin.looks.clear();
            }
            _ => {
                let last = twin.terms.len().saturating_sub(1);
                // Mostly the current term, sometimes one before.
                let index = if draw(5) == 0 { usize::try_from(draw(last as u64 + 1)).unwrap_or(0) } else { last };
                let term = twin.terms.get(index).cloned().unwrap_or_else(|| term_id(u64::MAX));
                let (real, pure) = twin.batch(draw, ledger.limits().cells)?;
                let wanted = twin.state.commit(&term, &pure, ledger.limits());
                let got = ledger.swap(&term, &real).await;
                twin.compare(got, wanted)?;
            }
        }
    }
    let loaded = f.load().await?;
    let contents =
        |loaded: &Loaded| -> Vec<_> { loaded.cells.iter().map(|(id, stored)| (*id, stored.cell.clone())).collect() };
    same("cells at the end", contents(&loaded), contents(&twin.state.load()))?;
    holds("the run wrote something", !loaded.cells.is_empty())
}

/// The pure ledger beside the real one.
#[derive(Default)]
struct Twin {
    state: LedgerState,
    /// Fences that were read: in the real ledger, in the pure one.
    looks: Vec<(FenceSeen, FenceSeen)>,
    terms: Vec<TermId>,
    /// Versions of each cell: in the real ledger, in the pure one, oldest first.
    versions: BTreeMap<CellId, Vec<(Version, Version)>>,
}

impl Twin {
    /// Takes the versions that cells have in the real ledger: a term may give them new ones as it begins.
    fn take_versions(&mut self, loaded: &Loaded) {
        for (id, stored) in &loaded.cells {
            if let Some((real, _)) = self.versions.get_mut(id).and_then(|known| known.last_mut()) {
                *real = stored.version;
            }
        }
    }

    /// A batch of one to three cells (as far as the store takes them) for each ledger, mostly at the current versions.
    fn batch(&self, draw: impl Fn(u64) -> u64, most: usize) -> Verdict<(Vec<CellSwap>, Vec<CellSwap>)> {
        let (mut real, mut pure) = (Vec::new(), Vec::new());
        let first = draw(6);
        for offset in 0..=draw(3).min(most as u64 - 1) {
            let number = u8::try_from((first + offset) % 6).unwrap_or(0);
            let new = cell(number, &format!("n{}", draw(1000)))?;
            let known = self.versions.get(&cell_id(number)?).map_or(&[][..], Vec::as_slice);
            let back = if draw(6) == 0 { draw(3) } else { 0 };
            let place = known.len().checked_sub(1 + usize::try_from(back).unwrap_or(0));
            let (in_real, in_pure) =
                place.and_then(|place| known.get(place)).copied().unwrap_or((Version::ABSENT, Version::ABSENT));
            real.push(CellSwap { expected: in_real, new: new.clone() });
            pure.push(CellSwap { expected: in_pure, new });
        }
        Ok((real, pure))
    }

    fn compare(&mut self, got: SwapAnswer, wanted: SwapAnswer) -> Verdict {
        match (got, wanted) {
            (SwapAnswer::Done(real), SwapAnswer::Done(pure)) => {
                same("cells", real.keys().collect::<Vec<_>>(), pure.keys().collect::<Vec<_>>())?;
                for ((cell, real), pure) in real.into_iter().zip(pure.into_values()) {
                    self.versions.entry(cell).or_default().push((real, pure));
                }
                Ok(())
            }
            (got, wanted) => same("swap", got, wanted),
        }
    }
}
