//! The driver over a small controller that squares numbers and can be told to fail.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use prometheus_client::{encoding::text::encode, registry::Registry};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::{
    backoff::Backoff,
    env::{SeededEnv, SharedEnv},
    failure::Retry,
    queue::Queue,
    reason::Reason,
    sync::lock,
};

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum Error {
    #[error("odd number")]
    Odd,
    #[error("no answer")]
    Lost,
    #[error("deposed")]
    Deposed,
    #[error("status not written")]
    Unreported,
}

impl Failure for Error {
    fn reason(&self) -> Reason {
        match self {
            Self::Odd => const { Reason::new("Odd") },
            Self::Lost => const { Reason::new("Lost") },
            Self::Deposed => const { Reason::new("Deposed") },
            Self::Unreported => const { Reason::new("Unreported") },
        }
    }

    fn retry(&self) -> Retry {
        match self {
            Self::Odd => Retry::OnChange,
            Self::Lost | Self::Unreported => Retry::Backoff,
            Self::Deposed => Retry::EndTerm,
        }
    }
}

/// What happened, in order.
type Log = Mutex<Vec<String>>;

#[derive(Default)]
struct Squares {
    log: Log,
    /// How often `apply` fails for a key.
    lose: Mutex<BTreeMap<u32, u32>>,
    behind: Mutex<BTreeSet<u32>>,
    depose_at: Option<u32>,
    unreported_once: Mutex<BTreeSet<u32>>,
    apply_takes: Duration,
}

impl Squares {
    fn note(&self, text: String) {
        lock(&self.log).push(text);
    }
}

#[async_trait]
impl Controller for Squares {
    type Key = u32;
    type Core = Vec<u32>;
    type Observed = u32;
    type Valid = u32;
    type Plan = BTreeMap<u32, u32>;
    type Applied = u32;
    type Error = Error;

    fn name(&self) -> &'static str {
        "squares"
    }

    fn keys(&self) -> Vec<u32> {
        vec![2, 4]
    }

    fn caught_up(&self, key: &u32, _now: Instant) -> bool {
        !lock(&self.behind).remove(key)
    }

    async fn observe(&self, keys: &BTreeSet<u32>) -> PerKey<Self, u32> {
        self.note(format!("observe {keys:?}"));
        keys.iter().map(|key| (*key, Ok(*key))).collect()
    }

    fn validate(_core: &Vec<u32>, _key: &u32, observed: u32) -> Result<u32, Error> {
        if observed.is_multiple_of(2) { Ok(observed) } else { Err(Error::Odd) }
    }

    fn plan(core: &mut Vec<u32>, batch: BTreeMap<u32, u32>, _now: Instant) -> BTreeMap<u32, u32> {
        core.extend(batch.keys());
        batch.into_iter().map(|(key, valid)| (key, valid * valid)).collect()
    }

    async fn apply(&self, plan: BTreeMap<u32, u32>) -> PerKey<Self, u32> {
        self.note(format!("apply {:?}", plan.values().collect::<Vec<_>>()));
        sleep(self.apply_takes).await;
        let mut lose = lock(&self.lose);
        plan.into_iter()
            .map(|(key, square)| {
                let losses = lose.entry(key).or_default();
                let result = if self.depose_at == Some(key) {
                    Err(Error::Deposed)
                } else if *losses > 0 {
                    *losses -= 1;
                    Err(Error::Lost)
                } else {
                    Ok(square)
                };
                (key, result)
            })
            .collect()
    }

    fn settle(core: &mut Vec<u32>, applied: &PerKey<Self, u32>, _now: Instant) {
        core.retain(|key| applied.get(key).is_none_or(Result::is_ok));
    }

    async fn report(&self, key: &u32, result: &Result<u32, Error>) -> Result<Revisit, Error> {
        self.note(format!("report {key} {result:?}"));
        if lock(&self.unreported_once).remove(key) { Err(Error::Unreported) } else { Ok(Revisit::OnChange) }
    }
}

struct Bench {
    controller: Arc<Squares>,
    core: Arc<Mutex<Vec<u32>>>,
    queue: Queue<u32>,
    registry: Registry,
    driver: Driver<Squares>,
    stop: CancellationToken,
}

fn bench(controller: Squares, options: DriverOptions) -> Bench {
    let env: SharedEnv = Arc::new(SeededEnv::new(7));
    let (controller, core) = (Arc::new(controller), Arc::new(Mutex::new(Vec::new())));
    let queue = Queue::new(env, 3, Backoff::new(Duration::from_secs(2), Duration::from_secs(60)));
    let mut registry = Registry::default();
    let metrics = ControllerMetrics::register(&mut registry);
    let driver = Driver::new(Arc::clone(&controller), Arc::clone(&core), queue.clone(), options, metrics);
    Bench { controller, core, queue, registry, driver, stop: CancellationToken::new() }
}

const OPTIONS: DriverOptions = DriverOptions { batch_size: 10, batches: 1, reports: 1, full_pass: None };

impl Bench {
    /// Runs the driver for so long, in paused time, then stops it.
    async fn run_for(&self, time: Duration) -> Result<(), TermEnded> {
        let stop = async {
            sleep(time).await;
            self.stop.cancel();
        };
        futures::join!(self.driver.run(self.stop.clone()), stop).0
    }

    fn log(&self) -> Vec<String> {
        lock(&self.controller.log).clone()
    }
}

#[tokio::test(start_paused = true)]
async fn a_batch_goes_through_the_steps_and_an_invalid_key_is_reported() {
    let bench = bench(Squares::default(), OPTIONS);
    for key in [2, 3, 4] {
        bench.queue.try_add(key).unwrap();
    }
    bench.run_for(Duration::from_secs(100)).await.unwrap();
    assert_eq!(
        bench.log(),
        ["observe {2, 3, 4}", "apply [4, 16]", "report 2 Ok(4)", "report 3 Err(Odd)", "report 4 Ok(16)"]
    );
    assert!(bench.queue.is_empty());
    assert_eq!(*lock(&bench.core), [2, 4]);
    let mut text = String::new();
    encode(&mut text, &bench.registry).unwrap();
    assert!(text.contains(r#"controller_reconciled_total{controller="squares",outcome="Odd"} 1"#), "{text}");
    assert!(text.contains(r#"controller_reconciled_total{controller="squares",outcome="Done"} 2"#), "{text}");
}

#[tokio::test(start_paused = true)]
async fn a_failed_write_undoes_its_reservation_and_is_tried_again_with_back_off() {
    let bench = bench(Squares { lose: Mutex::new([(2, 3)].into()), ..Squares::default() }, OPTIONS);
    bench.queue.try_add(2).unwrap();
    let start = Instant::now();
    let end = async {
        while lock(&bench.core).is_empty() || !bench.queue.is_empty() {
            sleep(Duration::from_millis(10)).await;
        }
        bench.stop.cancel();
    };
    futures::join!(bench.driver.run(bench.stop.clone()), end).0.unwrap();
    // Pauses of 1..2, 2..4 and 4..8 seconds.
    assert!((7..15).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
    assert_eq!(bench.log().iter().filter(|line| *line == "report 2 Err(Lost)").count(), 3);
    assert_eq!(*lock(&bench.core), [2]);
}

#[tokio::test(start_paused = true)]
async fn a_key_waits_until_the_cache_has_caught_up() {
    let bench = bench(Squares { behind: Mutex::new([2].into()), ..Squares::default() }, OPTIONS);
    bench.queue.try_add(2).unwrap();
    bench.queue.try_add(4).unwrap();
    bench.run_for(Duration::from_secs(5)).await.unwrap();
    let observed: Vec<String> = bench.log().into_iter().filter(|line| line.starts_with("observe")).collect();
    assert_eq!(observed, ["observe {4}", "observe {2}"]);
}

#[tokio::test(start_paused = true)]
async fn what_is_under_way_is_finished_when_the_driver_stops() {
    let bench = bench(Squares { apply_takes: Duration::from_secs(60), ..Squares::default() }, OPTIONS);
    bench.queue.try_add(2).unwrap();
    bench.run_for(Duration::from_secs(1)).await.unwrap();
    assert_eq!(bench.log(), ["observe {2}", "apply [4]", "report 2 Ok(4)"]);
}

#[tokio::test(start_paused = true)]
async fn batches_run_side_by_side_up_to_the_bound() {
    let options = DriverOptions { batch_size: 1, batches: 2, ..OPTIONS };
    let bench = bench(Squares { apply_takes: Duration::from_secs(10), ..Squares::default() }, options);
    for key in [2, 4, 6] {
        bench.queue.try_add(key).unwrap();
    }
    let start = Instant::now();
    let end = async {
        while !bench.queue.is_empty() {
            sleep(Duration::from_millis(100)).await;
        }
        bench.stop.cancel();
    };
    futures::join!(bench.driver.run(bench.stop.clone()), end).0.unwrap();
    assert_eq!(start.elapsed().as_secs(), 20);
    assert_eq!(bench.log()[..4], ["observe {2}", "apply [4]", "observe {4}", "apply [16]"]);
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_term_ends_the_driver_after_the_report() {
    let bench = bench(Squares { depose_at: Some(4), ..Squares::default() }, OPTIONS);
    for key in [2, 4] {
        bench.queue.try_add(key).unwrap();
    }
    let ended = bench.driver.run(bench.stop.clone()).await.unwrap_err();
    assert_eq!(ended.to_string(), "the term of squares is over, seen at 4: deposed");
    assert!(bench.log().contains(&"report 2 Ok(4)".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_report_that_failed_is_made_again_though_the_key_waits_for_a_change() {
    let bench = bench(Squares { unreported_once: Mutex::new([3].into()), ..Squares::default() }, OPTIONS);
    bench.queue.try_add(3).unwrap();
    bench.run_for(Duration::from_secs(30)).await.unwrap();
    assert_eq!(bench.log(), ["observe {3}", "report 3 Err(Odd)", "observe {3}", "report 3 Err(Odd)"]);
}

#[tokio::test(start_paused = true)]
async fn the_full_pass_brings_every_key_back() {
    let options = DriverOptions { full_pass: Some(Duration::from_secs(60)), ..OPTIONS };
    let bench = bench(Squares::default(), options);
    bench.run_for(Duration::from_secs(150)).await.unwrap();
    let observed: Vec<String> = bench.log().into_iter().filter(|line| line.starts_with("observe")).collect();
    assert_eq!(observed, ["observe {2, 4}"; 2]);
}
