//! The steps of handing out blocks, and what keeps the leader from getting past one of them.

use anyhow::ensure;
use basal_e2e::cluster::Cluster;
use serde_json::Value;

use crate::rights::{CLUSTER_ROLE, grant, rules, set_rules, without};
use crate::view::{operator_metric, texts};

const CLAIMS: &str = "basal/ipam/v1/default/";
/// Writes to the ledger, by outcome.
const SWAPS: &str = "basal_operator_ledger_swaps_total";

/// A step that may not succeed any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Before {
    /// No claim can be written.
    Claim,
    /// Claims are written, and no CiliumNode.
    CiliumNode,
    /// Claims and CiliumNodes are written, and no node record.
    Record,
}

/// A right that was taken away from the operator, so that it cannot get past a step.
pub(crate) struct Obstacle {
    before: Before,
    /// Writes to the ledger that did not succeed, when it was put up.
    refused: f64,
    /// The rules of the whole role.
    rules: Vec<Value>,
}

impl Obstacle {
    pub(crate) fn put_up(cluster: &Cluster, before: Before) -> anyhow::Result<Self> {
        let this = Self { before, refused: refused(cluster)?, rules: rules(cluster, CLUSTER_ROLE)? };
        match before {
            Before::Claim => grant(cluster, "read", "basal/")?,
            Before::Record => grant(cluster, "read", "cilium/")?,
            Before::CiliumNode => {
                let rules = without(&this.rules, "ciliumnodes", &["create", "patch", "delete"])?;
                set_rules(cluster, CLUSTER_ROLE, &without(&rules, "ciliumnodes/status", &["patch"])?)?;
            }
        }
        Ok(this)
    }

    pub(crate) fn take_away(self, cluster: &Cluster) -> anyhow::Result<()> {
        match self.before {
            Before::Claim => grant(cluster, "readwrite", "basal/"),
            Before::Record => grant(cluster, "readwrite", "cilium/"),
            Before::CiliumNode => set_rules(cluster, CLUSTER_ROLE, &self.rules),
        }
    }

    /// Fails unless some of these nodes, which are new, is past the steps that come first.
    pub(crate) fn reached_by(&self, cluster: &Cluster, names: &[String]) -> anyhow::Result<()> {
        let found = match self.before {
            Before::Claim => refused(cluster)? > self.refused,
            Before::CiliumNode => {
                let claims = cluster.etcdctl()?.args(["get", "--prefix", CLAIMS, "--print-value-only"]).text()?;
                names.iter().any(|name| claims.contains(&format!("\"{name}\"")))
            }
            Before::Record => {
                let served = |node: &Value| {
                    let name = node["metadata"]["name"].as_str().unwrap_or_default();
                    names.iter().any(|new| new == name) && !texts(node, "/spec/ipam/podCIDRs").is_empty()
                };
                cluster.list(&["ciliumnodes"])?.iter().any(served)
            }
        };
        ensure!(found, "none of them is there yet");
        Ok(())
    }
}

/// Writes to the ledger that did not succeed, of the operators that run.
fn refused(cluster: &Cluster) -> anyhow::Result<f64> {
    Ok(operator_metric(cluster, SWAPS, &[])? - operator_metric(cluster, SWAPS, &[r#""Done""#])?)
}
