//! Endpoints from before a restart: their addresses are reserved, and the view holds them before the first comparison.

use crate::{
    endpoint::{
        build::endpoint,
        restore::{self, Restored},
        state::State,
    },
    view::View,
};

/// Reserves what endpoints from before the restart hold. One whose address is somebody else's is left alone: of two
/// records the first stands, and GC or DEL end the other.
pub(super) fn keep(restored: &mut Restored, state: &mut State) {
    let mut refused = Vec::new();
    let unreadable = restored.unreadable.iter().map(|(key, (slot, _))| (key, slot));
    for (key, slot) in restored.kept.iter().chain(unreadable).chain(&restored.removed) {
        if let Err(error) = state.restore(key.clone(), slot.clone()) {
            tracing::error!(%key, %error, "two records hold one address; this one is not taken over");
            refused.push(key.clone());
        }
    }
    for key in refused {
        restored.kept.remove(&key);
        restored.unreadable.remove(&key);
        restored.removed.remove(&key);
    }
}

/// Puts endpoints from before the restart into the view, so that the first comparison adopts them.
pub(super) fn put_restored(restored: &Restored, view: &mut View) {
    for slot in restored.kept.values().filter(|slot| slot.connected) {
        let Some(record) = &slot.record else { continue };
        match endpoint(record, view.local()) {
            Ok(endpoint) => view.put_endpoint(slot.id, endpoint),
            Err(error) => {
                tracing::error!(attachment = %record.attachment, %error, "an endpoint from before the restart")
            }
        }
    }
    for (key, (slot, shown)) in &restored.unreadable {
        match restore::endpoint(key, shown, view.local()) {
            Ok(endpoint) => view.put_endpoint(slot.id, endpoint),
            Err(error) => tracing::error!(%key, %error, "an endpoint without a readable record"),
        }
    }
}
