//! Installs CustomResourceDefinitions by Cilium's rules: one that is missing is created; one whose schema version is
//! missing, malformed or older than ours is replaced; an equal or newer one is left alone, so that a newer Cilium or Basal
//! is never downgraded.

use std::{collections::BTreeMap, time::Duration};

use basal_crds::resources::SCHEMA_VERSION_LABEL;
use basal_runtime::{
    backoff::{Backoff, Failures},
    env::Env,
    outcome::Outcome,
};
use serde_json::{Map, Value, json};
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use crate::{
    object::{Object, ObjectKey, resources::CRD},
    port::{MergePatch, Objects, ReadError, Refusal},
};

/// Pauses between two looks at a definition that is not done yet.
const PAUSES: Backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(2));

/// Why definitions are not installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The definition cannot be read.
    #[error("cannot read the CustomResourceDefinition {name}: {cause}")]
    Read {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        cause: ReadError,
    },
    /// The API server does not take the definition.
    #[error("cannot install the CustomResourceDefinition {name}: {cause}")]
    Refused {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        cause: Refusal,
    },
    /// It was not established in time.
    #[error("the CustomResourceDefinition {name} was not established within {} s: {state}", limit.as_secs())]
    NotEstablished {
        /// Its name.
        name: String,
        /// How long was waited.
        limit: Duration,
        /// What was seen last.
        state: String,
    },
}

/// What to do about a definition.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// There is none.
    Create,
    /// Ours is newer.
    Replace(MergePatch),
    /// It is there, and not served yet.
    AwaitEstablished,
    /// It is there, at our version or a newer one, and is served.
    Nothing,
}

/// Decides about one definition. `ours` carries the label with our schema version.
#[must_use]
pub fn plan(ours: &Object, found: Option<&Object>) -> Step {
    let Some(found) = found else { return Step::Create };
    let version = |object: &Object| object.labels().get(SCHEMA_VERSION_LABEL).and_then(|text| parse_version(text));
    let schemaless = found.0.pointer("/spec/versions/0/schema").is_none_or(Value::is_null);
    let older = match (version(found), version(ours)) {
        (None, _) => true,
        (Some(theirs), ours) => Some(theirs) < ours,
    };
    if older || schemaless {
        return Step::Replace(replacement(ours, found));
    }
    if is_established(found) { Step::Nothing } else { Step::AwaitEstablished }
}

/// A patch that makes specification and labels those of ours: what ours does not have is removed. Labels that others
/// added stay.
fn replacement(ours: &Object, found: &Object) -> MergePatch {
    let empty = Value::Object(Map::new());
    let mut spec = ours.0.get("spec").cloned().unwrap_or_else(|| empty.clone());
    remove_missing(&mut spec, found.0.get("spec").unwrap_or(&empty));
    if let Some(spec) = spec.as_object_mut() {
        spec.insert("preserveUnknownFields".to_owned(), false.into());
    }
    let labels: BTreeMap<&str, &str> = ours.labels();
    MergePatch {
        resource_version: found.resource_version().to_owned(),
        uid: found.uid().to_owned(),
        subresource: None,
        body: json!({"metadata": {"labels": labels}, "spec": spec}),
    }
}

/// Adds a null for each field that `found` has and `wanted` has not: a merge patch then removes it.
fn remove_missing(wanted: &mut Value, found: &Value) {
    let (Value::Object(wanted), Value::Object(found)) = (wanted, found) else { return };
    for (name, value) in found {
        match wanted.get_mut(name) {
            Some(field) => remove_missing(field, value),
            None => {
                wanted.insert(name.clone(), Value::Null);
            }
        }
    }
}

/// A version of two or three numbers, `1.33.11`.
fn parse_version(text: &str) -> Option<[u64; 3]> {
    let mut version = [0; 3];
    let mut parts = text.trim().split('.');
    for (index, place) in version.iter_mut().enumerate() {
        match parts.next() {
            Some(part) => *place = part.parse().ok()?,
            None if index == 2 => {}
            None => return None,
        }
    }
    parts.next().is_none().then_some(version)
}

fn is_established(object: &Object) -> bool {
    let conditions = object.0.pointer("/status/conditions").and_then(Value::as_array);
    conditions
        .into_iter()
        .flatten()
        .any(|condition| condition["type"] == "Established" && condition["status"] == "True")
}

/// Installs definitions and waits until each is served, `limit` at most for each.
///
/// # Errors
/// See [`InstallError`]. Conflicts and lost answers are tried again until the limit.
pub async fn install(
    objects: &dyn Objects,
    env: &dyn Env,
    definitions: &[Object],
    limit: Duration,
) -> Result<(), InstallError> {
    for definition in definitions {
        install_one(objects, env, definition, limit).await?;
    }
    Ok(())
}

async fn install_one(objects: &dyn Objects, env: &dyn Env, ours: &Object, limit: Duration) -> Result<(), InstallError> {
    let (name, key) = (ours.name(), ObjectKey::cluster(ours.name()));
    let deadline = Instant::now() + limit;
    let mut failures = Failures::none(PAUSES);
    loop {
        let found = match objects.get(CRD, &key).await {
            Err(ReadError::Unavailable(_) | ReadError::TooManyRequests { .. }) if Instant::now() < deadline => {
                sleep(failures.next(env)).await;
                continue;
            }
            found => found.map_err(|cause| InstallError::Read { name: name.to_owned(), cause })?,
        };
        let step = plan(ours, found.as_ref());
        let state = match &step {
            Step::Nothing => return Ok(()),
            Step::AwaitEstablished => "it exists, and its condition Established is not True".to_owned(),
            Step::Create => {
                info!(name, "creating a CustomResourceDefinition");
                written(name, objects.create(CRD, ours.clone()).await)?
            }
            Step::Replace(patch) => {
                info!(name, "replacing an older CustomResourceDefinition");
                written(name, objects.patch(CRD, &key, patch.clone()).await)?
            }
        };
        if Instant::now() >= deadline {
            return Err(InstallError::NotEstablished { name: name.to_owned(), limit, state });
        }
        debug!(name, state, "waiting for a CustomResourceDefinition");
        sleep(failures.next(env)).await;
    }
}

/// What is known after a write that is looked at again in any case.
fn written(name: &str, outcome: Outcome<Object, Refusal>) -> Result<String, InstallError> {
    match outcome {
        Outcome::Done(_) => Ok("it was written".to_owned()),
        Outcome::Unknown(why) => {
            warn!(name, why, "no answer to a write; looking again");
            Ok(why)
        }
        Outcome::Refused(
            refusal @ (Refusal::Conflict(_)
            | Refusal::AlreadyExists
            | Refusal::NotFound(_)
            | Refusal::TooManyRequests { .. }
            | Refusal::Unavailable(_)),
        ) => Ok(refusal.to_string()),
        Outcome::Refused(cause @ (Refusal::Invalid(_) | Refusal::Forbidden(_))) => {
            Err(InstallError::Refused { name: name.to_owned(), cause })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definition(version: Option<&str>, established: bool) -> Object {
        let labels = version.map_or(json!({}), |version| json!({SCHEMA_VERSION_LABEL: version}));
        let conditions = if established { json!([{"type": "Established", "status": "True"}]) } else { json!([]) };
        Object(json!({
            "metadata": {"name": "ciliumnodes.cilium.io", "uid": "u", "resourceVersion": "7", "labels": labels},
            "spec": {"versions": [{"name": "v2", "schema": {"openAPIV3Schema": {}}}], "scope": "Cluster"},
            "status": {"conditions": conditions},
        }))
    }

    fn replaces(found: &Object) -> bool {
        matches!(plan(&definition(Some("1.33.11"), false), Some(found)), Step::Replace(_))
    }

    #[test]
    fn only_missing_malformed_and_older_versions_are_replaced() {
        let ours = definition(Some("1.33.11"), false);
        assert_eq!(plan(&ours, None), Step::Create);
        for older in [None, Some("x"), Some("1.33"), Some("1.33.10"), Some("1.9.99"), Some("1.33.11.1")] {
            assert!(replaces(&definition(older, true)), "{older:?}");
        }
        for newer in ["1.33.11", "1.33.12", "1.100.0", "2.0"] {
            assert_eq!(plan(&ours, Some(&definition(Some(newer), true))), Step::Nothing, "{newer}");
            assert_eq!(plan(&ours, Some(&definition(Some(newer), false))), Step::AwaitEstablished, "{newer}");
        }
        let mut schemaless = definition(Some("1.33.11"), true);
        schemaless.0["spec"]["versions"][0]["schema"] = Value::Null;
        assert!(replaces(&schemaless));
    }

    #[test]
    fn a_replacement_removes_what_ours_does_not_have() {
        let mut found = definition(Some("1.0.0"), true);
        found.0["spec"]["conversion"] = json!({"strategy": "Webhook"});
        let Step::Replace(patch) = plan(&definition(Some("1.33.11"), false), Some(&found)) else { panic!("no patch") };
        assert_eq!((patch.uid.as_str(), patch.resource_version.as_str()), ("u", "7"));
        assert_eq!(patch.body["spec"]["conversion"], Value::Null);
        assert_eq!(patch.body["spec"]["scope"], "Cluster");
        assert_eq!(patch.body["spec"]["preserveUnknownFields"], false);
        assert_eq!(patch.body["metadata"]["labels"][SCHEMA_VERSION_LABEL], "1.33.11");
    }
}
