//! The shell of the election: requests, waits, and the published state.

use std::{sync::Arc, time::Duration};

use basal_runtime::{
    env::{SharedEnv, TaskHandle},
    outcome::Outcome,
};
use futures::{FutureExt, pin_mut, select_biased};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{
    Leadership, LeadershipOptions, TermId,
    election::{Action, Election, Observation},
    lease::{Lease, LeaseAt, LeaseWrite},
};
use crate::{
    object::resources::LEASE,
    port::{MergePatch, Objects, ReadError},
};

/// Stands for election in a task of its own.
///
/// Give it an [`Objects`] that nothing else uses: a renewal must not wait behind the requests that it renews for.
#[derive(Clone)]
pub struct Elector {
    objects: Arc<dyn Objects>,
    env: SharedEnv,
    options: LeadershipOptions,
    leadership: watch::Sender<Leadership>,
}

impl Elector {
    /// A candidate that does nothing yet.
    #[must_use]
    pub fn new(objects: Arc<dyn Objects>, env: SharedEnv, options: LeadershipOptions) -> Self {
        let leadership = watch::Sender::new(Leadership::Standby { holder: None });
        Self { objects, env, options, leadership }
    }

    /// Follows who leads. Ask [`Leadership::term`] with the time: a late task may not have published the end of a term.
    #[must_use]
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.subscribe()
    }

    /// Stands for election until `stop`, then releases the Lease. Stop it when nothing of the term is under way any more.
    pub fn start(&self, stop: CancellationToken) -> TaskHandle {
        let elector = self.clone();
        self.env.spawn("leader election", Box::pin(async move { elector.run(stop).await }))
    }

    /// Whether the Lease names us, by a read at quorum: the second look that a new leader takes before it sets the fence.
    ///
    /// # Errors
    /// The Lease could not be read.
    pub async fn holds_lease(&self) -> Result<bool, ReadError> {
        let object = self.objects.get(LEASE, &self.options.lease).await?;
        let holder = object.and_then(|object| Lease::read(&object).record.holder);
        Ok(holder.as_ref() == Some(&self.options.identity))
    }

    async fn run(&self, stop: CancellationToken) {
        let env = self.env.as_ref();
        let mut election = Election::new(self.options.clone(), TermId::new(env));
        let mut observation = Observation::Tick;
        loop {
            if stop.is_cancelled() {
                // A Lease that was won a moment ago is released, too.
                if matches!(observation, Observation::Written(_)) {
                    election.step(Instant::now(), observation, TermId::new(env));
                }
                observation = Observation::Release;
            }
            let action = election.step(Instant::now(), observation, TermId::new(env));
            self.publish(&election);
            // A request that outlives the term would keep its end from being noticed.
            let term_end = election.term().map(|term| term.until);
            let limit = Instant::now() + self.request_timeout();
            let limit = term_end.map_or(limit, |end| end.min(limit));
            observation = match action {
                Action::End => return,
                Action::Wait(until) => {
                    self.wait(until, term_end.is_some(), &stop).await;
                    Observation::Tick
                }
                Action::Read => timeout_at(limit, self.read()).await.unwrap_or(Observation::ReadFailed),
                Action::Create(write) => timeout_at(limit, self.create(&write)).await.unwrap_or(Observation::Unknown),
                Action::Write(at, write) => {
                    timeout_at(limit, self.write(at, &write)).await.unwrap_or(Observation::Unknown)
                }
            };
        }
    }

    /// As long as client-go allows one try: half the renew deadline, at least a second.
    fn request_timeout(&self) -> Duration {
        (self.options.renew_deadline / 2).max(Duration::from_secs(1))
    }

    async fn wait(&self, until: Instant, leading: bool, stop: &CancellationToken) {
        // Up to a fifth of the retry period, as client-go has it.
        let jitter =
            self.options.retry_period / 5 * u32::from((self.env.random_u64() >> 48) as u16) / u32::from(u16::MAX);
        let (timer, stopped) =
            (sleep_until(if leading { until } else { until + jitter }).fuse(), stop.cancelled().fuse());
        pin_mut!(timer, stopped);
        select_biased! { () = stopped => {}, () = timer => {} }
    }

    async fn read(&self) -> Observation {
        match self.objects.get(LEASE, &self.options.lease).await {
            Ok(object) => Observation::Read(object.map(|object| Lease::read(&object))),
            Err(error) => {
                warn!(lease = %self.options.lease, %error, "cannot read the Lease");
                Observation::ReadFailed
            }
        }
    }

    async fn create(&self, write: &LeaseWrite) -> Observation {
        let object = write.object(&self.options.lease, self.env.now());
        self.observed(self.objects.create(LEASE, object).await.map(|object| Lease::read(&object)))
    }

    async fn write(&self, at: LeaseAt, write: &LeaseWrite) -> Observation {
        let LeaseAt { uid, resource_version } = at;
        let body = write.patch(self.env.now());
        let patch = MergePatch { resource_version, uid, subresource: None, body };
        let outcome = self.objects.patch(LEASE, &self.options.lease, patch).await;
        self.observed(outcome.map(|object| Lease::read(&object)))
    }

    fn observed<R: std::fmt::Display>(&self, outcome: Outcome<Lease, R>) -> Observation {
        match outcome {
            Outcome::Done(lease) => Observation::Written(lease),
            Outcome::Refused(refusal) => {
                debug!(lease = %self.options.lease, %refusal, "the Lease was not written");
                Observation::Refused
            }
            Outcome::Unknown(why) => {
                warn!(lease = %self.options.lease, why, "no answer to a write of the Lease");
                Observation::Unknown
            }
        }
    }

    fn publish(&self, election: &Election) {
        let leadership = match election.term() {
            Some(term) => Leadership::Leading(term),
            None => Leadership::Standby { holder: election.other_holder().map(str::to_owned) },
        };
        self.leadership.send_if_modified(|known| {
            match (&*known, &leadership) {
                (Leadership::Leading(old), Leadership::Leading(new)) if old.id == new.id => {}
                (_, Leadership::Leading(term)) => info!(term = %term.id, identity = self.options.identity, "leading"),
                (Leadership::Leading(term), Leadership::Standby { .. }) => {
                    warn!(term = %term.id, "not leading any more")
                }
                (Leadership::Standby { holder: old }, Leadership::Standby { holder: new }) if old == new => {}
                (_, Leadership::Standby { holder }) => info!(holder, "standing by"),
            }
            let changed = *known != leadership;
            *known = leadership;
            changed
        });
    }
}
