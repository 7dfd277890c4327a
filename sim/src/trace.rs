//! What happened in a run, in order.

use std::{fmt, time::Duration};

use crate::fault::Fault;

/// Which incarnation of which process.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProcessId {
    /// The process, by the name that a scenario gave it.
    pub name: String,
    /// 1 for the first start, 2 after the first restart.
    pub incarnation: u32,
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.name, self.incarnation)
    }
}

/// Which port a call went to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Port {
    /// `Kv`.
    Kv,
    /// `Objects`.
    Objects,
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kv => "kv",
            Self::Objects => "objects",
        })
    }
}

/// A call of a process to a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Its number in the order of sending. Calls of the scenario itself have none: they do not go wrong.
    pub number: Option<u64>,
    /// The port.
    pub port: Port,
    /// Whether it is a write.
    pub write: bool,
    /// What was asked.
    pub request: String,
}

impl Call {
    /// Whether it concerns the Lease of a leader election.
    #[must_use]
    pub fn is_for_lease(&self) -> bool {
        self.port == Port::Objects && self.request.contains(" leases ")
    }

    /// Whether it only asks if a server is there.
    #[must_use]
    pub fn is_probe(&self) -> bool {
        self.request == "range cilium/.heartbeat"
    }
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Virtual time since the run began.
    pub at: Duration,
    /// To whom; `None` for the world.
    pub who: Option<ProcessId>,
    /// What.
    pub what: What,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A call took effect, or failed to.
    Call {
        /// The call.
        call: Call,
        /// What the server answered.
        answer: String,
        /// What went wrong on the way.
        fault: Option<Fault>,
    },
    /// A watch delivered something.
    Delivery {
        /// The number of the call that opened the watch.
        watch: Option<u64>,
        /// What it delivered.
        item: String,
    },
    /// Something else: a process started, died, started a task.
    Note(String),
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>9.3}s ", self.at.as_secs_f64())?;
        match &self.who {
            Some(who) => write!(f, "{who} ")?,
            None => write!(f, "world ")?,
        }
        match &self.what {
            What::Call { call, answer, fault } => {
                if let Some(number) = call.number {
                    write!(f, "#{number} ")?;
                }
                write!(f, "{} {} -> {answer}", call.port, call.request)?;
                match fault {
                    Some(fault) => write!(f, " [{fault}]"),
                    None => Ok(()),
                }
            }
            What::Delivery { watch: Some(number), item } => write!(f, "watch #{number}: {item}"),
            What::Delivery { watch: None, item } => write!(f, "watch: {item}"),
            What::Note(text) => f.write_str(text),
        }
    }
}

/// A few hex digits that stand for a value in a trace line.
pub(crate) fn digest(value: &[u8]) -> String {
    // FNV-1a, 32 bits: enough to see that two runs wrote the same.
    let hash = value.iter().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    format!("{hash:08x}")
}
