//! Bounded concurrency towards the API server, which gives way when the server asks for it or becomes slow, and comes
//! back by itself. There is no fixed rate: a server that keeps up gets as much as it can take.

use std::{
    future::Future,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use basal_runtime::{outcome::Outcome, sync::lock};
use futures::{pin_mut, stream::BoxStream};
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

use crate::{
    object::{Object, ObjectKey, Resource},
    port::{MergePatch, ObjectEvent, Objects, Page, Preconditions, ReadError, Refusal, Scope, Start},
};

/// The pause after a 429 that names none.
const DEFAULT_PAUSE: Duration = Duration::from_secs(1);

/// How the concurrency moves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PaceOptions {
    /// At most so many requests at once.
    pub most: u32,
    /// An answer that takes longer is a sign of overload.
    pub slow: Duration,
}

impl Default for PaceOptions {
    /// 64 requests at once; slow is a second, which is what Kubernetes promises for 99 % of its requests (SLO "API call
    /// latency").
    fn default() -> Self {
        Self { most: 64, slow: Duration::from_secs(1) }
    }
}

/// What an answer says of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answered {
    /// It came.
    Fine,
    /// The server asked to slow down, and said for how long, or not.
    TooMany(Option<Duration>),
}

/// How many requests may be under way: up to one more for each round of quick answers, half as many after a 429, a tenth
/// fewer after a slow answer. What was sent before a cut does not cut again.
#[derive(Debug, Clone)]
pub struct Pace {
    options: PaceOptions,
    limit: f64,
    under_way: u32,
    cut_at: Option<Instant>,
    paused_until: Option<Instant>,
}

impl Pace {
    /// Begins with a quarter of the bound.
    #[must_use]
    pub fn new(options: PaceOptions) -> Self {
        let limit = (f64::from(options.most) / 4.0).max(1.0);
        Self { options, limit, under_way: 0, cut_at: None, paused_until: None }
    }

    /// Begins a request, when one may begin.
    ///
    /// # Errors
    /// None may. The time is when to ask again; without it an answer comes first.
    pub fn begin(&mut self, now: Instant) -> Result<(), Option<Instant>> {
        match self.paused_until {
            Some(until) if now < until => Err(Some(until)),
            _ if f64::from(self.under_way) < self.limit.floor() => {
                self.under_way += 1;
                Ok(())
            }
            _ => Err(None),
        }
    }

    /// Ends a request that was begun at `begun`; `None` when it was given up.
    pub fn end(&mut self, begun: Instant, now: Instant, answered: Option<Answered>) {
        let in_use = 2.0 * f64::from(self.under_way) >= self.limit;
        self.under_way = self.under_way.saturating_sub(1);
        match answered {
            Some(Answered::TooMany(pause)) => {
                let until = now + pause.unwrap_or(DEFAULT_PAUSE);
                self.paused_until = Some(self.paused_until.map_or(until, |known| known.max(until)));
                self.cut(begun, now, 0.5);
            }
            Some(Answered::Fine) if now - begun > self.options.slow => self.cut(begun, now, 0.9),
            // A limit that is far away says nothing about the server.
            Some(Answered::Fine) if in_use => {
                self.limit = (self.limit + 1.0 / self.limit).min(f64::from(self.options.most));
            }
            Some(Answered::Fine) | None => {}
        }
    }

    /// The number of requests that may be under way at once.
    #[must_use]
    pub fn limit(&self) -> u32 {
        // Between 1 and `most`, so the conversion is exact.
        self.limit as u32
    }

    fn cut(&mut self, begun: Instant, now: Instant, factor: f64) {
        // A request from before the last cut was sent at the old limit and tells nothing new.
        if self.cut_at.is_none_or(|cut| begun > cut) {
            self.limit = (self.limit * factor).max(1.0);
            self.cut_at = Some(now);
        }
    }
}

/// An [`Objects`] whose requests keep a [`Pace`]; watches are not counted. Clones share it. The election must not go
/// through it: a renewal must not wait.
#[derive(Clone)]
pub struct Paced {
    objects: Arc<dyn Objects>,
    gate: Arc<Gate>,
}

/// A [`Pace`] that requests wait for.
struct Gate {
    pace: Mutex<Pace>,
    ended: Notify,
}

/// A request under way; dropped unanswered, it was given up.
struct Turn<'a> {
    gate: &'a Gate,
    begun: Instant,
    answered: Option<Answered>,
}

impl Gate {
    fn new(options: PaceOptions) -> Self {
        Self { pace: Mutex::new(Pace::new(options)), ended: Notify::new() }
    }

    /// Waits until a request may begin.
    async fn turn(&self) -> Turn<'_> {
        loop {
            let ended = self.ended.notified();
            pin_mut!(ended);
            // Registered before the question, so that an answer in between is not missed.
            ended.as_mut().enable();
            let begun = Instant::now();
            let answer = lock(&self.pace).begin(begun);
            match answer {
                Ok(()) => return Turn { gate: self, begun, answered: None },
                Err(Some(at)) => sleep_until(at).await,
                Err(None) => ended.await,
            }
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        lock(&self.gate.pace).end(self.begun, Instant::now(), self.answered);
        // All of them: the one that would be chosen may be given up before it begins.
        self.gate.ended.notify_waiters();
    }
}

impl Paced {
    /// Wraps `objects`.
    #[must_use]
    pub fn new(objects: Arc<dyn Objects>, options: PaceOptions) -> Self {
        Self { objects, gate: Arc::new(Gate::new(options)) }
    }

    /// The number of requests that may be under way at once, for a metric.
    #[must_use]
    pub fn limit(&self) -> u32 {
        lock(&self.gate.pace).limit()
    }

    async fn read<T>(&self, request: impl Future<Output = Result<T, ReadError>>) -> Result<T, ReadError> {
        let mut turn = self.gate.turn().await;
        let result = request.await;
        turn.answered = match &result {
            Err(ReadError::TooManyRequests { retry_after }) => Some(Answered::TooMany(*retry_after)),
            Err(ReadError::Unavailable(_)) => None,
            Ok(_) | Err(ReadError::Forbidden(_) | ReadError::UnknownKind(_)) => Some(Answered::Fine),
        };
        result
    }

    async fn write<T>(&self, request: impl Future<Output = Outcome<T, Refusal>>) -> Outcome<T, Refusal> {
        let mut turn = self.gate.turn().await;
        let outcome = request.await;
        turn.answered = match &outcome {
            Outcome::Refused(Refusal::TooManyRequests { retry_after }) => Some(Answered::TooMany(*retry_after)),
            Outcome::Refused(Refusal::Unavailable(_)) | Outcome::Unknown(_) => None,
            Outcome::Done(_) | Outcome::Refused(_) => Some(Answered::Fine),
        };
        outcome
    }
}

#[async_trait]
impl Objects for Paced {
    async fn get(&self, resource: Resource, key: &ObjectKey) -> Result<Option<Object>, ReadError> {
        self.read(self.objects.get(resource, key)).await
    }

    async fn list_page(&self, resource: Resource, scope: &Scope, start: &Start) -> Result<Page, ReadError> {
        self.read(self.objects.list_page(resource, scope, start)).await
    }

    fn watch(&self, resource: Resource, scope: &Scope) -> BoxStream<'static, Result<ObjectEvent, ReadError>> {
        self.objects.watch(resource, scope)
    }

    async fn create(&self, resource: Resource, object: Object) -> Outcome<Object, Refusal> {
        self.write(self.objects.create(resource, object)).await
    }

    async fn patch(&self, resource: Resource, key: &ObjectKey, patch: MergePatch) -> Outcome<Object, Refusal> {
        self.write(self.objects.patch(resource, key, patch)).await
    }

    async fn delete(&self, resource: Resource, key: &ObjectKey, only_if: Preconditions) -> Outcome<(), Refusal> {
        self.write(self.objects.delete(resource, key, only_if)).await
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    const OPTIONS: PaceOptions = PaceOptions { most: 16, slow: Duration::from_secs(1) };

    /// Begins as many requests as may begin.
    fn fill(pace: &mut Pace, now: Instant) -> usize {
        std::iter::from_fn(|| pace.begin(now).ok()).count()
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_keeps_up_gets_more_step_by_step() {
        let (mut pace, now) = (Pace::new(OPTIONS), Instant::now());
        let mut limits = Vec::new();
        for _round in 0..40 {
            let begun = fill(&mut pace, now);
            limits.push(begun);
            for _request in 0..begun {
                pace.end(now, now + Duration::from_millis(5), Some(Answered::Fine));
            }
        }
        assert_eq!(limits[0], 4);
        assert!(limits.windows(2).all(|pair| pair[1] >= pair[0] && pair[1] <= pair[0] + 1), "{limits:?}");
        assert_eq!(limits[39], 16);
    }

    #[tokio::test(start_paused = true)]
    async fn a_429_halves_once_and_pauses_as_long_as_it_says() {
        let (mut pace, now) = (Pace::new(PaceOptions { most: 64, ..OPTIONS }), Instant::now());
        assert_eq!(fill(&mut pace, now), 16);
        for _request in 0..16 {
            pace.end(now, now, Some(Answered::TooMany(Some(Duration::from_secs(3)))));
        }
        // All sixteen were sent at the old limit, so they cut it once.
        assert_eq!(pace.begin(now), Err(Some(now + Duration::from_secs(3))));
        assert_eq!(fill(&mut pace, now + Duration::from_secs(3)), 8);
    }

    #[tokio::test(start_paused = true)]
    async fn slow_answers_shrink_the_limit_down_to_one_request() {
        let (mut pace, mut now) = (Pace::new(OPTIONS), Instant::now());
        for _request in 0..100 {
            pace.begin(now).unwrap();
            let begun = now;
            now += Duration::from_secs(2);
            pace.end(begun, now, Some(Answered::Fine));
        }
        assert_eq!(pace.limit(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_was_given_up_frees_its_place_and_says_nothing() {
        let (mut pace, now) = (Pace::new(OPTIONS), Instant::now());
        let begun = fill(&mut pace, now);
        pace.end(now, now + Duration::from_secs(60), None);
        assert_eq!((fill(&mut pace, now), pace.limit() as usize), (1, begun));
    }

    #[tokio::test(start_paused = true)]
    async fn a_waiting_request_begins_when_another_ends_even_if_the_first_in_line_was_given_up() {
        let gate = Gate::new(PaceOptions { most: 1, ..OPTIONS });
        let first = gate.turn().await;
        let mut given_up = Box::pin(gate.turn());
        let mut waiting = Box::pin(gate.turn());
        assert!(given_up.as_mut().now_or_never().is_none());
        assert!(waiting.as_mut().now_or_never().is_none());
        drop(first);
        drop(given_up);
        assert!(waiting.now_or_never().is_some());
    }
}
