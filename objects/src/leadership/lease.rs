//! The Lease object: what is read of it, and what is written.

use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::object::{Object, ObjectKey, resources::LEASE};

/// Where a Lease stood when it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseAt {
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.resourceVersion`.
    pub resource_version: String,
}

/// What the holder of a Lease writes. Whoever waits for it to expire watches for any difference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseRecord {
    /// `holderIdentity`; `None` when the Lease was released.
    pub holder: Option<String>,
    /// `leaseDurationSeconds`; `None` when it is missing.
    pub duration: Option<Duration>,
    /// `renewTime` as it is written. It is the other's clock: only a change of it says anything.
    pub renewed: String,
    /// `leaseTransitions`.
    pub transitions: i64,
}

/// A Lease as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Where it stands.
    pub at: LeaseAt,
    /// What it says.
    pub record: LeaseRecord,
}

impl Lease {
    /// Reads an object. What is missing or malformed counts as not there: a Lease that names nobody can be taken.
    #[must_use]
    pub fn read(object: &Object) -> Self {
        let spec = |field: &str| object.0.pointer("/spec").and_then(|spec| spec.get(field));
        let text = |field: &str| spec(field).and_then(Value::as_str).unwrap_or_default().to_owned();
        let record = LeaseRecord {
            holder: Some(text("holderIdentity")).filter(|holder| !holder.is_empty()),
            duration: spec("leaseDurationSeconds").and_then(Value::as_u64).map(Duration::from_secs),
            renewed: text("renewTime"),
            transitions: spec("leaseTransitions").and_then(Value::as_i64).unwrap_or_default(),
        };
        let at = LeaseAt { uid: object.uid().to_owned(), resource_version: object.resource_version().to_owned() };
        Self { at, record }
    }
}

/// What is to be written into a Lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseWrite {
    /// The holder; empty to release it.
    pub holder: String,
    /// How long others shall wait, in whole seconds.
    pub duration: Duration,
    /// How often the holder changed.
    pub transitions: i64,
    /// Whether the holder is new, so that the time of acquisition is set.
    pub acquires: bool,
}

impl LeaseWrite {
    /// The merge patch.
    #[must_use]
    pub fn patch(&self, now: Timestamp) -> Value {
        let mut spec = json!({
            "holderIdentity": self.holder,
            "leaseDurationSeconds": self.duration.as_secs().max(1),
            "renewTime": micro_time(now),
            "leaseTransitions": self.transitions,
        });
        if self.acquires {
            spec["acquireTime"] = micro_time(now).into();
        }
        json!({"spec": spec})
    }

    /// The whole object, for a Lease that there is not yet.
    #[must_use]
    pub fn object(&self, key: &ObjectKey, now: Timestamp) -> Object {
        let mut object = self.patch(now);
        object["apiVersion"] = LEASE.api_version().into();
        object["kind"] = LEASE.kind.into();
        object["metadata"] = json!({"name": key.name, "namespace": key.namespace});
        Object(object)
    }
}

/// A time as the API's `MicroTime` has it.
#[must_use]
pub fn micro_time(time: Timestamp) -> String {
    format!("{time:.6}")
}
