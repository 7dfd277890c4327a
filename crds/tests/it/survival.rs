//! What the API server keeps, and what it drops.

use basal_crds::resources::{CiliumNode, Kind};
use serde_json::{Map, Value, json};

use crate::api::{endpoint, node, send, server};

/// A value for every field of a schema.
fn sample(schema: &Value) -> Value {
    if let Some(first) = schema["enum"].as_array().and_then(|values| values.first()) {
        return first.clone();
    }
    match schema["type"].as_str().unwrap_or_default() {
        "array" => json!([sample(&schema["items"])]),
        "boolean" => json!(true),
        "integer" => json!(7),
        "string" if schema["format"] == "cidr" => json!("10.0.0.0/24"),
        "string" if schema["format"] == "date-time" => json!("2026-01-02T03:04:05Z"),
        "string" => json!("x"),
        "object" if schema["additionalProperties"].is_object() => {
            json!({ "k": sample(&schema["additionalProperties"]) })
        }
        "object" => {
            let fields = schema["properties"].as_object().into_iter().flatten();
            Value::Object(fields.map(|(name, schema)| (name.clone(), sample(schema))).collect::<Map<_, _>>())
        }
        // A schema without type: the API server refuses it before this is sent.
        _ => Value::Null,
    }
}

#[test]
fn every_field_of_every_kind_is_kept() {
    let server = server();
    for definition in basal_crds::crds() {
        let spec = &definition.object["spec"];
        let version = &spec["versions"][0];
        let mut object = sample(&version["schema"]["openAPIV3Schema"]);
        object["apiVersion"] = json!(format!("{}/{}", definition.group.name, version["name"].as_str().unwrap()));
        object["kind"] = spec["names"]["kind"].clone();
        object["metadata"] = json!({ "name": "full", "namespace": "default" });
        if spec["scope"] == "Cluster" {
            object["metadata"] = json!({ "name": "full" });
        }
        let mut stored = send(&server, "create", &object).unwrap();
        if version["subresources"].get("status").is_some() && object.get("status").is_some() {
            // Status is a subresource: a create drops it, and it has a path of its own.
            assert_eq!(stored.get("status"), None, "{}", definition.plural);
            object["metadata"]["resourceVersion"] = stored["metadata"]["resourceVersion"].clone();
            let run = server.kubectl().unwrap().args(["replace", "--subresource=status", "-o", "json", "-f", "-"]);
            stored = run.stdin(object.to_string()).json().unwrap();
        }
        for field in ["spec", "status", "security-labels"] {
            assert!(stored.get(field) == object.get(field), "{}: {field} came back as {stored:#}", definition.plural);
        }
    }
}

#[test]
fn unknown_fields_and_nulls_are_dropped_and_empty_objects_stay() {
    let server = server();
    let spec =
        json!({ "eni": {}, "azure": null, "unknown": 1, "ipam": { "podCIDRs": null, "pools": {}, "unknown": {} } });
    let stored = send(&server, "create", &node("n", spec)).unwrap();
    assert_eq!(stored["spec"], json!({ "eni": {}, "ipam": { "pools": {} } }));
}

#[test]
fn what_the_types_write_is_stored_and_read_back() {
    let server = server();
    let mut typed: CiliumNode =
        serde_json::from_value(node("n", json!({ "ipam": { "podCIDRs": ["10.0.0.0/24"] } }))).unwrap();
    typed.spec.health.ipv4 = "10.0.0.9".to_owned();
    let stored = send(&server, "create", &typed.to_object().unwrap()).unwrap();
    let read: CiliumNode = serde_json::from_value(stored).unwrap();
    assert_eq!(read.spec, typed.spec);
    assert!(read.metadata.uid.is_some());
}

#[test]
fn the_status_of_an_endpoint_is_no_subresource() {
    let server = server();
    let stored = send(&server, "create", &endpoint("e", json!({ "state": "ready", "id": 5 }))).unwrap();
    assert_eq!(stored["status"], json!({ "state": "ready", "id": 5 }));
}
