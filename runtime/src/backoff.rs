//! Exponential back-off with jitter, as a pure function of the number of failures and one random number.

use std::time::Duration;

use crate::env::Env;

/// How long to wait after the n-th failure in a row: between half and all of `first` × 2^(n-1), never above `max`.
///
/// The jitter takes away up to half, so many clients that failed together do not come back together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    /// The longest wait after the first failure.
    pub first: Duration,
    /// The longest wait at all.
    pub max: Duration,
}

impl Backoff {
    /// A schedule.
    #[must_use]
    pub const fn new(first: Duration, max: Duration) -> Self {
        Self { first, max }
    }

    /// The longest wait after so many failures in a row; nothing after none.
    #[must_use]
    pub fn ceiling(&self, failures: u32) -> Duration {
        match failures.checked_sub(1) {
            None => Duration::ZERO,
            Some(doublings) => {
                let factor = 1_u32.checked_shl(doublings).unwrap_or(u32::MAX);
                self.first.saturating_mul(factor).min(self.max)
            }
        }
    }

    /// The wait after so many failures in a row; `random` is uniform over all values.
    #[must_use]
    pub fn delay(&self, failures: u32, random: u64) -> Duration {
        let half = self.ceiling(failures) / 2;
        // The upper 32 bits as a fraction of one: a Duration times 2^32 does not overflow for any wait below 136 years.
        let part = u64::from(u32::try_from(random >> 32).unwrap_or(u32::MAX));
        let nanos = u64::try_from(half.as_nanos()).unwrap_or(u64::MAX);
        let jitter = (u128::from(nanos) * u128::from(part)) >> 32;
        half + Duration::from_nanos(u64::try_from(jitter).unwrap_or(u64::MAX))
    }
}

/// A back-off with its count of failures in a row, for loops that try one thing.
#[derive(Debug, Clone, Copy)]
pub struct Failures {
    schedule: Backoff,
    count: u32,
}

impl Failures {
    /// No failure yet.
    #[must_use]
    pub const fn none(schedule: Backoff) -> Self {
        Self { schedule, count: 0 }
    }

    /// Counts a failure and answers how long to wait.
    #[must_use]
    pub fn next(&mut self, env: &dyn Env) -> Duration {
        self.count = self.count.saturating_add(1);
        self.schedule.delay(self.count, env.random_u64())
    }

    /// Counts from nothing again.
    pub fn reset(&mut self) {
        self.count = 0;
    }

    /// Failures in a row.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCHEDULE: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(30));

    #[test]
    fn the_ceiling_doubles_up_to_the_maximum() {
        let seconds: Vec<f64> = (0..12).map(|n| SCHEDULE.ceiling(n).as_secs_f64()).collect();
        assert_eq!(seconds, [0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0]);
        assert_eq!(SCHEDULE.ceiling(u32::MAX), SCHEDULE.max);
    }

    #[test]
    fn jitter_spans_the_upper_half() {
        assert_eq!(SCHEDULE.delay(3, 0), Duration::from_millis(200));
        assert_eq!(SCHEDULE.delay(3, 1 << 63), Duration::from_millis(300));
        let most = SCHEDULE.delay(3, u64::MAX);
        assert!(most > Duration::from_micros(399_999) && most < Duration::from_millis(400), "{most:?}");
        assert_eq!(SCHEDULE.delay(0, u64::MAX), Duration::ZERO);
    }
}
