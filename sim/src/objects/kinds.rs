//! What the API server knows of each kind: the built-in ones from a table, the custom ones from their definitions.

use std::sync::Arc;

use basal_objects::object::{Resource, resources};
use serde_json::Value;

use crate::store::Store;

/// How the API server treats a kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Facts {
    /// Whether there is a `status` subresource: then the main resource leaves `status` alone.
    pub(super) status: bool,
    /// Whether `metadata.generation` counts the changes of the specification.
    pub(super) generation: bool,
    /// What becomes of a status that a create brings.
    pub(super) status_at_create: StatusAtCreate,
    /// Whether a write to `status` may change labels and annotations too: so for built-in kinds, not for custom ones.
    pub(super) metadata_by_status: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StatusAtCreate {
    /// It stays, as with a Node that its kubelet registers, or a kind without the subresource.
    Kept,
    /// It is dropped.
    Dropped,
    /// It is replaced by this phase.
    Phase(&'static str),
}

/// A kind without a status subresource that counts nothing.
pub(super) const PLAIN: Facts =
    Facts { status: false, generation: false, status_at_create: StatusAtCreate::Kept, metadata_by_status: true };

/// Source: the strategies in Kubernetes' `pkg/registry` and apiextensions-apiserver, as the conformance suite finds them.
fn built_in(resource: &Resource) -> Option<Facts> {
    let facts = match (resource.group, resource.plural) {
        ("", "nodes") => Facts { status: true, ..PLAIN },
        ("", "pods") => {
            Facts { status: true, generation: true, status_at_create: StatusAtCreate::Phase("Pending"), ..PLAIN }
        }
        ("", "namespaces") => Facts { status: true, status_at_create: StatusAtCreate::Phase("Active"), ..PLAIN },
        ("events.k8s.io", "events") | ("coordination.k8s.io", "leases") => PLAIN,
        ("networking.k8s.io", "networkpolicies") => Facts { generation: true, ..PLAIN },
        ("apiextensions.k8s.io", "customresourcedefinitions") => {
            Facts { status: true, generation: true, status_at_create: StatusAtCreate::Dropped, ..PLAIN }
        }
        _ => return None,
    };
    Some(facts)
}

/// The key of an object, or what the keys of a kind (and namespace) start with.
pub(super) fn key(resource: &Resource, namespace: Option<&str>, name: &str) -> String {
    let group = if resource.group.is_empty() { "core" } else { resource.group };
    match namespace {
        Some(namespace) => format!("{group}/{}/{namespace}/{name}", resource.plural),
        None => format!("{group}/{}/{name}", resource.plural),
    }
}

/// What the server knows of a kind; `None` when it does not know it.
pub(super) fn facts(store: &Store<Arc<Value>>, resource: &Resource) -> Option<Facts> {
    if let Some(facts) = built_in(resource) {
        return Some(facts);
    }
    let definition = key(&resources::CRD, None, &format!("{}.{}", resource.plural, resource.group));
    let versions = store.get(&definition)?.value.pointer("/spec/versions")?.as_array()?;
    let version = versions.iter().find(|version| {
        version.get("name").and_then(Value::as_str) == Some(resource.version)
            && version.get("served").and_then(Value::as_bool) == Some(true)
    })?;
    let status = version.pointer("/subresources/status").is_some();
    Some(Facts {
        status,
        generation: true,
        status_at_create: if status { StatusAtCreate::Dropped } else { StatusAtCreate::Kept },
        metadata_by_status: false,
    })
}
