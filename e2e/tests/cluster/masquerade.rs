//! Programs that masquerade, in a cluster.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, ensure};
use basal_e2e::cluster::{Cluster, OUTSIDE};

use crate::view::{basal, eventually};
use crate::workload::{Checks, Pod};

/// Pods reach the outside and the API server by the node's address, which programs on its device give them: nftables leaves
/// that device alone, and the maps show the flows.
pub(crate) fn by_programs(cluster: &Cluster, pods: &[Pod]) -> anyhow::Result<()> {
    for node in cluster.nodes()? {
        let status = basal(cluster, node.name(), &["status"])?;
        ensure!(status.contains("BPF [eth0]"), "{status}");
        let rules = node.run("nft").args(["list", "table", "inet", "basal"]).text()?;
        let mut masquerading = rules.lines().filter(|line| line.contains("masquerade"));
        ensure!(masquerading.all(|rule| rule.contains("oifname != \"eth0\"")), "{rules}");
    }
    for pod in pods {
        reach_the_outside(cluster, pod)?;
        eventually(&format!("translations of {}", pod.name), || translations(cluster, pod))?;
    }
    Ok(())
}

fn reach_the_outside(cluster: &Cluster, pod: &Pod) -> anyhow::Result<()> {
    let mut checks = Checks::default();
    for address in OUTSIDE {
        checks.add(format!("the outside {address}"), format!("ping -c 1 -W 2 {address}"));
        checks.add(format!("the outside {address}, in fragments"), format!("ping -c 1 -W 2 -s 4000 {address}"));
    }
    let api_server = "curl -gksSf --max-time 5 https://$KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT/version";
    checks.add("the API server by its Service", api_server);
    let shell = cluster.kubectl()?.args(["exec", "-i", "-n", "default", &pod.name, "-c", "server", "--", "sh"]);
    checks.run(&format!("from pod {} on {}", pod.name, pod.node), shell)
}

/// The maps of the pod's node have each of its echoes to the outside, by the node's own address.
fn translations(cluster: &Cluster, pod: &Pod) -> anyhow::Result<()> {
    let node = cluster.node(&pod.node)?;
    let nat = basal(cluster, node.name(), &["bpf", "nat", "list"])?;
    let connections = basal(cluster, node.name(), &["bpf", "ct", "list", "global"])?;
    for address in OUTSIDE {
        let same_family = |ip: &IpAddr| ip.is_ipv4() == address.is_ipv4();
        let of_pod =
            pod.addresses.iter().filter_map(|ip| ip.parse().ok()).find(same_family).context("no such address")?;
        let of_node = node.addresses().into_iter().find(same_family).context("no such address")?;
        // As in a list, up to the port.
        let [outside, of_pod, of_node] = [address, of_pod, of_node].map(|ip| SocketAddr::new(ip, 0).to_string());
        let [outside, of_pod, of_node] = [&outside, &of_pod, &of_node].map(|text| text.trim_end_matches('0'));
        for (list, line) in [
            (&nat, ["OUT", of_pod, outside, &format!("XLATE_SRC {of_node}")]),
            (&nat, ["IN", of_node, outside, &format!("XLATE_DST {of_pod}")]),
            (&connections, ["OUT", of_pod, outside, "expires="]),
        ] {
            let found = list.lines().any(|text| line.iter().all(|part| text.contains(part)));
            ensure!(found, "no line with {line:?} in:\n{list}");
        }
    }
    Ok(())
}
