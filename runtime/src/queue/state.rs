//! The queue as a value.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use tokio::time::Instant;

use crate::backoff::Backoff;

/// Keyed, deduplicating, delaying, bounded.
///
/// A key is in it at most once: it waits for its time, or it is taken. A key that is added while it is taken is looked
/// at again afterwards, so no change is lost; it is never taken twice at once. Keys that are due are handed out in the
/// order of their times, and at one time in the order in which they were added. Behind them come the keys that are only
/// to be looked at once more, because a process begins or a pass is due: thousands of those hold no change up.
#[derive(Debug, Clone)]
pub struct QueueState<K> {
    capacity: usize,
    backoff: Backoff,
    keys: BTreeMap<K, Entry>,
    /// The waiting keys by time and turn.
    waiting: BTreeSet<(Instant, u64, K)>,
    /// The keys behind all that is due, by turn.
    behind: BTreeSet<(u64, K)>,
    turns: u64,
}

#[derive(Debug, Clone)]
struct Entry {
    place: Place,
    /// Failures in a row.
    failures: u32,
}

#[derive(Debug, Clone, Copy)]
enum Place {
    Waiting { due: Instant, turn: u64 },
    Behind { turn: u64 },
    Taken { added_again: Option<Instant> },
}

/// The queue holds as many different keys as it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the work queue is full; what was not added must be added again later")]
pub struct Full;

/// What shall become of a key that was worked on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Nothing, until it is added again.
    Settled,
    /// It went well; look again after this time.
    After(Duration),
    /// It was not worked on; look again after this time, with its failures kept.
    Postponed(Duration),
    /// It failed; look again after the back-off.
    Failed,
}

impl<K: Ord + Clone> QueueState<K> {
    /// An empty queue for at most `capacity` different keys.
    #[must_use]
    pub fn new(capacity: usize, backoff: Backoff) -> Self {
        Self { capacity, backoff, keys: BTreeMap::new(), waiting: BTreeSet::new(), behind: BTreeSet::new(), turns: 0 }
    }

    /// Adds a key that is due at a time, which is now for what has changed. Of two times for one key the earlier holds.
    ///
    /// # Errors
    /// [`Full`]: the key is new and there is no room for it.
    pub fn add(&mut self, key: K, due: Instant) -> Result<(), Full> {
        let full = self.keys.len() >= self.capacity;
        match self.keys.get_mut(&key).map(|entry| &mut entry.place) {
            Some(Place::Taken { added_again }) => {
                *added_again = Some(added_again.map_or(due, |earlier| earlier.min(due)));
            }
            Some(Place::Waiting { due: known, .. }) if *known <= due => {}
            Some(Place::Waiting { due: known, turn }) => {
                let old = (*known, *turn, key.clone());
                self.waiting.remove(&old);
                self.wait(key, due);
            }
            Some(Place::Behind { turn }) => {
                let old = (*turn, key.clone());
                self.behind.remove(&old);
                self.wait(key, due);
            }
            None if full => return Err(Full),
            None => self.wait(key, due),
        }
        Ok(())
    }

    /// Adds a key that is due now, behind all others that are.
    ///
    /// # Errors
    /// [`Full`]: the key is new and there is no room for it.
    pub fn add_behind(&mut self, key: K, now: Instant) -> Result<(), Full> {
        let full = self.keys.len() >= self.capacity;
        match self.keys.get_mut(&key).map(|entry| &mut entry.place) {
            Some(Place::Taken { .. }) => return self.add(key, now),
            Some(Place::Behind { .. }) => return Ok(()),
            Some(Place::Waiting { due, .. }) if *due <= now => return Ok(()),
            Some(Place::Waiting { due, turn }) => {
                let old = (*due, *turn, key.clone());
                self.waiting.remove(&old);
            }
            None if full => return Err(Full),
            None => {}
        }
        let turn = self.turn();
        self.behind.insert((turn, key.clone()));
        self.put(key, Place::Behind { turn });
        Ok(())
    }

    /// Takes up to `limit` keys that are due.
    pub fn take(&mut self, now: Instant, limit: usize) -> Vec<K> {
        let mut taken = Vec::new();
        while taken.len() < limit {
            let due = self.waiting.first().is_some_and(|(due, ..)| *due <= now);
            let due = if due { self.waiting.pop_first().map(|(_, _, key)| key) } else { None };
            let Some(key) = due.or_else(|| self.behind.pop_first().map(|(_, key)| key)) else { break };
            self.put(key.clone(), Place::Taken { added_again: None });
            taken.push(key);
        }
        taken
    }

    /// When the next key is due that waits for its time.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        self.waiting.first().map(|(due, ..)| *due)
    }

    /// Gives a taken key back; `random` jitters the back-off. A key that was not taken is left alone.
    pub fn done(&mut self, key: &K, next: Next, now: Instant, random: u64) {
        let Some(entry) = self.keys.get_mut(key) else { return };
        let Place::Taken { added_again } = entry.place else { return };
        let again = match next {
            Next::Settled => {
                entry.failures = 0;
                None
            }
            Next::After(pause) => {
                entry.failures = 0;
                Some(now + pause)
            }
            Next::Postponed(pause) => Some(now + pause),
            Next::Failed => {
                entry.failures = entry.failures.saturating_add(1);
                Some(now + self.backoff.delay(entry.failures, random))
            }
        };
        match again.into_iter().chain(added_again).min() {
            Some(due) => self.wait(key.clone(), due),
            None => {
                self.keys.remove(key);
            }
        }
    }

    /// Failures in a row of a key that is in the queue.
    #[must_use]
    pub fn failures(&self, key: &K) -> u32 {
        self.keys.get(key).map_or(0, |entry| entry.failures)
    }

    /// Keys that wait or are taken.
    #[must_use]
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// True when no key waits or is taken.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    fn wait(&mut self, key: K, due: Instant) {
        let turn = self.turn();
        self.waiting.insert((due, turn, key.clone()));
        self.put(key, Place::Waiting { due, turn });
    }

    fn turn(&mut self) -> u64 {
        self.turns += 1;
        self.turns
    }

    fn put(&mut self, key: K, place: Place) {
        self.keys.entry(key).and_modify(|entry| entry.place = place).or_insert(Entry { place, failures: 0 });
    }
}

#[cfg(test)]
mod tests {
    use proptest::{prelude::*, sample::select};

    use super::*;

    const BACKOFF: Backoff = Backoff::new(Duration::from_secs(2), Duration::from_secs(8));

    fn at(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    #[tokio::test(start_paused = true)]
    async fn keys_come_by_time_then_by_turn_and_once() {
        let start = Instant::now();
        let mut queue = QueueState::new(10, BACKOFF);
        for (key, due) in [("late", 3), ("b", 1), ("a", 1), ("b", 2), ("late", 2)] {
            queue.add(key, at(start, due)).unwrap();
        }
        assert_eq!(queue.take(start, 9), [""; 0]);
        assert_eq!(queue.take(at(start, 2), 2), ["b", "a"]);
        assert_eq!(queue.take(at(start, 2), 9), ["late"]);
        assert_eq!(queue.next_due(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_behind_waits_for_all_that_is_due_and_a_change_brings_it_forward() {
        let start = Instant::now();
        let mut queue = QueueState::new(4, BACKOFF);
        queue.add("later", at(start, 9)).unwrap();
        for key in ["a", "b", "later", "b"] {
            queue.add_behind(key, start).unwrap();
        }
        assert_eq!(queue.next_due(), None, "none of them waits for a time");
        queue.add("new", start).unwrap();
        assert_eq!(queue.add_behind("no room", start), Err(Full));
        queue.add("b", start).unwrap();
        queue.add_behind("new", start).unwrap();
        assert_eq!(queue.take(start, 3), ["new", "b", "a"]);
        queue.add_behind("a", start).unwrap();
        queue.done(&"a", Next::Settled, start, 0);
        assert_eq!(queue.take(start, 9), ["a", "later"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_added_while_taken_is_looked_at_again_and_never_taken_twice() {
        let start = Instant::now();
        let mut queue = QueueState::new(10, BACKOFF);
        queue.add("a", start).unwrap();
        assert_eq!(queue.take(start, 9), ["a"]);
        queue.add("a", start).unwrap();
        assert_eq!(queue.take(start, 9), [""; 0]);
        queue.done(&"a", Next::Settled, start, 0);
        assert_eq!(queue.take(start, 9), ["a"]);
        queue.done(&"a", Next::Settled, start, 0);
        assert!(queue.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn failures_back_off_and_a_success_forgets_them() {
        let start = Instant::now();
        let mut queue = QueueState::new(10, BACKOFF);
        queue.add("a", start).unwrap();
        let mut now = start;
        let mut waits = Vec::new();
        for _ in 0..4 {
            assert_eq!(queue.take(now, 9), ["a"]);
            queue.done(&"a", Next::Failed, now, 0);
            let due = queue.next_due().unwrap();
            waits.push((due - now).as_secs());
            now = due;
        }
        assert_eq!(waits, [1, 2, 4, 4]);
        assert_eq!(queue.take(now, 9), ["a"]);
        queue.done(&"a", Next::Postponed(Duration::ZERO), now, 0);
        assert_eq!(queue.failures(&"a"), 4);
        assert_eq!(queue.take(now, 9), ["a"]);
        queue.done(&"a", Next::After(Duration::from_secs(9)), now, 0);
        assert_eq!((queue.failures(&"a"), queue.next_due()), (0, Some(at(now, 9))));
    }

    /// What a caller may do; keys are few, so that they meet.
    #[derive(Debug, Clone)]
    enum Step {
        Add(u8, u64),
        AddBehind(u8),
        Take(usize),
        Done(u8, Next),
        Pass(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let ends = select(vec![
            Next::Settled,
            Next::Failed,
            Next::After(Duration::from_secs(3)),
            Next::Postponed(Duration::ZERO),
        ]);
        prop_oneof![
            (0..6_u8, 0..10_u64).prop_map(|(key, delay)| Step::Add(key, delay)),
            (0..6_u8).prop_map(Step::AddBehind),
            (1..4_usize).prop_map(Step::Take),
            (0..6_u8, ends).prop_map(|(key, next)| Step::Done(key, next)),
            (0..5_u64).prop_map(Step::Pass),
        ]
    }

    proptest! {
        /// Against a list that is searched by hand: what is due is handed out, once, earliest first, and bounded.
        #[test]
        fn behaves_like_a_naive_list(steps in prop::collection::vec(step(), 0..120)) {
            const CAPACITY: usize = 4;
            let start = Instant::now();
            let mut now = start;
            let mut queue = QueueState::new(CAPACITY, BACKOFF);
            // (key, due or behind all that is, taken, added again)
            let mut list: Vec<(u8, Option<Instant>, bool, Option<Instant>)> = Vec::new();
            let is_due = |due: Option<Instant>, now| due.is_none_or(|due| due <= now);
            for step in steps {
                match step {
                    Step::Pass(seconds) => now += Duration::from_secs(seconds),
                    Step::Add(key, delay) => {
                        let due = now + Duration::from_secs(delay);
                        let answer = queue.add(key, due);
                        let len = list.len();
                        match list.iter_mut().find(|known| known.0 == key) {
                            Some(known) if known.2 => known.3 = Some(known.3.map_or(due, |d| d.min(due))),
                            Some(known) => known.1 = Some(known.1.map_or(due, |d| d.min(due))),
                            None if len < CAPACITY => list.push((key, Some(due), false, None)),
                            None => prop_assert_eq!(answer, Err(Full)),
                        }
                    }
                    Step::AddBehind(key) => {
                        let answer = queue.add_behind(key, now);
                        let len = list.len();
                        match list.iter_mut().find(|known| known.0 == key) {
                            Some(known) if known.2 => known.3 = Some(known.3.map_or(now, |d| d.min(now))),
                            Some(known) if is_due(known.1, now) => {}
                            Some(known) => known.1 = None,
                            None if len < CAPACITY => list.push((key, None, false, None)),
                            None => prop_assert_eq!(answer, Err(Full)),
                        }
                    }
                    Step::Take(limit) => {
                        let keys = queue.take(now, limit);
                        let mut due: Vec<_> = list.iter_mut().filter(|known| !known.2 && is_due(known.1, now)).collect();
                        prop_assert_eq!(keys.len(), due.len().min(limit));
                        due.sort_by_key(|known| (known.1.is_none(), known.1));
                        let latest = keys.len().checked_sub(1).map(|last| (due[last].1.is_none(), due[last].1));
                        for known in due {
                            if keys.contains(&known.0) {
                                prop_assert!(Some((known.1.is_none(), known.1)) <= latest);
                                known.2 = true;
                            }
                        }
                    }
                    Step::Done(key, next) => {
                        let failures = queue.failures(&key);
                        queue.done(&key, next, now, 0);
                        let Some(index) = list.iter().position(|known| known.0 == key && known.2) else { continue };
                        let own = match next {
                            Next::Settled => None,
                            Next::After(d) | Next::Postponed(d) => Some(now + d),
                            Next::Failed => Some(now + BACKOFF.delay(failures + 1, 0)),
                        };
                        let known = list.swap_remove(index);
                        if let Some(due) = own.into_iter().chain(known.3).min() {
                            list.push((key, Some(due), false, None));
                        }
                    }
                }
                prop_assert_eq!(queue.len(), list.len());
                prop_assert!(queue.len() <= CAPACITY);
                let next = list.iter().filter(|known| !known.2).filter_map(|known| known.1).min();
                prop_assert_eq!(queue.next_due(), next);
            }
        }
    }
}
