use std::time::Duration;

use basal_ipam::cell::BlockState::{Granted, Quarantined};

use crate::stage::Stage;

#[test]
fn real_duplicates_that_heal_themselves_are_told() {
    let stage = Stage::with_a_served_node();
    let watch = stage.watch(&[]);
    // A record that comes and goes.
    stage.record("n2", "10.0.0.0/24");
    stage.delete("cilium/state/nodes/v1/default/n2");
    watch.until("its node record");
    // Two CiliumNodes that overlap for a moment.
    stage.spec("n3", &["10.0.9.0/24"]);
    stage.spec("n4", &["10.0.9.128/25"]);
    stage.spec("n4", &[]);
    watch.until("n3: its CiliumNode");
    // A CiliumNode that lists another node's claim, for as long as it takes to look at it again.
    stage.spec("n5", &["10.0.0.0/25"]);
    watch.until("n5: its CiliumNode");
    stage.kubectl(&["delete", "ciliumnode", "n3", "n4", "n5"]);
    let (code, reasons) = watch.end();
    assert_eq!(code, Some(1));
    assert!(reasons.iter().all(|reason| reason == "TwoOwners"), "{reasons:?}");
}

#[test]
fn real_quarantine_is_watched_across_restarts_of_both_servers() {
    let mut stage = Stage::with_a_served_node();
    stage.cell(&[("10.0.0.0/24", "n1", Granted), ("10.0.1.0/24", "n2", Granted)]);
    let watch = stage.watch(&[]);
    stage.etcd.kill().unwrap();
    stage.etcd.restart().unwrap();
    watch.until("the ledger are followed again; nothing was missed");
    stage.server.kill().unwrap();
    stage.server.restart().unwrap();
    stage.spec("n1", &["10.0.0.0/24"]);
    stage.cell(&[("10.0.0.0/24", "n1", Granted), ("10.0.1.0/24", "n2", Quarantined)]);
    stage.cell(&[("10.0.0.0/24", "n1", Granted)]);
    watch.until("ShortQuarantine");
    let (code, reasons) = watch.end();
    assert_eq!((code, reasons), (Some(1), vec!["ShortQuarantine".to_owned()]));
}

#[test]
fn real_peace_ends_with_0_after_the_time() {
    let stage = Stage::with_a_served_node();
    let watch = stage.watch(&["--for=3s"]);
    stage.node("n2");
    stage.cell(&[("10.0.0.0/24", "n1", Granted), ("10.0.1.0/24", "n2", Granted)]);
    stage.spec("n2", &["10.0.1.0/24"]);
    stage.record("n2", "10.0.1.0/24");
    watch.until("0 findings");
    std::thread::sleep(Duration::from_millis(100));
    let (code, reasons) = watch.end();
    assert_eq!((code, reasons), (Some(0), vec![]));
}
