//! The election as a state machine: it is told the time and what happened, and says what to do next.
//!
//! ```text
//!             free, ours or expired                    answered in time
//!  ┌─ Standby ───────────────────────► Trying ───────────────────────────► Leading ─┐
//!  │    ▲  ▲    create or take over      │                                   │  ▲   │ renew every
//!  └────┘  │                             │ refused, unknown                  │  └───┘ retry period
//!  look    └─────────────────────────────┘                                   │
//!  again   ▲                                deadline passed, or another holds │
//!          └─────────────────────────────────────────────────────────────────┘
//! ```
//!
//! Two clocks never meet: another's Lease expires when its record did not change for its duration on our clock; our own
//! term counts from before the request that renewed it.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    LeadershipOptions, Term, TermId,
    lease::{Lease, LeaseAt, LeaseRecord, LeaseWrite},
};

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Observation {
    /// Nothing but time: the begin, or the end of a wait.
    Tick,
    /// The Lease was read.
    Read(Option<Lease>),
    /// The Lease could not be read.
    ReadFailed,
    /// The write was carried out; this is the Lease since.
    Written(Lease),
    /// The write was refused.
    Refused,
    /// The write may have been carried out.
    Unknown,
    /// The process ends: release the Lease if it is ours.
    Release,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Read the Lease.
    Read,
    /// Create the Lease.
    Create(LeaseWrite),
    /// Write the Lease at the version that was read.
    Write(LeaseAt, LeaseWrite),
    /// Wait until this time; standbys may wait a little longer, so that they do not all come at once.
    Wait(Instant),
    /// Nothing more.
    End,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    /// Somebody else holds the Lease, or we do not know.
    Standby,
    /// A write that would make us the holder is under way since then.
    Trying { since: Instant },
    /// We hold it.
    Leading(Holding),
    /// Over.
    Ended,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Holding {
    term: Term,
    /// Where the Lease stands, when we know.
    at: Option<LeaseAt>,
    transitions: i64,
    /// When the renewal under way was begun.
    renewing_since: Option<Instant>,
}

/// Another's record and since when we see it unchanged.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    uid: String,
    record: LeaseRecord,
    since: Instant,
}

/// One candidate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Election {
    options: LeadershipOptions,
    state: State,
    seen: Option<Seen>,
    /// The name of the next term.
    next_term: TermId,
    transitions: i64,
}

impl Election {
    /// A standby.
    #[must_use]
    pub fn new(options: LeadershipOptions, first_term: TermId) -> Self {
        Self { options, state: State::Standby, seen: None, next_term: first_term, transitions: 0 }
    }

    /// The term, also when its time has passed and no step has noticed yet.
    #[must_use]
    pub fn term(&self) -> Option<Term> {
        match &self.state {
            State::Leading(holding) => Some(holding.term),
            State::Standby | State::Trying { .. } | State::Ended => None,
        }
    }

    /// The holder that the Lease last named, when it is somebody else.
    #[must_use]
    pub fn other_holder(&self) -> Option<&str> {
        self.seen.as_ref().and_then(|seen| seen.record.holder.as_deref())
    }

    /// Goes on. `next_term` names the term after the one that this step may begin.
    pub fn step(&mut self, now: Instant, observation: Observation, next_term: TermId) -> Action {
        if self.term().is_some_and(|term| now >= term.until) {
            self.state = State::Standby;
            // Whatever was under way belonged to the term that is over.
            if observation != Observation::Release {
                return Action::Wait(now + self.options.retry_period);
            }
        }
        match (self.state.clone(), observation) {
            (State::Leading(holding), Observation::Release) => self.release(holding),
            (State::Ended, _) | (_, Observation::Release) => {
                self.state = State::Ended;
                Action::End
            }
            (State::Standby, Observation::Read(lease)) => self.look(now, lease),
            (State::Standby, Observation::Tick) => Action::Read,
            (State::Trying { since }, Observation::Written(lease)) => self.begin(now, since, lease, next_term),
            (State::Standby | State::Trying { .. }, _) => {
                self.state = State::Standby;
                Action::Wait(now + self.options.retry_period)
            }
            (State::Leading(holding), observation) => self.hold(now, holding, observation),
        }
    }

    /// A standby has read the Lease.
    fn look(&mut self, now: Instant, lease: Option<Lease>) -> Action {
        let Some(Lease { at, record }) = lease else {
            self.state = State::Trying { since: now };
            self.transitions = 0;
            return Action::Create(self.claim(true));
        };
        self.transitions = record.transitions;
        match &record.holder {
            // Ours by a write whose answer was lost, or from before our term ended.
            Some(holder) if *holder == self.options.identity => self.take(now, at, false),
            None => self.take(now, at, true),
            Some(_) => {
                let duration = record.duration.unwrap_or(self.options.lease_duration);
                let unchanged = self
                    .seen
                    .as_ref()
                    .filter(|seen| seen.uid == at.uid && seen.record == record)
                    .map(|seen| seen.since);
                let since = unchanged.unwrap_or(now);
                self.seen = Some(Seen { uid: at.uid.clone(), record, since });
                if now >= since + duration {
                    self.take(now, at, true)
                } else {
                    Action::Wait((now + self.options.retry_period).min(since + duration))
                }
            }
        }
    }

    fn take(&mut self, now: Instant, at: LeaseAt, changes_holder: bool) -> Action {
        self.state = State::Trying { since: now };
        self.transitions += i64::from(changes_holder);
        Action::Write(at, self.claim(changes_holder))
    }

    fn claim(&self, acquires: bool) -> LeaseWrite {
        LeaseWrite {
            holder: self.options.identity.clone(),
            duration: self.options.lease_duration,
            transitions: self.transitions,
            acquires,
        }
    }

    /// The write that makes us the holder was answered.
    fn begin(&mut self, now: Instant, since: Instant, lease: Lease, next_term: TermId) -> Action {
        let until = since + self.options.renew_deadline;
        if now >= until {
            // So late that the next renewal could not be in time; the Lease names us, so it is taken again.
            self.state = State::Standby;
            return Action::Read;
        }
        let term = Term { id: std::mem::replace(&mut self.next_term, next_term), until };
        self.seen = None;
        self.state = State::Leading(Holding {
            term,
            at: Some(lease.at),
            transitions: lease.record.transitions,
            renewing_since: None,
        });
        Action::Wait((since + self.options.retry_period).max(now).min(until))
    }

    /// Something happened to the leader, before its deadline.
    fn hold(&mut self, now: Instant, mut holding: Holding, observation: Observation) -> Action {
        let retry = (now + self.options.retry_period).min(holding.term.until);
        let action = match observation {
            Observation::Tick => match holding.at.take() {
                Some(at) => self.renew(now, &mut holding, at),
                None => Action::Read,
            },
            Observation::Written(lease) => {
                let since = holding.renewing_since.take().unwrap_or(now);
                holding.term.until = holding.term.until.max(since + self.options.renew_deadline);
                holding.at = Some(lease.at);
                holding.transitions = lease.record.transitions;
                Action::Wait((since + self.options.retry_period).max(now))
            }
            // Somebody wrote the Lease: perhaps we, by a renewal whose answer was lost.
            Observation::Refused => Action::Read,
            Observation::Read(Some(lease)) if lease.record.holder.as_ref() == Some(&self.options.identity) => {
                holding.transitions = lease.record.transitions;
                self.renew(now, &mut holding, lease.at)
            }
            // Taken or released by another hand: the term is over at once.
            Observation::Read(Some(lease)) => {
                self.state = State::Standby;
                return self.look(now, Some(lease));
            }
            // Somebody deleted the Lease. Whoever creates it first leads; the other reads so and stands by.
            Observation::Read(None) => {
                holding.renewing_since = Some(now);
                self.transitions = holding.transitions;
                Action::Create(self.claim(true))
            }
            Observation::ReadFailed | Observation::Unknown => Action::Wait(retry),
            // Handled by the caller.
            Observation::Release => Action::End,
        };
        self.state = State::Leading(holding);
        action
    }

    fn renew(&self, now: Instant, holding: &mut Holding, at: LeaseAt) -> Action {
        holding.renewing_since = Some(now);
        let write = LeaseWrite { transitions: holding.transitions, ..self.claim(false) };
        Action::Write(at, write)
    }

    /// Lets the next one in at once: the Lease without holder, for one second, as client-go leaves it.
    fn release(&mut self, holding: Holding) -> Action {
        self.state = State::Ended;
        let write = LeaseWrite {
            holder: String::new(),
            duration: Duration::from_secs(1),
            transitions: holding.transitions,
            acquires: false,
        };
        match holding.at {
            Some(at) => Action::Write(at, write),
            None => Action::End,
        }
    }
}
