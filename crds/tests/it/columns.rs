//! What `kubectl get` shows.

use basal_e2e::servers::ApiServer;
use serde_json::json;

use crate::api::{cell, endpoint, identity, ledger, node, pool, send, server};

/// The words of the table, line by line, without the ages.
fn table(server: &ApiServer, args: &[&str]) -> Vec<Vec<String>> {
    let text = server.kubectl().and_then(|run| run.arg("get").args(args).text()).expect("kubectl get works");
    // Columns are at least three spaces apart.
    let line =
        |line: &str| line.split("   ").map(str::trim).filter(|cell| !cell.is_empty()).map(str::to_owned).collect();
    let mut lines: Vec<Vec<String>> = text.lines().map(line).collect();
    if lines[0].last().is_some_and(|head| head == "AGE") {
        lines.iter_mut().skip(1).for_each(|line| drop(line.pop()));
    }
    lines
}

#[test]
fn kubectl_shows_the_columns_of_cilium_by_short_name_and_category() {
    let server = server();
    let addresses = json!([
        { "type": "InternalIP", "ip": "172.18.0.2" },
        { "type": "CiliumInternalIP", "ip": "10.244.0.1" },
    ]);
    let status = json!({
        "identity": { "id": 300 },
        "networking": { "addressing": [{ "ipv4": "10.244.0.7", "ipv6": "fd00::7" }] },
        "policy": { "ingress": { "enforcing": true, "state": "ok" }, "egress": { "enforcing": false, "state": "off" } },
        "state": "ready",
    });
    for object in [
        node("node-1", json!({ "addresses": addresses })),
        endpoint("pod-1", status),
        identity("300"),
        pool("pool-1", json!({ "ipv4": { "cidrs": ["10.0.0.0/16"], "maskSize": 24 } })),
    ] {
        send(&server, "create", &object).unwrap();
    }

    for name in ["cn", "ciliumn"] {
        assert_eq!(
            table(&server, &[name]),
            [vec!["NAME", "CILIUMINTERNALIP", "INTERNALIP", "AGE"], vec!["node-1", "10.244.0.1", "172.18.0.2"]]
        );
    }
    assert_eq!(
        table(&server, &["cep"]),
        [
            vec!["NAME", "SECURITY IDENTITY", "ENDPOINT STATE", "IPV4", "IPV6"],
            vec!["pod-1", "300", "ready", "10.244.0.7", "fd00::7"],
        ]
    );
    assert_eq!(
        table(&server, &["ciliumep", "-o", "wide"]),
        [
            vec![
                "NAME",
                "SECURITY IDENTITY",
                "INGRESS ENFORCEMENT",
                "EGRESS ENFORCEMENT",
                "ENDPOINT STATE",
                "IPV4",
                "IPV6",
            ],
            vec!["pod-1", "300", "ok", "off", "ready", "10.244.0.7", "fd00::7"],
        ]
    );
    assert_eq!(table(&server, &["ciliumid"]), [vec!["NAME", "NAMESPACE", "AGE"], vec!["300", "bar"]]);
    assert_eq!(table(&server, &["cpip"]), [vec!["NAME", "AGE"], vec!["pool-1"]]);

    let all = server.kubectl().unwrap().args(["get", "cilium", "-o", "name"]).text().unwrap();
    let mut all: Vec<&str> = all.lines().collect();
    all.sort_unstable();
    assert_eq!(
        all,
        [
            "ciliumendpoint.cilium.io/pod-1",
            "ciliumidentity.cilium.io/300",
            "ciliumnode.cilium.io/node-1",
            "ciliumpodippool.cilium.io/pool-1",
        ]
    );
}

#[test]
fn kubectl_shows_the_ledger() {
    let server = server();
    let spec = json!({ "cluster": "c", "prefix": "10.0.0.0/16", "pool": "10.0.0.0/8", "maskSize": 24, "term": "t" });
    send(&server, "create", &cell("c-10-0-0-0-16", spec)).unwrap();
    send(&server, "create", &ledger("c", json!({ "store": "custom-resources", "term": "t" }))).unwrap();
    assert_eq!(
        table(&server, &["pcc"]),
        [vec!["NAME", "PREFIX", "POOL", "MASK SIZE", "AGE"], vec!["c-10-0-0-0-16", "10.0.0.0/16", "10.0.0.0/8", "24"]]
    );
    assert_eq!(
        table(&server, &["ledgers"]),
        [
            vec!["NAME", "STORE", "MOVE TO", "LEAVING", "READY", "REASON", "EXHAUSTED", "AGE"],
            vec!["c", "custom-resources"]
        ]
    );
    let all = server.kubectl().unwrap().args(["get", "basal", "-o", "name"]).text().unwrap();
    let mut all: Vec<&str> = all.lines().collect();
    all.sort_unstable();
    assert_eq!(all, ["ledger.basal.io/c", "podcidrcell.basal.io/c-10-0-0-0-16"]);
}
