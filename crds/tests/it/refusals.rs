//! What the API server refuses, and in which words.

use serde_json::{Value, json};

use crate::api::{cell, endpoint, identity, ledger, node, pool, send, server};

/// Takes away a field.
fn without(mut object: Value, field: &str) -> Value {
    object.as_object_mut().and_then(|fields| fields.remove(field)).expect("the field is there");
    object
}

#[test]
fn objects_that_break_a_rule_are_refused_with_the_field() {
    let server = server();
    let ipv4 = |cidrs: Value, mask: Value| pool("p", json!({ "ipv4": { "cidrs": cidrs, "maskSize": mask } }));
    let ipv6 = |mask: i32| pool("p", json!({ "ipv6": { "cidrs": ["fd00::/64"], "maskSize": mask } }));
    let selector = |expression: Value| pool("p", json!({ "podSelector": { "matchExpressions": [expression] } }));
    let good = || json!(["10.0.0.0/16"]);
    let cases = [
        (without(node("n", json!({})), "spec"), "spec: Required value"),
        (node("n", json!({ "addresses": {} })), "spec.addresses: Invalid value: \"object\""),
        (node("n", json!({ "ipam": { "pre-allocate": -1 } })), "spec.ipam.pre-allocate: Invalid value: -1"),
        (node("n", json!({ "ipam": { "min-allocate": -1 } })), "spec.ipam.min-allocate: Invalid value: -1"),
        (node("n", json!({ "ipam": { "max-allocate": -1 } })), "spec.ipam.max-allocate: Invalid value: -1"),
        (
            node("n", json!({ "ipam": { "max-above-watermark": -1 } })),
            "spec.ipam.max-above-watermark: Invalid value: -1",
        ),
        (
            node("n", json!({ "eni": { "first-interface-index": -1 } })),
            "spec.eni.first-interface-index: Invalid value: -1",
        ),
        (
            node("n", json!({ "ipam": { "pools": { "requested": [{}] } } })),
            "spec.ipam.pools.requested[0].pool: Required value",
        ),
        (
            node("n", json!({ "ipam": { "pools": { "allocated": [{ "pool": "" }] } } })),
            "spec.ipam.pools.allocated[0].pool: Invalid value: \"\"",
        ),
        (
            node("n", json!({ "ipam": { "pools": { "allocated": [{ "pool": "p", "cidrs": ["10.0.0.0"] }] } } })),
            "spec.ipam.pools.allocated[0].cidrs[0]: Invalid value: \"10.0.0.0\"",
        ),
        (without(identity("1"), "security-labels"), "security-labels: Required value"),
        (endpoint("e", json!({ "state": "well" })), "status.state: Unsupported value: \"well\""),
        (endpoint("e", json!({ "networking": {} })), "status.networking.addressing: Required value"),
        (endpoint("e", json!({ "policy": { "ingress": {} } })), "status.policy.ingress.enforcing: Required value"),
        (without(pool("p", json!({})), "spec"), "spec: Required value"),
        (
            ipv4(json!([]), json!(24)),
            "spec.ipv4.cidrs: Invalid value: 0: spec.ipv4.cidrs in body should have at least 1 items",
        ),
        (ipv4(json!(["10.0.0.0/33"]), json!(24)), "spec.ipv4.cidrs[0]: Invalid value: \"10.0.0.0/33\""),
        (ipv4(good(), json!(0)), "spec.ipv4.maskSize: Invalid value: 0"),
        (ipv4(good(), json!(33)), "spec.ipv4.maskSize: Invalid value: 33"),
        (ipv4(good(), Value::Null), "spec.ipv4.maskSize: Required value"),
        (ipv6(0), "spec.ipv6.maskSize: Invalid value: 0"),
        (ipv6(129), "spec.ipv6.maskSize: Invalid value: 129"),
        (pool("p", json!({ "ipv6": { "maskSize": 120 } })), "spec.ipv6.cidrs: Required value"),
        (
            selector(json!({ "key": "a", "operator": "Like" })),
            "spec.podSelector.matchExpressions[0].operator: Unsupported value: \"Like\"",
        ),
        (selector(json!({ "operator": "In" })), "spec.podSelector.matchExpressions[0].key: Required value"),
        (
            pool("p", json!({ "namespaceSelector": { "matchLabels": { "a": "b/c" } } })),
            "spec.namespaceSelector.matchLabels.a: Invalid value: \"b/c\"",
        ),
    ];
    let of = |block: Value| {
        let (prefix, pool) = ("10.0.0.0/16", "10.0.0.0/8");
        let spec =
            json!({ "cluster": "c", "prefix": prefix, "pool": pool, "maskSize": 24, "term": "t", "blocks": block });
        cell("c-10-0-0-0-16", spec)
    };
    let cases = cases.into_iter().chain([
        (of(json!([{ "block": "10.0.0.0", "state": "granted", "node": "n" }])), "spec.blocks[0].block: Invalid value"),
        (
            of(json!([{ "block": "10.0.0.0/24", "state": "given", "node": "n" }])),
            "spec.blocks[0].state: Unsupported value: \"given\"",
        ),
        (of(json!([{ "block": "10.0.0.0/24", "state": "granted" }])), "spec.blocks[0].node: Required value"),
        (
            of(json!([
                { "block": "10.0.0.0/24", "state": "granted", "node": "n" },
                { "block": "10.0.0.0/24", "state": "granted", "node": "m" },
            ])),
            "spec.blocks[1]: Duplicate value",
        ),
        (cell("c", json!({ "cluster": "c" })), "spec.prefix: Required value"),
        (ledger("c", json!({ "store": "file" })), "spec.store: Unsupported value: \"file\""),
        (
            ledger("c", json!({ "store": "etcd", "cells": ["10.0.0.0/16", "10.0.0.0/16"] })),
            "spec.cells[1]: Duplicate value",
        ),
    ]);
    for (object, wanted) in cases {
        let error = send(&server, "create", &object).expect_err(wanted);
        assert!(error.contains(wanted), "wanted {wanted:?}, the server said: {error}");
    }
}

#[test]
fn what_is_immutable_in_a_pool_stays() {
    let server = server();
    let spec = json!({
        "ipv4": { "cidrs": ["10.0.0.0/16"], "maskSize": 24 },
        "ipv6": { "cidrs": ["fd00::/104"], "maskSize": 120 },
    });
    let created = send(&server, "create", &pool("p", spec.clone())).unwrap();
    assert_eq!(created["spec"]["allowFirstIP"], json!(false), "the default is filled in");
    assert_eq!(created["spec"]["allowLastIP"], json!(false), "the default is filled in");

    let changed = |pointer: &str, value: Value| {
        let mut object = created.clone();
        *object.pointer_mut(pointer).unwrap() = value;
        send(&server, "replace", &object)
    };
    for (pointer, value, field, message) in [
        ("/spec/ipv4/maskSize", json!(25), "spec.ipv4.maskSize", "maskSize is immutable"),
        ("/spec/ipv6/maskSize", json!(112), "spec.ipv6.maskSize", "maskSize is immutable"),
        ("/spec/allowFirstIP", json!(true), "spec.allowFirstIP", "allowFirstIP is immutable"),
        ("/spec/allowLastIP", json!(true), "spec.allowLastIP", "allowLastIP is immutable"),
    ] {
        let error = changed(pointer, value).expect_err(pointer);
        assert!(error.contains(field) && error.contains(message), "{pointer}: {error}");
    }
    let grown = changed("/spec/ipv4/cidrs", json!(["10.0.0.0/16", "10.1.0.0/16"])).unwrap();
    assert_eq!(grown["spec"]["ipv4"]["cidrs"], json!(["10.0.0.0/16", "10.1.0.0/16"]));
    // The rules compare what is there before and after: they do not keep a family from being taken away.
    let mut object = grown;
    object["spec"].as_object_mut().unwrap().remove("ipv6");
    assert_eq!(send(&server, "replace", &object).unwrap()["spec"].get("ipv6"), None);
}

#[test]
fn what_a_cell_is_about_and_the_list_of_cells_stay() {
    let server = server();
    let spec = json!({ "cluster": "c", "prefix": "fd00::/112", "pool": "fd00::/104", "maskSize": 120, "term": "t" });
    let created = send(&server, "create", &cell("c-fd00-112", spec)).unwrap();
    for (field, value) in [
        ("cluster", json!("d")),
        ("prefix", json!("fd01::/112")),
        ("pool", json!("fd00::/64")),
        ("maskSize", json!(121)),
    ] {
        let mut object = created.clone();
        object["spec"][field] = value;
        let error = send(&server, "replace", &object).expect_err(field);
        assert!(error.contains(&format!("spec.{field}")) && error.contains("is immutable"), "{field}: {error}");
    }
    // A deletion waits for the finalizer, and the claims stay readable.
    server.kubectl().unwrap().args(["delete", "pcc", "c-fd00-112", "--wait=false"]).done().unwrap();
    let condemned = server.kubectl().unwrap().args(["get", "pcc", "c-fd00-112", "-o", "json"]).json().unwrap();
    assert!(condemned["metadata"]["deletionTimestamp"].is_string(), "{condemned}");

    let created =
        send(&server, "create", &ledger("c", json!({ "store": "custom-resources", "cells": ["fd00::/112"] }))).unwrap();
    let mut object = created;
    object["spec"]["cells"] = json!(["fd00::/112", "10.0.0.0/16"]);
    object["spec"]["term"] = json!("t");
    let mut object = send(&server, "replace", &object).unwrap();
    for less in [json!(["fd00::/112"]), Value::Null] {
        object["spec"]["cells"] = less;
        let error = send(&server, "replace", &object).unwrap_err();
        assert!(error.contains("cells never go"), "{error}");
    }
    object["spec"]["cells"] = json!(["fd00::/112", "10.0.0.0/16"]);

    // The store is changed by who moved the claims, where that was asked for.
    object["spec"]["store"] = json!("etcd");
    let error = send(&server, "replace", &object).unwrap_err();
    assert!(error.contains("the store is changed by moving the claims"), "{error}");
    object["spec"]["store"] = json!("custom-resources");
    object["spec"]["moveTo"] = json!("etcd");
    let mut object = send(&server, "replace", &object).unwrap();
    object["spec"] = json!({
        "store": "etcd", "leaving": "custom-resources", "term": "t", "cells": ["fd00::/112", "10.0.0.0/16"],
    });
    send(&server, "replace", &object).unwrap();
}
