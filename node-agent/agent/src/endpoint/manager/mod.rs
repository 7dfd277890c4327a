//! The endpoints of this node, and what the runtime's calls do to them: one call at a time for each endpoint, many
//! endpoints at once.

mod execute;
mod waiting;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use basal_cni::api::{AddRequest, AddResult, AgentError, Attachment, CheckRequest, DelRequest};
use basal_crds::{directory::Directory, identity::IdentityId, kvstore::NamedPort, labels::Labels};
use basal_ipam::prefix::PodCidr;
use basal_runtime::{env::SharedEnv, outcome::Outcome, sync::lock};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    build::result,
    error::AddError,
    record::{EndpointId, EndpointRecord, Phase},
    restore::Restored,
    state::{Slot, State},
};
use crate::{
    identity::labels,
    journal::{Journal, JournalKey},
    mac::MacAddr,
    sync::{AttachError, Datapath, Differences},
};

/// What is known of a pod, for the records of its endpoints.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PodDetails {
    /// `spec.serviceAccountName`.
    pub service_account: String,
    /// The ports with names.
    pub named_ports: Vec<NamedPort>,
}

/// What a start says of the node.
#[derive(Debug, Clone)]
pub struct EndpointsOptions {
    /// The address that other nodes tunnel to; ip records name it. See [`Endpoints::moved`].
    pub host_ip: IpAddr,
    /// The boot that this is.
    pub boot_id: String,
}

/// An endpoint that was added for somebody, and is not committed yet.
#[derive(Debug, Clone)]
pub struct Added {
    /// What to tell the runtime.
    pub result: AddResult,
    /// Tells it from the endpoint of another ADD for the same container.
    id: EndpointId,
}

/// All endpoints of this node.
#[derive(Clone)]
pub struct Endpoints {
    inner: Arc<Inner>,
}

struct Inner {
    env: SharedEnv,
    journal: Arc<dyn Journal>,
    directory: Arc<dyn Directory>,
    datapath: Datapath,
    boot_id: String,
    host_ip: Mutex<IpAddr>,
    began: Instant,
    state: Mutex<State>,
    details: Mutex<BTreeMap<JournalKey, PodDetails>>,
    /// `None` while addresses may be given out.
    problem: Mutex<Option<String>>,
    /// Blocks that were this node's and are no more.
    lost: Mutex<BTreeSet<PodCidr>>,
    /// One at a time for each endpoint.
    turns: Mutex<BTreeMap<JournalKey, Arc<tokio::sync::Mutex<()>>>>,
    /// Addresses became free, or blocks changed.
    freed: Notify,
    /// Raised with each change of an endpoint: for those who publish.
    version: watch::Sender<u64>,
}

impl Endpoints {
    /// Takes over `state`, which already holds what a start found (see [`Endpoints::adopt`]).
    #[must_use]
    pub fn new(
        env: SharedEnv,
        journal: Arc<dyn Journal>,
        directory: Arc<dyn Directory>,
        datapath: Datapath,
        options: EndpointsOptions,
        state: State,
        began: Instant,
    ) -> Self {
        let inner = Inner {
            env,
            journal,
            directory,
            datapath,
            boot_id: options.boot_id,
            host_ip: Mutex::new(options.host_ip),
            began,
            state: Mutex::new(state),
            details: Mutex::default(),
            problem: Mutex::new(None),
            lost: Mutex::default(),
            turns: Mutex::default(),
            freed: Notify::new(),
            version: watch::Sender::new(0),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Looks at all endpoints.
    pub fn read<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&lock(&self.inner.state))
    }

    /// Tells of each change of an endpoint.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.version.subscribe()
    }

    /// The time that the address pool counts in.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.inner.began.elapsed()
    }

    /// Says which blocks addresses come from, which were this node's and are no more, and why no new pods are served if
    /// that is so. Records of addresses in lost blocks are withdrawn, and come back when the blocks do.
    pub fn serve(&self, confirmed: &BTreeSet<PodCidr>, lost: BTreeSet<PodCidr>, problem: Option<String>) {
        lock(&self.inner.state).serve(confirmed);
        *lock(&self.inner.problem) = problem;
        let before = std::mem::replace(&mut *lock(&self.inner.lost), lost.clone());
        if before != lost {
            self.announce_again();
        }
        self.inner.freed.notify_waiters();
    }

    /// Other nodes tunnel to another address from now on: the records name that one.
    pub fn moved(&self, host_ip: IpAddr) {
        let before = std::mem::replace(&mut *lock(&self.inner.host_ip), host_ip);
        if before != host_ip {
            self.announce_again();
        }
    }

    /// Finishes what a start found: removes what is to be removed, announces what lives on.
    pub async fn adopt(&self, restored: &Restored) {
        for key in &restored.void {
            if let Outcome::Refused(error) = self.inner.journal.remove(key).await {
                tracing::warn!(%key, %error, "an unreadable record without an endpoint stays");
            }
        }
        for key in restored.kept.keys() {
            let _turn = self.turn(key).await;
            if let Err(error) = self.run(key, Phase::Committed).await {
                tracing::warn!(%key, %error, "an endpoint from before the restart");
            }
        }
        for key in restored.removed.keys() {
            self.remove_key(key).await;
        }
    }

    /// ADD. With `given_up` it ends at its next waiting point, and leaves nothing behind.
    ///
    /// # Errors
    /// See [`AddError`]; nothing is left behind then, or is left to [`Endpoints::sweep`].
    pub async fn add(&self, request: &AddRequest, given_up: &CancellationToken) -> Result<Added, AddError> {
        let key = JournalKey::of(&request.attachment);
        let _turn = self.turn(&key).await;
        if self.read(|state| state.get(&key).is_some()) {
            // The runtime asks anew for what it has: what there is belongs to an ADD whose answer it never saw.
            self.run(&key, Phase::Removing).await?;
        }
        let (id, addresses) = self.reserve(&key, &request.ips, given_up).await?;
        let random = || MacAddr::from_random(self.inner.env.random_u64());
        let record = EndpointRecord {
            id,
            attachment: request.attachment.clone(),
            pod: request.pod.clone(),
            netns: request.netns.clone(),
            addresses,
            mac: random(),
            host_mac: random(),
            identity: IdentityId::INIT,
            labels: labels::reserved("init").map(|labels| labels.canonical()).unwrap_or_default(),
            phase: Phase::Adding,
            boot_id: self.inner.boot_id.clone(),
        };
        let slot = Slot {
            id,
            addresses,
            record: Some(record.clone()),
            journal: None,
            connected: false,
            announced: false,
            reference: None,
        };
        lock(&self.inner.state).insert(key.clone(), slot);
        self.touch();
        if request.pod.is_some() {
            self.wait_for_identity(&key, given_up).await;
        }
        let mut added = self.run(&key, Phase::Adding).await;
        if added.is_ok() && given_up.is_cancelled() {
            added = Err(AddError::GivenUp("the datapath was being set up".to_owned()));
        }
        let node = self.inner.datapath.look(|view| view.local().clone()).await;
        match added.and_then(|()| node.ok_or(AttachError::Ending.into())) {
            Ok(node) => Ok(Added { result: result(&record, &node), id }),
            Err(error) => {
                tracing::warn!(attachment = %request.attachment, %error, "ADD is undone");
                if let Err(again) = self.run(&key, Phase::Removing).await {
                    tracing::warn!(attachment = %request.attachment, error = %again, "it is undone later");
                }
                Err(error)
            }
        }
    }

    /// The runtime has the result.
    ///
    /// # Errors
    /// The endpoint was removed meanwhile, or another ADD made it anew, or the journal cannot be written.
    pub async fn commit(&self, attachment: &Attachment, added: &Added) -> Result<(), AddError> {
        let key = JournalKey::of(attachment);
        let _turn = self.turn(&key).await;
        let adding = self.read(|state| {
            let record = state.get(&key).and_then(|slot| slot.record.as_ref());
            record.is_some_and(|record| record.phase == Phase::Adding && record.id == added.id)
        });
        if !adding {
            return Err(AddError::Overtaken(attachment.clone()));
        }
        self.run(&key, Phase::Committed).await
    }

    /// The end of an ADD whose result was not acknowledged. What another ADD made in its place stays.
    ///
    /// # Errors
    /// See [`AddError`]; [`Endpoints::sweep`] goes on with it.
    pub async fn undo(&self, attachment: &Attachment, added: &Added) -> Result<(), AddError> {
        let key = JournalKey::of(attachment);
        let _turn = self.turn(&key).await;
        if self.read(|state| state.get(&key).is_none_or(|slot| slot.id != added.id)) {
            return Ok(());
        }
        self.run(&key, Phase::Removing).await
    }

    /// DEL.
    ///
    /// # Errors
    /// See [`AddError`]; [`Endpoints::sweep`] goes on with it.
    pub async fn del(&self, request: &DelRequest) -> Result<(), AddError> {
        let key = JournalKey::of(&request.attachment);
        let _turn = self.turn(&key).await;
        if self.read(|state| state.get(&key).is_none()) {
            // A record that was not taken over at the start may be there nevertheless.
            return self.journal_answer(&key, None, self.inner.journal.remove(&key).await);
        }
        self.run(&key, Phase::Removing).await
    }

    /// GC.
    ///
    /// # Errors
    /// The first removal that failed; the others were carried out.
    pub async fn collect(&self, valid: &BTreeSet<Attachment>) -> Result<BTreeSet<Attachment>, AddError> {
        let mut removed = BTreeSet::new();
        let mut failed = None;
        for key in self.read(|state| state.orphans(valid)) {
            let _turn = self.turn(&key).await;
            let attachment = self.read(|state| Some(state.get(&key)?.record.as_ref()?.attachment.clone()));
            match self.run(&key, Phase::Removing).await {
                Ok(()) => removed.extend(attachment),
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(removed), Err)
    }

    /// CHECK.
    ///
    /// # Errors
    /// What is missing or different.
    pub async fn check(&self, request: &CheckRequest) -> Result<(), AgentError> {
        let key = JournalKey::of(&request.attachment);
        let found = self.read(|state| state.get(&key).map(|slot| (slot.id, slot.addresses, slot.connected)));
        let Some((id, addresses, connected)) = found else {
            let message = format!("there is no endpoint for {}", request.attachment);
            return Err(AgentError::UnknownAttachment { message });
        };
        let damaged = |message: String| Err(AgentError::Damaged { message });
        for wanted in &request.addresses {
            if !addresses.iter().any(|ip| ip == wanted.addr()) {
                return damaged(format!("address {wanted} is not one of endpoint {id}'s"));
            }
        }
        if !connected {
            return damaged(format!("the interface {key} of endpoint {id} is gone"));
        }
        let verified = self.inner.datapath.verify(id, Path::new(&request.netns)).await;
        let Differences { host, pod } =
            verified.map_err(|error| AgentError::TryAgain { message: error.to_string() })?;
        let mut parts = Vec::new();
        if !host.is_empty() {
            parts.push(format!("{}; the agent mends it", host.join(", ")));
        }
        if !pod.is_empty() {
            parts.push(format!("{}; a new pod in its place has it right", pod.join(", ")));
        }
        if parts.is_empty() { Ok(()) } else { damaged(format!("endpoint {id}: {}", parts.join(". "))) }
    }

    /// Goes on with removals that failed.
    pub async fn sweep(&self) {
        let removing = |slot: &Slot| {
            slot.journal == Some(Phase::Removing)
                || slot.record.as_ref().is_some_and(|record| record.phase == Phase::Removing)
        };
        let keys: Vec<_> =
            self.read(|state| state.iter().filter(|(_, slot)| removing(slot)).map(|(key, _)| key.clone()).collect());
        for key in keys {
            self.remove_key(&key).await;
        }
    }

    /// Interfaces that went away without a DEL.
    pub fn lost(&self, ids: &BTreeSet<EndpointId>) {
        let mut state = lock(&self.inner.state);
        let keys: Vec<_> =
            state.iter().filter(|(_, slot)| ids.contains(&slot.id)).map(|(key, _)| key.clone()).collect();
        for key in keys {
            if let Some(slot) = state.get_mut(&key) {
                slot.connected = false;
            }
        }
        drop(state);
        self.touch();
    }

    /// An endpoint's identity is known, or is another one. `reference` was allocated by the caller, who hands it over.
    pub async fn identify(&self, key: &JournalKey, identity: IdentityId, reference: Labels, details: PodDetails) {
        let journaled = {
            let mut state = lock(&self.inner.state);
            let slot =
                state.get_mut(key).filter(|slot| slot.record.as_ref().is_some_and(|r| r.phase != Phase::Removing));
            let Some(slot) = slot else {
                return self.inner.directory.release_identity(&reference);
            };
            if let Some(record) = &mut slot.record {
                record.identity = identity;
                record.labels = reference.canonical();
            }
            if let Some(held) = slot.reference.replace(reference) {
                self.inner.directory.release_identity(&held);
            }
            lock(&self.inner.details).insert(key.clone(), details);
            slot.journal.is_some()
        };
        self.touch();
        // An ADD that waits for its identity has its turn, and goes on with what was just noted.
        if journaled {
            let _turn = self.turn(key).await;
            self.write_identity(key).await;
        }
    }

    async fn write_identity(&self, key: &JournalKey) {
        let record = self.read(|state| state.get(key).and_then(|slot| slot.record.clone()));
        let Some(record) = record.filter(|record| record.phase != Phase::Removing) else { return };
        // The journal's identity only serves the moment after a restart; the next write makes up for a failed one.
        if let Outcome::Refused(error) = self.inner.journal.put(&record).await {
            tracing::warn!(%key, %error, "the new identity is not in the journal");
        }
        let (id, identity) = (record.id, record.identity);
        self.inner.datapath.edit(move |view| view.set_identity(id, identity)).await;
        self.announce(key, &record);
        self.touch();
    }

    /// What was noted of an endpoint's pod.
    #[must_use]
    pub fn details(&self, key: &JournalKey) -> PodDetails {
        lock(&self.inner.details).get(key).cloned().unwrap_or_default()
    }

    fn touch(&self) {
        self.inner.version.send_modify(|version| *version += 1);
    }

    async fn turn(&self, key: &JournalKey) -> tokio::sync::OwnedMutexGuard<()> {
        let turn = {
            let mut turns = lock(&self.inner.turns);
            // Those that nobody holds or waits for go, so that the map does not grow with every pod that ever was.
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
            Arc::clone(turns.entry(key.clone()).or_default())
        };
        turn.lock_owned().await
    }

    async fn remove_key(&self, key: &JournalKey) {
        let _turn = self.turn(key).await;
        if let Err(error) = self.run(key, Phase::Removing).await {
            tracing::warn!(%key, %error, "the endpoint is not gone yet; it is tried again");
        }
    }
}
