//! A living cluster goes from custom resources to etcd and back (docs/operations.md, "Change the store").

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{env, thread};

use anyhow::{anyhow, ensure};
use basal_e2e::cluster::{BasalOptions, Cluster, NAMESPACE};
use basal_e2e::say::say;
use serde_json::{Value, json};

use crate::flow::Flow;
use crate::kills::SECONDS;
use crate::suite::{on_its_own, values};
use crate::traffic::{identities, rows};
use crate::view::{IP_RECORDS, all_know_the_others, eventually, keys, pod_cidrs, text};
use crate::workload::{Pod, delete, deploy};

/// Whether somebody asks for it: it takes longer than `make test` has time for.
pub(crate) fn is_asked() -> bool {
    env::var_os(SECONDS).is_some()
}

/// Boots a cluster of its own without etcd. While its pods talk to each other the claims are moved to etcd and the agents
/// are changed, and everything back again: nothing is lost, no pod restarts, blocks and identities stay, rows of pods never
/// go.
pub(crate) fn there_and_back() -> anyhow::Result<()> {
    on_its_own("store", with(json!({"enabled": false})), |cluster| exercise(cluster))
}

/// One agent after the other, so that both kinds run for a while.
fn with(etcd: Value) -> Value {
    let mut values = values();
    values["etcd"] = etcd;
    values["updateStrategy"] = json!({"rollingUpdate": {"maxUnavailable": 1}});
    values
}

/// What must be the same in the end.
#[derive(Debug, PartialEq, Eq)]
struct Before {
    blocks: BTreeMap<String, Vec<String>>,
    identities: BTreeMap<&'static str, u64>,
    restarts: BTreeMap<String, i64>,
}

fn look(cluster: &Cluster, pods: &[Pod]) -> anyhow::Result<Before> {
    let mut blocks = BTreeMap::new();
    for node in cluster.nodes()? {
        blocks.insert(node.name().to_owned(), pod_cidrs(cluster, node.name())?);
    }
    let identities = identities(cluster, &[("green", pods)])?;
    let mut restarts = BTreeMap::new();
    for pod in cluster.list(&["pods", "-n", "default", "-l", "app in (green, steady)"])? {
        let statuses = pod.pointer("/status/containerStatuses").and_then(Value::as_array).into_iter().flatten();
        let count = statuses.filter_map(|status| status["restartCount"].as_i64()).sum();
        restarts.insert(text(&pod, "/metadata/uid")?.to_owned(), count);
    }
    Ok(Before { blocks, identities, restarts })
}

fn exercise(cluster: &Cluster) -> anyhow::Result<()> {
    let pods = deploy(cluster, "green", 3)?;
    let mut flow = Flow::start(cluster)?;
    let result = change_twice(cluster, &pods, &mut flow);
    result.and(flow.stop(cluster))
}

fn change_twice(cluster: &Cluster, pods: &[Pod], flow: &mut Flow) -> anyhow::Result<()> {
    let before = eventually("the identity of the Deployment", || look(cluster, pods))?;
    for node in cluster.nodes()? {
        eventually("rows of pods", || rows(cluster, &node, &[("green", pods)], &before.identities))?;
    }
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let watch = scope.spawn(|| rows_stay(cluster, pods, &before.identities, &over));
        let moved = to_etcd(cluster, pods, &before)
            .and_then(|()| flow.check(cluster))
            .and_then(|()| to_custom_resources(cluster))
            .and_then(|()| flow.check(cluster));
        over.store(true, Ordering::Relaxed);
        let looks = watch.join().map_err(|_panic| anyhow!("the watch over rows has panicked"))?;
        moved?;
        say(format!("  the rows of pods were looked at {} times", looks?));
        anyhow::Ok(())
    })?;
    let after = look(cluster, pods)?;
    ensure!(after == before, "before {before:?}, after {after:?}");
    Ok(())
}

/// Looks again and again whether every node has a row for each pod.
fn rows_stay(
    cluster: &Cluster,
    pods: &[Pod],
    identities: &BTreeMap<&'static str, u64>,
    over: &AtomicBool,
) -> anyhow::Result<usize> {
    let mut looks = 0;
    while !over.load(Ordering::Relaxed) {
        for node in cluster.nodes()? {
            match rows(cluster, &node, &[("green", pods)], identities) {
                Ok(()) => looks += 1,
                Err(error) if error.to_string().contains("tunnelendpoint=") => return Err(error),
                // An agent that is being replaced answers nothing.
                Err(_) => {}
            }
        }
        thread::sleep(Duration::from_millis(500));
    }
    ensure!(looks > 0, "no agent answered");
    Ok(looks)
}

fn ask(cluster: &Cluster, spec: &Value) -> anyhow::Result<()> {
    let patch = json!({"spec": spec}).to_string();
    cluster.kubectl()?.args(["patch", "ledger", "default", "--type=merge", "-p", &patch]).done()
}

/// Waits until a store is the active one, and agents can be changed.
fn moved(cluster: &Cluster, store: &str) -> anyhow::Result<()> {
    for condition in [format!("jsonpath={{.spec.store}}={store}"), "condition=Ready".to_owned()] {
        let condition = format!("--for={condition}");
        cluster.kubectl()?.args(["wait", "ledger/default", &condition, "--timeout=120s"]).done()?;
    }
    Ok(())
}

fn install(cluster: &Cluster, etcd: Value) -> anyhow::Result<()> {
    cluster.install_basal(&BasalOptions { values: with(etcd) })
}

/// Waits until the Ledger says that all agents are changed, and each knows the others.
fn agents_are_changed(cluster: &Cluster) -> anyhow::Result<()> {
    eventually("the Ledger to count every agent", || {
        let ledger = cluster.get(&["ledger", "default"])?;
        let conditions = ledger.pointer("/status/conditions").and_then(Value::as_array).into_iter().flatten();
        let ready: Vec<&Value> = conditions.filter(|condition| condition["type"] == "Ready").collect();
        ensure!(ready.iter().any(|ready| ready["reason"] == "AgentsChanged"), "{ready:?}");
        Ok(())
    })?;
    all_know_the_others(cluster)
}

fn to_etcd(cluster: &Cluster, pods: &[Pod], before: &Before) -> anyhow::Result<()> {
    ask(cluster, &json!({"moveTo": "etcd"}))?;
    install(cluster, json!({"agents": "none"}))?;
    moved(cluster, "etcd")?;
    install(cluster, json!({"agents": "moving"}))?;
    agents_are_changed(cluster)?;
    ask(cluster, &json!({"leaving": null}))?;
    install(cluster, json!({"agents": "all"}))?;
    moved(cluster, "etcd")?;
    let now = look(cluster, pods)?;
    ensure!(now == *before, "before {before:?}, with etcd {now:?}");
    let records = keys(cluster, IP_RECORDS)?;
    for address in pods.iter().flat_map(|pod| &pod.addresses) {
        ensure!(records.contains(&format!("{IP_RECORDS}{address}")), "no record of {address} among {records:?}");
    }
    // Fails with what it finds.
    let check = ["basal", "ipam", "check", "--config-dir=/tmp/cilium/config-map"];
    cluster.exec(NAMESPACE, "deploy/basal-operator", &check)?;
    deploy(cluster, "blue", 3).map(drop)
}

fn to_custom_resources(cluster: &Cluster) -> anyhow::Result<()> {
    ask(cluster, &json!({"moveTo": "custom-resources"}))?;
    moved(cluster, "custom-resources")?;
    install(cluster, json!({"agents": "none"}))?;
    agents_are_changed(cluster)?;
    install(cluster, json!({"enabled": false}))?;
    eventually("nothing of etcd to be left in the Ledger", || {
        let ledger = cluster.get(&["ledger", "default"])?;
        ensure!(ledger["spec"].get("leaving").is_none(), "{}", ledger["spec"]);
        ensure!(ledger["spec"]["store"] == "custom-resources", "{}", ledger["spec"]);
        Ok(())
    })?;
    delete(cluster, &["deployment", "blue"])?;
    deploy(cluster, "red", 3).map(drop)
}
