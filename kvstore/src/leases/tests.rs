use super::*;

const RULES: LeaseRules =
    LeaseRules { data_ttl: Duration::from_secs(900), lock_ttl: Duration::from_secs(25), max_keys: 2 };

/// Runs every action that is due against a fake etcd that always agrees; answers what it did.
struct Bench {
    leases: Leases,
    now: Instant,
    next_id: LeaseId,
}

impl Bench {
    fn new() -> Self {
        Self { leases: Leases::new(RULES), now: Instant::now(), next_id: 0 }
    }

    fn answer(&mut self, action: &Action) -> Ended {
        match action {
            Action::Grant(kind) => {
                self.next_id += 1;
                let ttl = if *kind == LeaseKind::Data { RULES.data_ttl } else { RULES.lock_ttl };
                Ended::Granted(Lease { id: self.next_id, ttl })
            }
            Action::KeepAlive(_) => Ended::Alive(RULES.data_ttl),
            Action::Put { .. } | Action::Delete { .. } => Ended::Done,
        }
    }

    fn end(&mut self, action: &Action, ended: Ended) {
        self.leases.ended(action, ended, self.now, self.now, 0);
    }

    fn run(&mut self) -> Vec<Action> {
        let mut all = Vec::new();
        loop {
            let actions = self.leases.start(self.now);
            if actions.is_empty() {
                return all;
            }
            for action in actions {
                let ended = self.answer(&action);
                self.end(&action, ended);
                all.push(action);
            }
        }
    }

    fn pass(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
    }
}

fn put(key: &str, value: &str, lease: LeaseId) -> Action {
    Action::Put { key: key.into(), value: value.into(), lease }
}

#[tokio::test(start_paused = true)]
async fn a_lease_takes_so_many_keys_and_no_more() {
    let mut bench = Bench::new();
    for key in ["a", "b", "c"] {
        bench.leases.want(key, b"1");
    }
    let grant = || Action::Grant(LeaseKind::Data);
    assert_eq!(bench.run(), [grant(), put("a", "1", 1), put("b", "1", 1), grant(), put("c", "1", 2)]);
    bench.leases.unwant("a");
    bench.leases.want("d", b"1");
    assert_eq!(bench.run(), [Action::Delete { key: "a".into() }, put("d", "1", 1)]);
    assert_eq!(bench.leases.report(), SessionReport { leases: 2, keys: 3, ..SessionReport::default() });
}

#[tokio::test(start_paused = true)]
async fn every_key_of_a_lost_lease_is_written_again() {
    let mut bench = Bench::new();
    for key in ["a", "b", "c"] {
        bench.leases.want(key, b"1");
    }
    bench.run();
    bench.pass(301);
    let actions = bench.leases.start(bench.now);
    assert_eq!(actions, [Action::KeepAlive(1), Action::KeepAlive(2)]);
    bench.end(&actions[0], Ended::LeaseGone);
    bench.end(&actions[1], Ended::Alive(RULES.data_ttl));
    assert_eq!(bench.leases.report().pending, 2);
    assert_eq!(bench.run(), [put("a", "1", 2), Action::Grant(LeaseKind::Data), put("b", "1", 3)]);
    let report = bench.leases.report();
    assert_eq!((report.pending, report.lost_leases), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn a_put_that_finds_its_lease_gone_loses_the_lease() {
    let mut bench = Bench::new();
    bench.leases.want("a", b"1");
    bench.run();
    bench.leases.want("b", b"1");
    let actions = bench.leases.start(bench.now);
    assert_eq!(actions, [put("b", "1", 1)]);
    bench.end(&actions[0], Ended::LeaseGone);
    let again = bench.run();
    assert_eq!(again, [Action::Grant(LeaseKind::Data), put("a", "1", 2), put("b", "1", 2)]);
}

#[tokio::test(start_paused = true)]
async fn a_value_that_changes_during_its_write_is_written_again() {
    let mut bench = Bench::new();
    bench.leases.want("a", b"1");
    let grant = bench.leases.start(bench.now);
    let granted = bench.answer(&grant[0]);
    bench.end(&grant[0], granted);
    let first = bench.leases.start(bench.now);
    bench.leases.want("a", b"2");
    assert!(bench.leases.start(bench.now).is_empty(), "one write of a key at a time");
    bench.end(&first[0], Ended::Done);
    assert_eq!(bench.run(), [put("a", "2", 1)]);
    bench.leases.unwant("a");
    let delete = bench.leases.start(bench.now);
    bench.leases.want("a", b"3");
    bench.end(&delete[0], Ended::Done);
    assert_eq!(bench.run(), [put("a", "3", 1)]);
}

#[tokio::test(start_paused = true)]
async fn a_failure_pauses_everything_and_a_refusal_one_key() {
    let mut bench = Bench::new();
    bench.leases.want("a", b"1");
    bench.leases.want("b", b"1");
    let grant = bench.leases.start(bench.now);
    bench.end(&grant[0], Ended::Failed("away".into()));
    assert!(bench.leases.start(bench.now).is_empty());
    let wake = bench.leases.next_wake(bench.now).unwrap();
    assert_eq!(wake, bench.now + Duration::from_millis(25), "half of 50 ms, and no jitter");
    bench.now = wake;
    let again = bench.leases.start(bench.now);
    assert_eq!(again, [Action::Grant(LeaseKind::Data)]);
    let granted = bench.answer(&again[0]);
    bench.end(&again[0], granted);
    let puts = bench.leases.start(bench.now);
    bench.end(&puts[0], Ended::Refused("role".into()));
    bench.end(&puts[1], Ended::Done);
    let report = bench.leases.report();
    assert_eq!((report.pending, report.last_error.as_deref()), (1, Some("role")));
    assert!(bench.leases.start(bench.now).is_empty());
    bench.now = bench.leases.next_wake(bench.now).unwrap();
    assert_eq!(bench.run(), [put("a", "1", 1)]);
    assert_eq!(bench.leases.report().last_error, None);
}

#[tokio::test(start_paused = true)]
async fn a_lock_lease_lives_while_it_is_used() {
    let mut bench = Bench::new();
    bench.leases.add_lock_user();
    assert_eq!(bench.leases.reserve(LeaseKind::Lock, bench.now), None);
    assert_eq!(bench.run(), [Action::Grant(LeaseKind::Lock)]);
    assert_eq!(bench.leases.reserve(LeaseKind::Lock, bench.now), Some(1));
    bench.pass(9);
    assert_eq!(bench.leases.start(bench.now), [Action::KeepAlive(1)]);
    bench.end(&Action::KeepAlive(1), Ended::Failed("away".into()));
    bench.pass(5);
    assert_eq!(bench.leases.reserve(LeaseKind::Lock, bench.now), None, "it may expire before it is of use");
    let actions = bench.leases.start(bench.now);
    assert_eq!(actions, [Action::KeepAlive(1), Action::Grant(LeaseKind::Lock)]);
    for action in actions {
        let ended = bench.answer(&action);
        bench.end(&action, ended);
    }
    bench.leases.remove_lock_user();
    bench.pass(500);
    assert!(bench.leases.start(bench.now).is_empty());
    assert_eq!(bench.leases.report().lock_leases, 0);
}

#[tokio::test(start_paused = true)]
async fn what_others_wrote_under_our_lease_is_kept_too() {
    let mut bench = Bench::new();
    assert_eq!(bench.leases.reserve(LeaseKind::Data, bench.now), None);
    bench.run();
    let lease = bench.leases.reserve(LeaseKind::Data, bench.now).unwrap();
    bench.leases.adopt("a", b"1", lease);
    bench.leases.unreserve(lease);
    assert!(bench.run().is_empty());
    bench.leases.rewrite("a");
    assert_eq!(bench.run(), [put("a", "1", lease)]);
    bench.leases.adopt("b", b"1", 99);
    assert_eq!(bench.run(), [put("b", "1", lease)]);
}

#[test]
fn the_time_of_a_lease_is_bounded() {
    let with = |seconds| LeaseRules::with_data_ttl(Duration::from_secs(seconds));
    assert_eq!(with(25).map(|rules| rules.data_ttl), Ok(Duration::from_secs(25)));
    assert!(with(24 * 3600).is_ok() && with(24 * 3600 + 1).is_err());
    assert_eq!(with(24).unwrap_err().to_string(), "kvstore-lease-ttl is 24s; it must be from 25s to 24h");
}
