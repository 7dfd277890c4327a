//! One cluster, and the pods in it.

use std::time::Duration;

use basal_e2e::{
    cluster::{self, BasalOptions, Cluster, ClusterName, Cni, Options},
    say::say,
    wait::Stopwatch,
    workload::idle_deployment,
};
use serde_json::{Value, json};

/// What connects the pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Case {
    /// Basal with its records in etcd.
    Etcd,
    /// Basal with its records in custom resources.
    CustomResources,
    /// Debian's bridge, host-local and portmap, and static routes between the nodes.
    Bridge,
}

/// What a cluster showed, in seconds.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// Of each round: until the pods are ready.
    pub(crate) ready: Vec<f64>,
    /// Of each round: until they are gone.
    pub(crate) gone: Vec<f64>,
    /// Until all nodes have another configuration; nothing for [`Case::Bridge`].
    pub(crate) upgrade: Vec<f64>,
}

impl Found {
    /// Adds what another cluster of the case showed.
    pub(crate) fn extend(&mut self, other: Self) {
        self.ready.extend(other.ready);
        self.gone.extend(other.gone);
        self.upgrade.extend(other.upgrade);
    }
}

impl Case {
    pub(crate) const ALL: [Self; 3] = [Self::Etcd, Self::Bridge, Self::CustomResources];

    /// For people.
    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::Etcd => "Basal over etcd",
            Self::CustomResources => "Basal over custom resources",
            Self::Bridge => "bridge and host-local",
        }
    }

    fn cni(self) -> Cni {
        if self == Self::Bridge { Cni::Bridge } else { Cni::Basal }
    }

    /// Values of the chart.
    fn values(self, debug: bool) -> Value {
        json!({"etcd": {"enabled": self == Self::Etcd}, "debug": {"enabled": debug}})
    }
}

/// The Deployment of the pods.
const NAME: &str = "many";

/// How long the pods may take to come, and to go.
const LIMIT: Duration = Duration::from_secs(240);

/// Starts a cluster, lets pods come and go, and takes it down, also after an error.
pub(crate) fn run(case: Case, pods: usize, rounds: usize) -> anyhow::Result<Found> {
    let name: ClusterName = "pods".parse()?;
    let options = Options { name, nodes: 2, cni: case.cni(), basal: BasalOptions { values: case.values(false) } };
    let found = cluster::up(&options).and_then(|cluster| measure(&cluster, case, pods, rounds));
    let down = cluster::down(&options.name);
    let found = found?;
    down.map(|()| found)
}

fn measure(cluster: &Cluster, case: Case, pods: usize, rounds: usize) -> anyhow::Result<Found> {
    // The first pods of a node make what the later ones find: images that are unpacked, the bridge.
    come(cluster, 4)?;
    go(cluster)?;
    let mut found = Found::default();
    for _ in 0..rounds {
        found.ready.push(come(cluster, pods)?);
        if case != Case::Bridge && found.upgrade.is_empty() {
            let watch = Stopwatch::start();
            cluster.install_basal(&BasalOptions { values: case.values(true) })?;
            found.upgrade.push(watch.elapsed().as_secs_f64());
        }
        found.gone.push(go(cluster)?);
    }
    say(format!("{}: {found:.1?}", case.text()));
    Ok(found)
}

fn come(cluster: &Cluster, pods: usize) -> anyhow::Result<f64> {
    let watch = Stopwatch::start();
    cluster.apply(&idle_deployment(NAME, pods).to_string())?;
    cluster.wait_rollout("default", &format!("deployment/{NAME}"), LIMIT)?;
    Ok(watch.elapsed().as_secs_f64())
}

fn go(cluster: &Cluster) -> anyhow::Result<f64> {
    let watch = Stopwatch::start();
    let timeout = format!("--timeout={}s", LIMIT.as_secs());
    cluster
        .kubectl()?
        .args(["delete", "deployment", "-n", "default", NAME, "--cascade=foreground", &timeout])
        .limit(LIMIT + Duration::from_secs(10))
        .done()?;
    Ok(watch.elapsed().as_secs_f64())
}
