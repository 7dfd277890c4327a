//! Bounded waits.

use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::bail;

use crate::say::say;

/// The time that passed since a start.
#[derive(Debug, Clone, Copy)]
pub struct Stopwatch(Instant);

impl Stopwatch {
    /// Starts now.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "the harness runs real processes in real time")]
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// Since [`Stopwatch::start`].
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }
}

/// The wall clock, since 1970.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "the harness runs real processes in real time")]
pub fn unix_time() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// What a check found.
#[derive(Debug)]
pub enum Check<T> {
    /// It is there.
    Done(T),
    /// Not yet; what is missing.
    NotYet(String),
}

/// Calls `check` every `pause` until it is done; a wait that lasts says what it waits for. Fails at the deadline with
/// `what` and the last thing that was missing, and at once when `check` fails: an error means that waiting longer
/// cannot help.
pub fn until<T>(
    what: &str,
    limit: Duration,
    pause: Duration,
    mut check: impl FnMut() -> anyhow::Result<Check<T>>,
) -> anyhow::Result<T> {
    let watch = Stopwatch::start();
    let mut next_line = QUIET;
    loop {
        let missing = match check()? {
            Check::Done(value) => return Ok(value),
            Check::NotYet(missing) => missing,
        };
        let waited = watch.elapsed();
        if waited >= limit {
            bail!("waited {} s for {what}, in vain: {missing}", limit.as_secs());
        }
        if waited >= next_line {
            say(format!("  waiting for {what} ({} of {} s): {missing}", waited.as_secs(), limit.as_secs()));
            next_line = waited + QUIET;
        }
        thread::sleep(pause);
    }
}

/// A wait says something after this time, and again each time it passes.
const QUIET: Duration = Duration::from_secs(10);

/// [`until`] for a command that fails as long as it is too early.
pub fn until_ok<T>(what: &str, limit: Duration, mut check: impl FnMut() -> anyhow::Result<T>) -> anyhow::Result<T> {
    until(what, limit, Duration::from_millis(200), || {
        Ok(check().map_or_else(|error| Check::NotYet(format!("{error:#}")), Check::Done))
    })
}
