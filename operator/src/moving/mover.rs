//! The move itself: a leader's way from one store to the other.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use basal_crds::resources::LedgerStore;
use basal_ipam::{
    ledger::{FenceSeen, Ledger, LedgerError, Loaded, SwapAnswer, SwapRefusal},
    names::{NodeName, TermId},
    prefix::PodCidr,
    transfer::{TransferError, batch, transfer},
};
use basal_kvstore::kv::Kv;
use basal_objects::{
    events::EventRecorder,
    leadership::Elector,
    ledger::{self, Asked},
    object::resources,
    port::{Freshness, ReadError, Scope},
};
use basal_runtime::reason::Reason;
use tracing::info;

use super::bridge::{Bridge, BridgeError};
use crate::{
    ledger_state,
    node::{CiliumNodeFacts, Facts as _, NodeError, confirm_blocks},
    ports::Ports,
    store::StoreError,
    term::{self, BeginError},
};

/// How often the claims are compared and copied before somebody is told that this does not end. Nobody else writes them.
const ROUNDS: usize = 8;

/// What a move consists of, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Both ledgers are read. Nothing is written before this worked.
    Check,
    /// The fence of the old ledger gets a seal: from here on nobody grants.
    Seal,
    /// The fence of the new ledger is taken, so that no earlier mover writes it any more.
    Open,
    /// Records of nodes and addresses, and identities: before the claims, since an agent goes on once its claim is there.
    Records,
    /// The claims.
    Claims,
    /// Both ledgers are read again and compared; then the new store becomes the active one.
    Activate,
}

impl Step {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Check, Self::Seal, Self::Open, Self::Records, Self::Claims, Self::Activate];

    /// The word for the Ledger's condition.
    #[must_use]
    pub const fn reason(self) -> Reason {
        Reason::new(match self {
            Self::Check => "MoveChecked",
            Self::Seal => "MoveSealing",
            Self::Open => "MoveOpening",
            Self::Records => "MoveCopyingRecords",
            Self::Claims => "MoveCopyingClaims",
            Self::Activate => "MoveActivating",
        })
    }
}

/// Why a move stopped. It begins again from the first step, unless it is called off.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    /// The Ledger does not ask for it any more.
    #[error("the move was called off: spec.moveTo of the Ledger is gone")]
    CalledOff,
    /// Another operator goes on with it, or a term of the old store began.
    #[error("the fence of a ledger was taken by somebody else; the move begins again")]
    FenceLost,
    /// A ledger cannot be used.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// This cluster cannot use etcd's ledger.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A fence was not taken.
    #[error(transparent)]
    Begin(#[from] Box<BeginError>),
    /// The claims cannot be copied.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// Claims were not written.
    #[error(transparent)]
    Swap(#[from] SwapRefusal),
    /// The claims were not alike in the end.
    #[error("{0} cells were not alike after {ROUNDS} comparisons")]
    Unlike(usize),
    /// Records were not copied.
    #[error(transparent)]
    Bridge(#[from] BridgeError),
    /// CiliumNodes cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A CiliumNode was not written.
    #[error("CiliumNode {0}: {1}")]
    Node(NodeName, #[source] NodeError),
}

/// One move, by a leader that reaches both stores.
pub(crate) struct Mover<'a> {
    ports: &'a Ports,
    kv: &'a Arc<dyn Kv>,
    elector: &'a Elector,
    events: &'a EventRecorder,
    from: LedgerStore,
    to: LedgerStore,
    old: Arc<dyn Ledger>,
    new: Arc<dyn Ledger>,
    seal: TermId,
    copy: TermId,
}

impl<'a> Mover<'a> {
    pub(crate) fn new(
        ports: &'a Ports,
        kv: &'a Arc<dyn Kv>,
        elector: &'a Elector,
        events: &'a EventRecorder,
        (from, to): (LedgerStore, LedgerStore),
    ) -> Self {
        let random = || ports.env.random_u64();
        let (seal, copy) = (TermId::seal(random(), random()), TermId::from_random(random(), random()));
        let (old, new) = (ports.serving(from).ledger, ports.filled(to, kv));
        Self { ports, kv, elector, events, from, to, old, new, seal, copy }
    }

    /// Goes through all steps.
    ///
    /// # Errors
    /// See [`MoveError`].
    pub(crate) async fn run(&self) -> Result<(), MoveError> {
        for step in Step::ALL {
            let asked = self.asked().await?;
            let message = format!("the claims are moved from {} to {}", self.from.as_str(), self.to.as_str());
            info!(step = step.reason().as_str(), "{message}");
            match step {
                Step::Check => {
                    // One of the two is etcd, which other clusters may use as well.
                    self.ports.serving(LedgerStore::Etcd).store.own(&self.ports.objects).await?;
                    drop(transfer(&self.read(&self.old).await?, &self.read(&self.new).await?)?);
                }
                Step::Seal => self.take(&self.old, &self.seal).await?,
                Step::Open => self.take(&self.new, &self.copy).await?,
                Step::Records => self.bridge().fill(self.to).await?,
                Step::Claims => self.copy_claims().await?,
                Step::Activate => {
                    // After the Ledger was read: a term that took the fence since then finds that the move is asked for.
                    self.verify().await?;
                    let cluster = self.ports.cluster.name().as_str();
                    ledger::switch(self.ports.objects.as_ref(), cluster, &asked, self.to).await?;
                    ledger_state::tell_moved(self.ports, self.events, self.from, self.to).await;
                    return Ok(());
                }
            }
            ledger_state::show_step(self.ports, step.reason(), &message).await;
        }
        Ok(())
    }

    /// The Ledger, if it still asks for this move.
    async fn asked(&self) -> Result<Asked, MoveError> {
        let asked = ledger::asked(self.ports.objects.as_ref(), self.ports.cluster.name().as_str()).await?;
        let asked = asked.ok_or(MoveError::CalledOff)?;
        let ours = asked.standing.store == self.from && asked.standing.move_to == Some(self.to);
        if ours { Ok(asked) } else { Err(MoveError::CalledOff) }
    }

    /// Reads a ledger that nobody holds yet.
    async fn read(&self, ledger: &Arc<dyn Ledger>) -> Result<Loaded, MoveError> {
        ledger.begin().await?;
        Ok(ledger.load().await?)
    }

    async fn take(&self, ledger: &Arc<dyn Ledger>, term: &TermId) -> Result<(), MoveError> {
        let seen: FenceSeen = ledger.begin().await?;
        Ok(term::take_fence(ledger.as_ref(), self.elector, &seen, term).await.map_err(Box::new)?)
    }

    /// Writes in etcd under the fence that this mover holds there.
    fn bridge(&self) -> Bridge {
        let fence = if self.to == LedgerStore::Etcd { &self.copy } else { &self.seal };
        Bridge::new(self.ports, self.kv, fence.as_str())
    }

    /// Both ledgers, while this mover holds them.
    async fn load(&self) -> Result<(Loaded, Loaded), MoveError> {
        let (old, new) = (self.old.load().await?, self.new.load().await?);
        if old.fence.holds(&self.seal) && new.fence.holds(&self.copy) {
            Ok((old, new))
        } else {
            Err(MoveError::FenceLost)
        }
    }

    async fn copy_claims(&self) -> Result<(), MoveError> {
        let mut left = 0;
        for _ in 0..ROUNDS {
            let (old, new) = self.load().await?;
            let swaps = transfer(&old, &new)?;
            left = swaps.len();
            if swaps.is_empty() {
                return match self.to {
                    LedgerStore::Etcd => Ok(()),
                    LedgerStore::CustomResources => self.confirm(&old).await,
                };
            }
            let mut rest = swaps.as_slice();
            while !rest.is_empty() {
                let now = batch(rest, self.new.limits());
                match self.new.swap(&self.copy, now).await {
                    SwapAnswer::Done(_) => rest = &rest[now.len()..],
                    SwapAnswer::FenceLost => return Err(MoveError::FenceLost),
                    SwapAnswer::Refused(refusal) => return Err(refusal.into()),
                    SwapAnswer::StoreReplaced(why) => return Err(LedgerError::StoreReplaced(why).into()),
                    // Another look tells.
                    SwapAnswer::Conflict(_) | SwapAnswer::Unknown(_) => break,
                }
            }
        }
        Err(MoveError::Unlike(left))
    }

    /// Has every CiliumNode confirm the blocks that are its node's, for agents that will read it there.
    async fn confirm(&self, claims: &Loaded) -> Result<(), MoveError> {
        let mut owned: BTreeMap<NodeName, BTreeSet<PodCidr>> = BTreeMap::new();
        let cells = claims.cells.values().filter_map(|stored| stored.cell.as_ref().ok());
        for (at, block) in cells.flat_map(|cell| cell.blocks()).filter(|(_, block)| block.state.is_usable()) {
            owned.entry(block.node.clone()).or_default().insert(*at);
        }
        let listed = self.ports.objects.list(resources::CILIUM_NODE, &Scope::default(), Freshness::Quorum).await?;
        for object in listed.items {
            let (Ok(name), Ok(facts)) = (NodeName::new(object.name()), CiliumNodeFacts::parse(&object)) else {
                continue;
            };
            let own = owned.remove(&name).unwrap_or_default();
            let blocks = facts.pod_cidrs.iter().filter_map(|text| text.parse().ok());
            let blocks: Vec<PodCidr> = blocks.filter(|block| own.contains(block)).collect();
            confirm_blocks(self.ports, &name, &facts, &blocks).await.map_err(|error| MoveError::Node(name, error))?;
        }
        Ok(())
    }

    async fn verify(&self) -> Result<(), MoveError> {
        let (old, new) = self.load().await?;
        match transfer(&old, &new)?.len() {
            0 => Ok(()),
            unlike => Err(MoveError::Unlike(unlike)),
        }
    }
}
