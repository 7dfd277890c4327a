//! Whether a suspicion is true: whether both sides stood at one and the same moment.
//!
//! Of two facts in etcd its history tells, even when one of them is gone by now. Two objects of one kind come in one
//! stream, so what stood in it stood in the API server. For facts of two streams there is no common history: the
//! CiliumNode has to say so between two reads of the other that find the same.

use anyhow::Context as _;
use basal_crds::kvstore::keys;
use basal_ipam::{cell::Cell, owners::Source};
use basal_kvstore::kv::{KvError, Range, Revision};
use basal_objects::object::{ObjectKey, resources};

use super::{
    super::{
        read,
        stores::{Etcd, Stores},
    },
    seen::{Suspect, Suspicion},
};

/// Judges.
///
/// # Errors
/// A server does not answer.
pub(super) async fn is_true(stores: &Stores, suspicion: &Suspicion) -> anyhow::Result<bool> {
    let Suspicion { one, other } = suspicion;
    match (is_said_by_object(one), is_said_by_object(other), &stores.etcd) {
        (true, true, _) | (false, false, None) => Ok(true),
        (false, false, Some(etcd)) => both_in_etcd(stores, etcd, one, other).await,
        (true, false, _) => in_both_streams(stores, other, one).await,
        (false, true, _) => in_both_streams(stores, one, other).await,
    }
}

/// Whether a CiliumNode says it.
fn is_said_by_object(suspect: &Suspect) -> bool {
    matches!(suspect.holding.source, Source::Spec | Source::Confirmation)
}

async fn both_in_etcd(stores: &Stores, etcd: &Etcd, one: &Suspect, other: &Suspect) -> anyhow::Result<bool> {
    let both_at = async |revision| -> Result<bool, KvError> {
        let (one, other) = (in_etcd(stores, etcd, one, revision).await?, in_etcd(stores, etcd, other, revision).await?);
        Ok(one.is_some() && other.is_some())
    };
    match both_at(one.revision.max(other.revision)).await {
        // Forgotten: what stands now has to do.
        Err(KvError::Compacted { .. }) => both_at(0).await,
        answer => answer,
    }
    .context("etcd")
}

async fn in_both_streams(stores: &Stores, claim: &Suspect, object: &Suspect) -> anyhow::Result<bool> {
    let before = now(stores, claim).await?;
    let key = ObjectKey::cluster(&object.holding.node);
    let found = stores.objects.get(resources::CILIUM_NODE, &key).await.context("the API server")?;
    let node = found.as_ref().and_then(|found| read::cilium_node(found).ok());
    let says = node.is_some_and(|node| match object.holding.source {
        Source::Confirmation => node.confirmed.contains(&object.holding.block),
        _ => node.pod_cidrs.iter().any(|text| text.parse() == Ok(object.holding.block)),
    });
    let after = now(stores, claim).await?;
    Ok(says && before.is_some() && before == after)
}

/// The version at which a claim or a record says it now; `None` when it does not.
async fn now(stores: &Stores, suspect: &Suspect) -> anyhow::Result<Option<Revision>> {
    match &stores.etcd {
        Some(etcd) => in_etcd(stores, etcd, suspect, 0).await.context("etcd"),
        None => {
            let loaded = stores.load().await?;
            let stored = suspect.cell.and_then(|id| loaded.cells.get(&id));
            let says = stored.filter(|stored| stored.cell.as_ref().is_ok_and(|cell| claims(cell, suspect)));
            Ok(says.map(|stored| stored.version.0))
        }
    }
}

fn claims(cell: &Cell, suspect: &Suspect) -> bool {
    let block = cell.blocks().get(&suspect.holding.block);
    block.is_some_and(|block| block.node.as_str() == suspect.holding.node)
}

/// The revision that wrote what a suspect says, as of a revision; `None` when it was not said then.
async fn in_etcd(
    stores: &Stores,
    etcd: &Etcd,
    suspect: &Suspect,
    revision: Revision,
) -> Result<Option<Revision>, KvError> {
    let holding = &suspect.holding;
    let key = match suspect.cell {
        Some(cell) => etcd.keys.cell(cell),
        None => format!("{}{}", keys::nodes_of(&stores.cluster), holding.node),
    };
    let answer = etcd.kv.range(Range { revision, ..Range::one(key) }).await?;
    let Some(kv) = answer.kvs.first() else { return Ok(None) };
    let says = match suspect.cell {
        Some(id) => Cell::from_json(id, &kv.value).is_ok_and(|cell| claims(&cell, suspect)),
        None => read::record(kv).is_ok_and(|record| record.blocks.contains(&holding.block)),
    };
    Ok(says.then_some(kv.mod_revision))
}
