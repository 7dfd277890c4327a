//! Leadership, events and custom resource definitions at a real API server.

use std::{sync::Arc, time::Duration};

use basal_crds::resources::SCHEMA_VERSION_LABEL;
use basal_objects::{
    crd_install::{self, InstallError},
    events::{EventRecorder, EventType, Happening, Regarding, Reporter},
    leadership::{Elector, LeaderWrites, Leadership, LeadershipOptions},
    object::{
        Object, ObjectKey,
        resources::{CILIUM_NODE, CRD, EVENT, LEASE, NODE},
    },
    port::{Freshness, Objects, Refusal, Scope},
};
use basal_runtime::{outcome::Outcome, reason::Reason};
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{LIMIT, connect, created, env, named, node, patch, start, until, within};

#[tokio::test(flavor = "multi_thread")]
async fn two_candidates_lead_one_after_the_other() {
    let mut server = start();
    let objects: Arc<dyn Objects> = Arc::new(connect(&server, "admin").await);
    let candidate = |name: &str| {
        let options = LeadershipOptions {
            lease_duration: Duration::from_secs(6),
            renew_deadline: Duration::from_secs(4),
            retry_period: Duration::from_millis(500),
            ..LeadershipOptions::new("default", name.to_owned())
        };
        Elector::new(Arc::clone(&objects), env(), options)
    };
    let (first, second) = (candidate("first"), candidate("second"));
    let (stop_first, stop_second) = (CancellationToken::new(), CancellationToken::new());
    let (mut first_leads, mut second_leads) = (first.leadership(), second.leadership());
    let leads = |leadership: &Leadership| leadership.term(Instant::now()).is_some();

    let first_task = first.start(stop_first.clone());
    let led = within("the first leader", first_leads.wait_for(leads)).await.unwrap().clone();
    assert!(within("the second look", first.holds_lease()).await.unwrap());
    let term = led.term(Instant::now()).unwrap().id;
    let writes = LeaderWrites::new(Arc::clone(&objects), first.leadership(), term);
    assert!(writes.create(NODE, node("by-the-leader")).await.is_done());

    let second_task = second.start(stop_second.clone());
    let standby = Leadership::Standby { holder: Some("first".to_owned()) };
    within("the standby", second_leads.wait_for(|leadership| *leadership == standby)).await.unwrap();
    assert!(!second.holds_lease().await.unwrap());

    // Released, so the second leads at once; the first one's term is over.
    stop_first.cancel();
    within("the release", first_task.join()).await;
    within("the second leader", second_leads.wait_for(leads)).await.unwrap();
    let refused = writes.create(NODE, node("too-late")).await;
    assert!(matches!(refused, Outcome::Refused(Refusal::Unavailable(_))), "{refused:?}");
    assert_eq!(objects.get(NODE, &named("too-late")).await, Ok(None));
    let lease = objects.get(LEASE, &ObjectKey::namespaced("default", "cilium-operator-resource-lock")).await;
    let lease = lease.unwrap().unwrap();
    assert_eq!(lease.0["spec"]["holderIdentity"], "second");
    assert_eq!(lease.0["spec"]["leaseTransitions"], 1);
    assert_eq!(lease.0["spec"]["leaseDurationSeconds"], 6);

    // Without a server the term ends by the clock.
    server.kill().unwrap();
    within("the end of the term", second_leads.wait_for(|leadership| !leads(leadership))).await.unwrap();
    stop_second.cancel();
    within("the end of the second", second_task.join()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_shown_by_describe_and_counted() {
    let server = start();
    let objects: Arc<dyn Objects> = Arc::new(connect(&server, "admin").await);
    let node = created(objects.as_ref(), "n1").await;
    let reporter = Reporter { controller: "basal-operator", instance: "operator-1".to_owned() };
    let (recorder, task) = EventRecorder::start(Arc::clone(&objects), &env(), reporter);
    let happening = |uid: &str| Happening {
        regarding: Regarding { resource: NODE, key: named("n1"), uid: uid.to_owned() },
        event_type: EventType::Warning,
        reason: Reason::new("PoolExhausted"),
        action: Reason::new("GrantBlock"),
        note: "no free block of /24 in 10.0.0.0/16; add a CIDR to cluster-pool-ipv4-cidr".to_owned(),
        shared: None,
    };
    recorder.record(happening(node.uid()));
    recorder.record(happening(node.uid()));
    let scope = Scope::default();
    let mut events = Vec::new();
    until("the event", async || {
        events = objects.list(EVENT, &scope, Freshness::Quorum).await.unwrap().items;
        events.iter().any(|event| event.0["reason"] == "PoolExhausted")
    })
    .await;
    assert_eq!(events.iter().filter(|event| event.0["reason"] == "PoolExhausted").count(), 1);
    let text = server.kubectl().unwrap().args(["describe", "node", "n1"]).text().unwrap();
    let line = text.lines().find(|line| line.contains("PoolExhausted")).unwrap_or_else(|| panic!("{text}"));
    assert!(line.contains("Warning") && line.contains("basal-operator") && line.contains("add a CIDR"), "{line}");
    // The second one is counted in the first one's series.
    until("the series", async || {
        let events = objects.list(EVENT, &scope, Freshness::Quorum).await.unwrap().items;
        events.iter().any(|event| event.0.pointer("/series/count") == Some(&json!(2)))
    })
    .await;
    assert_eq!(recorder.dropped(), 0);
    drop(recorder);
    within("the end of the task", task.join()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_many_tell_of_is_one_event() {
    let server = start();
    let objects: Arc<dyn Objects> = Arc::new(connect(&server, "admin").await);
    let node = created(objects.as_ref(), "n1").await;
    let happening = |edition: &str| Happening {
        regarding: Regarding { resource: NODE, key: named("n1"), uid: node.uid().to_owned() },
        event_type: EventType::Warning,
        reason: Reason::new("NotEnforced"),
        action: Reason::new("Watched"),
        note: "it is not".to_owned(),
        shared: Some(format!("not-enforced.{}.{edition}", node.uid())),
    };
    let reporter = |instance: &str| Reporter { controller: "basal-agent", instance: instance.to_owned() };
    let (mut recorders, mut tasks) = (Vec::new(), Vec::new());
    for instance in ["one", "two", "three"] {
        let (recorder, task) = EventRecorder::start(Arc::clone(&objects), &env(), reporter(instance));
        recorder.record(happening("1"));
        recorder.record(happening("2"));
        recorders.push(recorder);
        tasks.push(task);
    }
    let told = async || {
        let events = objects.list(EVENT, &Scope::default(), Freshness::Quorum).await.unwrap().items;
        events.into_iter().filter(|event| event.0["reason"] == "NotEnforced").collect::<Vec<_>>()
    };
    until("both editions", async || told().await.len() >= 2).await;
    drop(recorders);
    for task in tasks {
        within("the end of the task", task.join()).await;
    }
    let events = told().await;
    assert_eq!(events.len(), 2, "one of each edition: {events:?}");
}

fn definitions() -> Vec<Object> {
    basal_crds::crds().into_iter().map(|definition| Object(definition.object)).collect()
}

fn schema_version(definition: &Object) -> String {
    definition.labels().get(SCHEMA_VERSION_LABEL).copied().unwrap_or_default().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn definitions_are_installed_and_upgraded_but_never_downgraded() {
    let server = start();
    let objects = connect(&server, "admin").await;
    let (env, ours) = (env(), definitions());
    crd_install::install(&objects, env.as_ref(), &ours, LIMIT).await.unwrap();
    let node =
        Object(json!({"apiVersion": "cilium.io/v2", "kind": "CiliumNode", "metadata": {"name": "n"}, "spec": {}}));
    assert!(objects.create(CILIUM_NODE, node).await.is_done());

    let read = async |name: &str| objects.get(CRD, &named(name)).await.unwrap().unwrap();
    let relabel = async |name: &str, version: Value| {
        let body = json!({
            "metadata": {"labels": {SCHEMA_VERSION_LABEL: version, "theirs": "kept"}},
            "spec": {"names": {"categories": ["theirs"]}},
        });
        assert!(objects.patch(CRD, &named(name), patch(&read(name).await, body)).await.is_done());
    };
    let (old, new) = (ours[0].name(), ours[1].name());
    relabel(old, json!("1.0.0")).await;
    relabel(new, json!("99.0.0")).await;
    crd_install::install(&objects, env.as_ref(), &ours, LIMIT).await.unwrap();
    let upgraded = read(old).await;
    assert_eq!(schema_version(&upgraded), schema_version(&ours[0]));
    assert_eq!(upgraded.labels().get("theirs"), Some(&"kept"));
    assert_eq!(upgraded.0["spec"]["names"]["categories"], ours[0].0["spec"]["names"]["categories"]);
    let newer = read(new).await;
    assert_eq!(schema_version(&newer), "99.0.0");
    assert_eq!(newer.0["spec"]["names"]["categories"], json!(["theirs"]));
    // Nothing is written when nothing is to be done.
    crd_install::install(&objects, env.as_ref(), &ours, LIMIT).await.unwrap();
    assert_eq!(read(old).await, upgraded);

    let nobody = connect(&server, "nobody").await;
    let error = crd_install::install(&nobody, env.as_ref(), &ours, LIMIT).await.unwrap_err();
    assert!(matches!(&error, InstallError::Read { name, .. } if name == old), "{error}");
}
