//! Whom the API server takes for the writer of what is written through the port.

use std::time::Duration;

use basal_e2e::servers::ApiServer;
use basal_objects::{
    crd_install,
    object::{
        Object,
        resources::{NODE, POD_CIDR_CELL},
    },
    port::Objects as _,
};
use basal_runtime::outcome::Outcome;
use serde_json::{Value, json};

use super::{connect, env, node, patch, start};

/// `metadata.managedFields` of an object, which the port does not show.
fn managers(server: &ApiServer, kind: &str, name: &str) -> Value {
    let run = server.kubectl().unwrap().args(["get", kind, name, "-o", "json", "--show-managed-fields"]);
    run.json().unwrap()["metadata"]["managedFields"].take()
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_are_those_of_the_client_by_its_name_and_nobody_tracks_the_fields_of_cells() {
    let server = start();
    let admin = connect(&server, "admin").await;
    // An object that is made without any field is never tracked.
    let mut labelled = node("a");
    labelled.0["metadata"]["labels"] = json!({ "a": "b" });
    assert!(admin.create(NODE, labelled).await.is_done());
    let seen = managers(&server, "node", "a");
    assert_eq!(seen[0]["manager"], "basal-test", "{seen}");

    let definitions: Vec<Object> = basal_crds::crds().into_iter().map(|definition| Object(definition.object)).collect();
    crd_install::install(&admin, env().as_ref(), &definitions, Duration::from_secs(60)).await.unwrap();
    let block = |node: &str| json!([{ "block": "10.0.0.0/24", "state": "granted", "node": node }]);
    let spec = json!({
        "cluster": "c", "prefix": "10.0.0.0/16", "pool": "10.0.0.0/8", "maskSize": 24, "term": "t1", "blocks": block("n1"),
    });
    let cell = json!({
        "apiVersion": POD_CIDR_CELL.api_version(), "kind": POD_CIDR_CELL.kind,
        "metadata": { "name": "c-10-0-0-0-16" }, "spec": spec,
    });
    let Outcome::Done(cell) = admin.create(POD_CIDR_CELL, Object(cell)).await else { panic!("no cell") };
    for node in ["n2", "n3"] {
        let Some(seen) = admin.get(POD_CIDR_CELL, &cell.key()).await.unwrap() else { panic!("the cell is gone") };
        let change = patch(&seen, json!({ "spec": { "blocks": block(node) } }));
        let Outcome::Done(changed) = admin.patch(POD_CIDR_CELL, &cell.key(), change).await else { panic!("no patch") };
        assert_eq!(changed.0["spec"]["blocks"], block(node));
        assert_eq!(managers(&server, POD_CIDR_CELL.plural, cell.name()), Value::Null);
    }
}
