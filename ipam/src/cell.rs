//! The cell: the record that the ledger keeps for one aligned supernet, and its JSON text.
//!
//! A cell is replaced only as a whole and only at the version that was read. Blocks that overlap lie in one cell,
//! so two writers cannot both grant them, whatever their sizes.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

use crate::{
    names::{NodeName, NodeUid},
    prefix::{PodCidr, overlapping},
};

/// The most blocks that a cell holds; a mask that would put more into one is refused.
pub const MAX_BLOCKS: usize = 4096;

/// A new cell spans so many bits of blocks: 256 of the mask in force.
pub const CELL_BITS: u8 = 8;

/// The version of the JSON text that this code writes and reads.
pub const FORMAT: u32 = 1;

/// Which cell: the supernet that it is the record of.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CellId(PodCidr);

impl CellId {
    /// The cell of a supernet.
    #[must_use]
    pub const fn new(prefix: PodCidr) -> Self {
        Self(prefix)
    }

    /// Its supernet.
    #[must_use]
    pub const fn prefix(&self) -> PodCidr {
        self.0
    }

    /// Every cell that could hold a block, the narrowest first. At most one of them exists in a sound ledger.
    pub fn candidates(block: PodCidr) -> impl Iterator<Item = Self> {
        (0..=block.prefix_len()).rev().map(move |len| Self(block.supernet(len)))
    }
}

impl fmt::Display for CellId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for CellId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// What a store counts a record's writes with; 0 means that there is no record. In etcd the ModRevision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Version(pub i64);

impl Version {
    /// The version of a record that does not exist.
    pub const ABSENT: Self = Self(0);
}

/// What a block in a cell is. A block that is not in its cell is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BlockState {
    /// The node's.
    Granted,
    /// Going to be the node's once the block of its other family is written too. Only in stores that write one cell
    /// at a time; always completed, never taken back.
    Pending,
    /// Nobody's yet: the node is gone, and so may addresses of it not be in all caches.
    Quarantined,
    /// The node's still, and outside every pool CIDR: never granted anew.
    Orphaned,
}

impl BlockState {
    /// All, in the order in which texts and metrics list them.
    pub const ALL: [Self; 4] = [Self::Granted, Self::Pending, Self::Quarantined, Self::Orphaned];

    /// The word in JSON texts and metric labels.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Granted => "granted",
            Self::Pending => "pending",
            Self::Quarantined => "quarantined",
            Self::Orphaned => "orphaned",
        }
    }

    /// Whether the node named in the block may use its addresses.
    #[must_use]
    pub const fn is_usable(self) -> bool {
        matches!(self, Self::Granted | Self::Orphaned)
    }
}

/// What a cell says of one block.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Block {
    /// Its state.
    pub state: BlockState,
    /// Whose it is; in quarantine, whose it was.
    pub node: NodeName,
    /// That Node's uid; `None` when the block was adopted from a CiliumNode without a Node.
    pub uid: Option<NodeUid>,
}

/// The longest text of a CIDR.
const PREFIX_TEXT: usize = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128".len();

impl Block {
    /// About how many bytes it adds to its cell's text: never fewer.
    #[must_use]
    pub fn text_bound(&self) -> usize {
        const BLOCK: usize = r#"{"block":"","state":"quarantined","node":"","uid":""},"#.len() + PREFIX_TEXT;
        // A uid may hold characters that JSON escapes.
        BLOCK + self.node.as_str().len() + self.uid.as_ref().map_or(0, |uid| 2 * uid.as_str().len())
    }
}

/// One record of the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Cell {
    id: CellId,
    pool: PodCidr,
    mask: u8,
    blocks: BTreeMap<PodCidr, Block>,
}

/// What is wrong with a cell.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum CellError {
    /// Written by a newer version.
    #[error("the record has format {0}, and this version reads {FORMAT}; run the version that wrote it")]
    UnknownFormat(u32),
    /// No JSON text of a cell.
    #[error(
        "the record is not readable: {0}; restore it, or delete it while no operator runs, so that it is made anew from the nodes"
    )]
    Unreadable(String),
    /// The text is another cell's.
    #[error("the record is that of {found}, under the key of {expected}")]
    Misplaced {
        /// The cell by its key.
        expected: CellId,
        /// The cell by its text.
        found: CellId,
    },
    /// The cell does not lie in the pool CIDR that it was made for.
    #[error("cell {cell} does not lie in its pool CIDR {pool}, or mask {mask} does not fit that")]
    OutsidePool {
        /// The cell.
        cell: CellId,
        /// The pool CIDR.
        pool: PodCidr,
        /// The mask.
        mask: u8,
    },
    /// A block does not lie in its cell.
    #[error("block {block} does not lie in cell {cell}")]
    Outside {
        /// The block.
        block: PodCidr,
        /// The cell.
        cell: CellId,
    },
    /// Two blocks share addresses.
    #[error("block {block} overlaps {other}")]
    Overlap {
        /// One block.
        block: PodCidr,
        /// The other.
        other: PodCidr,
    },
    /// More than [`MAX_BLOCKS`].
    #[error("cell {0} would hold more than {MAX_BLOCKS} blocks")]
    Full(CellId),
    /// Two cells share addresses, so neither can be trusted to know all blocks in it.
    #[error("the record overlaps that of {0}; two ledgers were mixed: restore one of them")]
    OverlapsCell(CellId),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CellText<B> {
    version: u32,
    cell: CellId,
    pool: PodCidr,
    mask: u8,
    blocks: B,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BlockText {
    block: PodCidr,
    state: BlockState,
    node: NodeName,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    uid: Option<NodeUid>,
}

#[derive(Deserialize)]
struct VersionText {
    version: u32,
}

impl Cell {
    /// An empty cell, made for a pool CIDR under the mask in force at its first use.
    ///
    /// # Errors
    /// [`CellError::OutsidePool`].
    pub fn new(id: CellId, pool: PodCidr, mask: u8) -> Result<Self, CellError> {
        if pool.contains(&id.prefix()) && (pool.prefix_len()..=pool.family().bits()).contains(&mask) {
            Ok(Self { id, pool, mask, blocks: BTreeMap::new() })
        } else {
            Err(CellError::OutsidePool { cell: id, pool, mask })
        }
    }

    /// The same cell without blocks.
    #[must_use]
    pub fn emptied(&self) -> Self {
        Self { blocks: BTreeMap::new(), ..self.clone() }
    }

    /// The same cell with the blocks of another record of it, and no others.
    #[must_use]
    pub fn with_blocks_of(&self, other: &Self) -> Self {
        Self { blocks: other.blocks.clone(), ..self.clone() }
    }

    /// Which cell it is.
    #[must_use]
    pub fn id(&self) -> CellId {
        self.id
    }

    /// The pool CIDR that it was made for.
    #[must_use]
    pub fn pool(&self) -> PodCidr {
        self.pool
    }

    /// The mask that was in force when its pool CIDR was first used: with the pool CIDR it fixes the size of cells.
    #[must_use]
    pub fn mask(&self) -> u8 {
        self.mask
    }

    /// Every block that is not free, in the order of addresses.
    #[must_use]
    pub fn blocks(&self) -> &BTreeMap<PodCidr, Block> {
        &self.blocks
    }

    /// The blocks that share addresses with `block`.
    pub fn overlapping(&self, block: &PodCidr) -> impl Iterator<Item = (&PodCidr, &Block)> {
        overlapping(&self.blocks, block)
    }

    /// Writes a block, new or known.
    ///
    /// # Errors
    /// The block lies outside the cell or overlaps another one, or the cell is full.
    pub fn set(&mut self, at: PodCidr, block: Block) -> Result<(), CellError> {
        if !self.id.prefix().contains(&at) {
            return Err(CellError::Outside { block: at, cell: self.id });
        }
        if let Some((&other, _)) = self.overlapping(&at).find(|(other, _)| **other != at) {
            return Err(CellError::Overlap { block: at, other });
        }
        if self.blocks.len() >= MAX_BLOCKS && !self.blocks.contains_key(&at) {
            return Err(CellError::Full(self.id));
        }
        self.blocks.insert(at, block);
        Ok(())
    }

    /// Frees a block.
    pub fn remove(&mut self, at: &PodCidr) -> Option<Block> {
        self.blocks.remove(at)
    }

    /// The JSON text:
    /// `{"version":1,"cell":"10.0.0.0/16","pool":"10.0.0.0/8","mask":24,"blocks":[{"block":"10.0.3.0/24","state":"granted","node":"n1","uid":"…"}]}`.
    ///
    /// # Errors
    /// The serializer's; none of these types makes it fail.
    pub fn to_json(&self) -> Result<Vec<u8>, serde_json::Error> {
        let blocks: Vec<BlockText> = self
            .blocks
            .iter()
            .map(|(at, block)| BlockText {
                block: *at,
                state: block.state,
                node: block.node.clone(),
                uid: block.uid.clone(),
            })
            .collect();
        serde_json::to_vec(&CellText { version: FORMAT, cell: self.id, pool: self.pool, mask: self.mask, blocks })
    }

    /// Reads the JSON text of the cell `id`.
    ///
    /// # Errors
    /// See [`CellError`]. Such a cell must not be treated as empty.
    pub fn from_json(id: CellId, text: &[u8]) -> Result<Self, CellError> {
        let parsed: CellText<Vec<BlockText>> =
            serde_json::from_slice(text).map_err(|error| match serde_json::from_slice::<VersionText>(text) {
                Ok(VersionText { version }) if version != FORMAT => CellError::UnknownFormat(version),
                _ => CellError::Unreadable(error.to_string()),
            })?;
        if parsed.version != FORMAT {
            return Err(CellError::UnknownFormat(parsed.version));
        }
        if parsed.cell != id {
            return Err(CellError::Misplaced { expected: id, found: parsed.cell });
        }
        let mut cell = Self::new(id, parsed.pool, parsed.mask)?;
        for BlockText { block, state, node, uid } in parsed.blocks {
            if cell.blocks.contains_key(&block) {
                return Err(CellError::Overlap { block, other: block });
            }
            cell.set(block, Block { state, node, uid })?;
        }
        Ok(cell)
    }

    /// About how many bytes [`Cell::to_json`] gives: never fewer.
    #[must_use]
    pub fn text_bound(&self) -> usize {
        const CELL: usize =
            r#"{"version":4294967295,"cell":"","pool":"","mask":128,"blocks":[]}"#.len() + 2 * PREFIX_TEXT;
        self.blocks.values().map(Block::text_bound).sum::<usize>() + CELL
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cidr(text: &str) -> PodCidr {
        text.parse().unwrap()
    }

    fn id() -> CellId {
        CellId::new(cidr("10.0.0.0/16"))
    }

    fn block(state: BlockState, uid: Option<&str>) -> Block {
        Block { state, node: NodeName::new("n1").unwrap(), uid: uid.map(|uid| NodeUid::new(uid).unwrap()) }
    }

    const TEXT: &str = r#"{"version":1,"cell":"10.0.0.0/16","pool":"10.0.0.0/8","mask":24,"blocks":[{"block":"10.0.3.0/24","state":"granted","node":"n1","uid":"u1"},{"block":"10.0.4.0/26","state":"quarantined","node":"n1"}]}"#;

    #[test]
    fn the_text_is_what_the_design_says() {
        let mut cell = Cell::new(id(), cidr("10.0.0.0/8"), 24).unwrap();
        cell.set(cidr("10.0.4.0/26"), block(BlockState::Quarantined, None)).unwrap();
        cell.set(cidr("10.0.3.0/24"), block(BlockState::Granted, Some("u1"))).unwrap();
        let text = cell.to_json().unwrap();
        assert_eq!(std::str::from_utf8(&text).unwrap(), TEXT);
        assert_eq!(Cell::from_json(id(), &text), Ok(cell.clone()));
        assert!(cell.text_bound() >= text.len());
    }

    #[test]
    fn what_is_not_such_a_text_is_named_and_never_empty() {
        let changed = |from: &str, to: &str| Cell::from_json(id(), TEXT.replace(from, to).as_bytes()).unwrap_err();
        assert_eq!(changed(r#""version":1"#, r#""version":2,"seal":true"#), CellError::UnknownFormat(2));
        assert_eq!(changed(r#""version":1"#, r#""version":0"#), CellError::UnknownFormat(0));
        for (from, to) in [
            (TEXT, ""),
            (TEXT, "{}"),
            (r#""version":1"#, r#""version":1,"extra":0"#),
            ("granted", "given"),
            ("10.0.3.0/24", "10.0.3.1/24"),
            (r#""node":"n1","uid""#, r#""node":"N1","uid""#),
            (r#""uid":"u1""#, r#""uid":"""#),
        ] {
            assert!(matches!(changed(from, to), CellError::Unreadable(_)), "{to}");
        }
        let other = CellId::new(cidr("10.1.0.0/16"));
        assert_eq!(Cell::from_json(other, TEXT.as_bytes()), Err(CellError::Misplaced { expected: other, found: id() }));
        assert_eq!(
            changed("10.0.3.0/24", "10.0.0.0/15"),
            CellError::Outside { block: cidr("10.0.0.0/15"), cell: id() }
        );
        assert_eq!(
            changed("10.0.3.0/24", "10.0.4.0/24"),
            CellError::Overlap { block: cidr("10.0.4.0/26"), other: cidr("10.0.4.0/24") }
        );
        assert_eq!(
            changed("10.0.3.0/24", "10.0.4.0/26"),
            CellError::Overlap { block: cidr("10.0.4.0/26"), other: cidr("10.0.4.0/26") }
        );
        for (pool, mask) in [("11.0.0.0/8", 24), ("10.0.0.0/8", 7), ("10.0.0.0/8", 33), ("10.0.0.0/17", 24)] {
            assert_eq!(
                Cell::new(id(), cidr(pool), mask),
                Err(CellError::OutsidePool { cell: id(), pool: cidr(pool), mask })
            );
        }
    }

    #[test]
    fn a_cell_has_room_for_so_many_blocks_and_no_more() {
        let mut cell = Cell::new(id(), cidr("10.0.0.0/8"), 24).unwrap();
        for index in 0..4096 {
            cell.set(id().prefix().nth(28, index), block(BlockState::Granted, Some("0f0f0f0f-0f0f"))).unwrap();
        }
        let first = id().prefix().nth(28, 0);
        cell.set(first, block(BlockState::Quarantined, None)).unwrap();
        cell.remove(&first).unwrap();
        cell.set(first.nth(29, 0), block(BlockState::Granted, None)).unwrap();
        assert_eq!(cell.set(first.nth(29, 1), block(BlockState::Granted, None)), Err(CellError::Full(id())));
        assert!(cell.text_bound() >= cell.to_json().unwrap().len());
    }

    #[test]
    fn the_longest_text_is_as_long_as_it_may_be() {
        let host = cidr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128");
        let mut cell = Cell::new(CellId::new(host), host, 128).unwrap();
        let node = NodeName::new(&"n".repeat(253)).unwrap();
        let uid = Some(NodeUid::new(&"\"".repeat(128)).unwrap());
        cell.set(host, Block { state: BlockState::Quarantined, node, uid }).unwrap();
        let text = cell.to_json().unwrap().len();
        // Nine more digits of the version, and a comma.
        assert_eq!(cell.text_bound(), text + 10);
    }

    #[test]
    fn a_block_can_only_be_in_cells_around_it() {
        let block = cidr("10.0.3.0/24");
        let cells: Vec<_> = CellId::candidates(block).collect();
        assert_eq!(cells.len(), 25);
        assert!(cells.iter().all(|cell| cell.prefix().contains(&block)));
        assert!(cells.contains(&id()));
    }
}
