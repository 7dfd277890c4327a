//! Each call of the port, and what each refusal of the API server becomes.

use basal_objects::{
    object::{
        Object, ObjectKey,
        resources::{CILIUM_NODE, LEASE, NODE, POD},
    },
    port::{Freshness, MergePatch, Objects, Preconditions, ReadError, Refusal, Scope, Start, gather},
};
use basal_runtime::outcome::Outcome;
use serde_json::json;

use super::{connect, created, named, node, patch, start};

#[tokio::test(flavor = "multi_thread")]
async fn calls_and_refusals() {
    let server = start();
    let admin = connect(&server, "admin").await;

    // Reads of what is not there, and of what cannot be.
    assert_eq!(admin.get(NODE, &named("none")).await, Ok(None));
    let unknown = ReadError::UnknownKind("ciliumnodes.cilium.io".to_owned());
    assert_eq!(admin.get(CILIUM_NODE, &named("none")).await, Err(unknown.clone()));
    assert_eq!(admin.list(CILIUM_NODE, &Scope::default(), Freshness::Quorum).await, Err(unknown));

    // Create.
    let first = created(&admin, "a").await;
    assert_eq!(admin.get(NODE, &named("a")).await, Ok(Some(first.clone())));
    assert_eq!(admin.create(NODE, node("a")).await, Outcome::Refused(Refusal::AlreadyExists));
    let invalid = admin.create(NODE, node("Not A Name")).await;
    assert!(
        matches!(&invalid, Outcome::Refused(Refusal::Invalid(why)) if why.contains("metadata.name")),
        "{invalid:?}"
    );
    let lease = Object(json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {"name": "l", "namespace": "no-such-namespace"}}));
    let missing = admin.create(LEASE, lease).await;
    assert!(
        matches!(&missing, Outcome::Refused(Refusal::NotFound(why)) if why.contains("no-such-namespace")),
        "{missing:?}"
    );

    // A patch takes effect only on the version and the object that were seen.
    let Outcome::Done(second) =
        admin.patch(NODE, &named("a"), patch(&first, json!({"spec": {"podCIDR": "10.0.0.0/24"}}))).await
    else {
        panic!("the patch was not carried out")
    };
    assert_ne!(second.resource_version(), first.resource_version());
    assert_eq!(second.0["spec"]["podCIDR"], "10.0.0.0/24");
    let labels = json!({"metadata": {"labels": {"late": "yes"}}});
    let late = admin.patch(NODE, &named("a"), patch(&first, labels.clone())).await;
    assert!(matches!(late, Outcome::Refused(Refusal::Conflict(_))), "{late:?}");
    let other_object = MergePatch { uid: "00000000-0000-0000-0000-000000000000".into(), ..patch(&second, labels) };
    let other = admin.patch(NODE, &named("a"), other_object).await;
    assert!(matches!(other, Outcome::Refused(Refusal::Conflict(_))), "{other:?}");
    let gone = admin.patch(NODE, &named("none"), patch(&second, json!({}))).await;
    assert!(matches!(gone, Outcome::Refused(Refusal::NotFound(_))), "{gone:?}");
    let immutable = admin.patch(NODE, &named("a"), patch(&second, json!({"spec": {"podCIDR": "10.0.1.0/24"}}))).await;
    assert!(matches!(&immutable, Outcome::Refused(Refusal::Invalid(_))), "{immutable:?}");

    // A subresource.
    let status = json!({"status": {"nodeInfo": {"bootID": "b"}}});
    let status = MergePatch { subresource: Some("status"), ..patch(&second, status) };
    let Outcome::Done(third) = admin.patch(NODE, &named("a"), status).await else { panic!("no status") };
    assert_eq!(third.0.pointer("/status/nodeInfo/bootID"), Some(&json!("b")));

    // A delete takes effect only on what was seen.
    let only_if = |object: &Object, uid: &str| Preconditions {
        uid: uid.to_owned(),
        resource_version: object.resource_version().to_owned(),
    };
    let stale = admin.delete(NODE, &named("a"), only_if(&second, second.uid())).await;
    assert!(matches!(stale, Outcome::Refused(Refusal::Conflict(_))), "{stale:?}");
    let stranger = admin.delete(NODE, &named("a"), only_if(&third, "00000000-0000-0000-0000-000000000000")).await;
    assert!(matches!(stranger, Outcome::Refused(Refusal::Conflict(_))), "{stranger:?}");
    assert_eq!(admin.delete(NODE, &named("a"), only_if(&third, third.uid())).await, Outcome::Done(()));
    let twice = admin.delete(NODE, &named("a"), only_if(&third, third.uid())).await;
    assert!(matches!(twice, Outcome::Refused(Refusal::NotFound(_))), "{twice:?}");

    // Somebody without rights.
    let nobody = connect(&server, "nobody").await;
    let read = nobody.get(NODE, &named("a")).await;
    assert!(matches!(&read, Err(ReadError::Forbidden(why)) if why.contains("nobody")), "{read:?}");
    let written = nobody.create(NODE, node("b")).await;
    assert!(matches!(written, Outcome::Refused(Refusal::Forbidden(_))), "{written:?}");
    let pods = Scope { namespace: Some("default".to_owned()), ..Scope::default() };
    assert!(matches!(nobody.list(POD, &pods, Freshness::Any).await, Err(ReadError::Forbidden(_))));

    lists_in_pages(&admin).await;
}

/// More objects than a page holds, by selectors, at both kinds of freshness; items name their kind.
async fn lists_in_pages(admin: &dyn Objects) {
    let all: Vec<usize> = (0..520).collect();
    for chunk in all.chunks(16) {
        let make = |number: &usize| {
            let mut object = node(&format!("n{number:04}"));
            object.0["metadata"]["labels"] = json!({"parity": if number.is_multiple_of(2) { "even" } else { "odd" }});
            object
        };
        let writes = chunk.iter().map(|number| admin.create(NODE, make(number)));
        assert!(futures::future::join_all(writes).await.iter().all(Outcome::is_done));
    }
    let list = admin.list(NODE, &Scope::default(), Freshness::Quorum).await.unwrap();
    assert_eq!(list.items.len(), 520);
    assert!(list.resource_version.parse::<u64>().unwrap() > 0);
    assert_eq!(list.items[519].key(), ObjectKey::cluster("n0519"));
    assert_eq!((&list.items[0].0["kind"], &list.items[0].0["apiVersion"]), (&json!("Node"), &json!("v1")));
    // Page by page it is the same.
    let first = admin.list_page(NODE, &Scope::default(), &Start::First(Freshness::Quorum)).await.unwrap();
    assert_eq!((first.items.len(), first.next.is_some()), (500, true));
    let name = |object: &Object| Some(object.name().to_owned());
    let names = gather(admin, NODE, &Scope::default(), Freshness::Quorum, name).await.unwrap();
    assert!(names.iter().eq(list.items.iter().map(Object::name)));
    let even = Scope { labels: Some("parity=even".to_owned()), ..Scope::default() };
    assert_eq!(admin.list(NODE, &even, Freshness::Quorum).await.unwrap().items.len(), 260);
    let one = Scope { fields: Some("metadata.name=n0007".to_owned()), ..Scope::default() };
    assert_eq!(admin.list(NODE, &one, Freshness::Any).await.unwrap().items.len(), 1);
}
