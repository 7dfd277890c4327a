//! Traffic that never stops, in both families and all kinds, and what of it got lost.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context, bail, ensure};
use basal_e2e::cluster::Cluster;
use basal_e2e::say::say;

use crate::view::eventually;
use crate::workload::{PORT, Pod, delete, deploy, expose, in_url, waiting_pod};

/// The Deployment of servers, and its Service.
const SERVERS: &str = "steady";
const CLIENT: &str = "steady-client";
/// Streams use ports from here on, one each.
const FIRST_PORT: u16 = 5301;
/// How often pings are looked at: at one moment or another a reply is under way, but not at each.
const LOOKS: usize = 20;

/// Pings every 2 ms, TCP streams, UDP datagrams with sequence numbers and new TCP connections: from a pod to a pod of its
/// own node, to one of another, to Services and to a host.
pub(crate) struct Flow {
    streams: Vec<Stream>,
    /// What had arrived of each kind when it was last looked at.
    arrived: BTreeMap<String, u64>,
}

/// A stream to a server that listens for it alone.
struct Stream {
    label: String,
    /// The pod of the server.
    server: String,
    address: String,
    port: u16,
    udp: bool,
}

/// What arrived of one kind of traffic, and what did not; of a TCP stream the seconds in which bytes did.
#[derive(Clone, Copy)]
struct Count {
    arrived: u64,
    lost: u64,
}

impl Flow {
    /// Starts it on the cluster's first two nodes; answers when all of it flows.
    pub(crate) fn start(cluster: &Cluster) -> anyhow::Result<Self> {
        let nodes = cluster.nodes()?;
        let [here, there, ..] = nodes.as_slice() else { bail!("there are {} nodes", nodes.len()) };
        let servers = deploy(cluster, SERVERS, nodes.len())?;
        let on = |node: &str| servers.iter().find(|pod| pod.node == node).context("a node without a server");
        let (near, far) = (on(here.name())?, on(there.name())?);
        let (services, _port) = expose(cluster, SERVERS)?;
        cluster.apply(&waiting_pod(CLIENT, CLIENT, here.name()).to_string())?;
        cluster.kubectl()?.args(["wait", "--for=condition=Ready", "--timeout=60s", "pod", CLIENT]).done()?;

        let streams = streams(near, far);
        for stream in &streams {
            let serve = format!("iperf3 -s -i 1 --forceflush -p {0} > /tmp/served.{0} 2>&1 &", stream.port);
            cluster.exec("default", &stream.server, &["sh", "-c", &serve])?;
        }
        let mut script = String::from("mkdir /tmp/flow; cd /tmp/flow\n");
        for (label, address) in places(near, far) {
            script.push_str(&ping(&label, &address));
            let url = format!("http://{}:{PORT}/hostname", in_url(&address));
            script.push_str(&connect(&label, &url));
        }
        for address in &services {
            script.push_str(&connect(&format!("Service {address}"), &format!("http://{}/hostname", in_url(address))));
        }
        for address in there.addresses() {
            let (label, address) = (format!("host {address}"), address.to_string());
            script.push_str(&ping(&label, &address));
            script.push_str(&connect(&label, &format!("https://{}:10250/healthz", in_url(&address))));
        }
        for stream in &streams {
            // So few datagrams that a receiver which has to wait for a processor has room for them in its socket.
            let kind = if stream.udp { "-u -b 80K -l 100 -w 208K" } else { "-b 4M" };
            let Stream { label, address, port, .. } = stream;
            writeln!(script, "iperf3 -c {address} -p {port} {kind} -t 86400 -i 0 > '/tmp/{label}' 2>&1 &")?;
        }
        let started = cluster.kubectl()?.args(["exec", "-i", "-n", "default", CLIENT, "--", "sh"]).stdin(script);
        started.done().context("starting the traffic")?;
        let mut flow = Self { streams, arrived: BTreeMap::new() };
        flow.arrived = eventually("all traffic to flow", || {
            let arrived = flow.arrivals(cluster)?;
            ensure!(arrived.values().all(|count| *count > 0), "arrived is {arrived:?}");
            Ok(arrived)
        })?;
        Ok(flow)
    }

    /// Fails when something got lost since the start, or when nothing arrived of a kind since the last look, which must
    /// be some seconds ago.
    pub(crate) fn check(&mut self, cluster: &Cluster) -> anyhow::Result<()> {
        for (label, arrived) in self.arrivals(cluster)? {
            let before = self.arrived.insert(label.clone(), arrived).unwrap_or_default();
            ensure!(arrived > before, "{label} stands still at {before}");
        }
        Ok(())
    }

    /// What arrived since the start, of each kind; fails when something got lost.
    fn arrivals(&self, cluster: &Cluster) -> anyhow::Result<BTreeMap<String, u64>> {
        let mut counts = connections(cluster)?;
        counts.extend(pings(cluster)?);
        for stream in &self.streams {
            counts.insert(stream.label.clone(), stream.count(cluster)?);
        }
        let lost: Vec<String> = counts
            .iter()
            .filter(|(_label, count)| count.lost > 0)
            .map(|(label, count)| format!("{label}: {} of {}", count.lost, count.lost + count.arrived))
            .collect();
        ensure!(lost.is_empty(), "lost: {}\n{}", lost.join("; "), in_client(cluster, "tail -n 3 failed* || true")?);
        Ok(counts.into_iter().map(|(label, count)| (label, count.arrived)).collect())
    }

    /// Ends it; fails when something got lost.
    pub(crate) fn stop(self, cluster: &Cluster) -> anyhow::Result<()> {
        let arrived = self.arrivals(cluster);
        delete(cluster, &["pod", CLIENT, "--now"])?;
        delete(cluster, &["deployment,service", SERVERS])?;
        let arrived = arrived?;
        let sum = |words: &str| -> u64 {
            arrived.iter().filter(|(label, _)| label.starts_with(words)).map(|(_, count)| count).sum()
        };
        say(format!(
            "  nothing was lost of {} pings, {} new connections, {} datagrams and {} seconds of TCP streams",
            sum("ping"),
            sum("new"),
            sum("UDP"),
            sum("TCP"),
        ));
        Ok(())
    }
}

/// The addresses of a pod here and of one on another node, with what to call them.
fn places(near: &Pod, far: &Pod) -> Vec<(String, String)> {
    let of = |place: &str, pod: &Pod| {
        pod.addresses.iter().map(|address| (format!("{place} pod {address}"), address.clone())).collect::<Vec<_>>()
    };
    [of("near", near), of("far", far)].concat()
}

fn streams(near: &Pod, far: &Pod) -> Vec<Stream> {
    let mut streams = Vec::new();
    let mut port = FIRST_PORT;
    for (place, pod) in [("near", near), ("far", far)] {
        for address in &pod.addresses {
            for (kind, udp) in [("TCP", false), ("UDP", true)] {
                let label = format!("{kind} to the {place} pod {address}");
                streams.push(Stream { label, server: pod.name.clone(), address: address.clone(), port, udp });
                port += 1;
            }
        }
    }
    streams
}

/// Pings without end, whose process is in a file beside their summary.
fn ping(label: &str, address: &str) -> String {
    format!("ping -q -i 0.002 {address} > 'ping {label}' 2>&1 & echo $! > 'pid ping {label}'\n")
}

/// A loop of new connections: a dot in one file for each that was answered, a line in another for each that was not.
fn connect(label: &str, url: &str) -> String {
    format!(
        "while :; do if said=$(curl -gksS --max-time 5 -o /dev/null {url} 2>&1); then printf . >> 'new {label}'; \
         else echo \"$said\" >> 'failed {label}'; fi; sleep 0.1; done > /dev/null 2>&1 &\n"
    )
}

fn in_client(cluster: &Cluster, script: &str) -> anyhow::Result<String> {
    cluster.exec("default", CLIENT, &["sh", "-c", &format!("cd /tmp/flow; {script}")])
}

/// New connections, each kind by its label.
fn connections(cluster: &Cluster) -> anyhow::Result<BTreeMap<String, Count>> {
    let script = "for file in new*; do label=${file#new }; failed=$(cat \"failed $label\" 2>/dev/null | wc -l); \
                  echo \"$(wc -c < \"$file\") $failed new $label\"; done";
    in_client(cluster, script)?.lines().map(count).collect()
}

/// `ARRIVED LOST LABEL`.
fn count(line: &str) -> anyhow::Result<(String, Count)> {
    let mut words = line.splitn(3, ' ');
    let mut number = || words.next()?.parse().ok();
    let numbers = number().zip(number());
    let ((arrived, lost), label) = numbers.zip(words.next()).with_context(|| format!("no count: {line:?}"))?;
    Ok((label.to_owned(), Count { arrived, lost }))
}

/// Pings, each kind by its label. Of several looks the one with the fewest that are not answered yet.
fn pings(cluster: &Cluster) -> anyhow::Result<BTreeMap<String, Count>> {
    let mut best = BTreeMap::<String, Count>::new();
    for _look in 0..LOOKS {
        for (label, seen) in look_at_pings(cluster)? {
            let known = best.entry(label).or_insert(seen);
            *known = Count { arrived: seen.arrived, lost: seen.lost.min(known.lost) };
        }
        if best.values().all(|count| count.lost == 0) {
            break;
        }
    }
    Ok(best)
}

/// ping answers SIGQUIT with `RECEIVED/SENT packets, …`.
fn look_at_pings(cluster: &Cluster) -> anyhow::Result<Vec<(String, Count)>> {
    let script = "for file in ping*; do kill -QUIT $(cat \"pid $file\"); done; sleep 0.1; \
                  for file in ping*; do echo \"$file=$(tail -n 1 \"$file\")\"; done";
    let said = in_client(cluster, script)?;
    let read = |line: &str| {
        let (label, text) = line.split_once('=')?;
        let (received, rest) = text.trim().split_once('/')?;
        let (received, sent): (u64, u64) = (received.parse().ok()?, rest.split(' ').next()?.parse().ok()?);
        Some((label.to_owned(), Count { arrived: received, lost: sent.saturating_sub(received) }))
    };
    said.lines().map(|line| read(line).with_context(|| format!("no summary of ping: {line:?}"))).collect()
}

impl Stream {
    /// What its server says each second. Of TCP nothing gets lost; it stands still when its packets do.
    fn count(&self, cluster: &Cluster) -> anyhow::Result<Count> {
        let log = format!("/tmp/served.{}", self.port);
        let said = cluster.exec("default", &self.server, &["cat", &log])?;
        let seconds = said.lines().filter(|line| line.contains(" sec ") && line.contains("bits/sec"));
        let mut count = Count { arrived: 0, lost: 0 };
        for second in seconds {
            if self.udp {
                let (arrived, lost) = datagrams(second).with_context(|| format!("no datagrams in {second:?}"))?;
                count = Count { arrived: count.arrived + arrived, lost: count.lost + lost };
            } else {
                count.arrived += u64::from(!second.contains(" 0.00 bits/sec"));
            }
        }
        Ok(count)
    }
}

/// Of `… 0.011 ms  LOST/TOTAL (0%)`, those that arrived and those that did not.
fn datagrams(line: &str) -> Option<(u64, u64)> {
    let (lost, total) =
        line.split_whitespace().find_map(|word| word.split_once('/').filter(|_| !word.contains("bits")))?;
    let (lost, total): (u64, u64) = (lost.parse().ok()?, total.parse().ok()?);
    Some((total.saturating_sub(lost), lost))
}
