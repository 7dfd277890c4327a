//! What the agent knows, as tables.

use std::{net::IpAddr, path::Path, process::ExitCode, time::Duration};

use anyhow::bail;
use basal_cni::{
    api::{Answer, Request},
    client::{Deadline, call},
};

use crate::{
    output::{Format, print, print_json},
    table::{lay_out, row},
};

/// How long the agent may take to answer.
const LIMIT: Duration = Duration::from_secs(30);

/// Asks the agent.
pub(crate) fn ask(socket: &Path, request: Request) -> anyhow::Result<Answer> {
    match call(socket, request, Deadline::after(LIMIT))? {
        Answer::Error(error) => Err(error.into()),
        answer => Ok(answer),
    }
}

/// `basal node list`.
pub(crate) fn nodes(socket: &Path, format: Format) -> anyhow::Result<ExitCode> {
    let Answer::Nodes(nodes) = ask(socket, Request::Nodes)? else { bail!("the agent answered something else") };
    if format == Format::Json {
        return print_json(&nodes);
    }
    let mut rows = vec![row(["Name", "IPv4 Address", "Endpoint CIDR", "IPv6 Address", "Endpoint CIDR", "Source"])];
    for node in &nodes {
        let of = |v4: bool| {
            let ip = node.internal_ips.iter().find(|ip| ip.is_ipv4() == v4);
            let cidr = node.pod_cidrs.iter().find(|cidr| cidr.addr().is_ipv4() == v4);
            (ip.map(ToString::to_string).unwrap_or_default(), cidr.map(ToString::to_string).unwrap_or_default())
        };
        let (name, source) = (format!("{}/{}", node.cluster, node.name), if node.local { "local" } else { "kvstore" });
        let ((ip4, cidr4), (ip6, cidr6)) = (of(true), of(false));
        rows.push(row([&name, &ip4, &cidr4, &ip6, &cidr6, source]));
    }
    print(&lay_out(&rows))
}

/// `basal endpoint list`.
pub(crate) fn endpoints(socket: &Path, format: Format) -> anyhow::Result<ExitCode> {
    let Answer::Endpoints(endpoints) = ask(socket, Request::Endpoints)? else {
        bail!("the agent answered something else")
    };
    if format == Format::Json {
        return print_json(&endpoints);
    }
    // The two columns of policies are Cilium's; Basal enforces none yet.
    let mut rows = vec![
        row([
            "ENDPOINT",
            "POLICY (ingress)",
            "POLICY (egress)",
            "IDENTITY",
            "LABELS (source:key[=value])",
            "IPv6",
            "IPv4",
            "STATUS",
        ]),
        row(["", "ENFORCEMENT", "ENFORCEMENT", "", "", "", "", ""]),
    ];
    let text = |ip: Option<IpAddr>| ip.map(|ip| ip.to_string()).unwrap_or_default();
    for endpoint in &endpoints {
        let mut labels = endpoint.labels.iter();
        let first = labels.next().cloned().unwrap_or_default();
        let (id, identity) = (endpoint.id.to_string(), endpoint.identity.to_string());
        let (ipv6, ipv4) = (text(endpoint.ipv6), text(endpoint.ipv4));
        rows.push(row([&id, "Disabled", "Disabled", &identity, &first, &ipv6, &ipv4, &endpoint.state]));
        rows.extend(labels.map(|label| row(["", "", "", "", label, "", "", ""])));
    }
    print(&lay_out(&rows))
}

/// `basal identity list`.
pub(crate) fn identities(socket: &Path, format: Format) -> anyhow::Result<ExitCode> {
    let Answer::Identities(identities) = ask(socket, Request::Identities)? else {
        bail!("the agent answered something else")
    };
    if format == Format::Json {
        return print_json(&identities);
    }
    let mut rows = vec![row(["ID", "LABELS"])];
    for identity in &identities {
        let mut labels = identity.labels.iter();
        let first = labels.next().cloned().unwrap_or_default();
        rows.push(row([&identity.id.to_string(), &first]));
        rows.extend(labels.map(|label| row(["", label])));
    }
    print(&lay_out(&rows))
}

/// `basal ipam`.
pub(crate) fn ipam(socket: &Path, format: Format) -> anyhow::Result<ExitCode> {
    let Answer::Ipam(ipam) = ask(socket, Request::Ipam)? else { bail!("the agent answered something else") };
    if format == Format::Json {
        return print_json(&ipam);
    }
    let mut blocks = vec![row(["BLOCK", "CONFIRMED", "USED", "COOLING DOWN", "CAPACITY"])];
    for block in &ipam.blocks {
        let confirmed = if block.confirmed { "yes" } else { "no" };
        let (cidr, used) = (block.cidr.to_string(), block.used.to_string());
        blocks.push(row([&cidr, confirmed, &used, &block.cooling.to_string(), &block.capacity.to_string()]));
    }
    let mut addresses = vec![row(["ADDRESS", "OWNER"])];
    addresses.extend(ipam.addresses.iter().map(|address| row([&address.ip.to_string(), &address.owner])));
    let problem = if ipam.problem.is_empty() { String::new() } else { format!("\n{}\n", ipam.problem) };
    print(&format!("{}\n{}{problem}", lay_out(&blocks), lay_out(&addresses)))
}
