//! The rules, one function each.

use std::collections::{BTreeMap, BTreeSet};

use super::{Facts, Finding, Kind, NodeFact, Read, RecordFact, Remedy, finding::RESTORE_CELL};
use crate::{
    cell::{Block, BlockState, CellId},
    owners::{Holding, Source, claim_holdings, conflicts},
    prefix::{Family, PodCidr},
};

/// The facts, and what follows from them for every rule.
pub(super) struct View<'a> {
    facts: &'a Facts,
    /// Every claim. Two cells that overlap may name one block twice.
    claims: BTreeMap<(PodCidr, CellId), &'a Block>,
    /// The blocks of each node, by the ledger.
    by_node: BTreeMap<&'a str, Vec<(PodCidr, &'a Block)>>,
    /// Where nothing is known: the cells that cannot be read.
    unknown: Vec<PodCidr>,
    /// Who says that what is whose.
    holdings: BTreeSet<Holding>,
}

const CORRECT: &str = "correct the field that it names";

/// One side of a duplicate: a node and a block, and what says that they belong together.
type Side = (PodCidr, String);

/// A finding without a remedy.
fn finding(
    kind: Kind,
    reason: &'static str,
    what: impl ToString,
    who: impl IntoIterator<Item = String>,
    places: impl IntoIterator<Item = String>,
    problem: impl Into<String>,
    advice: impl Into<String>,
) -> Finding {
    let (who, places) = (who.into_iter().collect(), places.into_iter().collect());
    Finding {
        kind,
        reason,
        what: what.to_string(),
        who,
        places,
        problem: problem.into(),
        advice: advice.into(),
        remedy: None,
    }
}

fn readable<T>(map: &BTreeMap<String, Read<T>>) -> impl Iterator<Item = (&String, &T)> {
    map.iter().filter_map(|(name, read)| Some((name, read.as_ref().ok()?)))
}

fn cell_place(cell: CellId, state: BlockState) -> String {
    format!("cell {cell} of the ledger ({})", state.as_str())
}

fn spec_place(node: &str) -> String {
    format!("CiliumNode {node}")
}

fn record_place(node: &str) -> String {
    format!("node record {node}")
}

fn joined(blocks: &[PodCidr]) -> String {
    blocks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

impl<'a> View<'a> {
    pub(super) fn of(facts: &'a Facts) -> Self {
        let mut view = Self {
            facts,
            claims: BTreeMap::new(),
            by_node: BTreeMap::new(),
            unknown: Vec::new(),
            holdings: BTreeSet::new(),
        };
        for (id, cell) in &facts.cells {
            let Ok(cell) = cell else {
                view.unknown.push(id.prefix());
                continue;
            };
            for (at, block) in cell.blocks() {
                view.claims.insert((*at, *id), block);
                view.by_node.entry(block.node.as_str()).or_default().push((*at, block));
            }
            view.holdings.extend(claim_holdings(cell));
        }
        for (name, node) in readable(&facts.cilium_nodes) {
            let blocks = node.pod_cidrs.iter().filter_map(|text| text.parse().ok());
            view.hold(name, blocks, Source::Spec);
            if facts.published == Source::Confirmation {
                view.hold(name, node.confirmed.iter().copied(), Source::Confirmation);
            }
        }
        for (name, record) in readable(&facts.records) {
            view.hold(name, record.blocks.iter().copied(), Source::Record);
        }
        view
    }

    fn hold(&mut self, node: &str, blocks: impl Iterator<Item = PodCidr>, source: Source) {
        self.holdings.extend(blocks.map(|block| Holding { block, node: node.to_owned(), source }));
    }

    /// The claims of exactly this block.
    fn claims_of(&self, block: PodCidr) -> impl Iterator<Item = (CellId, &'a Block)> {
        let all = (block, CellId::new(block.supernet(0)))..=(block, CellId::new(block));
        self.claims.range(all).map(|((_, cell), claim)| (*cell, *claim))
    }

    fn is_claimed_by(&self, block: PodCidr, node: &str) -> bool {
        self.claims_of(block).any(|(_, claim)| claim.node.as_str() == node)
    }

    /// Whether some claim holds all of a block or of an address.
    fn is_claimed(&self, block: PodCidr) -> bool {
        (0..=block.prefix_len()).any(|len| self.claims_of(block.supernet(len)).next().is_some())
    }

    /// Whether an unreadable cell may say something of a block.
    fn is_unknown(&self, block: PodCidr) -> bool {
        self.unknown.iter().any(|cell| cell.overlaps(&block))
    }

    fn in_pool(&self, block: PodCidr) -> bool {
        let pool = self.facts.pool.family(block.family());
        pool.is_some_and(|pool| pool.cidrs().iter().any(|cidr| cidr.contains(&block)))
    }

    fn has_node(&self, name: &str) -> bool {
        self.facts.nodes.contains_key(name)
    }

    /// Where it is written that a block is a node's.
    fn places(&self, (block, node): &Side) -> Vec<String> {
        let mut places = Vec::new();
        for (cell, claim) in self.claims_of(*block).filter(|(_, claim)| claim.node.as_str() == node) {
            places.push(cell_place(cell, claim.state));
        }
        let says = |source| self.holdings.contains(&Holding { block: *block, node: node.clone(), source });
        places.extend(says(Source::Spec).then(|| spec_place(node)));
        places.extend(says(Source::Record).then(|| record_place(node)));
        places.extend(says(Source::Confirmation).then(|| format!("status of CiliumNode {node}")));
        places
    }

    pub(super) fn duplicates(&self) -> Vec<Finding> {
        let side = |holding: &Holding| (holding.block, holding.node.clone());
        let pairs = conflicts(&self.holdings).into_iter().map(|(one, other)| (side(one), side(other)));
        // Of equal blocks either may come first.
        let ordered = pairs.map(|(one, other)| if one <= other { (one, other) } else { (other, one) });
        let distinct: BTreeSet<(Side, Side)> = ordered.collect();
        let found = distinct.into_iter().map(|(one, other)| {
            let of = |side: &Side| {
                let places = self.places(side).into_iter();
                places.map(|place| format!("{}: {place}", side.1)).collect::<Vec<_>>()
            };
            let places = [of(&one), of(&other)].concat();
            Finding::two_owners((one.0, &one.1), (other.0, &other.1), places)
        });
        found.collect()
    }

    pub(super) fn orphaned_claims(&self) -> Vec<Finding> {
        let mut found = Vec::new();
        for ((at, cell), block) in &self.claims {
            let (node, place) = (block.node.as_str(), cell_place(*cell, block.state));
            let orphan = |reason, problem: String, advice: &str| {
                finding(Kind::Orphan, reason, at, [node.to_owned()], [place.clone()], problem, advice)
            };
            if !self.in_pool(*at) {
                let advice = if block.state == BlockState::Quarantined {
                    "nothing: it is dropped when its quarantine is over"
                } else {
                    "the node keeps it; put the CIDR back into the pool, or replace the node"
                };
                found.push(orphan("OutsidePool", "the block lies outside of every CIDR of the pool".into(), advice));
            }
            if block.state == BlockState::Quarantined {
                continue;
            }
            let advice = "is an operator leading? It releases the block when it looks at the node";
            match self.facts.nodes.get(node) {
                None => found.push(orphan("NodeGone", format!("there is no Node {node}"), advice)),
                Some(Ok(NodeFact { uid, .. })) if block.uid.as_ref().is_some_and(|of| of.as_str() != uid) => {
                    let problem = format!("the claim is that of an earlier Node {node}");
                    found.push(orphan("NodeReplaced", problem, advice));
                }
                Some(_) => {}
            }
        }
        found
    }

    pub(super) fn orphaned_records(&self) -> Vec<Finding> {
        let mut found = Vec::new();
        for (node, record) in readable(&self.facts.records) {
            if let Some(left) = self.record_of_nobody(node, record) {
                found.push(left);
            } else {
                let place = record_place(node);
                found.extend(record.blocks.iter().filter_map(|block| self.unclaimed(*block, node, &place)));
            }
        }
        found
    }

    /// The record of a node of which nothing else is left.
    fn record_of_nobody(&self, node: &str, record: &RecordFact) -> Option<Finding> {
        let known = self.has_node(node)
            || self.facts.cilium_nodes.contains_key(node)
            || self.by_node.contains_key(node)
            || !self.unknown.is_empty();
        if known {
            return None;
        }
        let what = if record.blocks.is_empty() { node.to_owned() } else { joined(&record.blocks) };
        let problem = format!("there is neither a Node {node}, nor a CiliumNode, nor a claim of it");
        let advice = "delete the record: --fix does, when all that still holds";
        let mut orphan =
            finding(Kind::Orphan, "RecordLeft", what, [node.to_owned()], [record_place(node)], problem, advice);
        orphan.remedy = Some(Remedy::DeleteRecord { node: node.to_owned() });
        Some(orphan)
    }

    pub(super) fn orphaned_specs(&self) -> Vec<Finding> {
        let mut found = Vec::new();
        for (node, facts) in readable(&self.facts.cilium_nodes) {
            let blocks = facts.pod_cidrs.iter().filter_map(|text| text.parse().ok());
            let place = spec_place(node);
            found.extend(blocks.filter_map(|block| self.unclaimed(block, node, &place)));
        }
        found
    }

    /// A block that a node lists and does not have, unless somebody else has it: that is a duplicate.
    fn unclaimed(&self, block: PodCidr, node: &str, place: &str) -> Option<Finding> {
        if self.is_claimed_by(block, node) || self.is_unknown(block) {
            return None;
        }
        if self.holdings.iter().any(|holding| holding.node != node && holding.block.overlaps(&block)) {
            return None;
        }
        let problem = "the ledger has no such claim of the node";
        let advice = "is an operator leading? It adopts the block, or takes it back, when it looks at the node";
        Some(finding(Kind::Orphan, "NoClaim", block, [node.to_owned()], [place.to_owned()], problem, advice))
    }

    pub(super) fn overdue(&self) -> Vec<Finding> {
        let resting = self
            .claims
            .iter()
            .filter(|((at, _), block)| block.state == BlockState::Quarantined && self.facts.overdue.contains(at));
        let found = resting.map(|((at, cell), block)| {
            let users: Vec<&str> = self.users_of(*at);
            let problem = match users.as_slice() {
                [] => "its quarantine is over since long under one leader, and it is not free".to_owned(),
                users => format!("its quarantine begins again and again, because it is in use by {}", users.join(", ")),
            };
            let advice = "delete what uses it; if nothing does, look into the leading operator's log";
            let (who, place) = (block.node.as_str().to_owned(), cell_place(*cell, block.state));
            finding(Kind::Leak, "QuarantineOverdue", at, [who], [place], problem, advice)
        });
        found.collect()
    }

    /// What has an address in a block.
    fn users_of(&self, at: PodCidr) -> Vec<&'a str> {
        let ips = readable(&self.facts.ips).filter(|(_, ip)| at.contains(&ip.target));
        let endpoints = readable(&self.facts.endpoints);
        let inside = endpoints.filter(|(_, addresses)| addresses.iter().any(|address| at.contains_address(*address)));
        ips.map(|(name, _)| name.as_str()).chain(inside.map(|(name, _)| name.as_str())).collect()
    }

    pub(super) fn addresses(&self) -> Vec<Finding> {
        let mut found = Vec::new();
        let is_free = |at: PodCidr| self.in_pool(at) && !self.is_claimed(at) && !self.is_unknown(at);
        let all_readable = self.facts.records.values().all(Result::is_ok);
        let hosts: BTreeSet<_> = readable(&self.facts.records).flat_map(|(_, record)| &record.addresses).collect();
        for (name, ip) in readable(&self.facts.ips) {
            let leak = |reason, problem: String, advice: &str| {
                finding(Kind::Leak, reason, name, [], [format!("ip record {name}")], problem, advice)
            };
            if is_free(ip.target) {
                let advice =
                    "an agent without a claim published it: restart it, or delete the record when its node is gone";
                found.push(leak("FreeBlockInUse", "the address lies in a block that is free".into(), advice));
            }
            if let Some(host) = ip.host.filter(|host| all_readable && !hosts.contains(host)) {
                let advice = "it goes with its agent's lease; until then packets to it lead nowhere";
                found.push(leak("NoNodeRecord", format!("no node record has the address {host} of its node"), advice));
            }
        }
        for (name, addresses) in readable(&self.facts.endpoints) {
            for address in addresses.iter().filter(|address| is_free(PodCidr::containing(**address, u8::MAX))) {
                let problem = "a CiliumEndpoint has an address of a block that is free";
                let advice = "delete the pod; if there is none, delete the CiliumEndpoint";
                let place = format!("CiliumEndpoint {name}");
                found.push(finding(Kind::Leak, "FreeBlockInUse", address, [], [place], problem, advice));
            }
        }
        found
    }

    pub(super) fn unserved(&self) -> Vec<Finding> {
        let nodes = readable(&self.facts.nodes).filter(|(_, node)| !node.deleting);
        nodes.filter_map(|(name, _)| self.unserved_node(name)).collect()
    }

    fn unserved_node(&self, node: &str) -> Option<Finding> {
        let families: Vec<Family> = self.facts.pool.families().map(|(family, _)| family).collect();
        let lacks: Vec<(Family, String)> =
            families.into_iter().filter_map(|family| Some((family, self.lack(node, family)?))).collect();
        if lacks.is_empty() {
            return None;
        }
        let what = lacks.iter().map(|(family, _)| family.to_string()).collect::<Vec<_>>().join(", ");
        let mut problem: Vec<String> = lacks.into_iter().map(|(_, lack)| lack).collect();
        problem.dedup();
        let said = self.facts.cilium_nodes.get(node).and_then(|read| read.as_ref().ok()).map(|facts| &facts.error);
        let advice = match said {
            Some(error) if !error.is_empty() => {
                problem.push(format!("the operator says: {error}"));
                "see what the operator says"
            }
            _ => "is an operator leading? --fix makes it look at the node again",
        };
        let places = [format!("Node {node}")];
        let mut found =
            finding(Kind::Unserved, "NotServed", what, [node.to_owned()], places, problem.join("; "), advice);
        found.remedy = Some(Remedy::Nudge { node: node.to_owned() });
        Some(found)
    }

    /// What a node lacks of a family, if it lacks anything.
    fn lack(&self, node: &str, family: Family) -> Option<String> {
        let claims = self.by_node.get(node).into_iter().flatten();
        let usable: Vec<PodCidr> =
            claims.filter(|(at, block)| at.family() == family && block.state.is_usable()).map(|(at, _)| *at).collect();
        if usable.is_empty() {
            let may_be_hidden = self.unknown.iter().any(|cell| cell.family() == family);
            return (!may_be_hidden).then(|| format!("no {family} block is its own"));
        }
        let lists = |source| {
            let listed =
                |block: &PodCidr| self.holdings.contains(&Holding { block: *block, node: node.to_owned(), source });
            usable.iter().any(listed)
        };
        let (spec, published) = (self.facts.cilium_nodes.get(node), self.facts.published);
        let published_by = match published {
            Source::Confirmation => spec.map(Result::is_ok),
            _ => self.facts.records.get(node).map(Result::is_ok),
        };
        let readable = [(Source::Spec, spec.map(Result::is_ok)), (published, published_by)];
        let lacks = readable.into_iter().find(|(source, read)| read.unwrap_or(true) && !lists(*source));
        lacks.map(|(source, _)| format!("{source} does not list {}", joined(&usable)))
    }

    pub(super) fn unreadable(&self) -> Vec<Finding> {
        let mut found = Vec::new();
        let mut bad = |reason, what: String, place: String, problem: String, advice: &str| {
            found.push(finding(Kind::Unreadable, reason, what, [], [place], problem, advice));
        };
        for (one, other) in nested(self.facts.cells.keys()) {
            let problem = format!("it overlaps cell {one}, so neither knows all blocks in it");
            bad("CellsOverlap", other.to_string(), format!("cell {other} of the ledger"), problem, RESTORE_CELL);
        }
        for key in &self.facts.strays {
            let problem = "it lies among the cells of the ledger, and no version of Basal writes such a one".to_owned();
            bad("StrayKey", key.clone(), key.clone(), problem, "delete it");
        }
        for (name, error) in unread(&self.facts.nodes) {
            bad("NodeUnreadable", name.clone(), format!("Node {name}"), error.clone(), CORRECT);
        }
        for (name, error) in unread(&self.facts.cilium_nodes) {
            bad("CiliumNodeUnreadable", name.clone(), spec_place(name), error.clone(), CORRECT);
        }
        for (name, node) in readable(&self.facts.cilium_nodes) {
            for error in node.pod_cidrs.iter().filter_map(|text| text.parse::<PodCidr>().err()) {
                let problem = format!("spec.ipam.podCIDRs: {error}");
                bad("PodCIDRUnreadable", name.clone(), spec_place(name), problem, "correct or remove the entry");
            }
        }
        for (name, error) in unread(&self.facts.records) {
            let advice = "delete the record: the operator writes it anew";
            bad("RecordUnreadable", name.clone(), record_place(name), error.clone(), advice);
        }
        for (name, error) in unread(&self.facts.ips) {
            let advice = "delete the record: its agent writes it anew";
            bad("IPRecordUnreadable", name.clone(), format!("ip record {name}"), error.clone(), advice);
        }
        for (name, error) in unread(&self.facts.endpoints) {
            bad("EndpointUnreadable", name.clone(), format!("CiliumEndpoint {name}"), error.clone(), CORRECT);
        }
        let cells = self.facts.cells.iter().filter_map(|(id, cell)| Some((*id, cell.as_ref().err()?)));
        found.extend(cells.map(|(id, error)| Finding::unreadable_cell(id, error)));
        found
    }
}

fn unread<T>(map: &BTreeMap<String, Read<T>>) -> impl Iterator<Item = (&String, &String)> {
    map.iter().filter_map(|(name, read)| Some((name, read.as_ref().err()?)))
}

/// The pairs of cells of which one lies in the other.
fn nested<'c>(cells: impl Iterator<Item = &'c CellId>) -> Vec<(CellId, CellId)> {
    let mut open: Vec<CellId> = Vec::new();
    let mut found = Vec::new();
    for cell in cells {
        open.retain(|around| around.prefix().contains(&cell.prefix()));
        found.extend(open.iter().map(|around| (*around, *cell)));
        open.push(*cell);
    }
    found
}
