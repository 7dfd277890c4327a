//! Which happenings become new events, which are counted in the series of an older one, and which are too many.

use std::{collections::BTreeMap, time::Duration};

use tokio::time::Instant;

use super::{Happening, Regarding};
use crate::object::ObjectKey;

/// A series ends when its happening does not come back for this long (as in client-go's event broadcaster).
const SERIES_END: Duration = Duration::from_secs(6 * 60);

/// The shortest time between two updates of a series.
const SERIES_PAUSE: Duration = Duration::from_secs(10);

/// New events that one object may get at once; after that, one in each [`REFILL`].
const BURST: u32 = 25;

/// See [`BURST`].
const REFILL: Duration = Duration::from_secs(60);

/// Happenings that are remembered. Beyond that the ones that came back longest ago are forgotten.
const MEMORY: usize = 4096;

/// How often a write without answer is tried, and how long apart.
const TRIES: u32 = 4;
const RETRY: Duration = Duration::from_secs(10);

/// An event at the API server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Which.
    pub key: ObjectKey,
    /// Its uid.
    pub uid: String,
    /// Its version.
    pub resource_version: String,
}

/// What to write for a happening.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Work {
    /// A new event.
    Create,
    /// The count of a series.
    Series {
        /// The event.
        stored: Stored,
        /// How often it happened, the first time included.
        count: u32,
    },
}

/// Why a write did not come about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// Trying again is of no use.
    Gone,
    /// No answer.
    Later,
}

/// The memory of what happened. Time is told to it.
#[derive(Debug, Default)]
pub struct Correlator {
    series: BTreeMap<Happening, Series>,
    budgets: BTreeMap<Regarding, Budget>,
}

#[derive(Debug)]
struct Series {
    stored: Option<Stored>,
    count: u32,
    last: Instant,
    /// When the count is to be written, if it is not.
    due: Option<Instant>,
    tries: u32,
}

#[derive(Debug)]
struct Budget {
    left: u32,
    since: Instant,
}

impl Budget {
    fn spend(&mut self, now: Instant) -> bool {
        let earned = now.duration_since(self.since).as_secs() / REFILL.as_secs();
        if earned > 0 {
            self.left = BURST.min(self.left.saturating_add(u32::try_from(earned).unwrap_or(BURST)));
            self.since = now;
        }
        let may = self.left > 0;
        self.left = self.left.saturating_sub(1);
        may
    }
}

impl Correlator {
    /// Counts a happening.
    pub fn happened(&mut self, happening: Happening, now: Instant) {
        self.forget(now);
        if let Some(series) = self.series.get_mut(&happening) {
            series.count = series.count.saturating_add(1);
            series.last = now;
            series.due.get_or_insert(now + SERIES_PAUSE);
            return;
        }
        let full = Budget { left: BURST, since: now };
        if self.budgets.entry(happening.regarding.clone()).or_insert(full).spend(now) {
            self.series.insert(happening, Series { stored: None, count: 1, last: now, due: Some(now), tries: 0 });
        }
    }

    /// When there is something to write.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        self.series.values().filter_map(|series| series.due).min()
    }

    /// What is to be written now, the longest due first. [`Self::written`] must follow.
    pub fn take(&mut self, now: Instant) -> Option<(Happening, Work)> {
        let due = self.series.iter_mut().filter(|(_, series)| series.due.is_some_and(|due| due <= now));
        let (happening, series) = due.min_by_key(|(_, series)| series.due)?;
        series.due = None;
        let work = match &series.stored {
            None => Work::Create,
            Some(stored) => Work::Series { stored: stored.clone(), count: series.count },
        };
        Some((happening.clone(), work))
    }

    /// Tells what became of a write.
    pub fn written(&mut self, happening: &Happening, result: Result<Stored, Failure>, now: Instant) {
        let Some(series) = self.series.get_mut(happening) else { return };
        match result {
            Ok(stored) => {
                let counted = if series.stored.is_some() { series.count } else { 1 };
                series.stored = Some(stored);
                series.tries = 0;
                if series.count > counted {
                    series.due.get_or_insert(now + SERIES_PAUSE);
                }
            }
            Err(Failure::Later) if series.tries + 1 < TRIES => {
                series.tries += 1;
                series.due = Some(now + RETRY);
            }
            Err(_) => {
                self.series.remove(happening);
            }
        }
    }

    /// Forgets series that ended, budgets that are full again, and what is beyond the bound.
    fn forget(&mut self, now: Instant) {
        self.series.retain(|_, series| series.due.is_some() || now < series.last + SERIES_END);
        self.budgets.retain(|_, budget| now < budget.since + REFILL * BURST);
        while self.series.len() >= MEMORY {
            let oldest = self.series.iter().min_by_key(|(_, series)| series.last).map(|(key, _)| key.clone());
            oldest.and_then(|key| self.series.remove(&key));
        }
        while self.budgets.len() >= MEMORY {
            self.budgets.pop_first();
        }
    }
}

#[cfg(test)]
mod tests {
    use basal_runtime::reason::Reason;

    use super::*;
    use crate::{events::EventType, object::resources::CILIUM_NODE};

    fn full(name: &str, note: &str) -> Happening {
        Happening {
            regarding: Regarding { resource: CILIUM_NODE, key: ObjectKey::cluster(name), uid: name.to_owned() },
            event_type: EventType::Warning,
            reason: Reason::new("PoolExhausted"),
            action: Reason::new("GrantBlock"),
            note: note.to_owned(),
            shared: None,
        }
    }

    fn stored(version: &str) -> Stored {
        Stored { key: ObjectKey::namespaced("default", "n.1"), uid: "u".into(), resource_version: version.into() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_repeated_happening_becomes_one_event_with_a_count() {
        let (mut correlator, now) = (Correlator::default(), Instant::now());
        correlator.happened(full("n", "full"), now);
        assert_eq!(correlator.take(now), Some((full("n", "full"), Work::Create)));
        // While the event is written it happens again, twice.
        correlator.happened(full("n", "full"), now);
        correlator.happened(full("n", "full"), now);
        correlator.written(&full("n", "full"), Ok(stored("1")), now);
        assert_eq!(correlator.next_due(), Some(now + SERIES_PAUSE));
        assert_eq!(correlator.take(now), None);
        let later = now + SERIES_PAUSE;
        let work = Work::Series { stored: stored("1"), count: 3 };
        assert_eq!(correlator.take(later), Some((full("n", "full"), work)));
        correlator.written(&full("n", "full"), Ok(stored("2")), later);
        assert_eq!(correlator.next_due(), None);
        // After a quiet time it is a new event.
        let much_later = later + SERIES_END;
        correlator.happened(full("n", "full"), much_later);
        assert_eq!(correlator.take(much_later), Some((full("n", "full"), Work::Create)));
    }

    #[tokio::test(start_paused = true)]
    async fn an_expired_event_is_written_anew_the_next_time() {
        let (mut correlator, now) = (Correlator::default(), Instant::now());
        for result in [Ok(stored("1")), Err(Failure::Gone)] {
            correlator.happened(full("n", "full"), now);
            correlator.take(now + SERIES_PAUSE).unwrap();
            correlator.written(&full("n", "full"), result, now);
        }
        correlator.happened(full("n", "full"), now);
        assert_eq!(correlator.take(now), Some((full("n", "full"), Work::Create)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_without_answer_is_tried_a_few_times() {
        let (mut correlator, mut now) = (Correlator::default(), Instant::now());
        correlator.happened(full("n", "full"), now);
        let mut tries = 0;
        while let Some(due) = correlator.next_due() {
            now = now.max(due);
            let (happening, work) = correlator.take(now).unwrap();
            assert_eq!(work, Work::Create);
            correlator.written(&happening, Err(Failure::Later), now);
            tries += 1;
        }
        assert_eq!(tries, TRIES);
    }

    #[tokio::test(start_paused = true)]
    async fn one_object_cannot_flood_the_server() {
        let (mut correlator, now) = (Correlator::default(), Instant::now());
        let writes = |correlator: &mut Correlator, now| std::iter::from_fn(|| correlator.take(now)).count();
        for number in 0..100 {
            correlator.happened(full("n", &number.to_string()), now);
        }
        correlator.happened(full("other", "full"), now);
        assert_eq!(writes(&mut correlator, now), BURST as usize + 1);
        for number in 100..200 {
            correlator.happened(full("n", &number.to_string()), now + REFILL * 2);
        }
        assert_eq!(writes(&mut correlator, now + REFILL * 2), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn the_memory_is_bounded() {
        let (mut correlator, now) = (Correlator::default(), Instant::now());
        for number in 0..2 * MEMORY {
            correlator.happened(full(&number.to_string(), "full"), now);
        }
        assert!(correlator.series.len() <= MEMORY && correlator.budgets.len() <= MEMORY);
    }
}
