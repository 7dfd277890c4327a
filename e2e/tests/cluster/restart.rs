//! Scenario 6: forwarding needs no running agent.

use anyhow::{Context, ensure};
use basal_e2e::cluster::{Cluster, NAMESPACE};
use basal_e2e::say::say;

use crate::view::{agent_pod, eventually};
use crate::workload::{delete, waiting_pod};

/// The command of the agent's process.
const AGENT: &str = "basal-agent";

/// The agent of a node is killed, and later its pod deleted, while one of its pods pings across nodes and streams over
/// TCP: no ping is lost and the stream ends in order.
pub(crate) fn forwarding_goes_on(cluster: &mut Cluster) -> anyhow::Result<()> {
    for (pod, node) in [("steady-a", "n1"), ("steady-b", "n2")] {
        cluster.apply(&waiting_pod(pod, "steady", node).to_string())?;
    }
    cluster
        .kubectl()?
        .args(["wait", "--for=condition=Ready", "--timeout=60s", "pod", "steady-a", "steady-b"])
        .done()?;
    let target = cluster.get(&["pod", "-n", "default", "steady-b"])?;
    let address = crate::view::text(&target, "/status/podIP")?.to_owned();
    cluster.exec("default", "steady-b", &["iperf3", "-s", "-D"])?;
    // SIGINT ends ping with its summary; SIGKILL would not.
    let start = format!(
        "ping -i 0.05 {address} > /tmp/ping 2>&1 & echo $! > /tmp/ping.pid; \
         iperf3 -c {address} -t 3600 -i 1 -b 20M --forceflush > /tmp/stream 2>&1 & echo $! > /tmp/stream.pid"
    );
    cluster.exec("default", "steady-a", &["sh", "-c", &start])?;
    eventually("ping and stream to flow", || flowing(cluster).map(drop))?;

    kill_agent(cluster, "n1")?;
    kill_agent(cluster, "n2")?;
    for node in ["n1", "n2"] {
        let pod = agent_pod(cluster, node)?;
        cluster.kubectl()?.args(["delete", "pod", "-n", NAMESPACE, &pod, "--timeout=60s"]).done()?;
        eventually(&format!("a new agent on {node}"), || agent_pod(cluster, node))?;
    }

    let before = flowing(cluster)?;
    eventually("the stream to go on", || {
        let now = flowing(cluster)?;
        ensure!(now > before + 1, "{now} seconds of stream, {before} before");
        Ok(())
    })?;
    let stop = "kill -INT $(cat /tmp/ping.pid) $(cat /tmp/stream.pid); sleep 1; cat /tmp/ping";
    let summary = cluster.exec("default", "steady-a", &["sh", "-c", stop])?;
    let (sent, received) = counts(&summary)?;
    say(format!("agents killed and replaced under ping: {sent} sent, {} lost", sent - received));
    ensure!(sent > 100, "only {sent} pings were sent:\n{summary}");
    // The last one may be under way when ping is stopped.
    ensure!(sent - received <= 1 && !gaps(&summary), "pings were lost:\n{}", tail(&summary));
    delete(cluster, &["pod", "steady-a", "steady-b", "--now"])
}

/// Kills the agent's process and waits until its successor is ready.
fn kill_agent(cluster: &Cluster, node: &str) -> anyhow::Result<()> {
    let handle = cluster.node(node)?;
    let pid = handle.run("pidof").args(["-s", AGENT]).text()?.trim().to_owned();
    handle.run("kill").args(["-KILL", &pid]).done()?;
    eventually(&format!("another agent process on {node}"), || {
        let now = handle.run("pidof").args(["-s", AGENT]).text()?.trim().to_owned();
        ensure!(now != pid, "process {pid} is still there");
        Ok(())
    })?;
    eventually(&format!("the agent of {node} to be ready"), || agent_pod(cluster, node)).map(drop)
}

/// Whole seconds that the stream has lasted; fails when either stands still from the start.
fn flowing(cluster: &Cluster) -> anyhow::Result<usize> {
    let both = "grep -c 'bytes from' /tmp/ping; grep -c 'Mbits/sec' /tmp/stream; kill -0 $(cat /tmp/stream.pid)";
    let said = cluster.exec("default", "steady-a", &["sh", "-c", both])?;
    let counts: Vec<usize> = said.lines().filter_map(|line| line.trim().parse().ok()).collect();
    let [pings, seconds] = counts.as_slice() else { anyhow::bail!("unexpected: {said}") };
    ensure!(*pings > 0 && *seconds > 0, "{pings} pings answered, {seconds} seconds of stream");
    // A stream that stalls reports seconds without bytes.
    let stalls = "grep -c ' 0.00 bits/sec' /tmp/stream || true";
    let stalls = cluster.exec("default", "steady-a", &["sh", "-c", stalls])?;
    ensure!(stalls.trim() == "0", "the stream stood still for {} s", stalls.trim());
    Ok(*seconds)
}

/// Sent and received of ping's summary.
fn counts(summary: &str) -> anyhow::Result<(usize, usize)> {
    let line = summary.lines().find(|line| line.contains("packets transmitted"));
    let line = line.with_context(|| format!("ping gave no summary: {}", tail(summary)))?;
    let mut numbers = line.split(|letter: char| !letter.is_ascii_digit()).filter_map(|word| word.parse().ok());
    numbers.next().zip(numbers.next()).with_context(|| format!("ping's summary: {line}"))
}

/// Whether the answered sequence numbers have a hole.
fn gaps(output: &str) -> bool {
    let number = |line: &str| line.split_once("icmp_seq=")?.1.split(' ').next()?.parse::<usize>().ok();
    let answered: Vec<usize> = output.lines().filter(|line| line.contains("bytes from")).filter_map(number).collect();
    answered.windows(2).any(|pair| pair[1] != pair[0] + 1)
}

fn tail(text: &str) -> &str {
    text.get(text.len().saturating_sub(600)..).unwrap_or(text)
}
