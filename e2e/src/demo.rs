//! The demonstration: two pods on two nodes of a running cluster, and what can be seen of Basal between them. All that
//! is printed was just said by a command or an object; each section begins with the command that says it again.

use std::fs;
use std::io::{Write, stdout};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use basal_e2e::cluster::{Cluster, MARK, NAMESPACE, Node};
use basal_e2e::parts;
use basal_e2e::process::{self, Process};
use basal_e2e::wait::{self, Check};
use serde_json::{Value, json};

/// The image of test pods.
const IMAGE: &str = "localhost/basal-e2e/tools:1";
/// The pod on the first node, which pings.
const FROM: &str = "demo-from";
/// The pod on the second node, which answers.
const TO: &str = "demo-to";
/// How long pods may take to run, and a packet to be seen.
const LIMIT: Duration = Duration::from_secs(60);

/// Runs it on a cluster that is up, with Basal in it.
pub(crate) fn run(cluster: &Cluster) -> anyhow::Result<()> {
    let nodes = cluster.nodes()?;
    let [first, second, ..] = nodes.as_slice() else { bail!("the demo needs two nodes; start them with --nodes=2") };
    let (from, to) = pods(cluster, first, second)?;
    let agent = agent(cluster, first)?;
    let basal = ["exec", "-n", NAMESPACE, &agent, "--", "basal"];

    print(&format!("\nThe operator gave each node a block of either family, its PodCIDRs:\n\n{}", blocks(cluster)?))?;

    let tunnels = kubectl(cluster, &[&basal[..], &["bpf", "tunnel", "list"]].concat())?;
    print(&format!(
        "\nThe agent of {} keeps the tunnels to the other nodes' blocks in a BPF map:\n\n{tunnels}",
        first.name()
    ))?;

    print(&format!("\nPod {} on {} pings pod {} on {}:\n", from.name, first.name(), to.name, second.name()))?;
    let capture = Capture::start(cluster)?;
    for address in &to.addresses {
        let ping = ["exec", from.name, "--", "ping", "-c", "3", "-i", "0.3", "-w", "10", &address.to_string()];
        print(&format!("\n{}", kubectl(cluster, &ping)?))?;
    }
    let packet = capture.packet(&from.addresses, &to.addresses)?;
    ensure!(
        packet.vni == from.identity,
        "the packet carries {} as VNI, and {} has the identity {}; see `basal bpf ipcache list` on both nodes",
        packet.vni,
        from.name,
        from.identity
    );
    print(&format!(
        "\nOne of these packets on the wire between the nodes, as tcpdump saw it:\n\n{}\n\n\
         Its VNI {} is the security identity of {}:\n{}",
        packet.lines, packet.vni, from.name, from.labels
    ))?;

    let status = kubectl(cluster, &[&basal[..], &["status"]].concat())?;
    print(&format!("\nThe health of that agent:\n\n{status}"))?;
    print(&look_around(cluster, &agent)?)
}

/// A pod that runs.
struct Pod {
    name: &'static str,
    addresses: Vec<IpAddr>,
    identity: u64,
    /// Those of the identity, one a line.
    labels: String,
}

/// Makes both pods, or takes those that are there, and waits until they run and have identities.
fn pods(cluster: &Cluster, first: &Node, second: &Node) -> anyhow::Result<(Pod, Pod)> {
    let places = [(FROM, first), (TO, second)];
    for (name, node) in places {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "default", "labels": {"app": name}},
            "spec": {
                "nodeName": node.name(), "terminationGracePeriodSeconds": 0,
                "containers": [{"name": "tools", "image": IMAGE, "imagePullPolicy": "Never"}],
            },
        });
        // The API server refuses pods as long as the namespace has no service account.
        wait::until_ok("the API server to take a pod", LIMIT, || cluster.apply(&pod.to_string()))?;
    }
    let [from, to] = places.map(|(name, node)| {
        let what = format!("pod {name} on {} to run with an identity", node.name());
        wait::until(&what, LIMIT, Duration::from_millis(300), || {
            Ok(running(cluster, name).map_or_else(|error| Check::NotYet(format!("{error:#}")), Check::Done))
        })
    });
    Ok((from?, to?))
}

/// A pod with what its objects say; fails as long as it is not there as a whole.
fn running(cluster: &Cluster, name: &'static str) -> anyhow::Result<Pod> {
    let pod = cluster.get(&["pod", "-n", "default", name])?;
    let conditions = pod.pointer("/status/conditions").and_then(Value::as_array);
    let ready = conditions.and_then(|all| all.iter().find(|condition| condition["type"] == "Ready"));
    ensure!(
        ready.is_some_and(|condition| condition["status"] == "True"),
        "it is not ready: {}",
        said_of(cluster, name)
    );
    let addresses = pod.pointer("/status/podIPs").and_then(Value::as_array).context("it has no address")?;
    let addresses: Vec<IpAddr> = addresses.iter().filter_map(|one| one["ip"].as_str()?.parse().ok()).collect();
    ensure!(addresses.len() == 2, "it has the addresses {addresses:?} instead of one of either family");
    let endpoint = cluster.get(&["ciliumendpoint", "-n", "default", name])?;
    let identity = endpoint.pointer("/status/identity/id").and_then(Value::as_u64);
    // Smaller numbers are reserved; 5 stands until the labels are known.
    let identity = identity.filter(|id| *id >= 256).context("its CiliumEndpoint has no identity of its own yet")?;
    let labels = endpoint.pointer("/status/identity/labels").and_then(Value::as_array);
    let labels: Vec<&str> = labels.into_iter().flatten().filter_map(Value::as_str).collect();
    Ok(Pod { name, addresses, identity, labels: indented(&labels.join("\n")) })
}

/// The last event about a pod: why it does not run.
fn said_of(cluster: &Cluster, pod: &str) -> String {
    let field = format!("--field-selector=involvedObject.name={pod}");
    let events = cluster.list(&["events", "-n", "default", "--sort-by=.lastTimestamp", &field]).unwrap_or_default();
    let message = events.last().and_then(|event| event["message"].as_str());
    message.unwrap_or("no event says why").to_owned()
}

/// The name of the agent's pod on a node.
fn agent(cluster: &Cluster, node: &Node) -> anyhow::Result<String> {
    let field = format!("--field-selector=spec.nodeName={},status.phase=Running", node.name());
    let pods = cluster.list(&["pods", "-n", NAMESPACE, "-l", "k8s-app=cilium", &field])?;
    let name = pods.first().and_then(|pod| pod.pointer("/metadata/name")).and_then(Value::as_str);
    let name =
        name.with_context(|| format!("no agent runs on {}; was the cluster started with --cni=basal?", node.name()))?;
    Ok(name.to_owned())
}

fn blocks(cluster: &Cluster) -> anyhow::Result<String> {
    const COLUMNS: &str = "-o=custom-columns=NODE:.metadata.name,\
                           ADDRESS:.spec.addresses[?(@.type==\"InternalIP\")].ip,PODCIDRS:.spec.ipam.podCIDRs";
    kubectl(cluster, &["get", "ciliumnodes", COLUMNS])
}

/// Runs kubectl and answers the command line with its output below, for the screen.
fn kubectl(cluster: &Cluster, words: &[&str]) -> anyhow::Result<String> {
    let output = cluster.kubectl()?.args(words).text()?;
    let words: Vec<String> = words.iter().map(|word| quoted(word)).collect();
    Ok(indented(&format!("$ kubectl {}\n{output}", words.join(" "))))
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "-_=./:,@".contains(letter);
    if word.chars().all(plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("    {line}").trim_end().to_owned() + "\n").collect()
}

/// tcpdump on the underlay bridge. Dropping it ends it.
struct Capture {
    log: PathBuf,
    _tcpdump: Process,
}

/// A packet between two nodes.
struct Packet {
    vni: u64,
    /// tcpdump's two lines: the outer packet, and the one inside.
    lines: String,
}

impl Capture {
    fn start(cluster: &Cluster) -> anyhow::Result<Self> {
        let log = cluster.dir().join("log/demo-capture.log");
        // What an earlier run saw must not be taken for what this one sees.
        fs::write(&log, "").with_context(|| format!("writing {}", log.display()))?;
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", cluster.name().underlay()))
            .args(["tcpdump", "-i", "br0", "-Z", "root", "-l", "-t", "-nn", "-T", "vxlan", "udp", "port", "8472"])
            .env(MARK, cluster.name().to_string());
        let mut running = Process::start("tcpdump", command, &log)?;
        wait::until("tcpdump to listen", LIMIT, Duration::from_millis(50), || {
            running.check_running()?;
            let said = fs::read_to_string(&log)?;
            Ok(if said.contains("listening on") { Check::Done(()) } else { Check::NotYet(process::tail(&log)) })
        })?;
        Ok(Self { log, _tcpdump: running })
    }

    /// The first echo request from one pod to the other, whichever family.
    fn packet(&self, from: &[IpAddr], to: &[IpAddr]) -> anyhow::Result<Packet> {
        wait::until("tcpdump to show the ping", LIMIT, Duration::from_millis(100), || {
            let said = fs::read_to_string(&self.log)?;
            Ok(find(&said, from, to).map_or_else(|| Check::NotYet(process::tail(&self.log)), Check::Done))
        })
    }
}

/// An echo request from one of `from` to one of `to` in tcpdump's lines.
fn find(said: &str, from: &[IpAddr], to: &[IpAddr]) -> Option<Packet> {
    let lines: Vec<&str> = said.lines().collect();
    lines.windows(2).find_map(|pair| {
        let [outer, inner] = pair else { return None };
        let vni = outer.split_once("vni ")?.1.split(|letter: char| !letter.is_ascii_digit()).next()?.parse().ok()?;
        let asked = from.iter().any(|from| to.iter().any(|to| inner.contains(&format!("{from} > {to}: "))));
        let echo = inner.contains("echo request");
        (asked && echo).then(|| Packet { vni, lines: format!("    {outer}\n    {inner}") })
    })
}

fn look_around(cluster: &Cluster, agent: &str) -> anyhow::Result<String> {
    let kubectl = parts::binary("kubectl")?;
    Ok(format!(
        "\nLook around:\n\n    \
         export KUBECONFIG={}\n    \
         {} get pods --all-namespaces --output wide\n    \
         {} exec -n {NAMESPACE} {agent} -- basal bpf ipcache list\n\n\
         `basal --help` there lists more: node list, endpoint list, identity list, ipam, bpf …\n\
         `eval \"$(make -s demo-env)\"` sets KUBECONFIG, PATH (kubectl, etcdctl, helm), etcdctl's variables for Basal's etcd\n\
         (`etcdctl get --prefix --keys-only cilium/`), and for each node the command that enters it ($NODE_N1_ENTER ip route).\n\
         `make demo-down` takes it all away.\n",
        cluster.kubeconfig().display(),
        kubectl.display(),
        kubectl.display(),
    ))
}

fn print(text: &str) -> anyhow::Result<()> {
    stdout().write_all(text.as_bytes()).context("writing to standard output")
}

#[cfg(test)]
mod tests {
    use super::find;

    const SAID: &str = "\
tcpdump: listening on br0, link-type EN10MB (Ethernet), snapshot length 262144 bytes
IP 10.200.0.11.45000 > 10.200.0.12.8472: VXLAN, flags [I] (0x08), vni 4
IP 10.100.0.9 > 10.100.1.9: ICMP echo request, id 1, seq 1, length 64
IP 10.200.0.12.45000 > 10.200.0.11.8472: VXLAN, flags [I] (0x08), vni 777
IP 10.100.1.7 > 10.100.0.7: ICMP echo reply, id 1, seq 1, length 64
IP 10.200.0.11.45000 > 10.200.0.12.8472: VXLAN, flags [I] (0x08), vni 4711
IP6 fd00:100::7 > fd00:100::107: ICMP6, echo request, id 1, seq 1, length 64
";

    #[test]
    fn the_ping_is_told_from_other_packets() {
        let (from, to) = (["fd00:100::7".parse().unwrap()], ["fd00:100::107".parse().unwrap()]);
        let packet = find(SAID, &from, &to).unwrap();
        assert_eq!(packet.vni, 4711);
        assert!(packet.lines.contains("> 10.200.0.12.8472: VXLAN") && packet.lines.contains("IP6 fd00:100::7"));
        let (from, to) = (["10.100.0.7".parse().unwrap()], ["10.100.1.7".parse().unwrap()]);
        assert!(find(SAID, &from, &to).is_none(), "an echo reply is no request");
        assert!(find(SAID, &from, &["10.100.1.70".parse().unwrap()]).is_none());
    }
}
