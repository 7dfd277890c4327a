//! How an agent looks its own claim up and follows it: without the ledger as a whole, and without knowing how large
//! cells are.

use std::sync::Arc;

use basal_ipam::{
    cell::{Block, Cell, CellError, CellId, Version},
    ledger::LedgerError,
    prefix::PodCidr,
};
use basal_runtime::outcome::Outcome;
use futures::{
    StreamExt as _, future,
    stream::{self, BoxStream},
};

use super::keys::LedgerKeys;
use crate::kv::{Header, Kv, MAX_TXN_OPS, Op, OpAnswer, Range, Txn, WatchEvent};

/// What the ledger says of one block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimSeen {
    /// The store's state when it was read.
    pub header: Header,
    /// The cell around the block and its version; `None` when there is no cell, hence no claim.
    pub cell: Option<(CellId, Version)>,
    /// The claim of exactly this block; `None` when it is free.
    pub block: Option<Block>,
}

/// Why a claim could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClaimError {
    /// etcd did not answer.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The cell is not readable: nothing is known of the block.
    #[error("cell {cell} of the ledger: {error}")]
    Cell {
        /// Which cell.
        cell: CellId,
        /// What is wrong with it.
        error: CellError,
    },
}

/// Reads, at quorum, what the ledger says of a block: one transaction that gets every key that could be its cell's.
///
/// # Errors
/// See [`ClaimError`].
pub async fn read_claim(kv: &Arc<dyn Kv>, keys: &LedgerKeys, block: PodCidr) -> Result<ClaimSeen, ClaimError> {
    let candidates: Vec<CellId> = CellId::candidates(block).collect();
    let mut seen = ClaimSeen { header: Header::default(), cell: None, block: None };
    for some in candidates.chunks(MAX_TXN_OPS) {
        let gets = some.iter().map(|cell| Op::Get(Range::one(keys.cell(*cell)))).collect();
        let answer = match kv.txn(Txn { when: Vec::new(), then: gets, or_else: Vec::new() }).await {
            Outcome::Done(answer) => answer,
            Outcome::Refused(refusal) => return Err(super::read_refused(&refusal).into()),
            Outcome::Unknown(why) => return Err(LedgerError::Unavailable(why).into()),
        };
        seen.header = answer.header;
        for (cell, answer) in some.iter().zip(answer.answers) {
            let OpAnswer::Get(range) = answer else { continue };
            let Some(kv) = range.kvs.into_iter().next() else { continue };
            let contents =
                Cell::from_json(*cell, &kv.value).map_err(|error| ClaimError::Cell { cell: *cell, error })?;
            if let Some((other, _)) = seen.cell {
                return Err(ClaimError::Cell { cell: *cell, error: CellError::OverlapsCell(other) });
            }
            seen.cell = Some((*cell, Version(kv.mod_revision)));
            seen.block = contents.blocks().get(&block).cloned();
        }
    }
    Ok(seen)
}

/// Follows a block's claim from what was seen on: an item each time that the ledger says something else of the block,
/// whatever becomes of its neighbours in the cell. Where there was no cell there is nothing to follow. The stream ends
/// when its watch breaks, after an error that says why; the caller reads the claim again.
pub fn watch_claim(
    kv: &Arc<dyn Kv>,
    keys: &LedgerKeys,
    block: PodCidr,
    seen: &ClaimSeen,
) -> BoxStream<'static, Result<Option<Block>, ClaimError>> {
    let Some((cell, _)) = seen.cell else { return stream::pending().boxed() };
    let key = keys.cell(cell);
    let batches = kv.watch(&key, seen.header.revision + 1);
    let claims = batches.flat_map(move |batch| {
        let claims = match batch {
            Ok(batch) => {
                // The watch is by prefix, and a key may begin like this one.
                let ours = batch.events.iter().filter(|event| event.key() == key);
                ours.map(|event| claim_in(event, cell, block)).collect()
            }
            Err(error) => vec![Err(super::read_failed(&error).into())],
        };
        stream::iter(claims)
    });
    let mut last = seen.block.clone();
    let news = claims.filter(move |claim| {
        let is_news = claim.as_ref().map_or(true, |claim| *claim != last);
        if let Ok(claim) = claim {
            last.clone_from(claim);
        }
        future::ready(is_news)
    });
    news.boxed()
}

/// What the ledger says of a block after a change of its cell.
fn claim_in(event: &WatchEvent, cell: CellId, block: PodCidr) -> Result<Option<Block>, ClaimError> {
    match event {
        WatchEvent::Delete { .. } => Ok(None),
        WatchEvent::Put(kv) => {
            let contents = Cell::from_json(cell, &kv.value).map_err(|error| ClaimError::Cell { cell, error })?;
            Ok(contents.blocks().get(&block).cloned())
        }
    }
}
