//! Creates and patches.

use basal_objects::{
    object::{Object, ObjectKey, resources},
    port::{MergePatch, ReadError, Refusal},
};
use serde_json::json;

use super::{Case, GADGET, ObjectsFixture, PHANTOM, Verdict, WIDGET, done, field, object, patch};
use crate::conformance::{holds, refused, same};

pub(super) fn cases() -> Vec<Case<ObjectsFixture>> {
    super::super::cases![
        a_created_object_gets_what_the_server_fills_in,
        a_second_create_finds_the_first,
        a_kind_that_nobody_defined_is_unknown,
        a_namespace_must_exist,
        a_bad_object_is_refused,
        an_object_to_be_created_has_no_resource_version,
        the_subresource_decides_who_writes_the_status,
        a_kind_without_subresource_keeps_its_status_and_counts_it,
        generation_counts_changes_of_the_specification,
        a_node_brings_its_status_and_counts_no_generation,
        a_lease_has_only_a_specification,
        a_status_patch_of_a_custom_kind_leaves_the_metadata,
        a_patch_merges_removes_and_replaces,
        a_patch_that_changes_nothing_is_no_write,
        a_patch_from_an_older_version_conflicts,
        a_patch_of_an_earlier_object_of_that_name_conflicts,
        a_patch_with_the_wrong_uid_conflicts,
        a_patch_of_nothing_finds_nothing,
        a_patch_cannot_rename,
        a_patch_cannot_write_what_the_server_writes,
    ]
}

async fn a_created_object_gets_what_the_server_fills_in(f: &ObjectsFixture) -> Verdict {
    let sent = json!({"metadata": {"uid": "mine", "labels": {"a": "b"}}, "spec": {"size": 1}});
    let created = f.create(WIDGET, &f.key("a"), sent).await?;
    holds("a uid of the server's", created.uid().len() == 36)?;
    holds("a resourceVersion", !created.resource_version().is_empty())?;
    same("generation", created.generation(), 1)?;
    same("labels", created.labels().get("a").copied(), Some("b"))?;
    let time = field(&created, "/metadata/creationTimestamp").and_then(|t| t.as_str()).unwrap_or_default();
    holds("a creation time in whole seconds", time.len() == "2026-01-01T00:00:00Z".len() && time.ends_with('Z'))?;
    same("what is read back", f.existing(WIDGET, &f.key("a")).await?, created)
}

async fn a_second_create_finds_the_first(f: &ObjectsFixture) -> Verdict {
    let first = f.widget("a").await?;
    let again = object(&WIDGET, &f.key("a"), json!({"spec": {"size": 2}}));
    same("refusal", refused("create", f.objects.create(WIDGET, again).await)?, Refusal::AlreadyExists)?;
    same("the object", f.existing(WIDGET, &f.key("a")).await?, first)
}

async fn a_kind_that_nobody_defined_is_unknown(f: &ObjectsFixture) -> Verdict {
    let created = f.objects.create(PHANTOM, object(&PHANTOM, &f.own(), json!({}))).await;
    holds("create finds no kind", matches!(refused("create", created)?, Refusal::NotFound(_)))?;
    let got = f.objects.get(PHANTOM, &f.own()).await;
    // A server cannot tell an unknown kind from an unknown object by its status code.
    holds("get finds nothing", matches!(got, Ok(None) | Err(ReadError::UnknownKind(_))))?;
    let listed = f.objects.list(PHANTOM, &super::Scope::default(), super::Freshness::Quorum).await;
    holds("list finds no kind", matches!(listed, Err(ReadError::UnknownKind(_))))
}

async fn a_namespace_must_exist(f: &ObjectsFixture) -> Verdict {
    let homeless = object(&WIDGET, &ObjectKey::namespaced("nowhere", "a"), json!({}));
    holds("not found", matches!(refused("create", f.objects.create(WIDGET, homeless).await)?, Refusal::NotFound(_)))
}

async fn a_bad_object_is_refused(f: &ObjectsFixture) -> Verdict {
    let mut other_kind = object(&WIDGET, &f.key("a"), json!({}));
    other_kind.0["kind"] = "Gizmo".into();
    let bad = [
        object(&WIDGET, &f.key(""), json!({})),
        object(&WIDGET, &f.key("Upper"), json!({})),
        object(&WIDGET, &f.key("-dash"), json!({})),
        other_kind,
    ];
    for object in bad {
        let refusal = refused(object.name(), f.objects.create(WIDGET, object.clone()).await)?;
        holds("invalid", matches!(refusal, Refusal::Invalid(_)))?;
    }
    Ok(())
}

async fn an_object_to_be_created_has_no_resource_version(f: &ObjectsFixture) -> Verdict {
    let versioned = object(&WIDGET, &f.key("a"), json!({"metadata": {"resourceVersion": "1"}}));
    holds("not done", !f.objects.create(WIDGET, versioned).await.is_done())?;
    same("the object", f.get(WIDGET, &f.key("a")).await?, None)
}

async fn the_subresource_decides_who_writes_the_status(f: &ObjectsFixture) -> Verdict {
    let sent = json!({"spec": {"size": 1}, "status": {"ready": true}});
    let created = f.create(WIDGET, &f.key("a"), sent).await?;
    same("status after the create", field(&created, "/status"), None)?;
    let both = json!({"spec": {"size": 2}, "status": {"ready": true}});
    let written = done("patch", f.patch(WIDGET, &created, both.clone()).await)?;
    same("size after the patch", field(&written, "/spec/size"), Some(&json!(2)))?;
    same("status after the patch", field(&written, "/status"), None)?;
    let reported =
        done("patch", f.patch_status(WIDGET, &written, json!({"spec": {"size": 3}, "status": {"ready": true}})).await)?;
    same("size after the status patch", field(&reported, "/spec/size"), Some(&json!(2)))?;
    same("status after the status patch", field(&reported, "/status/ready"), Some(&json!(true)))?;
    same("generation", reported.generation(), 2)?;
    let kept = done("patch", f.patch(WIDGET, &reported, json!({"spec": {"size": 4}})).await)?;
    same("status after another patch", field(&kept, "/status/ready"), Some(&json!(true)))
}

async fn a_kind_without_subresource_keeps_its_status_and_counts_it(f: &ObjectsFixture) -> Verdict {
    let created = f.create(GADGET, &f.own(), json!({"status": {"ready": false}})).await?;
    same("status", field(&created, "/status/ready"), Some(&json!(false)))?;
    let patched = done("patch", f.patch(GADGET, &created, json!({"status": {"ready": true}})).await)?;
    same("status", field(&patched, "/status/ready"), Some(&json!(true)))?;
    same("generation", patched.generation(), 2)?;
    let refusal = refused("status", f.patch_status(GADGET, &patched, json!({"status": {"ready": false}})).await)?;
    holds("no such subresource", matches!(refusal, Refusal::NotFound(_)))
}

async fn generation_counts_changes_of_the_specification(f: &ObjectsFixture) -> Verdict {
    let created = f.widget("a").await?;
    let labelled = done("label", f.patch(WIDGET, &created, json!({"metadata": {"labels": {"a": "b"}}})).await)?;
    same("generation after a label", labelled.generation(), 1)?;
    let changed = done("change", f.patch(WIDGET, &labelled, json!({"spec": {"size": 2}})).await)?;
    same("generation after a change", changed.generation(), 2)
}

async fn a_node_brings_its_status_and_counts_no_generation(f: &ObjectsFixture) -> Verdict {
    let address = json!({"type": "InternalIP", "address": "192.0.2.1"});
    let created = f.create(resources::NODE, &f.own(), json!({"status": {"addresses": [address]}})).await?;
    same("address", field(&created, "/status/addresses/0/address"), Some(&json!("192.0.2.1")))?;
    same("generation", created.generation(), 0)?;
    let body = json!({"spec": {"unschedulable": true}, "status": {"addresses": null}});
    let patched = done("patch", f.patch(resources::NODE, &created, body).await)?;
    same("address", field(&patched, "/status/addresses/0/address"), Some(&json!("192.0.2.1")))?;
    let body = json!({"metadata": {"annotations": {"a": "b"}}, "spec": {"unschedulable": null}});
    let reported = done("status patch", f.patch_status(resources::NODE, &patched, body).await)?;
    same("annotation by the status", reported.annotations().get("a").copied(), Some("b"))?;
    same("specification", field(&reported, "/spec/unschedulable"), Some(&json!(true)))?;
    same("generation", reported.generation(), 0)?;
    done("delete", f.delete(resources::NODE, &reported).await)
}

async fn a_lease_has_only_a_specification(f: &ObjectsFixture) -> Verdict {
    let spec = json!({"holderIdentity": "a", "leaseDurationSeconds": 15, "renewTime": "2026-01-01T00:00:00.000000Z"});
    let created = f.create(resources::LEASE, &f.key("a"), json!({ "spec": spec })).await?;
    same("specification", field(&created, "/spec"), Some(&spec))?;
    let patched = done("patch", f.patch(resources::LEASE, &created, json!({"spec": {"holderIdentity": "b"}})).await)?;
    same("holder", field(&patched, "/spec/holderIdentity"), Some(&json!("b")))?;
    same("generation", patched.generation(), 0)
}

async fn a_status_patch_of_a_custom_kind_leaves_the_metadata(f: &ObjectsFixture) -> Verdict {
    let created = f.widget("a").await?;
    let body = json!({"metadata": {"labels": {"a": "b"}, "finalizers": ["basal.io/x"]}, "status": {"ready": true}});
    let patched = done("status patch", f.patch_status(WIDGET, &created, body).await)?;
    same("status", field(&patched, "/status/ready"), Some(&json!(true)))?;
    same("labels", patched.labels().len(), 0)?;
    same("finalizers", field(&patched, "/metadata/finalizers"), None)
}

async fn a_patch_merges_removes_and_replaces(f: &ObjectsFixture) -> Verdict {
    let spec = json!({"keep": {"a": 1, "b": 2}, "list": [1, 2, 3], "unknown": {"deep": ["x"]}, "gone": 1});
    let created = f.create(WIDGET, &f.key("a"), json!({ "spec": spec })).await?;
    let body = json!({"spec": {"keep": {"b": 3, "c": 4}, "list": [9], "gone": null}});
    let patched = done("patch", f.patch(WIDGET, &created, body).await)?;
    let wanted = json!({"keep": {"a": 1, "b": 3, "c": 4}, "list": [9], "unknown": {"deep": ["x"]}});
    same("specification", field(&patched, "/spec"), Some(&wanted))?;
    holds("a new resourceVersion", patched.resource_version() != created.resource_version())?;
    same("uid", patched.uid(), created.uid())
}

async fn a_patch_that_changes_nothing_is_no_write(f: &ObjectsFixture) -> Verdict {
    let created = f.widget("a").await?;
    let patched = done("patch", f.patch(WIDGET, &created, json!({"spec": {"size": 1}})).await)?;
    same("the object", &patched, &created)?;
    let reported = done("patch", f.patch_status(WIDGET, &patched, json!({"status": {"ready": true}})).await)?;
    let again = done("patch", f.patch_status(WIDGET, &reported, json!({"status": {"ready": true}})).await)?;
    same("the object after a status", again.resource_version(), reported.resource_version())
}

async fn a_patch_from_an_older_version_conflicts(f: &ObjectsFixture) -> Verdict {
    let old = f.widget("a").await?;
    let new = done("patch", f.patch(WIDGET, &old, json!({"spec": {"size": 2}})).await)?;
    for refusal in [
        refused("patch", f.patch(WIDGET, &old, json!({"spec": {"size": 3}})).await)?,
        refused("status patch", f.patch_status(WIDGET, &old, json!({"status": {"ready": true}})).await)?,
    ] {
        holds("conflict", matches!(refusal, Refusal::Conflict(_)))?;
    }
    same("the object", f.existing(WIDGET, &f.key("a")).await?, new)
}

async fn a_patch_of_an_earlier_object_of_that_name_conflicts(f: &ObjectsFixture) -> Verdict {
    let first = f.widget("a").await?;
    done("delete", f.delete(WIDGET, &first).await)?;
    let second = f.widget("a").await?;
    holds("another uid", first.uid() != second.uid())?;
    let refusal = refused("patch", f.patch(WIDGET, &first, json!({"spec": {"size": 3}})).await)?;
    holds("conflict", matches!(refusal, Refusal::Conflict(_)))?;
    same("the object", f.existing(WIDGET, &f.key("a")).await?, second)
}

async fn a_patch_with_the_wrong_uid_conflicts(f: &ObjectsFixture) -> Verdict {
    let created = f.widget("a").await?;
    let uid = "00000000-0000-4000-8000-000000000000".to_owned();
    let wrong = MergePatch { uid, ..patch(&created, None, json!({"spec": {"size": 3}})) };
    let refusal = refused("patch", f.objects.patch(WIDGET, &f.key("a"), wrong).await)?;
    holds("conflict", matches!(refusal, Refusal::Conflict(_)))?;
    same("the object", f.existing(WIDGET, &f.key("a")).await?, created)
}

async fn a_patch_of_nothing_finds_nothing(f: &ObjectsFixture) -> Verdict {
    let created = f.widget("a").await?;
    done("delete", f.delete(WIDGET, &created).await)?;
    let refusal = refused("patch", f.patch(WIDGET, &created, json!({"spec": {"size": 3}})).await)?;
    holds("not found", matches!(refusal, Refusal::NotFound(_)))
}

async fn a_patch_cannot_rename(f: &ObjectsFixture) -> Verdict {
    let created = f.widget("a").await?;
    let refusal = refused("patch", f.patch(WIDGET, &created, json!({"metadata": {"name": "b"}})).await)?;
    holds("invalid", matches!(refusal, Refusal::Invalid(_)))
}

async fn a_patch_cannot_write_what_the_server_writes(f: &ObjectsFixture) -> Verdict {
    let created = f.widget("a").await?;
    let body = json!({
        "metadata": {"creationTimestamp": "2001-01-01T00:00:00Z", "generation": 7, "labels": {"a": "b"}},
    });
    let patched = done("patch", f.patch(WIDGET, &created, body).await)?;
    let time = |object: &Object| field(object, "/metadata/creationTimestamp").cloned();
    same("creation time", time(&patched), time(&created))?;
    same("generation", patched.generation(), 1)?;
    same("label", patched.labels().get("a").copied(), Some("b"))
}
