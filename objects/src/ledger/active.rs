//! Which store of claims is the active one: the Ledger says so, whichever it is.

use basal_crds::resources::LedgerStore;
use basal_ipam::ledger::LedgerError;
use basal_runtime::outcome::Outcome;

use super::{
    format::{self, LedgerSeen},
    read_failed, unreadable,
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

/// Whether a Ledger as it was read lets this store grant. `None`, where there is none, forbids nothing.
///
/// # Errors
/// [`LedgerError::NotActive`]; or the object does not parse.
pub fn check(ledger: Option<&Object>, store: LedgerStore) -> Result<(), LedgerError> {
    let Some(object) = ledger else { return Ok(()) };
    let seen = LedgerSeen::parse(object).map_err(|error| unreadable(&error))?;
    if seen.store == store { Ok(()) } else { Err(not_active(seen.store, store)) }
}

/// Makes a store the active one where none is, before a term begins.
///
/// # Errors
/// [`LedgerError::NotActive`]; or what keeps the Ledger from being read or made.
pub async fn activate(objects: &dyn Objects, cluster: &str, store: LedgerStore) -> Result<(), LedgerError> {
    match objects.get(LEDGER, &key(cluster)).await {
        Ok(Some(ledger)) => return check(Some(&ledger), store),
        Ok(None) => {}
        // Where the kind is missing nobody can have chosen the other store.
        Err(ReadError::UnknownKind(_)) if store == LedgerStore::Etcd => return Ok(()),
        Err(error) => return Err(read_failed(&error)),
    }
    match objects.create(LEDGER, format::new_ledger(cluster, store, None)).await {
        Outcome::Done(_) => Ok(()),
        Outcome::Refused(Refusal::AlreadyExists) => {
            Err(LedgerError::Unavailable("somebody made the Ledger meanwhile".to_owned()))
        }
        Outcome::Refused(Refusal::Forbidden(why)) => Err(LedgerError::Denied(why)),
        Outcome::Refused(refusal) => Err(LedgerError::Unavailable(refusal.to_string())),
        Outcome::Unknown(why) => Err(LedgerError::Unavailable(why)),
    }
}

pub(super) fn not_active(active: LedgerStore, configured: LedgerStore) -> LedgerError {
    LedgerError::NotActive { active: active.as_str(), configured: configured.as_str() }
}
