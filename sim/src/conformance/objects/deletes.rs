//! Deletes: preconditions, finalizers, definitions.

use basal_objects::{
    object::{Resource, resources},
    port::{Preconditions, ReadError, Refusal},
};
use serde_json::json;

use super::{Case, Freshness, ObjectsFixture, Scope, Verdict, WIDGET, define, done, field, preconditions};
use crate::conformance::{PATIENCE, holds, refused, same};

pub(super) fn cases() -> Vec<Case<ObjectsFixture>> {
    super::super::cases![
        a_delete_takes_the_object_that_was_seen,
        a_delete_of_another_version_conflicts,
        a_delete_of_another_uid_conflicts,
        a_delete_of_nothing_finds_nothing,
        a_finalizer_holds_the_object,
        a_deleting_object_takes_no_new_finalizer,
        a_kind_goes_with_its_definition,
    ]
}

async fn a_delete_takes_the_object_that_was_seen(f: &ObjectsFixture) -> Verdict {
    let created = f.widget("a").await?;
    done("delete", f.delete(WIDGET, &created).await)?;
    same("the object", f.get(WIDGET, &f.key("a")).await?, None)
}

async fn a_delete_of_another_version_conflicts(f: &ObjectsFixture) -> Verdict {
    let old = f.widget("a").await?;
    let new = done("patch", f.patch(WIDGET, &old, json!({"spec": {"size": 2}})).await)?;
    let refusal = refused("delete", f.delete(WIDGET, &old).await)?;
    holds("conflict", matches!(refusal, Refusal::Conflict(_)))?;
    same("the object", f.existing(WIDGET, &f.key("a")).await?, new)
}

async fn a_delete_of_another_uid_conflicts(f: &ObjectsFixture) -> Verdict {
    let created = f.widget("a").await?;
    let uid = "00000000-0000-4000-8000-000000000000".to_owned();
    let only_if = Preconditions { uid, ..preconditions(&created) };
    let refusal = refused("delete", f.objects.delete(WIDGET, &f.key("a"), only_if).await)?;
    holds("conflict", matches!(refusal, Refusal::Conflict(_)))?;
    same("the object", f.existing(WIDGET, &f.key("a")).await?, created)
}

async fn a_delete_of_nothing_finds_nothing(f: &ObjectsFixture) -> Verdict {
    let created = f.widget("a").await?;
    done("delete", f.delete(WIDGET, &created).await)?;
    let refusal = refused("delete again", f.delete(WIDGET, &created).await)?;
    holds("not found", matches!(refusal, Refusal::NotFound(_)))
}

async fn a_finalizer_holds_the_object(f: &ObjectsFixture) -> Verdict {
    let held = json!({"metadata": {"finalizers": ["basal.io/a", "basal.io/b"]}});
    let created = f.create(WIDGET, &f.key("a"), held).await?;
    done("delete", f.delete(WIDGET, &created).await)?;
    let deleting = f.existing(WIDGET, &f.key("a")).await?;
    holds("it is deleting", deleting.is_deleting())?;
    same("generation", deleting.generation(), 2)?;
    done("delete again", f.delete(WIDGET, &deleting).await)?;
    same("the object", &f.existing(WIDGET, &f.key("a")).await?, &deleting)?;
    let one_left = json!({"metadata": {"finalizers": ["basal.io/b"]}});
    let half = done("patch", f.patch(WIDGET, &deleting, one_left).await)?;
    same("finalizers", field(&half, "/metadata/finalizers"), Some(&json!(["basal.io/b"])))?;
    done("patch", f.patch(WIDGET, &half, json!({"metadata": {"finalizers": null}})).await)?;
    same("the object", f.get(WIDGET, &f.key("a")).await?, None)
}

async fn a_deleting_object_takes_no_new_finalizer(f: &ObjectsFixture) -> Verdict {
    let created = f.create(WIDGET, &f.key("a"), json!({"metadata": {"finalizers": ["basal.io/a"]}})).await?;
    done("delete", f.delete(WIDGET, &created).await)?;
    let deleting = f.existing(WIDGET, &f.key("a")).await?;
    let more = json!({"metadata": {"finalizers": ["basal.io/a", "basal.io/b"]}});
    let refusal = refused("patch", f.patch(WIDGET, &deleting, more).await)?;
    holds("invalid", matches!(refusal, Refusal::Invalid(_)))?;
    let other = done("patch", f.patch(WIDGET, &deleting, json!({"spec": {"size": 2}})).await)?;
    same("size", field(&other, "/spec/size"), Some(&json!(2)))
}

async fn a_kind_goes_with_its_definition(f: &ObjectsFixture) -> Verdict {
    const PASSING: Resource = Resource { kind: "Passing", plural: "passings", ..super::PHANTOM };
    define(&f.objects, &PASSING, true).await?;
    f.create(PASSING, &f.own(), json!({})).await?;
    // The server itself writes the definition's conditions, so another version may be there at each try.
    let name = format!("{}.{}", PASSING.plural, PASSING.group);
    let key = basal_objects::object::ObjectKey::cluster(name);
    loop {
        let seen = f.existing(resources::CRD, &key).await?;
        match f.delete(resources::CRD, &seen).await {
            basal_runtime::outcome::Outcome::Refused(Refusal::Conflict(_)) => {}
            outcome => break done("delete", outcome)?,
        }
    }
    let gone = async {
        loop {
            let listed = f.objects.list(PASSING, &Scope::default(), Freshness::Quorum).await;
            if matches!(listed, Err(ReadError::UnknownKind(_))) {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    };
    holds("the kind is gone", tokio::time::timeout(PATIENCE, gone).await.is_ok())
}
