//! `basal status`, laid out as Cilium's users know it.

use std::{path::Path, process::ExitCode};

use anyhow::bail;
use basal_cni::api::{Answer, Component, IpamReport, Request, StatusReport};

use crate::{
    output::{Format, print, print_json},
    show::ask,
    table::{lay_out, row},
};

/// Prints the agent's health; the exit code tells it too.
pub(crate) fn run(socket: &Path, format: Format) -> anyhow::Result<ExitCode> {
    let Answer::Status(status) = ask(socket, Request::Status)? else { bail!("the agent answered something else") };
    match format {
        Format::Json => print_json(&status)?,
        Format::Text => print(&text(&status))?,
    };
    Ok(if status.healthy() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn text(status: &StatusReport) -> String {
    let component = |component: &Component| format!("{}   {}", component.state.as_str(), component.message);
    let routing = format!("Network: {}   Host: {}", status.routing, status.host_routing);
    let endpoints = format!("{} of {} ready", status.endpoints_ready, status.endpoints);
    let lines = [
        ("KVStore:", component(&status.kvstore)),
        ("Kubernetes:", component(&status.kubernetes)),
        ("Cilium:", component(&status.cilium)),
        ("CNI Config file:", component(&status.cni_file)),
        ("Cluster:", format!("{}   Node: {}   Remote nodes: {}", status.cluster, status.node, status.remote_nodes)),
        ("IPAM:", ipam(&status.ipam)),
        ("Routing:", routing),
        ("Masquerading:", status.masquerading.clone()),
        ("Datapath:", format!("{}   Drift mended: {}", component(&status.datapath), status.drift)),
        ("Policy:", component(&status.policy)),
        ("Endpoints:", endpoints),
        ("Identities:", status.identities.to_string()),
    ];
    let rows: Vec<Vec<String>> = lines.iter().map(|(name, value)| row([name, value])).collect();
    lay_out(&rows).lines().flat_map(|line| [line.trim_end(), "\n"]).collect()
}

fn ipam(ipam: &IpamReport) -> String {
    if !ipam.problem.is_empty() {
        return ipam.problem.clone();
    }
    let blocks = ipam.blocks.iter().map(|block| {
        let family = if block.cidr.addr().is_ipv4() { "IPv4" } else { "IPv6" };
        let confirmed = if block.confirmed { "" } else { " (not confirmed)" };
        format!("{family}: {}/{} allocated from {}{confirmed}", block.used, block.capacity, block.cidr)
    });
    blocks.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use basal_cni::api::{BlockReport, ComponentState};

    use super::*;

    #[test]
    fn the_lines_are_those_that_people_look_for() {
        let ok = |message: &str| Component::new(ComponentState::Ok, message);
        let block = |cidr: &str, confirmed| BlockReport {
            cidr: cidr.parse().unwrap(),
            confirmed,
            used: 4,
            cooling: 0,
            capacity: 254,
        };
        let status = StatusReport {
            version: "0.1.0".into(),
            node: "n1".into(),
            cluster: "default".into(),
            kvstore: ok("etcd: 1/1 connected"),
            kubernetes: ok("v1.35.4"),
            cilium: Component::new(ComponentState::Failure, "waiting for: PodCIDR"),
            cni_file: ok("05-cilium.conflist"),
            datapath: ok("as it should be"),
            policy: Component::new(ComponentState::Warning, "NOT ENFORCED"),
            routing: "Tunnel [vxlan]".into(),
            masquerading: "nftables".into(),
            host_routing: "Legacy".into(),
            ipam: IpamReport {
                blocks: vec![block("10.0.1.0/24", true), block("fd00::/120", false)],
                addresses: Vec::new(),
                problem: String::new(),
            },
            remote_nodes: 2,
            endpoints: 3,
            endpoints_ready: 2,
            identities: 9,
            drift: 0,
        };
        let text = text(&status);
        for line in [
            "KVStore:           Ok   etcd: 1/1 connected",
            "Cilium:            Failure   waiting for: PodCIDR",
            "IPAM:              IPv4: 4/254 allocated from 10.0.1.0/24, IPv6: 4/254 allocated from fd00::/120 (not confirmed)",
            "Routing:           Network: Tunnel [vxlan]   Host: Legacy",
            "Policy:            Warning   NOT ENFORCED",
            "Endpoints:         2 of 3 ready",
        ] {
            assert!(text.lines().any(|found| found.trim_end() == line), "{line:?} is missing in\n{text}");
        }
        assert!(!status.healthy());
    }
}
