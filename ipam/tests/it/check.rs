//! The check against an oracle that counts single addresses, and over what the allocator leaves behind.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
};

use basal_ipam::{
    cell::{Block, BlockState, Cell, CellId},
    check::{CiliumNodeFact, Facts, Finding, IpFact, Kind, NodeFact, RecordFact, Remedy, check, standing},
    owners::{Holding, Source, conflicts},
    prefix::PodCidr,
};
use proptest::prelude::*;

use crate::support::{Rig, cidr, dual, ipv4, node, secs, uid};

/// The pool of the random clusters: half of the cell, so that blocks lie outside of it too.
const POOL: &str = "10.0.0.0/25";
const CELL: &str = "10.0.0.0/24";

fn name(number: u8) -> String {
    format!("n{}", number % 4)
}

/// A block in 10.0.0.0/24.
fn block(at: u8, len: u8) -> PodCidr {
    PodCidr::containing(IpAddr::V4(Ipv4Addr::new(10, 0, 0, at)), len)
}

fn blocks() -> impl Strategy<Value = PodCidr> {
    (any::<u8>(), 26_u8..=29).prop_map(|(at, len)| block(at, len))
}

fn state() -> impl Strategy<Value = BlockState> {
    prop::sample::select(BlockState::ALL.to_vec())
}

type Listed = Vec<(u8, PodCidr)>;

#[derive(Debug, Clone)]
struct Cluster {
    nodes: Vec<u8>,
    claims: Vec<(u8, PodCidr, BlockState)>,
    specs: Listed,
    records: Listed,
    ips: Vec<u8>,
}

fn clusters() -> impl Strategy<Value = Cluster> {
    let listed = || prop::collection::vec((0_u8..4, blocks()), 0..4);
    let claims = prop::collection::vec((0_u8..4, blocks(), state()), 0..6);
    let nodes = prop::collection::vec(0_u8..4, 0..4);
    let ips = prop::collection::vec(any::<u8>(), 0..4);
    (nodes, claims, listed(), listed(), ips).prop_map(|(nodes, claims, mut specs, mut records, ips)| {
        // Mostly what is claimed is listed, as in a real cluster; of some claims the ledger alone knows.
        for (number, (node, at, _)) in claims.iter().enumerate() {
            if matches!(number % 4, 1 | 2) {
                specs.push((*node, *at));
            }
            if matches!(number % 4, 0 | 2) {
                records.push((*node, *at));
            }
        }
        Cluster { nodes, claims, specs, records, ips }
    })
}

fn facts(cluster: &Cluster) -> Facts {
    let mut facts = Facts::new(ipv4(&[POOL], 26), Source::Record);
    let id = CellId::new(cidr(CELL));
    let mut cell = Cell::new(id, cidr(CELL), 26).unwrap();
    for (number, at, state) in &cluster.claims {
        let block = Block { state: *state, node: node(&name(*number)), uid: Some(uid(&name(*number))) };
        // A block that overlaps an earlier one is left out.
        cell.set(*at, block).unwrap_or_default();
    }
    facts.cells.insert(id, Ok(cell));
    for number in &cluster.nodes {
        let fact = NodeFact { uid: uid(&name(*number)).as_str().to_owned(), deleting: false };
        facts.nodes.insert(name(*number), Ok(fact));
    }
    for (number, at) in &cluster.specs {
        let entry = facts.cilium_nodes.entry(name(*number)).or_insert_with(|| Ok(CiliumNodeFact::default()));
        entry.as_mut().unwrap().pod_cidrs.push(at.to_string());
    }
    for (number, at) in &cluster.records {
        let entry = facts.records.entry(name(*number)).or_insert_with(|| Ok(RecordFact::default()));
        entry.as_mut().unwrap().blocks.push(*at);
    }
    for ip in &cluster.ips {
        let target = block(*ip, 32);
        facts.ips.insert(target.address().to_string(), Ok(IpFact { target, host: None }));
    }
    facts
}

/// What the stores say of one address.
struct Said {
    claimed: bool,
    owners: BTreeSet<String>,
}

fn said(facts: &Facts, address: IpAddr) -> Said {
    let mut said = Said { claimed: false, owners: BTreeSet::new() };
    for (at, block) in facts.cells.values().flat_map(|cell| cell.as_ref().unwrap().blocks()) {
        if at.contains_address(address) {
            said.claimed = true;
            said.owners.insert(block.node.as_str().to_owned());
        }
    }
    for (node, read) in &facts.cilium_nodes {
        if read.as_ref().unwrap().pod_cidrs.iter().any(|text| cidr(text).contains_address(address)) {
            said.owners.insert(node.clone());
        }
    }
    for (node, read) in &facts.records {
        if read.as_ref().unwrap().blocks.iter().any(|at| at.contains_address(address)) {
            said.owners.insert(node.clone());
        }
    }
    said
}

fn all_addresses() -> impl Iterator<Item = IpAddr> {
    (0..=u8::MAX).map(|last| IpAddr::V4(Ipv4Addr::new(10, 0, 0, last)))
}

fn with<'f>(found: &'f [Finding], reason: &'static str) -> impl Iterator<Item = &'f Finding> {
    found.iter().filter(move |finding| finding.reason == reason)
}

fn whats(found: &[Finding], reason: &'static str) -> BTreeSet<String> {
    with(found, reason).map(|finding| finding.what.clone()).collect()
}

fn claims(facts: &Facts) -> BTreeMap<PodCidr, Block> {
    let cells = facts.cells.values().flat_map(|cell| cell.as_ref().unwrap().blocks());
    cells.map(|(at, block)| (*at, block.clone())).collect()
}

proptest! {
    #[test]
    fn duplicates_are_the_addresses_with_two_owners(cluster in clusters()) {
        let facts = facts(&cluster);
        let found = check(&facts);
        let mut expected = BTreeSet::new();
        for owners in all_addresses().map(|address| said(&facts, address).owners) {
            for one in &owners {
                expected.extend(owners.iter().filter(|other| one < other).map(|other| (one.clone(), other.clone())));
            }
        }
        let told: BTreeSet<(String, String)> = with(&found, "TwoOwners")
            .map(|finding| (finding.who[0].clone().min(finding.who[1].clone()), finding.who[0].clone().max(finding.who[1].clone())))
            .collect();
        prop_assert_eq!(told, expected);
    }

    #[test]
    fn addresses_in_use_in_free_blocks_are_leaks(cluster in clusters()) {
        let facts = facts(&cluster);
        let free = facts.ips.values().map(|ip| ip.as_ref().unwrap().target.address())
            .filter(|address| cidr(POOL).contains_address(*address) && !said(&facts, *address).claimed)
            .map(|address| address.to_string());
        prop_assert_eq!(whats(&check(&facts), "FreeBlockInUse"), free.collect::<BTreeSet<_>>());
    }

    #[test]
    fn claims_are_orphans_without_a_node_and_outside_of_the_pool(cluster in clusters()) {
        let facts = facts(&cluster);
        let found = check(&facts);
        let (claims, pool) = (claims(&facts), cidr(POOL));
        let gone = claims.iter().filter(|(_, block)| {
            block.state != BlockState::Quarantined && !facts.nodes.contains_key(block.node.as_str())
        });
        prop_assert_eq!(whats(&found, "NodeGone"), gone.map(|(at, _)| at.to_string()).collect::<BTreeSet<_>>());
        let outside = claims.keys().filter(|at| !(pool.first() <= at.first() && at.last() <= pool.last()));
        prop_assert_eq!(whats(&found, "OutsidePool"), outside.map(ToString::to_string).collect::<BTreeSet<_>>());
    }

    #[test]
    fn a_node_is_served_by_one_block_that_ledger_and_objects_and_records_name(cluster in clusters()) {
        let facts = facts(&cluster);
        let found = check(&facts);
        let claims = claims(&facts);
        for node in facts.nodes.keys() {
            let usable: Vec<PodCidr> = claims.iter()
                .filter(|(_, block)| block.node.as_str() == node && block.state.is_usable())
                .map(|(at, _)| *at).collect();
            let listed = |at: &PodCidr| facts.cilium_nodes.get(node)
                .is_some_and(|read| read.as_ref().unwrap().pod_cidrs.contains(&at.to_string()));
            let recorded = |at: &PodCidr| facts.records.get(node)
                .is_some_and(|read| read.as_ref().unwrap().blocks.contains(at));
            let served = usable.iter().any(listed) && usable.iter().any(recorded);
            prop_assert_eq!(with(&found, "NotServed").any(|finding| finding.who == [node.clone()]), !served, "{}", node);
        }
    }

    #[test]
    fn what_is_listed_is_claimed_or_told(cluster in clusters()) {
        let facts = facts(&cluster);
        let found = check(&facts);
        let claims = claims(&facts);
        let all = cluster.specs.iter().chain(&cluster.records);
        for (number, at) in all {
            let node = name(*number);
            let claimed = claims.get(at).is_some_and(|block| block.node.as_str() == node);
            let told = found.iter().any(|finding| {
                matches!(finding.reason, "TwoOwners" | "NoClaim" | "RecordLeft")
                    && finding.who.contains(&node) && finding.what.contains(&at.to_string())
            });
            prop_assert!(claimed || told, "{} of {}", at, node);
        }
    }

    /// Whatever the allocator did, a cluster that says the same everywhere is sound, and what is not sound is only that
    /// which the test leaves out.
    #[test]
    fn what_the_allocator_leaves_is_sound(steps in prop::collection::vec((any::<bool>(), 0_u8..12), 0..40)) {
        let pool = dual(&["10.0.0.0/22"], 26, &["fd00::/118"], 122);
        let mut rig = Rig::new(pool.clone());
        let mut there = BTreeSet::new();
        for (joins, number) in steps {
            let node = format!("n{number}");
            if joins && rig.grant(&node).is_ok() {
                rig.write(secs(0));
                there.insert(node);
            } else if !joins && there.remove(&node) {
                rig.drop(&node, secs(0));
            }
        }
        let mut facts = Facts::new(pool, Source::Record);
        facts.cells = rig.ledger.cells.iter().map(|(id, (_, cell))| (*id, Ok(cell.clone()))).collect();
        for node in &there {
            let blocks = rig.held(node);
            facts.nodes.insert(node.clone(), Ok(NodeFact { uid: uid(node).as_str().to_owned(), deleting: false }));
            let record = RecordFact { blocks: blocks.iter().map(|text| cidr(text)).collect(), addresses: Vec::new() };
            facts.records.insert(node.clone(), Ok(record));
            let fact = CiliumNodeFact { pod_cidrs: blocks, ..CiliumNodeFact::default() };
            facts.cilium_nodes.insert(node.clone(), Ok(fact));
        }
        prop_assert_eq!(check(&facts), Vec::new());
        for node in &there {
            let mut lacking = facts.clone();
            lacking.records.remove(node);
            let found = check(&lacking);
            prop_assert_eq!(found.len(), 1);
            prop_assert_eq!((found[0].reason, &found[0].who), ("NotServed", &vec![node.clone()]));
        }
    }

    #[test]
    fn conflicts_are_all_pairs_that_overlap(holdings in prop::collection::vec((0_u8..3, blocks()), 0..12)) {
        let holdings: Vec<Holding> = holdings.into_iter()
            .map(|(number, block)| Holding { block, node: name(number), source: Source::Spec }).collect();
        let mut expected = 0;
        for (index, one) in holdings.iter().enumerate() {
            for other in &holdings[index + 1..] {
                let shared = all_addresses().any(|a| one.block.contains_address(a) && other.block.contains_address(a));
                expected += usize::from(shared && one.node != other.node);
            }
        }
        let found = conflicts(&holdings);
        prop_assert_eq!(found.len(), expected);
        prop_assert!(found.iter().all(|(one, other)| one.block.contains(&other.block)));
    }
}

const EMPTY: Cluster = Cluster { nodes: vec![], claims: vec![], specs: vec![], records: vec![], ips: vec![] };

fn one_node() -> Facts {
    let cluster = Cluster {
        nodes: vec![1],
        claims: vec![(1, block(0, 26), BlockState::Granted)],
        specs: vec![(1, block(0, 26))],
        records: vec![(1, block(0, 26))],
        ips: vec![],
    };
    facts(&cluster)
}

#[test]
fn a_duplicate_names_both_nodes_and_where_each_is_written() {
    let mut facts = one_node();
    let other = CiliumNodeFact { pod_cidrs: vec!["10.0.0.0/27".into()], ..CiliumNodeFact::default() };
    facts.cilium_nodes.insert("n2".into(), Ok(other));
    let found = check(&facts);
    let duplicate = with(&found, "TwoOwners").next().unwrap();
    assert_eq!(duplicate.kind, Kind::Duplicate);
    assert_eq!(duplicate.what, "10.0.0.0/26 and 10.0.0.0/27");
    assert_eq!(duplicate.who, ["n1", "n2"]);
    assert_eq!(
        duplicate.places,
        [
            "n1: cell 10.0.0.0/24 of the ledger (granted)",
            "n1: CiliumNode n1",
            "n1: node record n1",
            "n2: CiliumNode n2"
        ]
    );
}

#[test]
fn the_record_of_a_node_that_is_gone_is_deleted_only_when_nothing_else_is_left() {
    let mut facts = one_node();
    let record = RecordFact { blocks: vec![block(64, 26)], addresses: vec![] };
    facts.records.insert("n2".into(), Ok(record));
    let found = check(&facts);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].remedy, Some(Remedy::DeleteRecord { node: "n2".into() }));
    // A CiliumNode, a Node or an unreadable cell may still have a say.
    for change in [
        (|facts| drop(facts.cilium_nodes.insert("n2".into(), Err("broken".into())))) as fn(&mut Facts),
        |facts| drop(facts.nodes.insert("n2".into(), Ok(NodeFact::default()))),
        |facts| {
            drop(
                facts
                    .cells
                    .insert(CellId::new(cidr("10.9.0.0/24")), Cell::from_json(CellId::new(cidr("10.9.0.0/24")), b"{}")),
            )
        },
    ] {
        let mut facts = facts.clone();
        change(&mut facts);
        assert!(check(&facts).iter().all(|finding| !matches!(finding.remedy, Some(Remedy::DeleteRecord { .. }))));
    }
}

#[test]
fn nothing_is_concluded_from_a_cell_that_cannot_be_read() {
    let mut facts = one_node();
    let id = CellId::new(cidr(CELL));
    facts.cells.insert(id, Cell::from_json(id, b"{}"));
    facts.ips.insert("10.0.0.9".into(), Ok(IpFact { target: block(9, 32), host: None }));
    let found = check(&facts);
    assert_eq!(found.iter().map(|finding| finding.reason).collect::<Vec<_>>(), ["CellUnreadable"]);
}

#[test]
fn everything_that_cannot_be_read_is_named() {
    let mut facts = one_node();
    facts.strays.push("basal/ipam/v1/default/cells/x".into());
    facts.nodes.insert("a".into(), Err("bad".into()));
    facts.cilium_nodes.insert("b".into(), Err("bad".into()));
    facts
        .cilium_nodes
        .insert("c".into(), Ok(CiliumNodeFact { pod_cidrs: vec!["x".into()], ..CiliumNodeFact::default() }));
    facts.records.insert("d".into(), Err("bad".into()));
    facts.ips.insert("e".into(), Err("bad".into()));
    facts.endpoints.insert("f/g".into(), Err("bad".into()));
    let wide = CellId::new(cidr("10.0.0.0/16"));
    facts.cells.insert(wide, Cell::new(wide, cidr("10.0.0.0/8"), 24));
    let found = check(&facts);
    assert!(found.iter().all(|finding| finding.kind == Kind::Unreadable), "{found:?}");
    let told: Vec<(&str, &str)> = found.iter().map(|finding| (finding.reason, finding.what.as_str())).collect();
    assert_eq!(
        told,
        [
            ("CellsOverlap", "10.0.0.0/24"),
            ("CiliumNodeUnreadable", "b"),
            ("EndpointUnreadable", "f/g"),
            ("IPRecordUnreadable", "e"),
            ("NodeUnreadable", "a"),
            ("PodCIDRUnreadable", "c"),
            ("RecordUnreadable", "d"),
            ("StrayKey", "basal/ipam/v1/default/cells/x"),
        ]
    );
}

#[test]
fn a_block_that_rests_too_long_says_who_uses_it() {
    let mut facts = one_node();
    let id = CellId::new(cidr(CELL));
    let mut cell = facts.cells[&id].clone().unwrap();
    let resting = block(64, 26);
    cell.set(resting, Block { state: BlockState::Quarantined, node: node("n2"), uid: Some(uid("n2")) }).unwrap();
    facts.cells.insert(id, Ok(cell));
    assert_eq!(check(&facts), []);
    facts.overdue.insert(resting);
    facts.endpoints.insert("default/pod".into(), Ok(vec!["10.0.0.65".parse().unwrap()]));
    let found = check(&facts);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].reason, "QuarantineOverdue");
    assert!(found[0].problem.contains("default/pod"), "{}", found[0].problem);
}

#[test]
fn an_address_behind_a_node_without_a_record_is_a_leak() {
    let mut facts = one_node();
    let host = |text: &str| Some(text.parse().unwrap());
    facts.records.get_mut("n1").unwrap().as_mut().unwrap().addresses = vec!["192.0.2.1".parse().unwrap()];
    facts.ips.insert("10.0.0.9".into(), Ok(IpFact { target: block(9, 32), host: host("192.0.2.1") }));
    assert_eq!(check(&facts), []);
    facts.ips.insert("10.0.0.10".into(), Ok(IpFact { target: block(10, 32), host: host("192.0.2.2") }));
    assert_eq!(whats(&check(&facts), "NoNodeRecord"), BTreeSet::from(["10.0.0.10".to_owned()]));
}

#[test]
fn a_claim_of_an_earlier_node_of_the_name_is_an_orphan() {
    let mut facts = one_node();
    facts.nodes.insert("n1".into(), Ok(NodeFact { uid: "another".into(), deleting: false }));
    assert_eq!(whats(&check(&facts), "NodeReplaced"), BTreeSet::from(["10.0.0.0/26".to_owned()]));
}

#[test]
fn an_unserved_node_comes_with_the_words_of_the_operator() {
    let mut facts = one_node();
    facts.nodes.insert("n2".into(), Ok(NodeFact::default()));
    let error = "allocator full: no free IPv4 block".to_owned();
    facts.cilium_nodes.insert("n2".into(), Ok(CiliumNodeFact { error: error.clone(), ..CiliumNodeFact::default() }));
    let found = check(&facts);
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].reason, found[0].what.as_str()), ("NotServed", "IPv4"));
    assert!(found[0].problem.contains(&error), "{}", found[0].problem);
    assert_eq!(found[0].remedy, Some(Remedy::Nudge { node: "n2".into() }));
    facts.nodes.insert("n2".into(), Ok(NodeFact { uid: String::new(), deleting: true }));
    assert_eq!(check(&facts), [], "a node that is leaving needs nothing");
}

#[test]
fn without_records_the_status_of_a_cilium_node_stands_for_them() {
    let mut facts = one_node();
    facts.records.clear();
    assert_eq!(check(&facts)[0].problem, "its node record does not list 10.0.0.0/26");
    facts.published = Source::Confirmation;
    let found = check(&facts);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].problem, "the confirmation in its CiliumNode does not list 10.0.0.0/26");
    let confirmed = |at: &str| CiliumNodeFact {
        pod_cidrs: vec![at.to_owned()],
        confirmed: vec![cidr(at)],
        ..CiliumNodeFact::default()
    };
    facts.cilium_nodes.insert("n1".into(), Ok(confirmed("10.0.0.0/26")));
    assert_eq!(check(&facts), []);
    let mut unreadable = facts.clone();
    unreadable.cilium_nodes.insert("n1".into(), Err("torn".into()));
    assert_eq!(whats(&check(&unreadable), "NotServed"), BTreeSet::new(), "nobody knows what it confirms");
    facts.cilium_nodes.insert("n2".into(), Ok(confirmed("10.0.0.0/27")));
    let found = check(&facts);
    let duplicate = with(&found, "TwoOwners").next().unwrap();
    assert_eq!(duplicate.places.last().unwrap(), "n2: status of CiliumNode n2");
}

#[test]
fn only_what_two_looks_find_stands() {
    let mut facts = one_node();
    let clean = check(&facts);
    facts.nodes.insert("n2".into(), Ok(NodeFact::default()));
    let first = check(&facts);
    assert_eq!(standing(&clean, first.clone()), []);
    let error = "passing".to_owned();
    facts.cilium_nodes.insert("n2".into(), Ok(CiliumNodeFact { error, ..CiliumNodeFact::default() }));
    assert_eq!(standing(&first, check(&facts)).len(), 1, "the words may change, the fault is the same");
    // A fault of the same kind, of somebody else.
    facts.nodes.remove("n2");
    facts.nodes.insert("n3".into(), Ok(NodeFact::default()));
    assert_eq!(standing(&first, check(&facts)), []);
}

#[test]
fn a_claim_outside_the_pool_stays_its_nodes_or_goes_with_its_quarantine() {
    for (state, advice) in [(BlockState::Orphaned, "the node keeps it"), (BlockState::Quarantined, "nothing: ")] {
        let cluster = Cluster { claims: vec![(1, block(0, 26), state)], ..EMPTY };
        let mut facts = facts(&cluster);
        facts.pool = ipv4(&["10.9.0.0/24"], 26);
        let found = check(&facts);
        let told = with(&found, "OutsidePool").next().unwrap();
        assert!(told.advice.starts_with(advice), "{}", told.advice);
    }
}

#[test]
fn a_kind_has_one_word_in_tables_and_json() {
    for kind in [Kind::Duplicate, Kind::Quarantine, Kind::Orphan, Kind::Leak, Kind::Unserved, Kind::Unreadable] {
        assert_eq!(serde_json::to_value(kind).unwrap(), kind.as_str());
    }
}
