//! The fault laboratory over the operators that ship: what is explored, and how a failure is replayed, stands in
//! docs/testing.md.

use std::{env, sync::OnceLock, time::Duration};

use basal_objects::{
    object::{Object, resources},
    port::Objects as _,
};
use basal_runtime::outcome::Outcome;
use basal_sim::{
    fault::{Fault, FaultPlan},
    laboratory::{Baseline, Report, baselines, explore, replay, run},
    process::Restart,
    workload::{
        Schedule, Store, generate, named,
        perform::{Operators, Start},
    },
    world::World,
};
use futures::FutureExt as _;

use crate::cluster::{Over, Setup, definitions, one_operator};

/// Shorter than in the other tests: it is waited for in every run.
const QUARANTINE: Duration = Duration::from_secs(20);

/// How long a CiliumNode that never had a Node stays.
const NODE_GC: Duration = Duration::from_secs(300);

/// What `make test` runs of each kind.
const PAIRS: u64 = 200;
const DRAWN: u64 = 1_600;
const DRAWN_FOR_EACH: u64 = 9;

/// A block became free though pods ran in it, when etcd was slow while its time of rest ended: nobody had looked for pods yet.
/// A node that was gone kept its blocks at rest until the next full pass, because its release was written in two steps; one
/// that waited for a block at rest was told the seconds that were left, over and over; one that left before a late cache had
/// it kept its blocks until the next full pass; and where the laboratory itself judged too early, or took what was put back,
/// or was on its way meanwhile, for what had left.
const FOUND: [&str; 24] = [
    r#"{"seed":1,"store":"custom-resources","leaders":"one","families":"both","steps":[{"join":2},{"leave":2},{"join":3}],"faults":{"1":{"fail-over":3}}}"#,
    r#"{"seed":1,"store":"etcd","leaders":"one","families":"both","steps":[{"join":2},{"join":1},{"leave":2}],"faults":{"44":"overtake"}}"#,
    r#"{"seed":21,"store":"etcd","leaders":"one","families":"one","steps":[{"join":2},{"leave":2},{"kill":"b"}],"faults":{"215":{"rewind":2}}}"#,
    r#"{"seed":4,"store":"etcd","leaders":"one","families":"one","steps":[{"join":2}],"faults":{"9":{"fail-over":3},"148":{"restore":2}}}"#,
    r#"{"seed":102,"store":"etcd","leaders":"two","families":"one","steps":[{"join":1},{"wait":"2s"},{"delete-cilium-node":1},{"end-pods":1},{"start-pod":1},{"leave":1},{"save":1}],"faults":{"16":"unavailable","224":{"restore":2}}}"#,
    r#"{"seed":69,"store":"etcd","leaders":"one","families":"one","steps":[{"join":1},{"start-pod":1},{"join":2},{"join":2},{"kill":"a"},{"join":3},{"leave":3}],"faults":{"122":{"stall":"60s"},"167":{"stall":"60s"}}}"#,
    r#"{"seed":6,"store":"etcd","leaders":"one","families":"one","steps":[{"join":1},{"leave":1},{"join":2},{"join":3},{"join":4},{"join":5}],"faults":{"64":{"delay":"12s"},"134":{"restore":10}}}"#,
    r#"{"seed":14,"store":"etcd","leaders":"one","families":"both","steps":[{"join":1},{"wait":"31s"},{"leave":1}],"faults":{"9":"drop-event","192":"crash-after"}}"#,
    r#"{"seed":1,"store":"etcd","leaders":"one","families":"both","steps":[],"faults":{"22":{"restore":2}}}"#,
    r#"{"seed":67,"store":"etcd","leaders":"two","families":"both","steps":[{"join":1},{"start-pod":1},{"forget":1}],"faults":{"28":{"fail-over":20}}}"#,
    r#"{"seed":3,"store":"etcd","leaders":"one","families":"one","steps":[{"join":1},{"join":2},{"join":3},{"join":4},{"wait":"2s"},{"start-pod":1},{"join":5},{"pool":"appended"},{"pool":"shrunk"},{"leave":2},{"pool":"remasked"}],"faults":{"196":{"rewind":2}}}"#,
    r#"{"seed":98,"store":"etcd","leaders":"one","families":"one","steps":[{"join":1},{"save":1},{"start-pod":1},{"leave":1},{"join":3},{"forget":2},{"put-back":1}],"faults":{"87":"crash-before"}}"#,
    r#"{"seed":167,"store":"custom-resources","leaders":"one","families":"one","steps":[{"join":1},{"join":2},{"wait":"38s"},{"leave":2}],"faults":{"49":"crash-before","116":{"fail-over":20},"149":{"gap":"15s"}}}"#,
    r#"{"seed":497,"store":"etcd","leaders":"two","families":"both","steps":[{"join":1},{"wait":"25s"},{"join":2},{"leave":2}],"faults":{"90":"drop-event","107":"crash-after","183":{"stall":"60s"}}}"#,
    r#"{"seed":298,"store":"etcd","leaders":"two","families":"both","steps":[{"join":1},{"forget":1}],"faults":{"490":{"rewind":10}}}"#,
    r#"{"seed":660,"store":"etcd","leaders":"two","families":"one","steps":[{"join":1},{"start-pod":1},{"delete-cilium-node":1},{"forget":1}],"faults":{"45":{"restore":10},"209":{"lag":"20s"},"635":{"delay":"12s"}}}"#,
    r#"{"seed":729,"store":"etcd","leaders":"one","families":"one","steps":[{"join":1},{"edit":[1,"foreign"]},{"join":2},{"join":3},{"put-back":3},{"join":4},{"put-back":4},{"start-pod":1},{"edit":[3,"free"]}],"faults":{"86":"crash-after","109":{"rewind":10}}}"#,
    r#"{"seed":166,"store":"etcd","leaders":"one","families":"one","steps":[{"join":1},{"join":2},{"edit":[2,{"others":1}]}],"faults":{"5":"lose-request","50":{"lag":"20s"},"61":{"rewind":2}}}"#,
    r#"{"seed":311,"store":"etcd","leaders":"one","families":"one","steps":[{"join":1},{"join":2},{"start-pod":2},{"join":3},{"forget":2},{"join":4},{"join":5}],"faults":{}}"#,
    r#"{"seed":44,"store":"etcd","leaders":"one","families":"both","steps":[],"faults":{"58":{"rewind":10}}}"#,
    r#"{"seed":1456,"store":"etcd","leaders":"two","families":"one","steps":[{"join":1},{"leave":1}],"faults":{"2":{"stall":"60s"}}}"#,
    r#"{"seed":1494,"store":"etcd","leaders":"one","families":"one","steps":[{"join":1},{"save":1},{"leave":1},{"join":3},{"kill":"b"},{"put-back":1},{"kill":"a"}],"faults":{"663":{"lose-lease":"8s"}}}"#,
    r#"{"seed":1741,"store":"etcd","leaders":"two","families":"one","steps":[{"join":1},{"edit":[1,"garbage"]},{"wait":"3s"},{"join":2},{"forget":1},{"start-pod":1}],"faults":{"21":{"fail-over":3},"153":{"rewind":10}}}"#,
    r#"{"seed":2476,"store":"etcd","leaders":"two","families":"both","steps":[{"join":1},{"start-pod":1},{"edit":[1,"free"]},{"join":2},{"leave":2}],"faults":{"131":{"rewind":10}}}"#,
];

const OPERATORS: Operators = Operators { prepare, start, cluster: "default", quarantine: QUARANTINE, node_gc: NODE_GC };

/// The definitions are there already, as in a cluster that runs for a while; without their schemas, which the model does not
/// look at and which are most of what there is to copy.
fn prepare(world: &World) {
    static DEFINITIONS: OnceLock<Vec<Object>> = OnceLock::new();
    let without_schema = |mut definition: Object| {
        for version in definition.0["spec"]["versions"].as_array_mut().into_iter().flatten() {
            version["schema"].take();
        }
        definition
    };
    for definition in DEFINITIONS.get_or_init(|| definitions().into_iter().map(without_schema).collect()) {
        let created = world.objects().create(resources::CRD, definition.clone()).now_or_never();
        assert!(matches!(created, Some(Outcome::Done(_))));
    }
}

fn start(world: &World, start: &Start<'_>) {
    let over = match start.store {
        Store::Etcd => Over::Etcd,
        Store::CustomResources => Over::CustomResources,
    };
    let setup = Setup {
        quarantine: QUARANTINE,
        node_gc: Some(NODE_GC),
        lease: Some(start.lease.to_owned()),
        ..Setup::without_definitions(over, start.pool.clone())
    };
    world.start(start.name, Restart::After(Duration::from_secs(2)), move |ports| one_operator(ports, setup.clone()));
}

fn sound<T>(result: Result<T, Box<Report>>) -> T {
    result.unwrap_or_else(|report| panic!("{report}"))
}

fn number(name: &str) -> Option<u64> {
    env::var(name).ok().filter(|text| !text.is_empty()).map(|text| text.parse().unwrap())
}

/// So many random schedules over a store, a few draws of faults over each.
fn drawn(store: Store, seed: u64, runs: u64) -> usize {
    let schedules: Vec<Schedule> =
        (0..runs.div_ceil(DRAWN_FOR_EACH + 1)).map(|n| generate::schedule(seed.wrapping_add(n), store)).collect();
    let bases = sound(baselines(&OPERATORS, &schedules));
    let faulty = faults_over(&bases, |n, base| base.drawn_faults(seed.wrapping_add(n), DRAWN_FOR_EACH, 4));
    sound(explore(&OPERATORS, &faulty, &bases))
}

/// What is made of each baseline, with the number of that.
fn faults_over(bases: &[Baseline], make: impl Fn(u64, &Baseline) -> Vec<Schedule>) -> Vec<(usize, Schedule)> {
    let numbered = bases.iter().enumerate();
    numbered.flat_map(|(n, base)| make(n as u64, base).into_iter().map(move |schedule| (n, schedule))).collect()
}

/// Every single fault of some kinds at every call of one schedule.
fn singles(store: Store, schedule: Schedule, wanted: impl Fn(Fault) -> bool) -> usize {
    let bases = [sound(Baseline::of(&OPERATORS, &Schedule { store, ..schedule }))];
    sound(explore(&OPERATORS, &faults_over(&bases, |_, base| base.single_faults(&wanted)), &bases))
}

fn pairs(store: Store) -> usize {
    let schedules: Vec<Schedule> =
        named::all().into_iter().map(|(_, schedule)| Schedule { store, ..schedule }).collect();
    let bases = sound(baselines(&OPERATORS, &schedules));
    sound(explore(&OPERATORS, &faults_over(&bases, |_, base| base.drawn_faults(17, PAIRS, 2)), &bases))
}

#[test]
fn every_fault_of_every_call_in_the_life_of_a_block_over_etcd() {
    assert!(singles(Store::Etcd, named::life_of_a_block(), |fault| !fault.is_in_the_world()) > 1000);
}

#[test]
fn every_fault_around_every_call_in_the_life_of_a_block_over_etcd() {
    assert!(singles(Store::Etcd, named::life_of_a_block(), Fault::is_in_the_world) > 1000);
}

#[test]
fn every_fault_of_every_call_in_the_life_of_a_block_over_custom_resources() {
    assert!(singles(Store::CustomResources, named::life_of_a_block(), |fault| !fault.is_in_the_world()) > 1000);
}

#[test]
fn every_fault_around_every_call_in_the_life_of_a_block_over_custom_resources() {
    assert!(singles(Store::CustomResources, named::life_of_a_block(), Fault::is_in_the_world) > 1000);
}

/// A leader that wakes up late has the chance to give away what is somebody else's by then.
#[test]
fn every_late_wake_up_while_others_want_the_block() {
    for store in Store::ALL {
        assert!(singles(store, named::full_pool(), |fault| matches!(fault, Fault::Stall(_))) > 100);
    }
}

#[test]
fn pairs_of_faults_in_every_named_schedule_over_etcd() {
    assert!(pairs(Store::Etcd) > 1000);
}

#[test]
fn pairs_of_faults_in_every_named_schedule_over_custom_resources() {
    assert!(pairs(Store::CustomResources) > 1000);
}

/// What is found must be found again.
#[test]
fn one_schedule_gives_one_trace() {
    for store in Store::ALL {
        let schedule = Schedule { store, faults: FaultPlan::at(60, Fault::CrashAfter), ..named::life_of_a_block() };
        let lines = || run(&OPERATORS, &schedule, true).trace.iter().map(ToString::to_string).collect::<Vec<_>>();
        let first = lines();
        for _ in 0..10 {
            assert_eq!(lines(), first);
        }
    }
}

/// Schedules that failed once.
#[test]
fn what_was_found_before() {
    for text in FOUND {
        sound(replay(&OPERATORS, &text.parse().unwrap()));
    }
}

#[test]
fn random_faults_in_random_schedules() {
    // `make faults` says how many, from which seed on, or names one schedule.
    if let Some(text) = env::var("FAULTS_SCHEDULE").ok().filter(|text| !text.is_empty()) {
        return sound(replay(&OPERATORS, &text.parse().unwrap()));
    }
    let (seed, runs) = (number("FAULTS_SEED").unwrap_or(1), number("FAULTS_SCHEDULES").unwrap_or(DRAWN));
    for store in Store::ALL {
        println!("{} schedules over {store:?}", drawn(store, seed, runs / 2));
    }
}
