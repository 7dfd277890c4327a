//! Another version of Basal, with other programs and with another layout of one map: `e2e/next/edits.yaml` says which.

use std::thread;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use basal_e2e::cluster::{BasalOptions, Cluster, Node};
use basal_e2e::parts;
use serde_json::{Value, json};

use crate::view::{basal, eventually};

/// What the later version's programs count packets for pods under: the column of `basal bpf metrics list` that tells where.
const LINE: &str = "42424";

/// Which version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    /// That of this checkout.
    This,
    /// The later one.
    Next,
}

impl Version {
    const fn tag(self) -> &'static str {
        match self {
            Self::This => "dev",
            Self::Next => "next",
        }
    }

    /// How `bpftool map show` tells the size of a row's value in `cilium_lxc`.
    const fn row(self) -> &'static str {
        match self {
            Self::This => "value 48B",
            Self::Next => "value 56B",
        }
    }
}

/// Has helm install a version over the one that is there; answers when it runs on every node and nothing is left of the
/// other.
pub(crate) fn to(cluster: &Cluster, version: Version, mut values: Value) -> anyhow::Result<()> {
    let nodes = cluster.nodes()?;
    if version == Version::Next {
        let archive = parts::cache_dir()?.join("images/basal-next.tar");
        nodes.iter().try_for_each(|node| node.import_image(&archive))?;
    }
    values["image"] = json!({"tag": version.tag()});
    cluster.install_basal(&BasalOptions { values })?;
    for node in &nodes {
        eventually(&format!("the version {} on {}", version.tag(), node.name()), || runs(node, version))?;
    }
    Ok(())
}

/// One set of programs, whose map of endpoints has this version's layout.
fn runs(node: &Node, version: Version) -> anyhow::Result<()> {
    let map = node.run("bpftool").args(["map", "show", "pinned", "/sys/fs/bpf/tc/globals/cilium_lxc"]).text()?;
    ensure!(map.contains(version.row()), "{map}");
    let pinned = node.run("ls").args(["/sys/fs/bpf/basal", "/sys/fs/bpf/basal/programs"]).text()?;
    let lines: Vec<&str> = pinned.lines().collect();
    let [_, "programs", "", _, _set] = lines.as_slice() else { bail!("on the bpffs:\n{pinned}") };
    Ok(())
}

/// Fails unless this version's programs deliver packets to pods of a node, of which there must be some each second.
pub(crate) fn delivers(cluster: &Cluster, node: &str, version: Version) -> anyhow::Result<()> {
    let before = counted_by_next(cluster, node)?;
    thread::sleep(Duration::from_secs(1));
    let after = counted_by_next(cluster, node)?;
    ensure!((after > before) == (version == Version::Next), "the later version counted {before} packets, then {after}");
    Ok(())
}

/// Packets for pods of a node that the later version's programs counted. The counters outlive the programs.
fn counted_by_next(cluster: &Cluster, node: &str) -> anyhow::Result<u64> {
    let table = basal(cluster, node, &["bpf", "metrics", "list"])?;
    let mut sum = 0;
    for row in table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()) {
        // REASON DIRECTION PACKETS BYTES LINE FILE
        if let [.., packets, _bytes, LINE, _file] = row.as_slice() {
            sum += packets.parse::<u64>().with_context(|| format!("no number of packets in {row:?}"))?;
        }
    }
    Ok(sum)
}
