//! A cluster of Nodes without kubelets, and operators over it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use basal_crds::names::{Cluster, ClusterId, ClusterName};
use basal_ipam::config::{FamilySettings, PoolConfig, PoolSettings};
use basal_kvstore::leases::LeaseRules;
use basal_objects::{
    leadership::LeadershipOptions,
    object::{Object, ObjectKey, resources},
    port::{MergePatch, Objects, Preconditions},
};
use basal_operator::{
    duties::DutySettings,
    metrics::OperatorMetrics,
    ports::Ports,
    run::{Operator, Settings},
};
use basal_runtime::{controller::ControllerMetrics, metrics::Metrics, outcome::Outcome, readiness::Readiness};
use basal_sim::{
    explore,
    process::{ProcessPorts, Restart},
    safety::BlockSafety,
    world::{Options, Trouble, World},
};
use serde_json::{Value, json};

use crate::{
    denied::{Denied, Denying},
    weather::{Under, Weather},
};

/// How long anything may take in virtual time.
pub(crate) const LIMIT: Duration = Duration::from_secs(600);

/// The quarantine of these clusters.
pub(crate) const QUARANTINE: Duration = Duration::from_secs(60);

/// A pool of IPv4 and IPv6 CIDRs, with blocks of /24 and /120.
pub(crate) fn pool(ipv4: &[&str], ipv6: &[&str]) -> PoolConfig {
    pool_of(ipv4, 24, ipv6, 120)
}

/// A pool of IPv4 and IPv6 CIDRs, each with the prefix length of its blocks.
pub(crate) fn pool_of(ipv4: &[&str], ipv4_mask: u8, ipv6: &[&str], ipv6_mask: u8) -> PoolConfig {
    let family = |cidrs: &[&str], mask_size| FamilySettings {
        enabled: !cidrs.is_empty(),
        cidrs: cidrs.iter().map(|cidr| (*cidr).to_owned()).collect(),
        mask_size,
    };
    PoolConfig::new(&PoolSettings { ipv4: family(ipv4, ipv4_mask), ipv6: family(ipv6, ipv6_mask) }).unwrap()
}

/// Looks for two owners, and for blocks that were freed too early, after each change.
pub(crate) fn watch_over(world: &World) {
    let mut safety = BlockSafety::new("default", QUARANTINE);
    world.watch_over(Box::new(move |world: &World| {
        safety.look(world.kv(), world.objects()).map_err(|breach| breach.to_string())
    }));
}

/// Where claims lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Over {
    Etcd,
    CustomResources,
}

impl Over {
    pub(crate) const BOTH: [Self; 2] = [Self::Etcd, Self::CustomResources];
}

/// Runs a scenario over each store; what goes wrong is reported with the end of the trace.
pub(crate) fn run(seed: u64, scenario: impl AsyncFn(&World, Over) -> Result<(), Trouble>) {
    for over in Over::BOTH {
        run_over(over, seed, async |world| scenario(world, over).await);
    }
}

/// Runs a scenario over one store.
pub(crate) fn run_over(over: Over, seed: u64, scenario: impl AsyncFnOnce(&World) -> Result<(), Trouble>) {
    let run = explore::run(Options::seeded(seed), async |world| {
        watch_over(world);
        scenario(world).await
    })
    .unwrap();
    if let Err(trouble) = run.result {
        panic!("over {over:?}: {trouble}\n{}", run.report);
    }
}

/// How an operator of these tests works.
#[derive(Clone)]
pub(crate) struct Setup {
    pub(crate) over: Over,
    pub(crate) pool: PoolConfig,
    pub(crate) quarantine: Duration,
    /// The name of its Lease, if not the usual one.
    pub(crate) lease: Option<String>,
    /// CustomResourceDefinitions that it installs.
    pub(crate) definitions: Vec<Object>,
    pub(crate) duties: DutySettings,
    pub(crate) node_gc: Option<Duration>,
    /// How its API server is.
    pub(crate) api_server: Weather,
    /// How its etcd is.
    pub(crate) etcd: Weather,
    /// What its API server denies.
    pub(crate) denied: Denied,
    /// What the last process of it shows on `/readyz`.
    pub(crate) readiness: LastReadiness,
    /// The metrics of the last process of it.
    pub(crate) shown: Shown,
}

impl Setup {
    /// With the defaults of the configuration, but for the quarantine.
    pub(crate) fn new(over: Over, pool: PoolConfig) -> Self {
        Self { definitions: definitions(), ..Self::without_definitions(over, pool) }
    }

    /// The same where somebody else installs the definitions, which take longer to make than all the rest.
    pub(crate) fn without_definitions(over: Over, pool: PoolConfig) -> Self {
        let duties = DutySettings {
            leases: LeaseRules::default(),
            identity_gc: Some(Duration::from_secs(900)),
            identity_heartbeat: Duration::from_secs(1800),
            endpoint_gc: Some(Duration::from_secs(300)),
        };
        Self {
            over,
            pool,
            quarantine: QUARANTINE,
            lease: None,
            definitions: Vec::new(),
            duties,
            node_gc: Some(Duration::from_secs(300)),
            api_server: Weather::default(),
            etcd: Weather::default(),
            readiness: LastReadiness::default(),
            denied: Denied::default(),
            shown: Shown::default(),
        }
    }
}

/// The CustomResourceDefinitions of this version.
pub(crate) fn definitions() -> Vec<Object> {
    basal_crds::resources::crds().into_iter().map(|definition| Object(definition.object)).collect()
}

/// The metrics of a process that runs.
#[derive(Clone, Default)]
pub(crate) struct Shown(Arc<Mutex<Option<Metrics>>>);

impl Shown {
    /// The value of one series, by its name and labels as they stand in the text; 0 where there is none.
    pub(crate) fn value(&self, series: &str) -> u64 {
        let text = self.0.lock().unwrap().as_ref().map(|metrics| metrics.text().unwrap()).unwrap_or_default();
        let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok());
        value.unwrap_or_default()
    }
}

/// The readiness of a process that runs.
#[derive(Clone, Default)]
pub(crate) struct LastReadiness(Arc<Mutex<Option<Readiness>>>);

impl LastReadiness {
    /// What `/readyz` says to it: each condition that does not hold, with its reason.
    pub(crate) fn pending(&self) -> Vec<String> {
        let readiness = self.0.lock().unwrap().clone().unwrap_or_default();
        readiness.pending().iter().map(|pending| format!("{}: {}", pending.name, pending.reason)).collect()
    }
}

/// Starts an operator, which starts again whenever it ends.
pub(crate) fn operator(world: &World, over: Over, name: &str, pool: &PoolConfig) {
    operator_of(world, name, Setup::new(over, pool.clone()));
}

/// The same, set up otherwise.
pub(crate) fn operator_of(world: &World, name: &str, setup: Setup) {
    world.start(name, Restart::After(Duration::from_secs(2)), move |ports| one_operator(ports, setup.clone()));
}

/// One operator process.
pub(crate) async fn one_operator(process: ProcessPorts, setup: Setup) {
    let Setup { over, pool, quarantine, lease: own_lease, definitions, duties, node_gc, .. } = setup;
    let Setup { api_server, etcd, denied, readiness: last, shown, .. } = setup;
    let cluster = Cluster::new(ClusterName::new("default").unwrap(), ClusterId::new(0)).unwrap();
    let server: Arc<dyn Objects> = Arc::new(Denying { server: process.objects, denied });
    let objects: Arc<dyn Objects> = Arc::new(Under::new(server, &api_server));
    let lease = Arc::clone(&objects);
    let ports = match over {
        Over::Etcd => Ports::new(process.env, objects, Arc::new(Under::new(process.kv, &etcd)), cluster),
        Over::CustomResources => Ports::without_etcd(process.env, objects, cluster),
    };
    let metrics = Metrics::new("basal_operator");
    *shown.0.lock().unwrap() = Some(metrics.clone());
    let mut election = LeadershipOptions::new("kube-system", process.id.to_string());
    if let Some(name) = own_lease {
        election.lease.name = name;
    }
    let settings = Settings { pool, quarantine, election, node_gc, duties, definitions };
    let controllers = metrics.register(ControllerMetrics::register);
    let readiness = Readiness::new();
    *last.0.lock().unwrap() = Some(readiness.clone());
    let operator = Operator::new(ports, lease, settings, OperatorMetrics::register(&metrics), controllers, readiness);
    operator.run(process.stop).await;
}

/// Adds a Node with one address of each family.
pub(crate) async fn add_node(world: &World, name: &str, number: u8) {
    let node = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": { "name": name, "labels": { "kubernetes.io/hostname": name } },
        "status": { "addresses": [
            { "type": "InternalIP", "address": format!("172.18.0.{number}") },
            { "type": "InternalIP", "address": format!("fc00::{number:x}") },
            { "type": "Hostname", "address": name },
        ] },
    });
    // Where status is a subresource a create does not take it.
    let objects = world.user().objects;
    let Outcome::Done(created) = objects.create(resources::NODE, Object(node.clone())).await else {
        panic!("Node {name} was not created")
    };
    patch(world, resources::NODE, &created, Some("status"), json!({ "status": node["status"] })).await;
}

/// Patches an object at the version that was seen.
pub(crate) async fn patch(
    world: &World,
    resource: basal_objects::object::Resource,
    seen: &Object,
    subresource: Option<&'static str>,
    body: Value,
) -> Object {
    let patch = MergePatch {
        resource_version: seen.resource_version().to_owned(),
        uid: seen.uid().to_owned(),
        subresource,
        body,
    };
    match world.user().objects.patch(resource, &seen.key(), patch).await {
        Outcome::Done(object) => object,
        other => panic!("{} was not patched: {other:?}", seen.key()),
    }
}

/// Deletes an object, and what it owns.
pub(crate) async fn delete(world: &World, resource: basal_objects::object::Resource, name: &str) {
    let objects = world.user().objects;
    let key = ObjectKey::cluster(name);
    let seen = objects.get(resource, &key).await.unwrap().unwrap();
    let only_if = Preconditions { uid: seen.uid().to_owned(), resource_version: seen.resource_version().to_owned() };
    assert_eq!(objects.delete(resource, &key, only_if).await, Outcome::Done(()));
}

/// The CiliumNodes by name.
pub(crate) fn cilium_nodes(world: &World) -> BTreeMap<String, Object> {
    world.objects().all(&resources::CILIUM_NODE).into_iter().map(|object| (object.name().to_owned(), object)).collect()
}

/// The blocks that a CiliumNode lists.
pub(crate) fn pod_cidrs(object: &Object) -> Vec<String> {
    let list = object.0.pointer("/spec/ipam/podCIDRs").and_then(Value::as_array);
    list.into_iter().flatten().filter_map(|cidr| cidr.as_str().map(str::to_owned)).collect()
}

/// The operator's error in a CiliumNode's status.
pub(crate) fn error(object: &Object) -> String {
    let error = object.0.pointer("/status/ipam/operator-status/error").and_then(Value::as_str);
    error.unwrap_or_default().to_owned()
}

/// Who holds the Lease.
pub(crate) fn leader(world: &World) -> String {
    let leases = world.objects().all(&resources::LEASE);
    let holder = leases.first().and_then(|lease| lease.0.pointer("/spec/holderIdentity")?.as_str().map(str::to_owned));
    holder.unwrap_or_default()
}

/// The Ledger; null where there is none.
pub(crate) fn ledger(world: &World) -> Value {
    world.objects().all(&resources::LEDGER).into_iter().next().map(|object| object.0).unwrap_or_default()
}

/// The node record of a node.
pub(crate) fn record(world: &World, name: &str) -> Option<Value> {
    let contents = world.kv().contents();
    contents.get(&format!("cilium/state/nodes/v1/default/{name}")).and_then(|text| serde_json::from_slice(text).ok())
}

/// The blocks that the operator confirms in a CiliumNode's status, IPv4 first.
pub(crate) fn confirmed(object: &Object) -> Vec<String> {
    let entries = object.0.pointer("/status/ipam/pod-cidrs").and_then(Value::as_object).into_iter().flatten();
    let in_use = entries.filter(|(_, entry)| entry["status"] == "in-use").map(|(block, _)| block.clone());
    in_use.collect::<BTreeSet<_>>().into_iter().collect()
}

/// Whether a node has blocks of both families in its CiliumNode, and a record or the confirmation of both.
pub(crate) fn is_served(world: &World, name: &str) -> bool {
    cilium_nodes(world).get(name).is_some_and(|object| {
        let blocks = pod_cidrs(object);
        blocks.len() == 2 && (record(world, name).is_some() || confirmed(object) == blocks)
    })
}

/// Whether nothing says any more that a node has blocks.
pub(crate) fn is_withdrawn(world: &World, name: &str) -> bool {
    !cilium_nodes(world).contains_key(name) && record(world, name).is_none()
}
