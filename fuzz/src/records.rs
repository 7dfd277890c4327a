//! Keys and values in etcd: Cilium's records, and the cells of the ledger.

use basal_crds::kvstore::{ClusterConfig, IpRecord, NodeRecord, keys, parse_identity_labels, parse_identity_value};
use basal_ipam::{
    cell::{Cell, CellId},
    prefix::PodCidr,
};
use basal_kvstore::ledger::{LedgerKey, LedgerKeys};

/// The cells that inputs are read as.
const CELLS: [&str; 3] = ["10.0.0.0/16", "fd00::/112", "0.0.0.0/0"];

pub(crate) fn values(input: &[u8]) {
    if let Ok(record) = NodeRecord::parse(input) {
        assert_eq!(NodeRecord::parse(record.to_json().as_bytes()).as_ref(), Ok(&record));
        for cidr in record.cidrs() {
            assert_eq!(cidr.trunc(), cidr, "a block with bits behind its prefix");
        }
    }
    if let Ok(record) = IpRecord::parse(input) {
        assert_eq!(IpRecord::parse(record.to_json().as_bytes()), Ok(record));
    }
    if let Ok(config) = ClusterConfig::parse(input) {
        assert_eq!(ClusterConfig::parse(config.to_json().as_bytes()), Ok(config));
    }
    if let Ok(id) = parse_identity_value(input) {
        assert_eq!(parse_identity_value(id.get().to_string().as_bytes()), Ok(id));
    }
    match parse_identity_labels(input) {
        Ok(labels) => assert_eq!(parse_identity_labels(labels.canonical().as_bytes()), Ok(labels)),
        Err(error) => super::explained(&error),
    }
}

pub(crate) fn keys(input: &[u8]) {
    let Ok(key) = std::str::from_utf8(input) else { return };
    if let Ok((cluster, node)) = keys::parse_node(key) {
        assert_eq!(keys::node(&cluster, &node), key);
    }
    if let Ok(target) = keys::parse_ip_target(key) {
        assert_eq!(keys::parse_ip_target(&keys::ip(target)), Ok(target));
    }
    if let Ok(id) = keys::parse_identity(key) {
        assert_eq!(keys::parse_identity(&keys::identity(id)), Ok(id));
    }
    match keys::parse_identity_reference(key) {
        Ok((labels, ip)) => {
            let again = keys::identity_reference(&labels, ip);
            assert_eq!(keys::parse_identity_reference(&again), Ok((labels, ip)));
        }
        Err(error) => super::explained(&error),
    }
    let ledger = LedgerKeys::new("default");
    if let Some(LedgerKey::Cell(id)) = ledger.parse(key) {
        assert_eq!(ledger.cell(id), key, "a cell has one key");
    }
}

pub(crate) fn cell(input: &[u8]) {
    for prefix in CELLS {
        let id = CellId::new(prefix.parse::<PodCidr>().expect("a prefix"));
        match Cell::from_json(id, input) {
            Ok(cell) => {
                let text = cell.to_json().expect("what was read can be written");
                assert!(text.len() <= cell.text_bound(), "{} bytes, and {} at most", text.len(), cell.text_bound());
                assert!(cell.blocks().keys().all(|block| id.prefix().contains(block)));
                let mut blocks = cell.blocks().keys();
                if let Some(mut last) = blocks.next() {
                    for block in blocks {
                        assert!(!block.overlaps(last), "{block} overlaps {last}");
                        last = block;
                    }
                }
                assert_eq!(Cell::from_json(id, &text), Ok(cell));
            }
            Err(error) => super::explained(&error),
        }
    }
}
