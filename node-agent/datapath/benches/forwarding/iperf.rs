//! TCP throughput, by iperf3.

use std::{net::IpAddr, path::Path, process::Command, time::Duration};

use anyhow::Context as _;
use basal_e2e::{
    command::Run,
    process::{Process, tail},
    wait::{self, Check},
};

use super::worlds::Way;
use crate::harness::Netns;

/// How long more than its measure a run of iperf3 may take, and a server until it listens.
const PATIENCE: Duration = Duration::from_secs(10);

/// Starts a server in a namespace and waits until it listens.
pub(crate) fn serve(netns: &Netns, logs: &Path) -> anyhow::Result<Process> {
    let log = tempfile::Builder::new().prefix("iperf3").tempfile_in(logs)?.into_temp_path().keep()?;
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", netns.path().display())).args(["iperf3", "--server", "--forceflush"]);
    let mut process = Process::start("iperf3", command, &log)?;
    wait::until("iperf3 to listen", PATIENCE, Duration::from_millis(10), || {
        process.check_running()?;
        let text = tail(&log);
        Ok(if text.contains("Server listening") { Check::Done(()) } else { Check::NotYet(text) })
    })?;
    Ok(process)
}

/// What arrives, in Gbit/s.
pub(crate) fn throughput(way: &Way<'_>, streams: u32, ipv6: bool, time: Duration) -> anyhow::Result<f64> {
    let server: IpAddr = if ipv6 { way.server.v6.into() } else { way.server.v4.into() };
    let found = Run::new("nsenter")
        .arg(format!("--net={}", way.client.path().display()))
        .args(["iperf3", "--json", "--client", &server.to_string()])
        .args(["--time", &time.as_secs().to_string(), "--parallel", &streams.to_string()])
        .limit(time + PATIENCE)
        .json()?;
    let bits = found["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(bits.with_context(|| format!("iperf3 tells no throughput: {found}"))? / 1e9)
}
