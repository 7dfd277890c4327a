//! Which store of claims is the active one, and which one they are moved to: the Ledger says so, whichever it is.

use basal_crds::resources::LedgerStore;
use basal_ipam::{cell::Version, ledger::LedgerError};
use basal_runtime::outcome::Outcome;
use serde_json::{Value, json};

use super::{
    format::{self, LedgerSeen},
    patch, read_failed, unreadable,
};
use crate::{
    object::{Object, ObjectKey, resources::LEDGER},
    port::{Objects, ReadError, Refusal},
};

/// The Ledger of a cluster.
#[must_use]
pub fn key(cluster: &str) -> ObjectKey {
    ObjectKey::cluster(cluster)
}

/// Where the claims of a cluster are, and where they go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// The active store.
    pub store: LedgerStore,
    /// The other one, when the claims shall be moved there.
    pub move_to: Option<LedgerStore>,
    /// The other one, while agents may still work with it.
    pub leaving: Option<LedgerStore>,
}

impl From<&LedgerSeen> for Standing {
    fn from(seen: &LedgerSeen) -> Self {
        Self { store: seen.store, move_to: seen.move_to, leaving: seen.leaving }
    }
}

/// What a Ledger says as it was read; `None` where there is none.
///
/// # Errors
/// The object does not parse.
pub fn standing(ledger: Option<&Object>) -> Result<Option<Standing>, LedgerError> {
    let seen = ledger.map(LedgerSeen::parse).transpose().map_err(|error| unreadable(&error))?;
    Ok(seen.as_ref().map(Standing::from))
}

/// A Ledger as it was read, to be changed only if nobody changed it since.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// What it says.
    pub standing: Standing,
    uid: String,
    version: Version,
}

/// Reads the Ledger, at quorum; `None` where there is none, or its kind is not known yet.
///
/// # Errors
/// See [`LedgerError`].
pub async fn asked(objects: &dyn Objects, cluster: &str) -> Result<Option<Asked>, LedgerError> {
    let object = match objects.get(LEDGER, &key(cluster)).await {
        // Where the kind is missing nobody can have chosen anything.
        Err(ReadError::UnknownKind(_)) => None,
        other => other.map_err(|error| read_failed(&error))?,
    };
    let Some(object) = object else { return Ok(None) };
    let seen = LedgerSeen::parse(&object).map_err(|error| unreadable(&error))?;
    Ok(Some(Asked { standing: Standing::from(&seen), uid: seen.uid, version: seen.version }))
}

/// Makes a store the active one where none is, before a term begins.
///
/// # Errors
/// [`LedgerError::NotActive`]; or what keeps the Ledger from being read or made.
pub async fn activate(objects: &dyn Objects, cluster: &str, store: LedgerStore) -> Result<(), LedgerError> {
    match objects.get(LEDGER, &key(cluster)).await {
        Ok(Some(ledger)) => {
            let seen = LedgerSeen::parse(&ledger).map_err(|error| unreadable(&error))?;
            return if seen.store == store { Ok(()) } else { Err(not_active(seen.store, store)) };
        }
        Ok(None) => {}
        // Where the kind is missing nobody can have chosen the other store.
        Err(ReadError::UnknownKind(_)) if store == LedgerStore::Etcd => return Ok(()),
        Err(error) => return Err(read_failed(&error)),
    }
    match objects.create(LEDGER, format::new_ledger(cluster, store, None)).await {
        Outcome::Refused(Refusal::AlreadyExists) => {
            Err(LedgerError::Unavailable("somebody made the Ledger meanwhile".to_owned()))
        }
        other => written(other),
    }
}

/// Makes the store that the claims were moved to the active one, if the Ledger still is as it was read. The other one is the
/// one that is left.
///
/// # Errors
/// Nothing was written, or it is not known whether.
pub async fn switch(objects: &dyn Objects, cluster: &str, asked: &Asked, to: LedgerStore) -> Result<(), LedgerError> {
    let left = asked.standing.store.as_str();
    change(objects, cluster, asked, json!({ "store": to.as_str(), "moveTo": null, "leaving": left })).await
}

/// Notes that nobody works with the store any more that the claims were moved from.
///
/// # Errors
/// Nothing was written, or it is not known whether.
pub async fn forget_left(objects: &dyn Objects, cluster: &str, asked: &Asked) -> Result<(), LedgerError> {
    change(objects, cluster, asked, json!({ "leaving": null })).await
}

async fn change(objects: &dyn Objects, cluster: &str, asked: &Asked, spec: Value) -> Result<(), LedgerError> {
    let patch = patch(&asked.uid, asked.version, json!({ "spec": spec }));
    written(objects.patch(LEDGER, &key(cluster), patch).await)
}

fn written(outcome: Outcome<Object, Refusal>) -> Result<(), LedgerError> {
    match outcome {
        Outcome::Done(_) => Ok(()),
        Outcome::Refused(Refusal::Forbidden(why)) => Err(LedgerError::Denied(why)),
        Outcome::Refused(refusal) => Err(LedgerError::Unavailable(refusal.to_string())),
        Outcome::Unknown(why) => Err(LedgerError::Unavailable(why)),
    }
}

pub(super) fn not_active(active: LedgerStore, configured: LedgerStore) -> LedgerError {
    LedgerError::NotActive { active: active.as_str(), configured: configured.as_str() }
}
