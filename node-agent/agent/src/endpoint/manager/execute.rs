//! Carries out the steps of one endpoint, and publishes its addresses.

use basal_crds::kvstore::{IpRecord, IpTarget};
use basal_runtime::{outcome::Outcome, sync::lock};

use super::Endpoints;
use crate::{
    endpoint::{
        build::endpoint,
        error::AddError,
        record::{EndpointRecord, Phase},
        state::Slot,
        step::{Seen, Step, next},
    },
    journal::{JournalError, JournalKey},
};

impl Endpoints {
    fn seen(&self, key: &JournalKey) -> Seen {
        self.read(|state| state.get(key).map_or(Seen::NOTHING, Slot::seen))
    }

    /// Carries out steps until the goal is reached. The caller has the endpoint's turn.
    pub(super) async fn run(&self, key: &JournalKey, goal: Phase) -> Result<(), AddError> {
        if let Some(record) = lock(&self.inner.state).get_mut(key).and_then(|slot| slot.record.as_mut()) {
            record.phase = record.phase.max(goal);
        }
        while let Some(step) = next(goal, &self.seen(key)) {
            tracing::debug!(%key, ?step, "endpoint");
            self.carry_out(key, step).await?;
            self.touch();
        }
        Ok(())
    }

    async fn carry_out(&self, key: &JournalKey, step: Step) -> Result<(), AddError> {
        let Some(slot) = self.read(|state| state.get(key).cloned()) else { return Ok(()) };
        let change = |change: fn(&mut Slot)| {
            if let Some(slot) = lock(&self.inner.state).get_mut(key) {
                change(slot);
            }
        };
        match (step, &slot.record) {
            (Step::Record(phase), Some(record)) => {
                let record = EndpointRecord { phase, ..record.clone() };
                match self.inner.journal.put(&record).await {
                    // Nothing can be written to a full disk, but pods can leave: who asks for a removal asks until it is
                    // carried out, and deleting the record itself needs no room.
                    Outcome::Refused(error) if phase == Phase::Removing => {
                        tracing::warn!(%key, %error, "the endpoint is removed without a note of it");
                        self.noted(key, Some(phase));
                    }
                    answer => self.journal_answer(key, Some(phase), answer)?,
                }
            }
            // A record that cannot be read cannot be rewritten: the removal goes on without the note.
            (Step::Record(phase), None) => self.noted(key, Some(phase)),
            (Step::Connect, Some(record)) => {
                let wanted = record.clone();
                self.inner.datapath.attach(record.id, move |node| endpoint(&wanted, node)).await?;
                change(|slot| slot.connected = true);
            }
            (Step::Announce, Some(record)) => self.announce(key, record),
            // Its records live on under an earlier run's lease, if at all.
            (Step::Connect | Step::Announce, None) => change(|slot| slot.announced = true),
            (Step::Withdraw, _) => {
                for ip in slot.addresses.iter() {
                    self.inner.directory.withdraw_ip(IpTarget::Host(ip));
                }
                change(|slot| slot.announced = false);
            }
            (Step::Disconnect, _) => {
                self.inner.datapath.detach(slot.id).await?;
                change(|slot| slot.connected = false);
            }
            (Step::Forget, _) => {
                self.journal_answer(key, None, self.inner.journal.remove(key).await)?;
            }
            (Step::Release, _) => {
                if let Some(labels) = &slot.reference {
                    self.inner.directory.release_identity(labels);
                }
                let now = self.now();
                lock(&self.inner.state).release(key, now);
                lock(&self.inner.details).remove(key);
                self.inner.freed.notify_waiters();
            }
        }
        Ok(())
    }

    /// From now on the journal counts as holding the endpoint in this phase, or not at all.
    fn noted(&self, key: &JournalKey, phase: Option<Phase>) {
        if let Some(slot) = lock(&self.inner.state).get_mut(key) {
            slot.journal = phase;
        }
    }

    pub(super) fn journal_answer(
        &self,
        key: &JournalKey,
        phase: Option<Phase>,
        answer: Outcome<(), JournalError>,
    ) -> Result<(), AddError> {
        match answer {
            Outcome::Done(()) => {
                self.noted(key, phase);
                Ok(())
            }
            Outcome::Refused(error) => Err(error.into()),
            Outcome::Unknown(why) => {
                // Where nothing was before there may be a record now: the removal has to look.
                if let Some(slot) = lock(&self.inner.state).get_mut(key) {
                    slot.journal = slot.journal.or(phase);
                }
                Err(AddError::JournalUnknown(why))
            }
        }
    }

    pub(super) fn announce(&self, key: &JournalKey, record: &EndpointRecord) {
        let details = lock(&self.inner.details).get(key).cloned().unwrap_or_default();
        let lost = lock(&self.inner.lost).clone();
        let host_ip = *lock(&self.inner.host_ip);
        for ip in record.addresses.iter() {
            if lost.iter().any(|block| block.contains_address(ip)) {
                self.inner.directory.withdraw_ip(IpTarget::Host(ip));
                continue;
            }
            let mut out = IpRecord::new(IpTarget::Host(ip), host_ip, record.identity);
            if let Some(pod) = &record.pod {
                out.namespace.clone_from(&pod.namespace);
                out.pod_name.clone_from(&pod.name);
            }
            out.service_account.clone_from(&details.service_account);
            out.named_ports.clone_from(&details.named_ports);
            self.inner.directory.publish_ip(&out);
        }
        if let Some(slot) = lock(&self.inner.state).get_mut(key) {
            slot.announced = true;
        }
    }

    /// Publishes the records of all endpoints whose records are published.
    pub(super) fn announce_again(&self) {
        let announced: Vec<_> = self.read(|state| {
            let announced = state.iter().filter(|(_, slot)| slot.announced);
            announced.filter_map(|(key, slot)| Some((key.clone(), slot.record.clone()?))).collect()
        });
        for (key, record) in announced {
            self.announce(&key, &record);
        }
    }
}
