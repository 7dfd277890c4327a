//! What can go wrong at a call, and where a run wants it to.

use std::{collections::BTreeMap, fmt, time::Duration};

/// What goes wrong at one call of a process to a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// The process dies before the request leaves.
    CrashBefore,
    /// The request is carried out, then the process dies without its answer.
    CrashAfter,
    /// The request gets lost; of a write the caller learns only that it may have happened.
    LoseRequest,
    /// The request is carried out and its answer gets lost; of a write the caller learns only that it may have happened.
    LoseAnswer,
    /// Somebody else writes what the request was made from, just before the request arrives. Only for writes.
    Overtake,
    /// The server does not take the request.
    Unavailable,
    /// The server asks for a pause (429).
    Throttle,
    /// The request arrives so much later.
    Delay(Duration),
    /// The whole process stands still for so long before the request leaves, as under SIGSTOP; then it goes on as if
    /// nothing had been.
    Stall(Duration),
}

impl Fault {
    /// Whether it makes a difference for a read too.
    #[must_use]
    pub fn concerns_reads(self) -> bool {
        !matches!(self, Self::Overtake)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CrashBefore => f.write_str("crash before"),
            Self::CrashAfter => f.write_str("crash after"),
            Self::LoseRequest => f.write_str("lose request"),
            Self::LoseAnswer => f.write_str("lose answer"),
            Self::Overtake => f.write_str("overtake"),
            Self::Unavailable => f.write_str("unavailable"),
            Self::Throttle => f.write_str("throttle"),
            Self::Delay(time) => write!(f, "delay {time:?}"),
            Self::Stall(time) => write!(f, "stall {time:?}"),
        }
    }
}

/// Which calls of a run go wrong, by their number. Up to its first fault a run is the run without faults, so a number
/// that was seen there means the same call.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FaultPlan(BTreeMap<u64, Fault>);

impl FaultPlan {
    /// Nothing goes wrong.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// One call goes wrong.
    #[must_use]
    pub fn at(call: u64, fault: Fault) -> Self {
        Self(BTreeMap::from([(call, fault)]))
    }

    /// One more call goes wrong.
    #[must_use]
    pub fn and(mut self, call: u64, fault: Fault) -> Self {
        self.0.insert(call, fault);
        self
    }

    /// What goes wrong at a call.
    #[must_use]
    pub fn fault(&self, call: u64) -> Option<Fault> {
        self.0.get(&call).copied()
    }
}

impl fmt::Display for FaultPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("no faults");
        }
        for (place, (call, fault)) in self.0.iter().enumerate() {
            let separator = if place == 0 { "" } else { ", " };
            write!(f, "{separator}{fault} at #{call}")?;
        }
        Ok(())
    }
}
