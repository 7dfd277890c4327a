//! What `up` decided, in the cluster's folder.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, bail, ensure};
use nix::ifaddrs::getifaddrs;
use serde::{Deserialize, Serialize};

use super::names::{ClusterDir, ClusterName, clusters_dir};

/// Pods of every cluster get addresses from these; they are seen inside its own nodes only.
pub const POD_CIDRS: [&str; 2] = ["10.100.0.0/16", "fd00:100::/104"];
/// Services of every cluster.
pub const SERVICE_CIDRS: [&str; 2] = ["10.96.0.0/16", "fd00:96::/112"];
/// CoreDNS.
pub const DNS_ADDRESS: &str = "10.96.0.10";
/// A host beyond the underlay's router, of either family: the world outside (RFC 5737, RFC 3849).
pub const OUTSIDE: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 1))];

/// The last byte of the router's address in the underlay.
const ROUTER: u16 = 254;
/// The last byte of the first node's address in the underlay.
const FIRST_NODE: u16 = 11;

/// What gives pods their network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Cni {
    /// Nothing: nodes stay not ready until something is installed.
    None,
    /// Debian's bridge plug-in and static routes; shows that the cluster itself works.
    Bridge,
    /// Basal, from its chart and image.
    Basal,
}

/// A cluster's decisions.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct State {
    /// Counts the clusters of this machine; makes its underlay different from the others'.
    pub index: u8,
    /// Pod network.
    pub cni: Cni,
    /// Its nodes, in the order in which they joined.
    pub nodes: Vec<NodeState>,
    /// The number of the node that joins next; numbers are not used twice.
    pub next_node: u16,
}

/// A node's decisions.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct NodeState {
    /// Its name in Kubernetes and on the underlay.
    pub name: String,
    /// Its number.
    pub number: u16,
}

impl State {
    /// The machine's addresses in the underlay, where the control plane listens: IPv4 10.200+INDEX.0.1, IPv6 alike.
    #[must_use]
    pub(super) fn control_plane(&self) -> [IpAddr; 2] {
        self.underlay(1)
    }

    /// The default gateway of the nodes.
    #[must_use]
    pub(super) fn router(&self) -> [IpAddr; 2] {
        self.underlay(ROUTER)
    }

    /// The addresses of a node, IPv4 and IPv6.
    #[must_use]
    pub(super) fn node_addresses(&self, node: &NodeState) -> [IpAddr; 2] {
        self.underlay(FIRST_NODE + node.number)
    }

    fn underlay(&self, host: u16) -> [IpAddr; 2] {
        let [_, host4] = host.to_be_bytes();
        [
            IpAddr::V4(Ipv4Addr::new(10, 200_u8.saturating_add(self.index), 0, host4)),
            IpAddr::V6(Ipv6Addr::new(0xfd10, 0, 0, self.index.into(), 0, 0, 0, host)),
        ]
    }

    /// Reserves the next number for a node.
    pub(super) fn add_node(&mut self, name: &str) -> anyhow::Result<NodeState> {
        ensure!(self.nodes.iter().all(|node| node.name != name), "the cluster has a node {name} already");
        ensure!(FIRST_NODE + self.next_node < ROUTER, "the underlay of a cluster has no room for another node");
        let node = NodeState { name: name.to_owned(), number: self.next_node };
        self.next_node += 1;
        self.nodes.push(node.clone());
        Ok(node)
    }

    /// Reads it.
    pub(super) fn load(dir: &ClusterDir) -> anyhow::Result<Self> {
        let path = dir.state();
        let text = fs::read(&path).with_context(|| format!("there is no such cluster: reading {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("parsing {}", path.display()))
    }

    /// Writes it.
    pub(super) fn save(&self, dir: &ClusterDir) -> anyhow::Result<()> {
        let path = dir.state();
        let new = path.with_extension("new");
        fs::write(&new, serde_json::to_vec_pretty(self)?).with_context(|| format!("writing {}", new.display()))?;
        fs::rename(&new, &path).with_context(|| format!("renaming to {}", path.display()))
    }

    /// Makes the folder of a new cluster and picks the lowest index that no other cluster of this machine has.
    pub(super) fn create(name: &ClusterName, cni: Cni) -> anyhow::Result<(ClusterDir, Self)> {
        let clusters = clusters_dir()?;
        fs::create_dir_all(&clusters).with_context(|| format!("creating {}", clusters.display()))?;
        let lock = File::create(clusters.join(".lock"))?;
        lock.lock().context("locking the clusters' folder")?;
        let dir = name.dir()?;
        if dir.path().exists() {
            bail!("a cluster {name} exists; take it down first: basal-e2e down --name {name}");
        }
        let mut used: BTreeSet<u8> = all_names()?
            .iter()
            .filter_map(|other| Self::load(&other.dir().ok()?).ok())
            .map(|state| state.index)
            .collect();
        // Clusters of another cache folder share the machine's addresses too.
        used.extend(getifaddrs().context("listing the machine's addresses")?.filter_map(|one| {
            let address = one.address?.as_sockaddr_in()?.ip();
            let [first, second, ..] = address.octets();
            (first == 10).then(|| second.checked_sub(200)).flatten()
        }));
        let index = (0..50).find(|index| !used.contains(index)).context("50 clusters are on this machine already")?;
        let state = Self { index, cni, nodes: Vec::new(), next_node: 0 };
        fs::create_dir_all(dir.path().join("log")).with_context(|| format!("creating {}", dir.path().display()))?;
        state.save(&dir)?;
        Ok((dir, state))
    }
}

/// The names of the clusters that have a folder.
pub fn all_names() -> anyhow::Result<Vec<ClusterName>> {
    let Ok(entries) = fs::read_dir(clusters_dir()?) else { return Ok(Vec::new()) };
    let mut names: Vec<ClusterName> =
        entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    names.sort();
    Ok(names)
}
