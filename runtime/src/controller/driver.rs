//! The one driver of every control loop.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    future::pending,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::{FutureExt, StreamExt, future::BoxFuture, pin_mut, select_biased, stream::FuturesUnordered};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{Controller, ControllerMetrics, PerKey, Revisit};
use crate::{
    failure::{Failure, Retry, chain},
    queue::{Next, Queue},
    sync::lock,
};

/// How long a key waits between two looks at whether the caches have caught up. The change that it waits for brings
/// it back sooner.
const CATCH_UP_PAUSE: Duration = Duration::from_secs(1);

/// How much the driver does at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DriverOptions {
    /// At most so many keys in a batch.
    pub batch_size: usize,
    /// At most so many batches at once. One where batches share a record that each replaces as a whole: keys that
    /// arrive while a batch is written then make up the next one.
    pub batches: usize,
    /// At most so many reports at once, within a batch.
    pub reports: usize,
    /// How often to look at every key.
    pub full_pass: Option<Duration>,
}

/// The driver ended because a step said that the term is over.
#[derive(Debug, thiserror::Error)]
#[error("the term of {controller} is over, seen at {key}: {message}")]
pub struct TermEnded {
    /// The control loop.
    pub controller: &'static str,
    /// The key at which it showed.
    pub key: String,
    /// What the step said.
    pub message: String,
}

/// Runs a [`Controller`].
pub struct Driver<C: Controller> {
    controller: Arc<C>,
    core: Arc<Mutex<C::Core>>,
    queue: Queue<C::Key>,
    options: DriverOptions,
    metrics: ControllerMetrics,
}

/// What a batch came to.
type BatchEnd = Result<(), TermEnded>;

enum Event<K> {
    Ended(BatchEnd),
    Stop,
    FullPass,
    Keys(Vec<K>),
}

impl<C: Controller> Driver<C> {
    /// Makes a driver that does nothing until it is run. `core` is shared with whoever shows it in metrics.
    #[must_use]
    pub fn new(
        controller: Arc<C>,
        core: Arc<Mutex<C::Core>>,
        queue: Queue<C::Key>,
        options: DriverOptions,
        metrics: ControllerMetrics,
    ) -> Self {
        Self { controller, core, queue, options, metrics }
    }

    /// Works until `stop`; what is under way then is finished first.
    ///
    /// # Errors
    /// A step answered [`Retry::EndTerm`]. What was under way is finished, nothing new was begun.
    pub async fn run(&self, stop: CancellationToken) -> Result<(), TermEnded> {
        let name = self.controller.name();
        let mut running: FuturesUnordered<BoxFuture<'_, BatchEnd>> = FuturesUnordered::new();
        let mut backlog: VecDeque<C::Key> = VecDeque::new();
        let mut next_pass = self.options.full_pass.map(|period| Instant::now() + period);
        let mut ended: Option<TermEnded> = None;
        loop {
            let closing = ended.is_some() || stop.is_cancelled();
            if closing && running.is_empty() {
                return ended.map_or(Ok(()), Err);
            }
            self.add_from(&mut backlog);
            self.metrics.queue(name, self.queue.len());
            let room = !closing && running.len() < self.options.batches.max(1);
            match self.next_event(&mut running, &stop, closing, room, next_pass).await {
                Event::Ended(Ok(())) | Event::Stop => {}
                Event::Ended(Err(error)) => {
                    warn!(controller = name, %error, "the term ended");
                    ended.get_or_insert(error);
                }
                Event::FullPass => {
                    backlog = self.controller.keys().into();
                    debug!(controller = name, keys = backlog.len(), "full pass");
                    next_pass = self.options.full_pass.map(|period| Instant::now() + period);
                }
                Event::Keys(keys) => running.push(self.batch(keys).boxed()),
            }
        }
    }

    async fn next_event(
        &self,
        running: &mut FuturesUnordered<BoxFuture<'_, BatchEnd>>,
        stop: &CancellationToken,
        closing: bool,
        room: bool,
        next_pass: Option<Instant>,
    ) -> Event<C::Key> {
        let stopped = async { if closing { pending().await } else { stop.cancelled().await } }.fuse();
        let pass = async { if let Some(at) = next_pass { sleep_until(at).await } else { pending().await } }.fuse();
        let keys =
            async { if room { self.queue.take(self.options.batch_size.max(1)).await } else { pending().await } }.fuse();
        pin_mut!(stopped, pass, keys);
        select_biased! {
            end = running.select_next_some() => Event::Ended(end),
            () = stopped => Event::Stop,
            () = pass => Event::FullPass,
            keys = keys => Event::Keys(keys),
        }
    }

    /// Adds what there is room for; the rest follows when keys leave the queue.
    fn add_from(&self, backlog: &mut VecDeque<C::Key>) {
        while let Some(key) = backlog.pop_front() {
            if self.queue.try_add_behind(key.clone()).is_err() {
                backlog.push_front(key);
                return;
            }
        }
    }

    async fn batch(&self, keys: Vec<C::Key>) -> BatchEnd {
        let now = Instant::now();
        let (keys, behind): (BTreeSet<_>, BTreeSet<_>) =
            keys.into_iter().partition(|key| self.controller.caught_up(key, now));
        for key in &behind {
            self.queue.done(key, Next::Postponed(CATCH_UP_PAUSE));
        }
        if keys.is_empty() {
            return Ok(());
        }
        let results = self.work(&keys).await;
        let mut end = Ok(());
        for key in keys.iter().filter(|key| !results.contains_key(*key)) {
            warn!(controller = self.controller.name(), %key, "a step gave no result for the key");
            self.queue.done(key, Next::Failed);
        }
        let mut reports = futures::stream::iter(results)
            .map(|(key, result)| self.report(key, result))
            .buffer_unordered(self.options.reports.max(1));
        while let Some((key, result, report)) = reports.next().await {
            if let Err(error) = self.conclude(&key, &result, report) {
                end = Err(error);
            }
        }
        end
    }

    async fn report(
        &self,
        key: C::Key,
        result: Result<C::Applied, C::Error>,
    ) -> (C::Key, Result<C::Applied, C::Error>, Result<Revisit, C::Error>) {
        let report = self.controller.report(&key, &result).await;
        (key, result, report)
    }

    /// All steps up to the report.
    async fn work(&self, keys: &BTreeSet<C::Key>) -> PerKey<C, C::Applied> {
        let name = self.controller.name();
        let begun = Instant::now();
        let observed = self.controller.observe(keys).await;
        self.metrics.took(name, "observe", begun);

        let begun = Instant::now();
        let mut failed: PerKey<C, C::Applied> = BTreeMap::new();
        let plan = {
            let mut core = lock(&self.core);
            let mut valid = BTreeMap::new();
            for (key, observed) in observed {
                match observed.and_then(|observed| C::validate(&core, &key, observed)) {
                    Ok(observation) => {
                        valid.insert(key, observation);
                    }
                    Err(error) => {
                        failed.insert(key, Err(error));
                    }
                }
            }
            (!valid.is_empty()).then(|| C::plan(&mut core, valid, begun))
        };
        self.metrics.took(name, "plan", begun);

        let Some(plan) = plan else { return failed };
        let begun = Instant::now();
        let mut results = self.controller.apply(plan).await;
        C::settle(&mut lock(&self.core), &results, Instant::now());
        self.metrics.took(name, "apply", begun);
        results.extend(failed);
        results
    }

    /// Gives the key back to the queue as result and report demand.
    fn conclude(
        &self,
        key: &C::Key,
        result: &Result<C::Applied, C::Error>,
        report: Result<Revisit, C::Error>,
    ) -> BatchEnd {
        let name = self.controller.name();
        let next = match (result, &report) {
            (Ok(_), Ok(Revisit::OnChange)) => Next::Settled,
            (Ok(_), Ok(Revisit::After(pause))) => Next::After(*pause),
            (Err(error), Ok(_)) | (Ok(_), Err(error)) => next_after(error),
            // A report that is missing must be tried again, even where the result itself waits for a change.
            (Err(error), Err(unreported)) => match (next_after(error), next_after(unreported)) {
                (Next::Settled, next) | (next, _) => next,
            },
        };
        let errors: Vec<&C::Error> = result.as_ref().err().into_iter().chain(report.as_ref().err()).collect();
        let outcome = errors.first().map_or("Done", |error| error.reason().as_str());
        self.metrics.count(name, outcome);
        for error in &errors {
            info!(controller = name, %key, reason = %error.reason(), error = chain(*error), "not done");
        }
        self.queue.done(key, next);
        match errors.into_iter().find(|error| error.retry() == Retry::EndTerm) {
            Some(error) => Err(TermEnded { controller: name, key: key.to_string(), message: chain(error) }),
            None => Ok(()),
        }
    }
}

fn next_after(error: &impl Failure) -> Next {
    match error.retry() {
        Retry::OnChange => Next::Settled,
        // A key whose term ended is tried again in the next one.
        Retry::Backoff | Retry::EndTerm => Next::Failed,
        Retry::After(pause) => Next::Postponed(pause),
    }
}
