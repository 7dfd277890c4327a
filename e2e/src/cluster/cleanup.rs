//! Taking a cluster down, and the proof that nothing of it is left. Both look for what carries the cluster's name; no
//! record is needed that a crash could have cut short.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use nix::sys::signal::Signal;

use super::cgroups;
use super::names::{ClusterName, MARK};
use super::state::all_names;
use crate::command::Run;
use crate::process;
use crate::wait::{self, Check};

/// Takes down whatever exists of a cluster, then fails with a list if anything is left.
pub(super) fn down(name: &ClusterName) -> anyhow::Result<()> {
    kill_all(name)?;
    for netns in network_namespaces(name)? {
        Run::new("ip").args(["netns", "delete", &netns]).done()?;
    }
    for link in links(name)? {
        Run::new("ip").args(["link", "delete", &link]).done()?;
    }
    cgroups::remove(&name.cgroup())?;
    let dir = name.dir()?;
    if dir.path().exists() {
        fs::remove_dir_all(dir.path()).with_context(|| format!("removing {}", dir.path().display()))?;
    }
    super::machine::restore_after_last(&all_names()?)?;
    wait::until("the last traces of the cluster to go", Duration::from_secs(20), Duration::from_millis(100), || {
        let left = leftovers(name)?;
        Ok(if left.is_empty() { Check::Done(()) } else { Check::NotYet(format!("left are\n  {}", left.join("\n  "))) })
    })
}

/// Everything on this machine that belongs to a cluster, one line each: processes, network namespaces, links, mounts
/// (also those that only some process's mount namespace still shows, with the BPF pins in them), control groups, files.
pub fn leftovers(name: &ClusterName) -> anyhow::Result<Vec<String>> {
    let dir = name.dir()?;
    let mut left: Vec<String> =
        processes(name)?.iter().map(|pid| format!("process {pid} ({})", command(*pid))).collect();
    left.extend(network_namespaces(name)?.iter().map(|netns| format!("network namespace {netns}")));
    left.extend(links(name)?.iter().map(|link| format!("link {link}")));
    left.extend(mounts(dir.path())?);
    left.extend(cgroups::find(&name.cgroup())?.iter().map(|group| format!("control group {}", group.display())));
    if dir.path().exists() {
        left.push(format!("folder {}", dir.path().display()));
    }
    Ok(left)
}

fn kill_all(name: &ClusterName) -> anyhow::Result<()> {
    wait::until("the cluster's processes to end", Duration::from_secs(60), Duration::from_millis(50), || {
        let pids = processes(name)?;
        for pid in &pids {
            process::signal_pid(*pid, Signal::SIGKILL)?;
        }
        Ok(match pids.first() {
            None => Check::Done(()),
            Some(pid) => Check::NotYet(format!("{} processes live, one is {pid} ({})", pids.len(), command(*pid))),
        })
    })
}

/// Processes that carry the cluster's mark, or live in one of its network namespaces. The caller is not one of them.
fn processes(name: &ClusterName) -> anyhow::Result<Vec<u32>> {
    let mark = format!("{MARK}={name}");
    let mut namespaces = BTreeSet::new();
    for netns in network_namespaces(name)? {
        namespaces.insert(fs::metadata(format!("/run/netns/{netns}"))?.ino());
    }
    let own = std::process::id();
    let mut found = Vec::new();
    for pid in all_pids()?.into_iter().filter(|pid| *pid != own && process::is_alive(*pid)) {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let marked = environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes());
        let inside = fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|netns| namespaces.contains(&netns.ino()));
        if marked || inside {
            found.push(pid);
        }
    }
    Ok(found)
}

fn all_pids() -> anyhow::Result<Vec<u32>> {
    let entries = fs::read_dir("/proc").context("listing /proc")?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect())
}

fn command(pid: u32) -> String {
    let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&words).replace('\0', " ").trim().chars().take(120).collect()
}

fn network_namespaces(name: &ClusterName) -> anyhow::Result<Vec<String>> {
    names_in(Path::new("/run/netns"), &name.prefix())
}

fn links(name: &ClusterName) -> anyhow::Result<Vec<String>> {
    names_in(Path::new("/sys/class/net"), &name.prefix())
}

fn names_in(dir: &Path, prefix: &str) -> anyhow::Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("listing {}", dir.display())),
    };
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|entry| entry.starts_with(prefix))
        .collect();
    names.sort();
    Ok(names)
}

/// Mounts from the cluster's folder, in the mount namespace of any process.
fn mounts(dir: &Path) -> anyhow::Result<Vec<String>> {
    let needle = format!("{}/", dir.to_str().context("the cache folder's path is not UTF-8")?);
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for pid in all_pids()? {
        let Ok(namespace) = fs::read_link(format!("/proc/{pid}/ns/mnt")) else { continue };
        if !seen.insert(namespace) {
            continue;
        }
        let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
        found.extend(
            mounts
                .lines()
                .filter(|line| line.contains(&needle))
                .map(|line| format!("mount seen by process {pid}: {line}")),
        );
    }
    if seen.is_empty() {
        bail!("/proc shows no process at all");
    }
    Ok(found)
}
