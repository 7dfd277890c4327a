use basal_e2e::command::Run;
use basal_ipam::cell::BlockState::{Granted, Quarantined};
use serde_json::json;

use crate::stage::{Stage, binary, said};

#[test]
fn real_faults_are_found_and_named() {
    let stage = Stage::with_a_served_node();
    let sound = stage.check(&[]);
    assert_eq!((sound.code, sound.reasons()), (Some(0), vec![]), "{}", sound.stderr);
    assert!(stage.table().starts_with("Nothing is wrong"));

    // Another node's CiliumNode lists a part of the block, and that node has none.
    stage.node("n2");
    stage.spec("n2", &["10.0.0.128/25"]);
    let found = stage.check(&[]);
    assert_eq!(found.code, Some(1));
    assert_eq!(found.reasons(), ["TwoOwners", "NotServed"]);
    assert_eq!(found.findings[0]["who"], json!(["n1", "n2"]));
    assert_eq!(found.findings[0]["where"][3], "n2: CiliumNode n2");
    assert!(stage.table().lines().any(|line| line.starts_with("duplicate   10.0.0.0/24 and 10.0.0.128/25   n1, n2")));
    stage.kubectl(&["delete", "node,ciliumnode", "n2"]);

    // A claim without a Node, in the pool and outside of it; and one that rests.
    stage.cell(&[("10.0.0.0/24", "n1", Granted), ("10.0.1.0/24", "n3", Granted), ("10.0.2.0/24", "n3", Quarantined)]);
    let found = stage.check(&[]);
    assert_eq!((found.code, found.reasons()), (Some(1), vec!["NodeGone"]));
    let outside = stage.check(&["--cluster-pool-ipv4-cidr=10.0.0.0/23"]);
    assert_eq!(outside.reasons(), ["NodeGone", "OutsidePool"], "{}", outside.stderr);
    stage.cell(&[("10.0.0.0/24", "n1", Granted)]);

    // Addresses: in the node's block, in a free one, behind a node without a record.
    stage.ip("10.0.0.9", "192.0.2.1");
    stage.ip("10.0.7.9", "192.0.2.1");
    stage.ip("10.0.0.10", "192.0.2.2");
    let endpoint = json!({
        "apiVersion": "cilium.io/v2", "kind": "CiliumEndpoint", "metadata": {"name": "pod", "namespace": "default"},
        "status": {"networking": {"addressing": [{"ipv4": "10.0.8.1"}]}},
    });
    stage.server.apply(&endpoint).unwrap();
    let found = stage.check(&[]);
    assert_eq!(found.reasons(), ["FreeBlockInUse", "FreeBlockInUse", "NoNodeRecord"]);
    let whats: Vec<&str> = found.findings.iter().map(|finding| finding["what"].as_str().unwrap()).collect();
    assert_eq!(whats, ["10.0.7.9", "10.0.8.1", "10.0.0.10"]);
    stage.delete("cilium/state/ip/v1/default/10.0.7.9");
    stage.delete("cilium/state/ip/v1/default/10.0.0.10");
    stage.kubectl(&["delete", "ciliumendpoint", "pod"]);

    // What cannot be read.
    stage.put("basal/ipam/v1/default/cells/ipv4/10.9.0.0/16", "{}");
    stage.put("basal/ipam/v1/default/cells/x", "{}");
    stage.put("cilium/state/nodes/v1/default/n9", "no record");
    let found = stage.check(&[]);
    assert_eq!(found.reasons(), ["CellUnreadable", "RecordUnreadable", "StrayKey"]);
}

#[test]
fn real_mending_touches_only_what_is_safe() {
    let stage = Stage::with_a_served_node();
    stage.put("basal/ipam/v1/default/fence", "term");
    stage.record("gone", "10.0.5.0/24");
    stage.node("n2");
    stage.cell(&[("10.0.0.0/24", "n1", Granted), ("10.0.1.0/24", "n3", Granted)]);
    let ledger = stage.etcd.etcdctl(&["get", "--prefix", "basal/", "-w", "json"]).unwrap();

    let shown = stage.check(&["--dry-run"]);
    assert_eq!(shown.reasons(), ["NodeGone", "RecordLeft", "NotServed"]);
    assert!(shown.stderr.contains("would delete cilium/state/nodes/v1/default/gone"), "{}", shown.stderr);
    assert!(shown.stderr.contains("would annotate node n2"), "{}", shown.stderr);
    assert!(shown.stderr.contains("only the leader writes the ledger"), "{}", shown.stderr);
    assert_eq!(stage.check(&[]).reasons(), shown.reasons(), "a dry run changes nothing");

    let mended = stage.check(&["--fix"]);
    assert_eq!(mended.code, Some(1));
    assert!(mended.stderr.contains("delete cilium/state/nodes/v1/default/gone"), "{}", mended.stderr);
    assert_eq!(stage.check(&[]).reasons(), ["NodeGone", "NotServed"]);
    let nudged = stage.kubectl(&["get", "node", "n2", "-o", r"jsonpath={.metadata.annotations.basal\.io/nudged-at}"]);
    assert!(nudged.contains('T'), "{nudged:?}");
    let after = stage.etcd.etcdctl(&["get", "--prefix", "basal/", "-w", "json"]).unwrap();
    let kvs = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap()["kvs"].clone();
    assert_eq!(kvs(&after), kvs(&ledger), "the ledger is nobody's but the leader's");
}

#[test]
fn real_servers_that_are_away_are_no_clean_answer() {
    let mut stage = Stage::with_a_served_node();
    let unknown = stage.check(&["--no-such-key"]);
    assert_eq!(unknown.code, Some(2));
    let no_pool = stage.check(&["--enable-ipv6=true"]);
    assert_eq!(no_pool.code, Some(2));
    assert!(no_pool.stderr.contains("cluster-pool-ipv6-cidr"), "{}", no_pool.stderr);
    let keys = stage.etcd.dir().join("keys");
    std::fs::create_dir(&keys).unwrap();
    for (key, value) in [("cluster-pool-ipv4-cidr", "10.0.0.0/16"), ("enable-ipv6", "false"), ("enable-ipv4", "true")] {
        std::fs::write(keys.join(key), value).unwrap();
    }
    let kvstore = format!("{{\"etcd.config\": \"{}\"}}", stage.etcd.client_config("operator").unwrap().display());
    std::fs::write(keys.join("kvstore"), "etcd").unwrap();
    std::fs::write(keys.join("kvstore-opt"), kvstore).unwrap();
    let mounted = said(
        Run::new(binary())
            .args(["-o", "json", "ipam", "check", "--config-dir"])
            .arg(&keys)
            .env("KUBECONFIG", stage.server.kubeconfig("admin").unwrap()),
    );
    assert_eq!(mounted.code, Some(0), "{}", mounted.stderr);
    stage.etcd.kill().unwrap();
    let blind = stage.check(&[]);
    assert_eq!(blind.code, Some(2));
    assert!(blind.stderr.contains("ledger"), "{}", blind.stderr);
    stage.etcd.restart().unwrap();
    stage.server.kill().unwrap();
    let blind = stage.check(&[]);
    assert_eq!(blind.code, Some(2));
    assert!(blind.stderr.contains("the list of"), "{}", blind.stderr);
}
