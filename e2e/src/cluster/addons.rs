//! What a cluster has beside a pod network: CoreDNS, and the rights that components without a bootstrap role need.

use super::Cluster;

const COREDNS: &str = include_str!("../../manifests/coredns.yaml");

/// Creates the objects; pods start when nodes are ready.
pub(super) fn install(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(COREDNS)
}
