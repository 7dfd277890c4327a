//! Scenario 2: who can talk to whom, and what is on the wire meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use anyhow::{Context, ensure};
use basal_e2e::cluster::{Cluster, DNS_ADDRESS, MARK, Node, OUTSIDE};
use basal_e2e::process;
use nix::sys::signal::Signal;

use crate::services;
use crate::view::{basal, eventually, has};
use crate::workload::{Checks, PORT, Pod, delete, deploy, expose, in_url};

/// Two Deployments over all nodes; every pod talks to every other, to every host, to Services, to the name server and to
/// the outside, over IPv4 and IPv6; every host talks to every pod; a pod talks to itself through a Service, and the outside
/// to the pod of a node by that node's NodePort. A capture on the underlay meanwhile shows VXLAN with
/// the identities of both Deployments.
pub(crate) fn everybody_talks(cluster: &mut Cluster) -> anyhow::Result<()> {
    let nodes = cluster.nodes()?;
    let (red, blue) = (deploy(cluster, "red", nodes.len())?, deploy(cluster, "blue", nodes.len())?);
    let (services, node_port) = expose(cluster, "blue")?;
    let identities = eventually("identities of both Deployments", || {
        let identities = identities(cluster, &[("red", &red), ("blue", &blue)])?;
        ensure!(identities["red"] != identities["blue"], "different labels, one identity: {identities:?}");
        Ok(identities)
    })?;
    for node in &nodes {
        eventually(&format!("ipcache rows on {}", node.name()), || {
            rows(cluster, node, &[("red", &red), ("blue", &blue)], &identities)
        })?;
    }
    let capture = Capture::start(cluster)?;
    let world = World { nodes: &nodes, pods: [red.as_slice(), &blue].concat(), services: &services, node_port };
    let result = world.ask(cluster);
    let alone = blue.first().context("blue has no pod")?;
    let result = result.and_then(|()| services::one_backend(cluster, &nodes, alone, node_port));
    let packets = capture.stop()?;
    result?;
    let seen = identities_on_the_wire(&packets);
    for (app, identity) in &identities {
        ensure!(seen.contains(identity), "no packet carried the identity {identity} of {app}; VNIs seen: {seen:?}");
    }
    delete(cluster, &["deployment,service", "red", "blue", services::ALONE])
}

/// Identity of each Deployment, by the CiliumEndpoints of its pods.
pub(crate) fn identities(
    cluster: &Cluster,
    apps: &[(&'static str, &[Pod])],
) -> anyhow::Result<BTreeMap<&'static str, u64>> {
    let mut identities = BTreeMap::new();
    for (app, pods) in apps {
        for pod in *pods {
            let endpoint = cluster.get(&["ciliumendpoint", "-n", "default", &pod.name])?;
            let id = endpoint.pointer("/status/identity/id").and_then(serde_json::Value::as_u64);
            let id = id.with_context(|| format!("the CiliumEndpoint of {} has no identity", pod.name))?;
            ensure!(id >= 256, "{} has the reserved identity {id}", pod.name);
            let first = *identities.entry(*app).or_insert(id);
            ensure!(first == id, "pods of {app} have the identities {first} and {id}");
        }
    }
    Ok(identities)
}

/// The ipcache of a node has each pod with its identity, and with the tunnel endpoint of its node when that is another.
pub(crate) fn rows(
    cluster: &Cluster,
    node: &Node,
    apps: &[(&'static str, &[Pod])],
    identities: &BTreeMap<&'static str, u64>,
) -> anyhow::Result<()> {
    let table = basal(cluster, node.name(), &["bpf", "ipcache", "list"])?;
    for (app, pods) in apps {
        let identity = format!("identity={}", identities[app]);
        for pod in *pods {
            let endpoint = if pod.node == node.name() {
                "tunnelendpoint=0.0.0.0".to_owned()
            } else {
                format!("tunnelendpoint={}", cluster.node(&pod.node)?.addresses()[0])
            };
            for address in &pod.addresses {
                let prefix = format!("{address}/{}", if address.contains(':') { 128 } else { 32 });
                ensure!(
                    has(&table, &[&prefix, &identity, &endpoint]),
                    "no {prefix} {identity} {endpoint} in:\n{table}"
                );
            }
        }
    }
    Ok(())
}

/// Everybody who can be asked.
pub(crate) struct World<'a> {
    pub(crate) nodes: &'a [Node],
    pub(crate) pods: Vec<Pod>,
    /// Addresses of the Service `blue`, which some of the pods serve, and its NodePort.
    pub(crate) services: &'a [String],
    pub(crate) node_port: u64,
}

impl World<'_> {
    /// Every pod and every host asks everybody else.
    pub(crate) fn ask(&self, cluster: &Cluster) -> anyhow::Result<()> {
        self.pods.iter().try_for_each(|pod| self.ask_as_pod(cluster, pod))?;
        self.nodes.iter().try_for_each(|node| self.ask_as_host(node))
    }

    fn ask_as_pod(&self, cluster: &Cluster, pod: &Pod) -> anyhow::Result<()> {
        let mut checks = Checks::default();
        for target in self.pods.iter().filter(|target| target.name != pod.name) {
            let place = if target.node == pod.node { "on the same node" } else { "on another node" };
            for address in &target.addresses {
                reach(&mut checks, &format!("pod {place} {address}"), address);
                full_size(&mut checks, &format!("pod {place} {address}"), address);
            }
        }
        for node in self.nodes {
            let place = if node.name() == pod.node { "own host" } else { "other host" };
            for address in node.addresses() {
                checks.add(format!("ping {place} {address}"), format!("ping -c 1 -W 2 {address}"));
                checks.add(format!("TCP {place} {address}"), kubelet(&address.to_string()));
            }
            let address = in_url(&node.addresses()[0].to_string());
            checks.add(format!("NodePort at {place}"), get(&format!("{address}:{}/hostname", self.node_port)));
        }
        for address in self.services {
            // Often enough to meet a backend on this node and one on another.
            let url = in_url(address);
            let distinct = format!(
                "test $(for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do curl -gsS --max-time 5 http://{url}/hostname; echo; done \
                 | sort -u | wc -l) -ge 2"
            );
            checks.add(format!("several backends of ClusterIP {address}"), distinct);
            checks.add(format!("UDP ClusterIP {address}"), udp(&in_url(address), 81));
        }
        checks.add("ClusterIP by name", get("blue.default.svc.cluster.local/hostname"));
        checks.add(format!("the name server at {DNS_ADDRESS}"), "getent ahosts blue.default.svc.cluster.local");
        for address in OUTSIDE {
            checks.add(format!("the outside {address}"), format!("ping -c 1 -W 2 {address}"));
        }
        // One stream in each direction across nodes shows that full-size segments pass.
        if let Some(target) = self.pods.iter().find(|target| target.node != pod.node) {
            for address in &target.addresses {
                let command = format!("iperf3 -c {address} -n 8M --connect-timeout 3000");
                checks.add(format!("8 MB to {address}"), retry(&command));
            }
        }
        let shell = cluster.kubectl()?.args(["exec", "-i", "-n", "default", &pod.name, "-c", "server", "--", "sh"]);
        checks.run(&format!("from pod {} on {}", pod.name, pod.node), shell)
    }

    fn ask_as_host(&self, node: &Node) -> anyhow::Result<()> {
        let mut checks = Checks::default();
        for target in &self.pods {
            for address in &target.addresses {
                checks.add(format!("host to pod {address}"), get(&format!("{}:{PORT}/hostname", in_url(address))));
                checks.add(format!("ping host to pod {address}"), format!("ping -c 1 -W 2 {address}"));
            }
        }
        for address in self.services {
            checks.add(format!("host to ClusterIP {address}"), get(&format!("{}/hostname", in_url(address))));
        }
        checks.run(&format!("from host {}", node.name()), node.run("sh"))
    }
}

/// TCP, UDP and ICMP to a server pod.
pub(crate) fn reach(checks: &mut Checks, label: &str, address: &str) {
    checks.add(format!("TCP {label}"), get(&format!("{}:{PORT}/hostname", in_url(address))));
    checks.add(format!("UDP {label}"), udp(&in_url(address), PORT + 1));
    checks.add(format!("ping {label}"), format!("ping -c 1 -W 2 {address}"));
}

/// A packet as big as the route allows, which may not be fragmented.
fn full_size(checks: &mut Checks, label: &str, address: &str) {
    let headers = if address.contains(':') { 48 } else { 28 };
    let mtu = format!("$(ip -o route get {address} | sed -n 's/.* mtu \\([0-9]*\\).*/\\1/p')");
    let device = "$(cat /sys/class/net/eth0/mtu)";
    let command = format!("mtu={mtu}; ping -c 1 -W 2 -M do -s $((${{mtu:-{device}}}-{headers})) {address}");
    checks.add(format!("full-size packet to {label}"), command);
}

pub(crate) fn get(url: &str) -> String {
    format!("curl -gsSf --max-time 5 http://{url}")
}

/// The kubelet of a host asks who calls: any answer shows that TCP works.
fn kubelet(address: &str) -> String {
    format!("curl -gksS --max-time 5 -o /dev/null https://{}:10250/healthz", in_url(address))
}

/// agnhost's own server sends the datagram and tells the answer.
pub(crate) fn udp(host: &str, port: u16) -> String {
    format!("agnhost connect --protocol=udp --timeout=3s {host}:{port}")
}

/// iperf3 serves one client at a time.
fn retry(command: &str) -> String {
    format!("(for i in 1 2 3 4 5 6 7 8 9 10; do {command} && exit 0; sleep 0.3; done; exit 1)")
}

/// tcpdump on the underlay bridge.
pub(crate) struct Capture {
    pid: u32,
    file: std::path::PathBuf,
}

impl Capture {
    pub(crate) fn start(cluster: &Cluster) -> anyhow::Result<Self> {
        let (file, log) = (cluster.dir().join("vxlan.pcap"), cluster.dir().join("log/tcpdump.log"));
        let mut tcpdump = Command::new("nsenter");
        tcpdump
            .arg(format!("--net=/run/netns/{}-net", cluster.name()))
            .args(["tcpdump", "-i", "br0", "-Z", "root", "-U", "--immediate-mode", "-s", "128", "-w"])
            .arg(&file)
            .args(["udp", "port", "8472"])
            .env(MARK, cluster.name().to_string());
        let pid = process::start_detached("tcpdump", tcpdump, &log)?;
        eventually("the capture to begin", || {
            ensure!(std::fs::read_to_string(&log)?.contains("listening on"), "{}", process::tail(&log));
            Ok(())
        })?;
        Ok(Self { pid, file })
    }

    /// Ends the capture and answers tcpdump's lines.
    pub(crate) fn stop(self) -> anyhow::Result<String> {
        process::signal_pid(self.pid, Signal::SIGTERM)?;
        eventually("the capture to end", || {
            ensure!(!process::is_alive(self.pid), "tcpdump runs");
            Ok(())
        })?;
        let read = basal_e2e::command::Run::new("tcpdump");
        read.args(["-nn", "-T", "vxlan", "-r"]).arg(&self.file).text()
    }
}

/// The VNIs in tcpdump's lines.
pub(crate) fn identities_on_the_wire(packets: &str) -> BTreeSet<u64> {
    let after =
        |line: &str| line.split_once("vni ")?.1.split(|letter: char| !letter.is_ascii_digit()).next()?.parse().ok();
    packets.lines().filter_map(after).collect()
}
