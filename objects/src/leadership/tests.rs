//! The election: every transition, two candidates over a Lease with lost and late answers, and the shell.

use std::{collections::BTreeMap, time::Duration};

use basal_runtime::env::SeededEnv;
use proptest::prelude::*;
use serde_json::json;
use tokio::time::Instant;

use super::{
    election::{Action, Election, Observation},
    lease::{Lease, LeaseAt, LeaseRecord, LeaseWrite},
    *,
};
use crate::object::Object;

fn options(identity: &str) -> LeadershipOptions {
    LeadershipOptions::new("kube-system", identity.to_owned())
}

fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn lease(version: &str, holder: &str, renewed: &str, transitions: i64) -> Lease {
    let record = LeaseRecord {
        holder: Some(holder.to_owned()).filter(|holder| !holder.is_empty()),
        duration: Some(seconds(15)),
        renewed: renewed.to_owned(),
        transitions,
    };
    Lease { at: at(version), record }
}

fn at(version: &str) -> LeaseAt {
    LeaseAt { uid: "u".to_owned(), resource_version: version.to_owned() }
}

fn claim(transitions: i64, acquires: bool) -> LeaseWrite {
    LeaseWrite { holder: "me".to_owned(), duration: seconds(15), transitions, acquires }
}

/// An election that is told what happens, second by second.
struct Story {
    start: Instant,
    env: SeededEnv,
    election: Election,
}

impl Story {
    fn begin() -> Self {
        let env = SeededEnv::new(1);
        Self { start: Instant::now(), election: Election::new(options("me"), TermId::new(&env)), env }
    }

    fn at(&self, second: u64) -> Instant {
        self.start + seconds(second)
    }

    fn step(&mut self, second: u64, observation: Observation) -> Action {
        let next = TermId::new(&self.env);
        self.election.step(self.at(second), observation, next)
    }

    /// Leads from second 0 on.
    fn leading() -> Self {
        let mut story = Self::begin();
        assert_eq!(story.step(0, Observation::Tick), Action::Read);
        assert_eq!(story.step(0, Observation::Read(None)), Action::Create(claim(0, true)));
        let wait = Action::Wait(story.at(2));
        assert_eq!(story.step(0, Observation::Written(lease("1", "me", "t0", 0))), wait);
        assert_eq!(story.until(), Some(10));
        story
    }

    /// When the term ends, in seconds.
    fn until(&self) -> Option<u64> {
        self.election.term().map(|term| (term.until - self.start).as_secs())
    }
}

#[tokio::test(start_paused = true)]
async fn a_standby_waits_until_the_others_record_rests_for_its_duration() {
    let mut story = Story::begin();
    let other = |version, renewed| Observation::Read(Some(lease(version, "other", renewed, 3)));
    assert_eq!(story.step(0, other("1", "t0")), Action::Wait(story.at(2)));
    assert_eq!(story.election.other_holder(), Some("other"));
    // A renewal begins the wait anew; a change that is none of the record's does not.
    assert_eq!(story.step(14, other("2", "t1")), Action::Wait(story.at(16)));
    assert_eq!(story.step(28, other("3", "t1")), Action::Wait(story.at(29)));
    assert_eq!(story.step(29, other("3", "t1")), Action::Write(at("3"), claim(4, true)));
    assert_eq!(story.step(30, Observation::Written(lease("4", "me", "t2", 4))), Action::Wait(story.at(31)));
    assert_eq!(story.until(), Some(39));
}

#[tokio::test(start_paused = true)]
async fn a_released_lease_is_taken_at_once() {
    let mut story = Story::begin();
    let released = Observation::Read(Some(lease("1", "", "t0", 1)));
    assert_eq!(story.step(0, released), Action::Write(at("1"), claim(2, true)));
}

#[tokio::test(start_paused = true)]
async fn a_leader_renews_and_its_term_counts_from_before_the_request() {
    let mut story = Story::leading();
    assert_eq!(story.step(2, Observation::Tick), Action::Write(at("1"), claim(0, false)));
    assert_eq!(story.step(5, Observation::Written(lease("2", "me", "t1", 0))), Action::Wait(story.at(5)));
    assert_eq!(story.until(), Some(12));
}

#[tokio::test(start_paused = true)]
async fn a_lost_answer_is_followed_by_a_read_and_a_renewal_at_what_was_read() {
    let mut story = Story::leading();
    story.step(2, Observation::Tick);
    assert_eq!(story.step(7, Observation::Unknown), Action::Wait(story.at(9)));
    assert_eq!(story.step(9, Observation::Tick), Action::Read);
    let own = Observation::Read(Some(lease("2", "me", "t1", 0)));
    assert_eq!(story.step(9, own), Action::Write(at("2"), claim(0, false)));
    assert_eq!(story.until(), Some(10), "what is not answered renews nothing");
    story.step(9, Observation::Written(lease("3", "me", "t2", 0)));
    assert_eq!(story.until(), Some(19));
}

#[tokio::test(start_paused = true)]
async fn a_term_ends_at_its_deadline_and_the_next_one_has_another_name() {
    let mut story = Story::leading();
    let first = story.election.term().unwrap().id;
    story.step(2, Observation::Tick);
    assert_eq!(story.step(7, Observation::Unknown), Action::Wait(story.at(9)));
    assert_eq!(story.step(9, Observation::Tick), Action::Read);
    assert_eq!(story.step(10, Observation::ReadFailed), Action::Wait(story.at(12)));
    assert_eq!(story.until(), None);
    // Nobody took the Lease: it still names us, and is claimed again.
    story.step(12, Observation::Tick);
    let own = Observation::Read(Some(lease("2", "me", "t1", 0)));
    assert_eq!(story.step(12, own), Action::Write(at("2"), claim(0, false)));
    story.step(13, Observation::Written(lease("3", "me", "t2", 0)));
    assert_eq!(story.until(), Some(22));
    assert_ne!(story.election.term().unwrap().id, first);
}

#[tokio::test(start_paused = true)]
async fn an_answer_after_the_deadline_begins_no_term() {
    let mut story = Story::begin();
    story.step(0, Observation::Read(None));
    assert_eq!(story.step(10, Observation::Written(lease("1", "me", "t0", 0))), Action::Read);
    assert_eq!(story.until(), None);
}

#[tokio::test(start_paused = true)]
async fn another_holder_ends_the_term_at_once() {
    let mut story = Story::leading();
    story.step(2, Observation::Tick);
    assert_eq!(story.step(2, Observation::Refused), Action::Read);
    let other = Observation::Read(Some(lease("2", "other", "t1", 1)));
    assert_eq!(story.step(2, other), Action::Wait(story.at(4)));
    assert_eq!(story.until(), None);
}

#[tokio::test(start_paused = true)]
async fn a_deleted_lease_is_created_again() {
    let mut story = Story::leading();
    story.step(2, Observation::Tick);
    assert_eq!(story.step(2, Observation::Refused), Action::Read);
    assert_eq!(story.step(3, Observation::Read(None)), Action::Create(claim(0, true)));
    story.step(3, Observation::Written(lease("9", "me", "t1", 0)));
    assert_eq!(story.until(), Some(13));
}

#[tokio::test(start_paused = true)]
async fn release_gives_the_lease_away_and_ends() {
    let mut story = Story::leading();
    let given = LeaseWrite { holder: String::new(), duration: seconds(1), transitions: 0, acquires: false };
    assert_eq!(story.step(3, Observation::Release), Action::Write(at("1"), given));
    assert_eq!(story.until(), None);
    assert_eq!(story.step(3, Observation::Written(lease("2", "", "t1", 0))), Action::End);
    assert_eq!(Story::begin().step(0, Observation::Release), Action::End);
}

/// Every state against every observation: what is done next, and whether we lead afterwards.
#[tokio::test(start_paused = true)]
async fn every_transition() {
    let trying = || {
        let mut story = Story::begin();
        story.step(0, Observation::Read(None));
        story
    };
    let renewing = || {
        let mut story = Story::leading();
        story.step(2, Observation::Tick);
        story
    };
    let ended = || {
        let mut story = Story::leading();
        story.step(1, Observation::Release);
        story
    };
    let states: [(&str, &dyn Fn() -> Story); 5] = [
        ("standby", &Story::begin),
        ("trying", &trying),
        ("leading", &Story::leading),
        ("renewing", &renewing),
        ("ended", &ended),
    ];
    let observations = [
        ("tick", Observation::Tick),
        ("none", Observation::Read(None)),
        ("own", Observation::Read(Some(lease("5", "me", "t", 0)))),
        ("other", Observation::Read(Some(lease("5", "other", "t", 0)))),
        ("free", Observation::Read(Some(lease("5", "", "t", 0)))),
        ("unread", Observation::ReadFailed),
        ("written", Observation::Written(lease("6", "me", "t", 0))),
        ("refused", Observation::Refused),
        ("unknown", Observation::Unknown),
        ("release", Observation::Release),
    ];
    let mut table = String::new();
    for (state, story) in states {
        table += state;
        for (name, observation) in &observations {
            let mut story = story();
            let next = match story.step(3, observation.clone()) {
                Action::Read => "read",
                Action::Create(_) => "create",
                Action::Write(_, write) if write.holder.is_empty() => "give",
                Action::Write(..) => "write",
                Action::Wait(_) => "wait",
                Action::End => "end",
            };
            let leads = if story.until().is_some() { "*" } else { "" };
            table += &format!(" {name}:{next}{leads}");
        }
        table += "\n";
    }
    let expected = "\
standby tick:read none:create own:write other:wait free:write unread:wait written:wait refused:wait unknown:wait release:end
trying tick:wait none:wait own:wait other:wait free:wait unread:wait written:wait* refused:wait unknown:wait release:end
leading tick:write* none:create* own:write* other:wait free:write unread:wait* written:wait* refused:read* unknown:wait* release:give
renewing tick:read* none:create* own:write* other:wait free:write unread:wait* written:wait* refused:read* unknown:wait* release:end
ended tick:end none:end own:end other:end free:end unread:end written:end refused:end unknown:end release:end
";
    assert_eq!(table, expected);
}

/// A Lease at a server, and two candidates whose requests are carried out, lost, and answered when the test says so.
struct Field {
    start: Instant,
    now: Instant,
    env: SeededEnv,
    version: u64,
    lease: Option<LeaseRecord>,
    candidates: Vec<Candidate>,
}

struct Candidate {
    election: Election,
    action: Action,
    /// The answer that is on its way.
    answer: Option<Observation>,
}

#[derive(Debug, Clone, Copy)]
enum Move {
    /// Time passes, in tenths of a second.
    Pass(u64),
    /// A candidate's request reaches the server.
    Arrive(usize),
    /// Its answer reaches the candidate; or is lost, and the candidate gives up waiting.
    Answer(usize, bool),
}

impl Field {
    fn new() -> Self {
        let (start, env) = (Instant::now(), SeededEnv::new(1));
        let candidate = |name: &str| {
            let mut election = Election::new(options(name), TermId::new(&env));
            let action = election.step(start, Observation::Tick, TermId::new(&env));
            Candidate { election, action, answer: None }
        };
        let candidates = vec![candidate("a"), candidate("b")];
        Self { start, now: start, env, version: 0, lease: None, candidates }
    }

    fn lease(&self) -> Option<Lease> {
        Some(Lease { at: at(&self.version.to_string()), record: self.lease.clone()? })
    }

    fn store(&mut self, write: &LeaseWrite) -> Observation {
        self.version += 1;
        self.lease = Some(LeaseRecord {
            holder: Some(write.holder.clone()).filter(|holder| !holder.is_empty()),
            duration: Some(write.duration),
            renewed: format!("{:?}", self.now - self.start),
            transitions: write.transitions,
        });
        Observation::Written(Lease { at: at(&self.version.to_string()), record: self.lease.clone().unwrap() })
    }

    fn go(&mut self, step: Move) {
        match step {
            Move::Pass(tenths) => self.now += Duration::from_millis(100 * tenths),
            Move::Arrive(index) => {
                if self.candidates[index].answer.is_some() {
                    return;
                }
                let answer = match self.candidates[index].action.clone() {
                    Action::Read => Observation::Read(self.lease()),
                    Action::Create(write) if self.lease.is_none() => self.store(&write),
                    Action::Write(lease, write) if lease == at(&self.version.to_string()) => self.store(&write),
                    Action::Create(_) | Action::Write(..) => Observation::Refused,
                    Action::Wait(until) if self.now >= until => Observation::Tick,
                    Action::Wait(_) | Action::End => return,
                };
                self.candidates[index].answer = Some(answer);
            }
            Move::Answer(index, arrives) => {
                let candidate = &mut self.candidates[index];
                let Some(answer) = candidate.answer.take() else { return };
                let observation = match answer {
                    answer if arrives => answer,
                    Observation::Read(_) => Observation::ReadFailed,
                    Observation::Tick => Observation::Tick,
                    _ => Observation::Unknown,
                };
                candidate.action = candidate.election.step(self.now, observation, TermId::new(&self.env));
            }
        }
    }

    fn leaders(&self) -> usize {
        let leads = |candidate: &&Candidate| candidate.election.term().is_some_and(|term| self.now < term.until);
        self.candidates.iter().filter(leads).count()
    }
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let one = prop_oneof![
        3 => (1..40_u64).prop_map(Move::Pass),
        4 => (0..2_usize).prop_map(Move::Arrive),
        4 => (0..2_usize, prop::bool::weighted(0.8)).prop_map(|(index, arrives)| Move::Answer(index, arrives)),
    ];
    prop::collection::vec(one, 0..400)
}

proptest! {
    /// However late answers are and whatever is lost, no two terms last at one time.
    #[test]
    fn never_two_leaders(moves in moves()) {
        let mut field = Field::new();
        for step in moves {
            field.go(step);
            prop_assert!(field.leaders() <= 1, "two leaders after {:?}", field.now - field.start);
        }
    }

    /// With a server that answers at once, whatever came before, there is a leader within a lease and some retries.
    #[test]
    fn somebody_leads_in_the_end(moves in moves()) {
        let mut field = Field::new();
        for step in moves {
            field.go(step);
        }
        let mut led = false;
        for _tick in 0..400 {
            for index in 0..2 {
                field.go(Move::Arrive(index));
                field.go(Move::Answer(index, true));
            }
            led |= field.leaders() == 1;
            field.go(Move::Pass(1));
        }
        prop_assert!(led);
    }
}

#[test]
fn a_lease_is_read_leniently() {
    let object = Object(json!({
        "metadata": {"name": "l", "uid": "u", "resourceVersion": "7"},
        "spec": {"holderIdentity": "me", "leaseDurationSeconds": 15, "renewTime": "t", "leaseTransitions": 3},
    }));
    assert_eq!(Lease::read(&object), lease("7", "me", "t", 3));
    let empty = Lease::read(&Object(json!({"metadata": {}, "spec": {"holderIdentity": "", "leaseTransitions": "x"}})));
    let nothing = LeaseRecord { holder: None, duration: None, renewed: String::new(), transitions: 0 };
    assert_eq!(empty.record, nothing);
}

#[tokio::test(start_paused = true)]
async fn identities_and_durations() {
    let env = SeededEnv::new(3);
    let identities: BTreeMap<String, ()> = (0..100).map(|_| (identity("node-1", &env), ())).collect();
    assert_eq!(identities.len(), 100);
    for identity in identities.keys() {
        let suffix = identity.strip_prefix("node-1-").unwrap();
        assert!(
            suffix.len() == 10 && suffix.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()),
            "{identity}"
        );
    }
    options("me").check().unwrap();
    let error = LeadershipOptions { renew_deadline: seconds(15), ..options("me") }.check().unwrap_err();
    assert!(error.starts_with("leader-election-lease-duration must be longer"), "{error}");
    LeadershipOptions { retry_period: seconds(9), ..options("me") }.check().unwrap_err();
}
