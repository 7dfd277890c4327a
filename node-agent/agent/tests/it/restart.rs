//! An agent that is started again.

use std::collections::BTreeSet;

use basal_agent::{
    endpoint::record::EndpointRecord,
    journal::{Journal as _, file::FileJournal},
};
use basal_cni::api::{Answer, Request};
use basal_objects::object::resources;
use serde_json::json;

use crate::world::{World, attachment};

#[tokio::test(start_paused = true)]
async fn a_restart_changes_nothing_in_the_kernel() {
    let mut world = World::ready().await;
    let pod = world.pod("web-0", json!({"app": "web"})).await;
    world.add("c1", Some(pod)).await;
    world.until("the object is there", || !world.objects.all(&resources::CILIUM_ENDPOINT).is_empty()).await;
    world.stop().await;
    let before = world.kernel.observed();
    world.kernel.take_log();

    world.start();
    world.until_ready().await;
    assert_eq!(world.kernel.take_log(), []);
    assert_eq!(world.kernel.observed(), before);
    let Answer::Endpoints(endpoints) = world.ask(Request::Endpoints).await else { panic!("no endpoints") };
    assert_eq!(
        endpoints.iter().map(|e| (e.pod.as_str(), e.state.as_str())).collect::<Vec<_>>(),
        [("shop/web-0", "ready")]
    );

    assert_eq!(world.del("c1").await, Answer::Deleted);
    world.stop_clean().await;
}

#[tokio::test(start_paused = true)]
async fn an_add_that_was_cut_off_is_undone_at_the_next_start() {
    let mut world = World::ready().await;
    let (stream, answer) = world.offer("c1", None).await;
    assert!(matches!(answer, Answer::Added(_)), "{answer:?}");
    world.stop().await;
    drop(stream);
    world.start();
    world.until_ready().await;
    world.stop_clean().await;
}

/// A record of a newer agent, and one that was cut off.
#[tokio::test(start_paused = true)]
async fn a_record_that_cannot_be_read_keeps_its_pod_connected() {
    keeps_its_pod(|_| b"basal-endpoint 2 x\n{}\n".to_vec()).await;
    keeps_its_pod(|record| record[..record.len() / 2].to_vec()).await;
    keeps_its_pod(|_| Vec::new()).await;
}

async fn keeps_its_pod(damage: fn(&[u8]) -> Vec<u8>) {
    let mut world = World::ready().await;
    let result = world.add("c1", None).await;
    world.stop().await;
    let path = world.path(&format!("run/state/endpoints/{}.endpoint", result.host.name));
    std::fs::write(&path, damage(&std::fs::read(&path).unwrap())).unwrap();
    let before = world.kernel.observed();
    world.kernel.take_log();

    world.start();
    world.until_ready().await;
    assert_eq!(world.kernel.observed(), before);
    let next = world.add("c2", None).await;
    assert_ne!(next.addresses[0].address, result.addresses[0].address);

    assert_eq!(world.del("c1").await, Answer::Deleted);
    assert_eq!(world.del("c2").await, Answer::Deleted);
    world.stop_clean().await;
}

/// As from a backup of the folder that was laid over it.
#[tokio::test(start_paused = true)]
async fn of_two_records_with_one_address_one_stands_and_gc_finds_both() {
    let mut world = World::ready().await;
    let result = world.add("c1", None).await;
    world.stop().await;
    let journal = FileJournal::open(&world.path("run/state/endpoints")).unwrap();
    let record = journal.load().await.unwrap().into_values().next().unwrap().unwrap();
    assert!(journal.put(&EndpointRecord { attachment: attachment("c2"), ..record }).await.is_done());
    world.start();
    world.until_ready().await;
    let Answer::Ipam(report) = world.ask(Request::Ipam).await else { panic!("no report") };
    let address = result.addresses[0].address.addr();
    assert_eq!(report.addresses.iter().filter(|used| used.ip == address).count(), 1);
    let answer = world.ask(Request::Gc { valid: BTreeSet::new() }).await;
    assert!(matches!(answer, Answer::Collected { .. }), "{answer:?}");
    world.stop_clean().await;
}

#[tokio::test(start_paused = true)]
async fn the_object_of_an_endpoint_that_an_earlier_run_ended_goes() {
    let mut world = World::ready().await;
    let pod = world.pod("web-0", json!({"app": "web"})).await;
    let result = world.add("c1", Some(pod)).await;
    world.until("the object is there", || !world.objects.all(&resources::CILIUM_ENDPOINT).is_empty()).await;
    world.stop().await;
    std::fs::remove_file(world.path(&format!("run/state/endpoints/{}.endpoint", result.host.name))).unwrap();

    world.start();
    world.until_ready().await;
    world.until("the object is gone", || world.objects.all(&resources::CILIUM_ENDPOINT).is_empty()).await;
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn after_a_reboot_nothing_is_left_and_gc_has_nothing_to_do() {
    let mut world = World::ready().await;
    world.add("c1", None).await;
    world.stop().await;
    std::fs::write(world.path("run/state/endpoints/lxc0.draft"), "cut off").unwrap();
    world.reboot();
    world.start();
    world.until_ready().await;
    let answer = world.ask(Request::Gc { valid: BTreeSet::new() }).await;
    assert_eq!(answer, Answer::Collected { removed: BTreeSet::new() });
    world.stop_clean().await;
}

/// An agent of a version whose programs the kernel does not take.
#[tokio::test(start_paused = true)]
async fn programs_that_are_refused_leave_those_that_run() {
    let mut world = World::ready().await;
    world.add("c1", None).await;
    world.stop().await;
    let before = world.kernel.observed().state;

    world.kernel.refuse_programs(Some("R0 invalid mem access 'scalar'"));
    // Another constant makes another set.
    world.arguments = vec!["--enable-host-legacy-routing=false"];
    world.start();
    let told = || world.readiness.pending().iter().any(|pending| pending.reason.contains("R0 invalid mem access"));
    world.until("the verifier's words are told", told).await;
    tokio::time::sleep(std::time::Duration::from_secs(300)).await;
    assert!(told() && !world.is_ready());
    let after = world.kernel.observed().state;
    assert_eq!((&after.programs, &after.hooks), (&before.programs, &before.hooks));

    world.kernel.refuse_programs(None);
    world.until_ready().await;
    let after = world.kernel.observed().state;
    assert!(after.programs.len() == 1 && after.programs.is_disjoint(&before.programs), "{:?}", after.programs);
    assert!(after.hooks.values().all(|hash| after.programs.contains(hash)));
    assert_eq!(world.del("c1").await, Answer::Deleted);
    world.stop_clean().await;
}
