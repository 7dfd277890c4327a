//! What goes wrong on the watches of one process.

use std::{sync::Mutex, time::Duration};

use basal_runtime::sync::lock;
use tokio::{sync::Notify, time::Instant};

/// The state of one process's watches and of its way to the Lease, as faults make it. Its watches look at it whenever it
/// changes.
#[derive(Debug, Default)]
pub(crate) struct Line {
    state: Mutex<LineState>,
    changed: Notify,
}

#[derive(Debug, Clone, Copy, Default)]
struct LineState {
    /// Nothing is delivered before.
    held_until: Option<Instant>,
    gaps: u32,
    gap_ends: Option<Instant>,
    drops: u32,
    /// How much longer requests for Leases take until when.
    slow_leases: Option<(Duration, Instant)>,
}

/// How much of it a watch has gone through.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Seen {
    gaps: u32,
    drops: u32,
}

impl Line {
    fn change(&self, change: impl FnOnce(&mut LineState)) {
        change(&mut lock(&self.state));
        self.changed.notify_waiters();
    }

    fn state(&self) -> LineState {
        *lock(&self.state)
    }

    /// Nothing is delivered for so long.
    pub(crate) fn hold(&self, time: Duration) {
        self.change(|state| state.held_until = Some(Instant::now() + time));
    }

    /// Every watch breaks, and is opened anew so much later.
    pub(crate) fn break_off(&self, time: Duration) {
        self.change(|state| {
            state.gaps += 1;
            state.gap_ends = Some(Instant::now() + time);
        });
    }

    /// Every watch at the API server loses its next change.
    pub(crate) fn drop_one(&self) {
        self.change(|state| state.drops += 1);
    }

    /// Requests for Leases take so much longer, for so long.
    pub(crate) fn slow_leases(&self, time: Duration) {
        self.change(|state| state.slow_leases = Some((time, Instant::now() + time)));
    }

    /// How much longer a request for a Lease takes now.
    pub(super) fn lease_delay(&self) -> Duration {
        let slow = self.state().slow_leases.filter(|(_, until)| Instant::now() < *until);
        slow.map(|(time, _)| time).unwrap_or_default()
    }

    /// Wakes up at the next change, counted from this call.
    pub(super) fn changed(&self) -> impl Future<Output = ()> {
        self.changed.notified()
    }

    /// What a new watch has gone through: all that was before.
    pub(super) fn now(&self) -> Seen {
        let LineState { gaps, drops, .. } = self.state();
        Seen { gaps, drops }
    }

    /// Whether the watch breaks, and when it is opened anew.
    pub(super) fn take_gap(&self, seen: &mut Seen) -> Option<Instant> {
        let state = self.state();
        let broken = std::mem::replace(&mut seen.gaps, state.gaps) != state.gaps;
        state.gap_ends.filter(|_| broken)
    }

    /// Whether the watch loses a change.
    pub(super) fn take_drop(&self, seen: &mut Seen) -> bool {
        let drops = self.state().drops;
        std::mem::replace(&mut seen.drops, drops) != drops
    }

    /// Waits until something may be delivered.
    pub(super) async fn ready(&self) {
        while let Some(until) = self.state().held_until.filter(|until| Instant::now() < *until) {
            tokio::time::sleep_until(until).await;
        }
    }
}
