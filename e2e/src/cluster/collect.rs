//! What one wants to see after a failure.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;

use super::{Cluster, Node};
use crate::command::Run;
use crate::{parts, wait};

/// What each node is asked.
const NODE_COMMANDS: &[(&str, &[&str])] = &[
    ("links", &["ip", "-d", "address"]),
    ("routes", &["ip", "route", "show", "table", "all"]),
    ("routes6", &["ip", "-6", "route", "show", "table", "all"]),
    ("rules", &["ip", "rule"]),
    ("neighbours", &["ip", "neighbour"]),
    ("nftables", &["nft", "list", "ruleset"]),
    ("iptables", &["iptables-save"]),
    ("bpf-programs", &["bpftool", "net"]),
    ("bpf-pins", &["find", "/sys/fs/bpf"]),
    ("containers", &["ctr", "--namespace=k8s.io", "containers", "list"]),
    ("processes", &["ps", "axfww"]),
    ("mounts", &["cat", "/proc/self/mountinfo"]),
];

/// Dumps each pinned map; the pins are the maps' names.
const DUMP_MAPS: &str =
    "for map in $(find /sys/fs/bpf -type f); do echo \"== $map\"; bpftool map dump pinned $map 2>&1; done";

/// What the API server is asked.
const OBJECTS: &[&str] = &[
    "nodes",
    "pods",
    "services",
    "endpointslices",
    "events",
    "leases",
    "configmaps",
    "daemonsets",
    "deployments",
    "ciliumnodes",
    "ciliumendpoints",
    "ciliumidentities",
    "ciliumpodippools",
];

/// Collects into `failures/NAME-TIME` of the cache. What cannot be had is noted there; it is no error.
pub(super) fn collect(cluster: &Cluster) -> anyhow::Result<PathBuf> {
    let target = parts::cache_dir()?.join("failures").join(format!("{}-{}", cluster.name, wait::unix_time().as_secs()));
    let objects = target.join("objects");
    fs::create_dir_all(&objects).with_context(|| format!("creating {}", objects.display()))?;
    copy_logs(&cluster.dir().join("log"), &target)?;
    for kind in OBJECTS {
        let get = cluster.kubectl()?.args(["get", kind, "--all-namespaces", "-o", "yaml", "--request-timeout=10s"]);
        note(&objects.join(format!("{kind}.yaml")), get)?;
    }
    let pods = cluster.kubectl()?.args(["get", "pods", "-A", "-o", "wide", "--request-timeout=10s"]);
    note(&target.join("pods.txt"), pods)?;
    note(&target.join("etcd.txt"), cluster.etcdctl()?.args(["get", "--prefix", "", "--command-timeout=10s"]))?;
    for node in &cluster.state.nodes {
        // A node whose start failed early is no more than its logs.
        match cluster.node(&node.name) {
            Ok(node) => collect_node(&node, &target.join(node.name()))?,
            Err(error) => fs::write(target.join(format!("{}.txt", node.name)), format!("{error:#}\n"))?,
        }
    }
    Ok(target)
}

fn collect_node(node: &Node, target: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(target)?;
    copy_logs(node.dir(), target)?;
    for (name, words) in NODE_COMMANDS {
        if let Some((program, args)) = words.split_first() {
            note(&target.join(format!("{name}.txt")), node.run(program).args(args))?;
        }
    }
    note(&target.join("bpf-maps.txt"), node.run("sh").args(["-c", DUMP_MAPS]))?;
    let pods = node.dir().join("var-log/pods");
    note(&target.join("pod-logs.txt"), Run::new("cp").arg("-rL").arg(pods).arg(target.join("pods")))
}

fn copy_logs(from: &Path, to: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(from).with_context(|| format!("listing {}", from.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "log") {
            fs::copy(&path, to.join(path.file_name().unwrap_or_default()))?;
        }
    }
    Ok(())
}

/// Writes what a command says, on either stream.
fn note(path: &Path, run: Run) -> anyhow::Result<()> {
    let text = match run.output() {
        Ok(output) => [output.stdout, output.stderr].concat(),
        Err(error) => format!("{error:#}\n").into_bytes(),
    };
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}
