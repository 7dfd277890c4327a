//! Whether a suspicion is true: whether both sides stood at one and the same moment.
//!
//! Of two facts in etcd its history tells, even when one of them is gone by now. Two CiliumNodes come in one stream,
//! so what stood in it stood in the API server. For a fact of each server there is no common history: the CiliumNode
//! has to list the block between two reads of etcd that find the same.

use anyhow::Context as _;
use basal_crds::kvstore::keys;
use basal_ipam::{cell::Cell, owners::Source};
use basal_kvstore::kv::{KvError, Range, Revision};
use basal_objects::object::{ObjectKey, resources};

use super::{
    super::{read, stores::Stores},
    seen::{Suspect, Suspicion},
};

/// Judges.
///
/// # Errors
/// A server does not answer.
pub(super) async fn is_true(stores: &Stores, suspicion: &Suspicion) -> anyhow::Result<bool> {
    let Suspicion { one, other } = suspicion;
    match (one.holding.source == Source::Spec, other.holding.source == Source::Spec) {
        (true, true) => Ok(true),
        (false, false) => both_in_etcd(stores, one, other).await,
        (true, false) => at_both_servers(stores, other, one).await,
        (false, true) => at_both_servers(stores, one, other).await,
    }
}

async fn both_in_etcd(stores: &Stores, one: &Suspect, other: &Suspect) -> anyhow::Result<bool> {
    let moment = one.revision.max(other.revision);
    match both_at(stores, one, other, moment).await {
        // Forgotten: what stands now has to do.
        Err(KvError::Compacted { .. }) => both_at(stores, one, other, 0).await,
        answer => answer,
    }
    .context("etcd")
}

async fn both_at(stores: &Stores, one: &Suspect, other: &Suspect, revision: Revision) -> Result<bool, KvError> {
    Ok(in_etcd(stores, one, revision).await?.is_some() && in_etcd(stores, other, revision).await?.is_some())
}

async fn at_both_servers(stores: &Stores, etcd: &Suspect, spec: &Suspect) -> anyhow::Result<bool> {
    let before = in_etcd(stores, etcd, 0).await.context("etcd")?;
    let key = ObjectKey::cluster(&spec.holding.node);
    let object = stores.objects.get(resources::CILIUM_NODE, &key).await.context("the API server")?;
    let listed = object
        .as_ref()
        .and_then(|object| read::cilium_node(object).ok())
        .is_some_and(|node| node.pod_cidrs.iter().any(|text| text.parse() == Ok(spec.holding.block)));
    let after = in_etcd(stores, etcd, 0).await.context("etcd")?;
    Ok(listed && before.is_some() && before == after)
}

/// The revision that wrote what a suspect says, as of a revision; `None` when it was not said then.
async fn in_etcd(stores: &Stores, suspect: &Suspect, revision: Revision) -> Result<Option<Revision>, KvError> {
    let holding = &suspect.holding;
    let key = match suspect.cell {
        Some(cell) => stores.keys.cell(cell),
        None => format!("{}{}", keys::nodes_of(&stores.cluster), holding.node),
    };
    let answer = stores.kv.range(Range { revision, ..Range::one(key) }).await?;
    let Some(kv) = answer.kvs.first() else { return Ok(None) };
    let says = match suspect.cell {
        Some(id) => Cell::from_json(id, &kv.value).is_ok_and(|cell| {
            cell.blocks().get(&holding.block).is_some_and(|block| block.node.as_str() == holding.node)
        }),
        None => read::record(kv).is_ok_and(|record| record.blocks.contains(&holding.block)),
    };
    Ok(says.then_some(kv.mod_revision))
}
