//! How long a pod's network takes: ADD and DEL by CNI, beside Debian's bridge with host-local.

use std::{path::Path, thread, time::Duration};

use basal_e2e::{bench::Row, say::say};
use serde_json::{Value, json};

use super::{
    cluster::{Cluster, Store},
    container::{Container, DEBIAN, Plugin, Verb},
    figures::Samples,
    netns::Netns,
    node::Node,
};

/// Pods of each kind, after so many others.
const PODS: usize = 200;
const WARM_UP: usize = 16;

/// How many are attached at the same time.
const AT_ONCE: [usize; 2] = [1, 8];

/// How long an agent may take to see the pods that were made.
const SETTLE: Duration = Duration::from_secs(2);

/// One plugin, and the node whose agent stands behind it.
struct Subject<'a> {
    plugin: Plugin<'a>,
    node: Option<&'a Node<'a>>,
}

/// Times of one plugin, by verb.
#[derive(Default)]
struct Times {
    add: Samples,
    del: Samples,
}

/// Measures both stores, on nodes with these numbers, beside the bridge with one and with both families. `state` is that
/// of the cluster, for the names of the metrics.
pub(crate) fn run(cluster: &Cluster, numbers: [u8; 2], state: &str) -> anyhow::Result<Vec<Row>> {
    let [first, second] = numbers;
    let mut nodes = [Node::join(cluster, first, Store::Etcd)?, Node::join(cluster, second, Store::CustomResources)?];
    for node in &mut nodes {
        node.start()?;
    }
    let hosts = [Netns::new()?, Netns::new()?];
    let both = [("10.240.0.0/20", "0.0.0.0/0"), ("fd00:f0::/112", "::/0")];
    let mut subjects = Vec::new();
    for node in &nodes {
        let plugin = Plugin { executable: node.cni_executable(), conf: node.cni_conf()?, host: &node.netns };
        subjects.push(Subject { plugin, node: Some(node) });
    }
    for (host, families) in hosts.iter().zip([&both[..], &both[..1]]) {
        let data = cluster.folder.path().join(format!("host-local-{}", families.len()));
        subjects.push(Subject { plugin: bridge(host, &data, families), node: None });
    }
    let mut rows = Vec::new();
    for at_once in AT_ONCE {
        say(format!("  {PODS} pods, {at_once} at once"));
        let times = measure(cluster, &subjects, at_once)?;
        rows.extend(told(state, at_once, &times));
    }
    Ok(rows)
}

/// The baseline: a bridge with a gateway address, without masquerading. `families` are subnet and default route of each.
fn bridge<'a>(host: &'a Netns, data: &Path, families: &[(&str, &str)]) -> Plugin<'a> {
    let ranges: Vec<Value> = families.iter().map(|(subnet, _)| json!([{"subnet": subnet}])).collect();
    let routes: Vec<Value> = families.iter().map(|(_, route)| json!({"dst": route})).collect();
    let conf = json!({"cniVersion": "1.0.0", "name": "bag", "type": "bridge", "bridge": "cni0", "isGateway": true,
        "ipam": {"type": "host-local", "dataDir": data, "ranges": ranges, "routes": routes}});
    Plugin { executable: Path::new(DEBIAN).join("bridge"), conf, host }
}

/// Attaches and detaches pods with each plugin in turn: the machine is the same for all.
fn measure(cluster: &Cluster, subjects: &[Subject<'_>], at_once: usize) -> anyhow::Result<Vec<Times>> {
    let mut times: Vec<Times> = subjects.iter().map(|_| Times::default()).collect();
    let rounds = (WARM_UP + PODS).div_ceil(at_once);
    let pods = cluster.wait("making pods", make_pods(subjects, at_once, rounds * at_once))?;
    thread::sleep(SETTLE);
    for round in 0..rounds {
        for ((subject, times), pods) in subjects.iter().zip(&mut times).zip(&pods) {
            let pods = &pods[round * at_once..(round + 1) * at_once];
            let containers: Vec<Container> =
                pods.iter().map(|(name, uid)| Container::new(name, uid)).collect::<anyhow::Result<_>>()?;
            let add = subject.plugin.call(Verb::Add, &containers)?;
            let del = subject.plugin.call(Verb::Del, &containers)?;
            if round * at_once >= WARM_UP {
                times.add.extend(add);
                times.del.extend(del);
            }
        }
    }
    Ok(times)
}

/// Name and uid of the pods for each plugin. Where an agent reads them they exist; all are of one workload.
async fn make_pods(
    subjects: &[Subject<'_>],
    at_once: usize,
    count: usize,
) -> anyhow::Result<Vec<Vec<(String, String)>>> {
    let mut all = Vec::new();
    for (number, subject) in subjects.iter().enumerate() {
        let mut pods = Vec::new();
        for pod in 0..count {
            let name = format!("pod-{number}-{at_once}-{pod}{}", subject.node.map_or("", |node| node.name.as_str()));
            let uid = match subject.node {
                Some(node) => node.make_pod(&name, "web").await?.uid().to_owned(),
                None => String::new(),
            };
            pods.push((name, uid));
        }
        all.push(pods);
    }
    Ok(all)
}

const METHOD: &str = "the plugin called directly as a runtime does (CNI_… in the environment, configuration on standard \
                      input), from before the fork until its output was read, a fresh network namespace for each pod; \
                      ours has both families, its Pod objects exist, all of one workload; all four in turn, 200 pods \
                      each after 16 others; the bridge has a gateway and no masquerading";

fn told(state: &str, at_once: usize, times: &[Times]) -> Vec<Row> {
    let [etcd, objects, dual, v4] = times else { return Vec::new() };
    let mut rows = Vec::new();
    for verb in [Verb::Add, Verb::Del] {
        let of = |times: &Times, percent| {
            if verb == Verb::Add { times.add.percentile(percent) } else { times.del.percentile(percent) }
        };
        for (store, times) in Store::ALL.into_iter().zip([etcd, objects]) {
            for percent in [50.0, 99.0] {
                for (families, bridge) in [("IPv4 and IPv6", dual), ("IPv4 alone", v4)] {
                    let metric = format!("{}, {state}{at_once} at once, {store}, p{percent}", verb.text());
                    let baseline = format!("bridge + host-local, {families}");
                    let row = Row::new(metric, of(times, percent), "ms", METHOD);
                    rows.push(row.against(baseline, of(bridge, percent)));
                }
            }
        }
    }
    rows
}
