//! Claims in custom resources: no record of Basal's is in etcd.

use basal_ipam::cell::BlockState::{Granted, Quarantined};

use crate::stage::Stage;

/// Where claims are: not in etcd, which runs for the other tests.
const HERE: &str = "--kvstore=";

impl Stage {
    /// Node n1 with a block, as cell and CiliumNode say.
    fn with_a_confirmed_node() -> Self {
        let stage = Self::new();
        stage.node("n1");
        stage.ledger_object("custom-resources");
        stage.cell_object(&[("10.0.0.0/24", "n1", Granted)]);
        stage.spec("n1", &["10.0.0.0/24"]);
        stage.confirm("n1", &["10.0.0.0/24"]);
        stage
    }
}

#[test]
fn real_objects_are_compared_and_mended_like_records() {
    let stage = Stage::with_a_confirmed_node();
    let sound = stage.check(&[HERE]);
    assert_eq!((sound.code, sound.reasons()), (Some(0), vec![]), "{}", sound.stderr);

    // Agents use only what the status confirms.
    stage.confirm("n1", &[]);
    let found = stage.check(&[HERE]);
    assert_eq!((found.code, found.reasons()), (Some(1), vec!["NotServed"]));
    let problem = found.findings[0]["problem"].as_str().unwrap();
    assert_eq!(problem, "the confirmation in its CiliumNode does not list 10.0.0.0/24");
    let shown = stage.check(&[HERE, "--dry-run"]);
    assert!(shown.stderr.contains("would annotate node n1"), "{}", shown.stderr);
    let nudged =
        || stage.kubectl(&["get", "ciliumnode", "n1", "-o", r"jsonpath={.metadata.annotations.basal\.io/nudged-at}"]);
    assert_eq!(nudged(), "");
    stage.check(&[HERE, "--fix"]);
    assert!(nudged().contains('T'), "{:?}", nudged());
    stage.confirm("n1", &["10.0.0.0/24"]);

    // Another node's status confirms a part of the block.
    stage.node("n2");
    stage.spec("n2", &["10.0.0.128/25"]);
    stage.confirm("n2", &["10.0.0.128/25"]);
    let found = stage.check(&[HERE]);
    assert_eq!(found.reasons(), ["TwoOwners", "NotServed"]);
    let places = found.findings[0]["where"].as_array().unwrap();
    assert_eq!(places.last().unwrap(), "n2: status of CiliumNode n2");
    stage.kubectl(&["delete", "node,ciliumnode", "n2"]);

    // A cell whose object is gone is no empty cell: nothing is said of its blocks.
    stage.remove_cell_object();
    assert_eq!(stage.check(&[HERE]).reasons(), ["CellUnreadable"]);
}

#[test]
fn real_claims_in_the_other_store_are_no_clean_answer() {
    let stage = Stage::new();
    stage.ledger_object("etcd");
    let found = stage.check(&[HERE]);
    assert_eq!(found.code, Some(2));
    assert!(found.stderr.contains("active store of claims is etcd"), "{}", found.stderr);
}

#[test]
fn real_duplicates_and_short_rests_in_objects_are_told_although_they_heal() {
    let mut stage = Stage::with_a_confirmed_node();
    stage.cell_object(&[("10.0.0.0/24", "n1", Granted), ("10.0.1.0/24", "n2", Granted)]);
    let watch = stage.watch(&[HERE]);
    stage.spec("n3", &["10.0.9.0/24"]);
    stage.spec("n4", &["10.0.9.128/25"]);
    stage.spec("n4", &[]);
    watch.until("n3: its CiliumNode");
    // A CiliumNode that confirms another node's claim, for as long as it takes to look at it again.
    stage.spec("n5", &["10.0.0.0/25"]);
    stage.confirm("n5", &["10.0.0.0/25"]);
    watch.until("n5: the confirmation in its CiliumNode");
    stage.kubectl(&["delete", "ciliumnode", "n3", "n4", "n5"]);
    stage.cell_object(&[("10.0.0.0/24", "n1", Granted), ("10.0.1.0/24", "n2", Quarantined)]);
    stage.cell_object(&[("10.0.0.0/24", "n1", Granted)]);
    watch.until("ShortQuarantine");
    stage.server.kill().unwrap();
    watch.until("the ledger are not followed");
    stage.server.restart().unwrap();
    let (code, reasons) = watch.end();
    assert_eq!(code, Some(1));
    assert_eq!(reasons.iter().filter(|reason| *reason == "ShortQuarantine").count(), 1, "{reasons:?}");
    assert!(reasons.iter().all(|reason| reason == "ShortQuarantine" || reason == "TwoOwners"), "{reasons:?}");
}

#[test]
fn real_peace_in_objects_ends_with_0_across_a_restart() {
    let mut stage = Stage::with_a_confirmed_node();
    let watch = stage.watch(&[HERE]);
    stage.server.kill().unwrap();
    watch.until("the ledger are not followed");
    stage.server.restart().unwrap();
    stage.cell_object(&[("10.0.0.0/24", "n1", Granted), ("10.0.1.0/24", "n2", Granted)]);
    watch.until("the ledger are followed again");
    stage.spec("n2", &["10.0.1.0/24"]);
    watch.until("the CiliumNodes are followed again");
    let (code, reasons) = watch.end();
    assert_eq!((code, reasons), (Some(0), vec![]));
}
