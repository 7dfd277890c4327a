//! Names of a cluster and of everything that belongs to it. Whatever a cluster makes on the machine carries its name
//! in a place that can be searched, so a cluster whose starter died half-way can still be found and taken down whole.

use std::fmt::{self, Display};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::ensure;

use crate::parts;

/// The environment variable that every process of a cluster inherits; its value is the cluster's name.
pub const MARK: &str = "BASAL_E2E_CLUSTER";

/// A cluster's name: 1 to 8 of `a-z0-9`, a letter first. No dash, so that `NAME-` is the prefix of one cluster only.
/// It is the machine's: whoever takes a cluster down takes down that of another cache folder, too, if it has the name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClusterName(String);

impl FromStr for ClusterName {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let letters = text.chars().all(|letter| letter.is_ascii_lowercase() || letter.is_ascii_digit());
        let first = text.starts_with(|letter: char| letter.is_ascii_lowercase());
        ensure!(
            letters && first && text.len() <= 8,
            "a cluster's name has 1 to 8 of a-z and 0-9 and begins with a letter; {text:?} does not"
        );
        Ok(Self(text.to_owned()))
    }
}

impl Display for ClusterName {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

impl ClusterName {
    /// The prefix of its network namespaces and of its links in the machine's namespace.
    #[must_use]
    pub fn prefix(&self) -> String {
        format!("{self}-")
    }

    /// The network namespace of the underlay bridge.
    #[must_use]
    pub fn underlay(&self) -> String {
        format!("{self}-net")
    }

    /// The machine's link into the underlay; the control plane listens on it.
    #[must_use]
    pub fn uplink(&self) -> String {
        format!("{self}-up")
    }

    /// The network namespace of a node.
    #[must_use]
    pub fn node_netns(&self, node: &str) -> String {
        format!("{self}-{node}")
    }

    /// The control group that holds those of its nodes, the same in every hierarchy.
    #[must_use]
    pub fn cgroup(&self) -> String {
        format!("basal-{self}")
    }

    /// Its folder.
    pub fn dir(&self) -> anyhow::Result<ClusterDir> {
        Ok(ClusterDir(clusters_dir()?.join(&self.0)))
    }
}

/// The folder that holds one folder for each cluster.
pub(super) fn clusters_dir() -> anyhow::Result<PathBuf> {
    Ok(parts::cache_dir()?.join("clusters"))
}

/// The folder of a cluster.
#[derive(Debug, Clone)]
pub struct ClusterDir(PathBuf);

impl ClusterDir {
    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// What `up` decided: addresses and nodes.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.0.join("state.json")
    }

    /// Certificates of Kubernetes.
    #[must_use]
    pub fn kubernetes_pki(&self) -> PathBuf {
        self.0.join("pki")
    }

    /// Certificates of Basal's etcd.
    #[must_use]
    pub fn etcd_pki(&self) -> PathBuf {
        self.0.join("etcd-pki")
    }

    /// The kubeconfig of a user.
    #[must_use]
    pub fn kubeconfig(&self, user: &str) -> PathBuf {
        self.0.join(format!("{}.kubeconfig", user.replace(':', "-")))
    }

    /// The administrator's kubeconfig.
    #[must_use]
    pub fn admin(&self) -> PathBuf {
        self.kubeconfig("admin")
    }

    /// The static tokens of the API server.
    #[must_use]
    pub fn tokens(&self) -> PathBuf {
        self.0.join("tokens.csv")
    }

    /// Logs of the control plane.
    #[must_use]
    pub fn log(&self, name: &str) -> PathBuf {
        self.0.join("log").join(format!("{name}.log"))
    }

    /// The folder of a node.
    #[must_use]
    pub fn node(&self, name: &str) -> PathBuf {
        self.0.join("nodes").join(name)
    }
}

/// Refuses a node name that would not fit where it goes: a link of the underlay and a host name.
pub(super) fn check_node_name(name: &str) -> anyhow::Result<()> {
    let fits = name.chars().all(|letter| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '-');
    let first = name.starts_with(|letter: char| letter.is_ascii_lowercase());
    ensure!(
        fits && first
            && name.len() <= 10
            && !name.ends_with('-')
            && !matches!(name, "net" | "up" | "uplink" | "br0" | "lo"),
        "a node's name has 1 to 10 of a-z, 0-9 and -, begins with a letter and is not net, up, uplink, br0 or lo; {name:?} is refused"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{ClusterName, check_node_name};

    #[test]
    fn a_name_that_would_blur_prefixes_or_overflow_a_link_is_refused() {
        for good in ["a", "demo", "t1234567"] {
            let name: ClusterName = good.parse().unwrap();
            assert!(name.uplink().len() <= 15);
        }
        for bad in ["", "1a", "a-b", "Demo", "ninechars", "ä"] {
            assert!(bad.parse::<ClusterName>().is_err(), "{bad}");
        }
        for bad in ["", "net", "up", "uplink", "-n", "n-", "n_1", "elevenchars"] {
            assert!(check_node_name(bad).is_err(), "{bad}");
        }
    }
}
