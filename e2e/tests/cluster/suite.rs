//! The cluster that the scenarios share.

use std::env;
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, anyhow, bail};
use basal_e2e::cluster::{self, BasalOptions, Cluster, ClusterName, Cni, Options};
use basal_e2e::say::say;
use basal_e2e::wait::Stopwatch;
use libtest_mimic::{Failed, Trial};
use serde_json::{Value, json};

/// Keeps the cluster after the run, and takes over one that was kept.
const KEEP: &str = "BASAL_E2E_KEEP";

/// What a scenario is: it may change the cluster as long as the next ones find it working.
pub(crate) type Scenario = fn(&mut Cluster) -> anyhow::Result<()>;

/// Boots the cluster for the first scenario that asks.
pub(crate) struct Suite {
    name: ClusterName,
    slot: Mutex<Slot>,
}

enum Slot {
    NotYet,
    Up(Box<Cluster>),
    Failed(String),
}

/// The chart's values beyond the harness's own: times short enough to watch, and a pool of four blocks a family, so that
/// the fourth node can be the last.
pub(crate) fn values() -> Value {
    json!({
        "ipam": {"operator": {
            "clusterPoolIPv4PodCIDRList": ["10.100.0.0/22"],
            "clusterPoolIPv6PodCIDRList": ["fd00:100::/118"],
            "clusterPoolQuarantine": "10s",
        }},
        "operator": {
            "identityGCInterval": "3s",
            "endpointGCInterval": "3s",
            "leaderElection": {"leaseDuration": "3s", "renewDeadline": "2s", "retryPeriod": "500ms"},
        },
    })
}

/// The same with a pool that was widened: for hundreds of nodes, and the blocks that rest meanwhile.
pub(crate) fn wider() -> Value {
    let mut values = values();
    values["ipam"]["operator"]["clusterPoolIPv4PodCIDRList"] =
        json!(["10.100.0.0/22", "10.101.0.0/16", "10.104.0.0/14"]);
    values["ipam"]["operator"]["clusterPoolIPv6PodCIDRList"] = json!(["fd00:100::/118", "fd00:101::/104"]);
    values
}

/// Waits until no other run of these tests uses the machine: names of clusters, their namespaces and links are the
/// machine's.
pub(crate) fn have_the_machine() -> anyhow::Result<File> {
    const LOCK: &str = "/run/basal-e2e-tests.lock";
    let lock = File::create(LOCK).with_context(|| format!("creating {LOCK}: the tests need root"))?;
    if lock.try_lock().is_err() {
        say("waiting for another run of the cluster tests on this machine");
        lock.lock().with_context(|| format!("locking {LOCK}"))?;
    }
    Ok(lock)
}

impl Suite {
    pub(crate) fn new(name: ClusterName) -> Arc<Self> {
        Arc::new(Self { name, slot: Mutex::new(Slot::NotYet) })
    }

    /// Makes a scenario a test.
    pub(crate) fn trial(self: &Arc<Self>, name: &str, scenario: Scenario) -> Trial {
        let suite = Arc::clone(self);
        timed(name, move || suite.run(scenario))
    }

    fn run(&self, scenario: Scenario) -> anyhow::Result<()> {
        let mut slot = self.lock();
        if matches!(*slot, Slot::NotYet) {
            *slot = match self.boot() {
                Ok(cluster) => Slot::Up(Box::new(cluster)),
                Err(error) => Slot::Failed(format!("{:#}", with_evidence(&self.name, error))),
            };
        }
        match &mut *slot {
            Slot::Up(cluster) => scenario(cluster).map_err(|error| with_evidence(&self.name, error)),
            Slot::Failed(error) => bail!("the cluster did not come up: {error}"),
            Slot::NotYet => bail!("the cluster was not booted"),
        }
    }

    fn boot(&self) -> anyhow::Result<Cluster> {
        if keep()
            && let Ok(cluster) = Cluster::open(&self.name)
        {
            return Ok(cluster);
        }
        boot(&self.name, values())
    }

    /// Takes the cluster down after the last scenario and proves that nothing is left; false when something is.
    pub(crate) fn end(&self) -> bool {
        let booted = !matches!(*self.lock(), Slot::NotYet);
        if !booted || keep() {
            return true;
        }
        cluster::down(&self.name).inspect_err(|error| say(format!("{error:#}"))).is_ok()
    }

    fn lock(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn boot(name: &ClusterName, values: Value) -> anyhow::Result<Cluster> {
    cluster::down(name)?;
    cluster::up(&Options { name: name.clone(), nodes: 3, cni: Cni::Basal, basal: BasalOptions { values } })
}

/// Collects logs and objects at once, before anything changes them.
fn with_evidence(name: &ClusterName, error: anyhow::Error) -> anyhow::Error {
    match Cluster::open(name).and_then(|cluster| cluster.collect()) {
        Ok(folder) => anyhow!("{error:#}\nlogs, objects, etcd keys, maps and routes: {}", folder.display()),
        Err(nothing) => anyhow!("{error:#}\nnothing could be collected: {nothing:#}"),
    }
}

/// Boots a cluster for one scenario alone, and takes it down.
pub(crate) fn on_its_own(
    name: &str,
    values: Value,
    scenario: impl FnOnce(&mut Cluster) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let name: ClusterName = name.parse()?;
    let result = boot(&name, values).and_then(|mut cluster| scenario(&mut cluster));
    let result = result.map_err(|error| with_evidence(&name, error));
    cluster::down(&name)?;
    result
}

fn keep() -> bool {
    env::var_os(KEEP).is_some_and(|value| value == "1")
}

/// A test that tells how long it took.
pub(crate) fn timed(name: &str, test: impl FnOnce() -> anyhow::Result<()> + Send + 'static) -> Trial {
    let shown = name.to_owned();
    Trial::test(name, move || {
        let watch = Stopwatch::start();
        let result = test();
        say(format!("{shown}: {} s", watch.elapsed().as_secs()));
        result.map_err(|error| Failed::from(format!("{error:#}")))
    })
}
