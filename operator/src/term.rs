//! The start of a leader's term: take the fence, read everything at quorum, adopt what nodes carry.
//!
//! The order matters (a leader that slept through the end of its Lease must not take the fence from its successor):
//! the Lease is held; read the fence; look at the Lease again; take the fence at the version that was read.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::Duration,
};

use basal_crds::resources::LedgerStore;
use basal_ipam::{
    allocator::{Allocator, Carried, CarriedBlock, Loss, Next},
    config::PoolConfig,
    ledger::{FenceAnswer, FenceSeen, Ledger, LedgerError, Loaded, SwapAnswer, SwapRefusal},
    names::{NodeName, TermId},
    prefix::PodCidr,
};
use basal_kvstore::ledger::OwnerError;
use basal_objects::{
    leadership::Elector,
    ledger::{self, Standing},
    port::ReadError,
};
use basal_runtime::{
    failure::{Failure, Retry},
    reason::Reason,
};
use tokio::time::Instant;
use tracing::{info, warn};

use crate::{
    moving::MoveError,
    node::{NodeCore, Site, Views, endpoints::InUse},
    ports::Ports,
    store::{Publication, StoreError},
};

pub mod kv;
mod unclaimed;

/// Why a term did not begin.
#[derive(Debug, thiserror::Error)]
pub enum BeginError {
    /// The Lease names somebody else at the second look.
    #[error("the Lease names another operator by now; this one stands by")]
    LeaseLost,
    /// Somebody else wrote the fence after it was read.
    #[error("another operator took the fence of the ledger meanwhile; this one stands by")]
    FenceLost,
    /// The ledger cannot be read.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The ledger was not written.
    #[error(transparent)]
    Swap(#[from] SwapRefusal),
    /// The ledger may have been written.
    #[error("no answer of the ledger's store: {0}")]
    Unknown(String),
    /// The API server cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// This cluster cannot use the store of claims.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Somebody asked for the claims to be moved, or moved them, while the term began.
    #[error("the Ledger changed while the term began; it is looked at again")]
    Moved,
    /// The claims are being moved by this operator.
    #[error("moving the claims stopped: {0}")]
    Move(#[from] MoveError),
}

impl BeginError {
    /// Whether it stays until somebody changes something.
    pub(crate) fn needs_somebody(&self) -> bool {
        matches!(
            self,
            Self::Move(_)
                | Self::Ledger(LedgerError::NotActive { .. } | LedgerError::Sealed { .. })
                | Self::Store(StoreError::Owner(OwnerError::Another { .. }))
        )
    }
}

/// Reason of a move that stopped.
pub(crate) const MOVE_STOPPED: Reason = Reason::new("MoveStopped");

impl Failure for BeginError {
    fn reason(&self) -> Reason {
        const LEASE_LOST: Reason = Reason::new("LeaseLost");
        const FENCE_LOST: Reason = Reason::new("FenceLost");
        const LEDGER_UNAVAILABLE: Reason = Reason::new("LedgerUnavailable");
        const LEDGER_NOT_ACTIVE: Reason = Reason::new("LedgerNotActive");
        const LEDGER_OF_ANOTHER_CLUSTER: Reason = Reason::new("LedgerOfAnotherCluster");
        const LEDGER_REFUSED: Reason = Reason::new("LedgerRefused");
        const LEDGER_SEALED: Reason = Reason::new("LedgerSealed");
        const LEDGER_CHANGED: Reason = Reason::new("LedgerChanged");
        const API_SERVER_UNAVAILABLE: Reason = Reason::new("APIServerUnavailable");
        match self {
            Self::LeaseLost => LEASE_LOST,
            Self::FenceLost => FENCE_LOST,
            Self::Ledger(LedgerError::NotActive { .. }) => LEDGER_NOT_ACTIVE,
            Self::Store(StoreError::Owner(OwnerError::Another { .. })) => LEDGER_OF_ANOTHER_CLUSTER,
            Self::Store(StoreError::Owner(OwnerError::Refused(_))) => LEDGER_REFUSED,
            Self::Store(StoreError::Owner(OwnerError::Unknown(_))) => LEDGER_UNAVAILABLE,
            Self::Store(StoreError::Cluster(_) | StoreError::NoCluster) => API_SERVER_UNAVAILABLE,
            Self::Ledger(LedgerError::Sealed { .. }) => LEDGER_SEALED,
            Self::Moved => LEDGER_CHANGED,
            Self::Move(_) => MOVE_STOPPED,
            Self::Ledger(_) | Self::Unknown(_) => LEDGER_UNAVAILABLE,
            Self::Swap(_) => LEDGER_REFUSED,
            Self::Read(_) => API_SERVER_UNAVAILABLE,
        }
    }

    fn retry(&self) -> Retry {
        Retry::Backoff
    }
}

/// A term that began.
#[derive(Debug)]
pub struct Begun {
    /// What plans are made from.
    pub core: Arc<Mutex<NodeCore>>,
    /// Blocks that nodes carry and do not keep.
    pub lost: Vec<Loss>,
}

/// Begins a term of the store that `ports` serve. `elector` holds the Lease already. What nodes carry is read by the lists
/// that the views begin with: one list of thousands of objects is dear enough.
///
/// # Errors
/// See [`BeginError`]. Nothing was granted then; the fence may be taken.
pub async fn begin(
    ports: &Ports,
    views: &Views,
    elector: &Elector,
    pool: &PoolConfig,
    quarantine: Duration,
    publication: Publication,
) -> Result<Begun, BeginError> {
    let asked = Instant::now();
    ledger::activate(ports.objects.as_ref(), ports.cluster.name().as_str(), ports.store.kind()).await?;
    ports.store.own(&ports.objects).await?;
    let seen = ports.ledger.begin().await?;
    if seen.is_sealed() {
        may_begin(ports, &seen).await?;
    }
    let term = TermId::from_random(ports.env.random_u64(), ports.env.random_u64());
    take_fence(ports.ledger.as_ref(), elector, &seen, &term).await?;
    // After the fence was taken: who moves the claims reads the Ledger first, and then finds that its seal is gone.
    may_begin(ports, &seen).await?;
    let begun = Instant::now();
    views.list().await?;
    let carried = carried(ports, views).await?;
    let objects = begun.elapsed();
    // After the objects: a claim that is newer than what they list is seen.
    let loaded = load(ports, &term).await?;
    for stray in &loaded.strays {
        warn!(key = stray, "a key in the ledger that no version of Basal writes");
    }
    let mut allocator = Allocator::start(term, pool.clone(), quarantine, &loaded, begun.elapsed());
    for problem in allocator.problems() {
        warn!(reason = problem.reason(), "{problem}");
    }
    let lost_claims = unclaimed::is_likely(&allocator, views, &carried);
    let mut adoption = allocator.adopt(&carried);
    if lost_claims {
        let by_pods = allocator.adopt(&unclaimed::carried(ports, views, &allocator).await?);
        adoption.lost.extend(by_pods.lost);
        adoption.kept.extend(by_pods.kept);
    }
    info!(nodes = carried.len(), kept = adoption.kept.len(), lost = adoption.lost.len(), "took over what nodes carry");
    flush(ports, &mut allocator, begun).await?;
    // What a term that begins slowly waited for.
    info!(fence = ?begun - asked, ?objects, claims = ?begun.elapsed() - objects, "the term begins");
    let site = Site { cluster: ports.cluster.clone(), publication };
    let core = NodeCore::new(allocator, begun, site, ports.ledger.limits());
    Ok(Begun { core: Arc::new(Mutex::new(core)), lost: adoption.lost })
}

/// Whether a term of this store may begin that found the fence so: in the active store, and over a seal only when the move
/// that it was made for is called off.
async fn may_begin(ports: &Ports, seen: &FenceSeen) -> Result<(), BeginError> {
    let asked = ledger::asked(ports.objects.as_ref(), ports.cluster.name().as_str()).await?;
    let Some(Standing { store, move_to, .. }) = asked.map(|asked| asked.standing) else { return Ok(()) };
    match move_to {
        _ if store != ports.store.kind() => Err(BeginError::Moved),
        // The fence in etcd is no part of the Ledger, so taking it does not show there: no term of etcd begins beside a move,
        // whatever the fence held. Who leads there moves the claims itself.
        Some(_) if store == LedgerStore::Etcd => Err(BeginError::Moved),
        Some(to) if seen.is_sealed() => Err(LedgerError::Sealed { to: to.as_str() }.into()),
        _ => Ok(()),
    }
}

/// Takes the fence of a ledger for a term, if the Lease is still held.
pub(crate) async fn take_fence(
    ledger: &dyn Ledger,
    elector: &Elector,
    seen: &FenceSeen,
    term: &TermId,
) -> Result<(), BeginError> {
    if !elector.holds_lease().await? {
        return Err(BeginError::LeaseLost);
    }
    match ledger.take_fence(seen, term).await {
        FenceAnswer::Taken => Ok(()),
        FenceAnswer::Lost => Err(BeginError::FenceLost),
        FenceAnswer::Refused(refusal) => Err(refusal.into()),
        // The fence may hold the term. The next try reads it and takes it with another term, which is as good.
        FenceAnswer::Unknown(why) => Err(BeginError::Unknown(why)),
        FenceAnswer::StoreReplaced(why) => Err(LedgerError::StoreReplaced(why).into()),
    }
}

async fn load(ports: &Ports, term: &TermId) -> Result<Loaded, BeginError> {
    let loaded = ports.ledger.load().await?;
    if loaded.fence.holds(term) { Ok(loaded) } else { Err(BeginError::FenceLost) }
}

/// What every CiliumNode lists, with the Node that it belongs to.
async fn carried(ports: &Ports, views: &Views) -> Result<Vec<Carried>, BeginError> {
    let all = views.cilium_nodes.read(|store| {
        let parsed = store.valid().filter_map(|(key, packed)| {
            let blocks = packed.facts().ok()?.pod_cidrs.iter().filter_map(|text| text.parse().ok()).collect();
            Some((NodeName::new(&key.name).ok()?, blocks))
        });
        parsed.collect::<Vec<(NodeName, Vec<PodCidr>)>>()
    });
    let in_use = in_use(ports, &all).await?;
    // One that cannot be read may have any address of its node.
    let unreadable: BTreeSet<&NodeName> = in_use.unreadable().iter().filter_map(|one| one.node.as_ref()).collect();
    let carried = all.into_iter().map(|(node, blocks)| {
        let live = |at: &PodCidr| unreadable.contains(&node) || in_use.has_address_in(at);
        let blocks = blocks.into_iter().map(|at| CarriedBlock { at, live: live(&at) }).collect();
        Carried { uid: views.node_uid(&node), node, blocks }
    });
    Ok(carried.collect())
}

/// What all endpoints use, when two nodes list overlapping blocks: only then do they decide anything.
async fn in_use(ports: &Ports, all: &[(NodeName, Vec<PodCidr>)]) -> Result<InUse, BeginError> {
    let mut blocks: Vec<&PodCidr> = all.iter().flat_map(|(_, blocks)| blocks).collect();
    blocks.sort_by_key(|block| (block.family(), block.first()));
    if !blocks.windows(2).any(|pair| pair[0].overlaps(pair[1])) {
        return Ok(InUse::default());
    }
    let in_use = InUse::read(ports.objects.as_ref()).await?;
    for endpoint in in_use.unreadable() {
        warn!(endpoint = %endpoint.key, why = endpoint.why, "a CiliumEndpoint that cannot be read");
    }
    Ok(in_use)
}

/// Writes what was adopted, before anything is granted.
async fn flush(ports: &Ports, allocator: &mut Allocator, begun: Instant) -> Result<(), BeginError> {
    let term = allocator.term().clone();
    while let Some(batch) = allocator.next_batch(ports.ledger.limits()) {
        let answer = ports.ledger.swap(&term, &batch.swaps).await;
        let settled = allocator.settle(batch.id, &answer, begun.elapsed());
        match (settled.next, answer) {
            (Next::Continue, SwapAnswer::Refused(refusal)) => return Err(refusal.into()),
            (Next::Continue, _) => {}
            (Next::Reload, _) => {
                let loaded = load(ports, &term).await?;
                allocator.reload(&loaded, begun.elapsed());
            }
            (Next::EndTerm, SwapAnswer::StoreReplaced(why)) => return Err(LedgerError::StoreReplaced(why).into()),
            (Next::EndTerm, _) => return Err(BeginError::FenceLost),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use basal_kvstore::ledger::EtcdLedger;
    use basal_objects::{
        leadership::LeadershipOptions,
        object::{Object, ObjectKey, resources},
        port::{MergePatch, Objects as _},
    };
    use basal_runtime::env::{SeededEnv, SharedEnv};
    use basal_sim::{kv::ModelKv, objects::ModelObjects};
    use serde_json::json;

    use super::*;

    /// A leader that slept between its election and the fence finds another name in the Lease.
    #[tokio::test(start_paused = true)]
    async fn the_fence_is_taken_only_by_who_the_lease_names_at_the_second_look() {
        let env: SharedEnv = Arc::new(SeededEnv::new(1));
        let server = ModelObjects::new(Arc::clone(&env));
        let lease = ObjectKey::namespaced("kube-system", "lease");
        let mut options = LeadershipOptions::new("kube-system", "slept".to_owned());
        options.lease = lease.clone();
        let elector = Elector::new(Arc::new(server.clone()), env, options);
        let term = TermId::from_random(1, 0);
        let ledger = EtcdLedger::new(Arc::new(ModelKv::new(1)), "default");
        let seen = ledger.begin().await.unwrap();

        let held_by = |holder: &str| {
            Object(json!({
                "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
                "metadata": { "name": lease.name, "namespace": "kube-system" },
                "spec": { "holderIdentity": holder, "leaseDurationSeconds": 15 },
            }))
        };
        assert!(server.create(resources::LEASE, held_by("other")).await.is_done());
        let answer = take_fence(&ledger, &elector, &seen, &term).await;
        assert!(matches!(answer, Err(BeginError::LeaseLost)), "{answer:?}");
        assert_eq!(ledger.read_fence().await.unwrap().value, None, "nothing was written");

        let found = server.get(resources::LEASE, &lease).await.unwrap().unwrap();
        let patch = MergePatch {
            resource_version: found.resource_version().to_owned(),
            uid: found.uid().to_owned(),
            subresource: None,
            body: json!({ "spec": { "holderIdentity": "slept" } }),
        };
        assert!(server.patch(resources::LEASE, &lease, patch).await.is_done());
        take_fence(&ledger, &elector, &seen, &term).await.unwrap();
        assert!(ledger.read_fence().await.unwrap().holds(&term));
    }
}
