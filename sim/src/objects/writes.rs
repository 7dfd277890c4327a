//! What the API server makes of an object on its way into the store, as functions of the old and the new one.
//!
//! Source: Kubernetes API conventions ("Metadata", "Spec and Status", "Concurrency Control and Consistency"), and the
//! conformance suite.

use basal_objects::{
    object::{Object, ObjectKey, Resource},
    port::{MergePatch, Preconditions, Refusal},
};
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::{
    kinds::{Facts, StatusAtCreate},
    merge::merge,
};

/// What only the server writes.
const SERVERS_OWN: [&str; 7] = [
    "uid",
    "resourceVersion",
    "creationTimestamp",
    "generation",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "selfLink",
];

/// What becomes of an object.
#[derive(Debug, PartialEq)]
pub(super) enum Effect {
    /// It stays as it is.
    Nothing,
    /// It is stored like this.
    Store(Value),
    /// It goes; this was its last state.
    Remove(Value),
}

/// Sets a field of a JSON object, or removes it. A value that is no object stays as it is: the checks refuse it.
fn set(value: &mut Value, field: &str, to: Option<Value>) {
    let Value::Object(fields) = value else { return };
    match to {
        Some(to) => fields.insert(field.to_owned(), to),
        None => fields.shift_remove(field),
    };
}

fn set_metadata(object: &mut Value, field: &str, to: impl Into<Value>) {
    if let Some(metadata) = object.get_mut("metadata") {
        set(metadata, field, Some(to.into()));
    }
}

fn finalizers(object: &Value) -> Vec<&str> {
    let list = object.pointer("/metadata/finalizers").and_then(Value::as_array);
    list.into_iter().flatten().filter_map(Value::as_str).collect()
}

fn is_subdomain(name: &str) -> bool {
    let label = |label: &str| {
        let clean = label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        !label.is_empty() && clean && !label.starts_with('-') && !label.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

/// Checks a new object; answers its key.
pub(super) fn check_new(resource: &Resource, object: &Object) -> Result<ObjectKey, Refusal> {
    let text = |field: &str| object.0.get(field).and_then(Value::as_str).unwrap_or_default();
    if text("kind") != resource.kind || text("apiVersion") != resource.api_version() {
        return Err(Refusal::Invalid(format!(
            "the object is a {} of {}, the request wants a {} of {}",
            text("kind"),
            text("apiVersion"),
            resource.kind,
            resource.api_version()
        )));
    }
    if !is_subdomain(object.name()) {
        return Err(Refusal::Invalid(format!("metadata.name: {:?} is no RFC 1123 subdomain", object.name())));
    }
    if !object.resource_version().is_empty() {
        return Err(Refusal::Invalid("resourceVersion should not be set on objects to be created".to_owned()));
    }
    let key = object.key();
    match (&key.namespace, resource.namespaced) {
        (None, true) => Err(Refusal::Invalid("metadata.namespace: an empty namespace may not be set".to_owned())),
        (Some(_), false) => Err(Refusal::Invalid("metadata.namespace: not allowed on this type".to_owned())),
        _ => Ok(key),
    }
}

/// A new object as it is stored.
pub(super) fn created(facts: Facts, object: Object, uid: String, now: Timestamp) -> Value {
    let mut value = object.0;
    if let Some(metadata) = value.get_mut("metadata") {
        SERVERS_OWN.iter().for_each(|field| set(metadata, field, None));
    }
    set_metadata(&mut value, "uid", uid);
    set_metadata(&mut value, "creationTimestamp", seconds(now));
    if facts.generation {
        set_metadata(&mut value, "generation", 1);
    }
    match facts.status_at_create {
        StatusAtCreate::Kept => {}
        StatusAtCreate::Dropped => set(&mut value, "status", None),
        StatusAtCreate::Phase(phase) => set(&mut value, "status", Some(json!({ "phase": phase }))),
    }
    value
}

/// What a patch makes of an object. `old` carries its resourceVersion.
pub(super) fn patched(facts: Facts, old: &Object, patch: &MergePatch) -> Result<Effect, Refusal> {
    let by_status = match patch.subresource {
        None => false,
        Some("status") if facts.status => true,
        Some(other) => return Err(Refusal::NotFound(format!("no subresource {other}"))),
    };
    if patch.resource_version != old.resource_version() {
        return Err(Refusal::Conflict(format!(
            "resourceVersion is {}, the patch was made from {}",
            old.resource_version(),
            patch.resource_version
        )));
    }
    if patch.uid != old.uid() {
        return Err(Refusal::Conflict(format!("uid is {}, the patch was made from {}", old.uid(), patch.uid)));
    }
    let mut new = old.0.clone();
    merge(&mut new, &patch.body);
    for field in ["apiVersion", "kind"] {
        if new.get(field) != old.0.get(field) {
            return Err(Refusal::Invalid(format!("{field} cannot be changed")));
        }
    }
    let old_metadata = old.0.get("metadata");
    for field in ["name", "namespace"] {
        if new.get("metadata").and_then(|meta| meta.get(field)) != old_metadata.and_then(|meta| meta.get(field)) {
            return Err(Refusal::Invalid(format!("metadata.{field} cannot be changed")));
        }
    }
    if let Some(metadata) = new.get_mut("metadata") {
        for field in SERVERS_OWN {
            set(metadata, field, old_metadata.and_then(|meta| meta.get(field)).cloned());
        }
    }
    if by_status {
        let mut kept = old.0.clone();
        set(&mut kept, "status", new.get("status").cloned());
        if facts.metadata_by_status {
            set(&mut kept, "metadata", new.get("metadata").cloned());
        }
        new = kept;
    } else if facts.status {
        set(&mut new, "status", old.0.get("status").cloned());
    }
    if old.is_deleting() && finalizers(&new).iter().any(|name| !finalizers(&old.0).contains(name)) {
        return Err(Refusal::Invalid(
            "metadata.finalizers: no new finalizers can be added if the object is being deleted".to_owned(),
        ));
    }
    if new == old.0 {
        return Ok(Effect::Nothing);
    }
    if facts.generation && !by_status && specification(facts, &new) != specification(facts, &old.0) {
        set_metadata(&mut new, "generation", old.generation() + 1);
    }
    let remove = old.is_deleting() && finalizers(&new).is_empty();
    Ok(if remove { Effect::Remove(new) } else { Effect::Store(new) })
}

/// What the generation counts changes of.
fn specification(facts: Facts, object: &Value) -> Map<String, Value> {
    let mut fields = object.as_object().cloned().unwrap_or_default();
    fields.shift_remove("metadata");
    if facts.status {
        fields.shift_remove("status");
    }
    fields
}

/// What a delete makes of an object. `old` carries its resourceVersion.
pub(super) fn deleted(facts: Facts, old: &Object, only_if: &Preconditions, now: Timestamp) -> Result<Effect, Refusal> {
    if only_if.uid != old.uid() {
        return Err(Refusal::Conflict(format!("uid is {}, the precondition {}", old.uid(), only_if.uid)));
    }
    if only_if.resource_version != old.resource_version() {
        return Err(Refusal::Conflict(format!(
            "resourceVersion is {}, the precondition {}",
            old.resource_version(),
            only_if.resource_version
        )));
    }
    Ok(doomed(facts, old, now))
}

/// What the end of an object looks like: at once, or later when finalizers hold it.
pub(super) fn doomed(facts: Facts, old: &Object, now: Timestamp) -> Effect {
    if finalizers(&old.0).is_empty() {
        return Effect::Remove(old.0.clone());
    }
    if old.is_deleting() {
        return Effect::Nothing;
    }
    let mut new = old.0.clone();
    set_metadata(&mut new, "deletionTimestamp", seconds(now));
    set_metadata(&mut new, "deletionGracePeriodSeconds", 0);
    if facts.generation {
        set_metadata(&mut new, "generation", old.generation() + 1);
    }
    Effect::Store(new)
}

/// `metav1.Time`: RFC 3339 in whole seconds.
fn seconds(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}
