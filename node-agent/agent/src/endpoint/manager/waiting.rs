//! What an ADD waits for: an address, and the identity of its pod.

use std::{net::IpAddr, time::Duration};

use basal_runtime::sync::lock;
use futures::{FutureExt, select_biased};
use tokio_util::sync::CancellationToken;

use super::Endpoints;
use crate::{
    endpoint::{
        error::AddError,
        record::{Addresses, EndpointId},
    },
    journal::JournalKey,
};

/// How long an ADD that waits for an address looks again without being told: a rest that ends tells nobody.
const ADDRESS_PAUSE: Duration = Duration::from_secs(1);
/// How long the identity of a pod is waited for before its endpoint starts as reserved:init.
const IDENTITY_WAIT: Duration = Duration::from_secs(10);

impl Endpoints {
    /// Takes an endpoint id and addresses, as soon as there are some.
    pub(super) async fn reserve(
        &self,
        key: &JournalKey,
        wanted: &[IpAddr],
        given_up: &CancellationToken,
    ) -> Result<(EndpointId, Addresses), AddError> {
        loop {
            let freed = self.inner.freed.notified();
            if let Some(problem) = lock(&self.inner.problem).clone() {
                return Err(AddError::Refused(problem));
            }
            let now = self.now();
            let reserved = lock(&self.inner.state).reserve(key, wanted, now);
            let refusal = match reserved {
                Ok(place) => return Ok(place),
                Err(refusal) if !refusal.is_temporary() => return Err(refusal.into()),
                Err(refusal) => refusal,
            };
            tracing::info!(%key, %refusal, "ADD waits");
            select_biased! {
                () = given_up.cancelled().fuse() => return Err(AddError::GivenUp(refusal.to_string())),
                () = freed.fuse() => {}
                () = tokio::time::sleep(ADDRESS_PAUSE).fuse() => {}
            }
        }
    }

    /// Waits until somebody has told the identity ([`Endpoints::identify`]), for a while.
    pub(super) async fn wait_for_identity(&self, key: &JournalKey, given_up: &CancellationToken) {
        let mut changes = self.changes();
        let known = async {
            loop {
                changes.mark_unchanged();
                if self.read(|state| state.get(key).is_none_or(|slot| slot.reference.is_some())) {
                    return;
                }
                if changes.changed().await.is_err() {
                    return;
                }
            }
        };
        select_biased! {
            () = given_up.cancelled().fuse() => {}
            () = known.fuse() => {}
            () = tokio::time::sleep(IDENTITY_WAIT).fuse() => {
                tracing::warn!(%key, "no identity yet; the endpoint starts as reserved:init");
            }
        }
    }
}
