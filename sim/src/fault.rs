//! What can go wrong at a call, and where a run wants it to.

use std::{collections::BTreeMap, fmt, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    text,
    trace::{Call, Port},
};

/// What goes wrong at one call of a process to a port: to the call itself, to the watches of the process that makes it,
/// or in the world at the moment when the call leaves. Behind each stands what it is in a real cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// The process dies before the request leaves: the OOM killer, a node that loses power.
    CrashBefore,
    /// The request is carried out, then the process dies without its answer.
    CrashAfter,
    /// The request gets lost; of a write the caller learns only that it may have happened: a connection that breaks
    /// before the server has read it.
    LoseRequest,
    /// The request is carried out and its answer gets lost; of a write the caller learns only that it may have happened:
    /// a time-out, a connection that breaks late.
    LoseAnswer,
    /// Somebody else writes what the request was made from, just before the request arrives: an agent, a user, another
    /// leader. Only for writes.
    Overtake,
    /// The API server answers that the object changed, and it did not: its storage had an older version in its cache, or
    /// a retry inside the server met the first try. Only for writes to it.
    Conflict,
    /// The server does not take the request: it restarts, or has no leader.
    Unavailable,
    /// The server asks for a pause (429).
    Throttle,
    /// The request arrives so much later: a queue on the way, a slow server.
    Delay(#[serde(with = "text::time")] Duration),
    /// The whole process stands still for so long before the request leaves, as under SIGSTOP, or on a node that swaps;
    /// then it goes on as if nothing had been.
    Stall(#[serde(with = "text::time")] Duration),
    /// The watches of the process deliver nothing for so long, then everything: a watch cache that lags.
    Lag(#[serde(with = "text::time")] Duration),
    /// The watches of the process break; so much later they are opened anew and list. What changed twice meanwhile shows
    /// its last state only, and an object that was deleted and made again looks changed. No time at all is a relist.
    Gap(#[serde(with = "text::time")] Duration),
    /// Each watch of the process at the API server loses the next change without a word; only a list half a minute later
    /// tells: a connection that is half open.
    DropEvent,
    /// Every watch at the API server lists again, from a server whose cache is so many changes behind and stays there for
    /// a while: a fail-over to another API server. Reads at quorum are not concerned.
    FailOver(u16),
    /// The Lease of the leader election is free at once, and requests of the process that concern Leases take so much
    /// longer: the others saw it expire (a clock that runs faster, a Lease edited by hand) while its holder works on.
    LoseLease(#[serde(with = "text::time")] Duration),
    /// Every etcd lease ends: etcd had no leader, or the holders no way to it, for longer than their time.
    EndLeases,
    /// The wall clock of the process jumps by so many seconds: NTP, a virtual machine that was moved.
    ClockJump(i32),
    /// etcd elects another leader: every watch at it breaks, and the answer to the call gets lost if it went to etcd.
    NewEtcdLeader,
    /// etcd and the API server forget their history: what is behind lists again.
    Compact,
    /// etcd is put back by so many revisions from a snapshot, as `etcdutl snapshot restore` does it: with another cluster
    /// id.
    Restore(u16),
    /// etcd is put back by so many revisions with its disks: the cluster id stays.
    Rewind(u16),
}

impl Fault {
    /// Whether it makes a difference at a call.
    #[must_use]
    pub fn concerns(self, call: &Call) -> bool {
        match self {
            Self::Overtake => call.write,
            Self::Conflict => call.write && call.port == Port::Objects,
            _ => true,
        }
    }

    /// Whether it happens to etcd, so that it makes no difference without it.
    #[must_use]
    pub(crate) fn is_of_etcd(self) -> bool {
        matches!(self, Self::EndLeases | Self::NewEtcdLeader | Self::Restore(_) | Self::Rewind(_))
    }

    /// Whether it happens in the world rather than to the call: then the call goes on as if nothing had been, apart from
    /// what the world makes of it.
    #[must_use]
    pub fn is_in_the_world(self) -> bool {
        match self {
            Self::CrashBefore
            | Self::CrashAfter
            | Self::LoseRequest
            | Self::LoseAnswer
            | Self::Overtake
            | Self::Conflict
            | Self::Unavailable
            | Self::Throttle
            | Self::Delay(_)
            | Self::Stall(_) => false,
            Self::Lag(_)
            | Self::Gap(_)
            | Self::DropEvent
            | Self::FailOver(_)
            | Self::LoseLease(_)
            | Self::EndLeases
            | Self::ClockJump(_)
            | Self::NewEtcdLeader
            | Self::Compact
            | Self::Restore(_)
            | Self::Rewind(_) => true,
        }
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
            Self::Conflict => f.write_str("conflict"),
            Self::Unavailable => f.write_str("unavailable"),
            Self::Throttle => f.write_str("throttle"),
            Self::Delay(time) => write!(f, "delay {time:?}"),
            Self::Stall(time) => write!(f, "stall {time:?}"),
            Self::Lag(time) => write!(f, "lag {time:?}"),
            Self::Gap(time) => write!(f, "gap {time:?}"),
            Self::DropEvent => f.write_str("drop event"),
            Self::FailOver(changes) => write!(f, "fail over {changes} changes back"),
            Self::LoseLease(time) => write!(f, "lose lease for {time:?}"),
            Self::EndLeases => f.write_str("end leases"),
            Self::ClockJump(seconds) => write!(f, "clock jump {seconds}s"),
            Self::NewEtcdLeader => f.write_str("new etcd leader"),
            Self::Compact => f.write_str("compact"),
            Self::Restore(revisions) => write!(f, "restore {revisions} revisions back"),
            Self::Rewind(revisions) => write!(f, "rewind {revisions} revisions"),
        }
    }
}

/// Which calls of a run go wrong, by their number. Up to its first fault a run is the run without faults, so a number
/// that was seen there means the same call.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
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

    /// The same without what goes wrong at one call.
    #[must_use]
    pub fn without(&self, call: u64) -> Self {
        let mut plan = self.clone();
        plan.0.remove(&call);
        plan
    }

    /// What goes wrong at a call.
    #[must_use]
    pub fn fault(&self, call: u64) -> Option<Fault> {
        self.0.get(&call).copied()
    }

    /// The calls that go wrong, in order.
    pub fn calls(&self) -> impl Iterator<Item = (u64, Fault)> {
        self.0.iter().map(|(call, fault)| (*call, *fault))
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
