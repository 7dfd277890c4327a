//! The one writer of the Ledger's status.

use basal_crds::resources::{Ledger, LedgerStatus};
use basal_objects::{
    conditions::{Conditions, same_but_for_times},
    object::{Object, resources},
    port::{MergePatch, Objects, Refusal},
};
use basal_runtime::{env::Env, outcome::Outcome};
use serde_json::json;

/// Changes the status of a Ledger as it was seen, if that makes a difference; answers the Ledger as it is then. What is
/// written is for people: what is done does not depend on it.
///
/// # Errors
/// Why it was not written, in words.
pub(crate) async fn write(
    objects: &dyn Objects,
    env: &dyn Env,
    seen: &Object,
    change: impl FnOnce(&mut LedgerStatus, &mut Conditions),
) -> Result<Option<Object>, String> {
    let before = seen.parse::<Ledger>().map_err(|error| error.to_string())?.status;
    let (mut after, mut conditions) =
        (before.clone(), Conditions::of(before.conditions.clone(), seen.generation(), env.now()));
    change(&mut after, &mut conditions);
    let conditions = conditions.into_list();
    let same = after.pools == before.pools && after.outside == before.outside;
    if same && same_but_for_times(&before.conditions, &conditions) {
        return Ok(None);
    }
    let status = json!({
        "observedGeneration": seen.generation(),
        "pools": after.pools,
        "outside": after.outside,
        "conditions": conditions,
    });
    let patch = MergePatch {
        resource_version: seen.resource_version().to_owned(),
        uid: seen.uid().to_owned(),
        subresource: Some("status"),
        body: json!({ "status": status }),
    };
    match objects.patch(resources::LEDGER, &seen.key(), patch).await {
        Outcome::Done(object) => Ok(Some(object)),
        // The change that was first comes by the watch.
        Outcome::Refused(Refusal::Conflict(_) | Refusal::NotFound(_)) => Ok(None),
        Outcome::Refused(refusal) => Err(refusal.to_string()),
        Outcome::Unknown(why) => Err(why),
    }
}
