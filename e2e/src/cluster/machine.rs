//! Settings of the machine that a cluster changes, and puts back when the last cluster has gone.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::Context;

use super::names::{ClusterName, clusters_dir};

/// What a kubelet sets by itself; recorded so that it can be put back.
const KUBELET: [&str; 6] = [
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
];

/// A kubelet, a containerd and the agents of several nodes need more than the usual 128 inotify instances.
const RAISED: [(&str, u64); 2] = [("fs/inotify/max_user_instances", 8192), ("fs/inotify/max_user_watches", 1_048_576)];

/// Records the settings, unless another cluster has, and raises what is too low.
pub(super) fn prepare() -> anyhow::Result<()> {
    let record = record()?;
    if !record.exists() {
        let mut before = BTreeMap::new();
        for key in KUBELET.into_iter().chain(RAISED.map(|(key, _value)| key)) {
            before.insert(key.to_owned(), read(key)?);
        }
        fs::write(&record, serde_json::to_vec_pretty(&before)?)
            .with_context(|| format!("writing {}", record.display()))?;
    }
    for (key, wanted) in RAISED {
        if read(key)?.parse::<u64>().is_ok_and(|current| current < wanted) {
            write(key, &wanted.to_string())?;
        }
    }
    Ok(())
}

/// Puts the settings back when no cluster is left.
pub(super) fn restore_after_last(left: &[ClusterName]) -> anyhow::Result<()> {
    let record = record()?;
    if !left.is_empty() || !record.exists() {
        return Ok(());
    }
    let before: BTreeMap<String, String> =
        serde_json::from_slice(&fs::read(&record)?).with_context(|| format!("parsing {}", record.display()))?;
    for (key, value) in &before {
        if read(key)? != *value {
            write(key, value)?;
        }
    }
    fs::remove_file(&record).with_context(|| format!("removing {}", record.display()))
}

fn record() -> anyhow::Result<PathBuf> {
    Ok(clusters_dir()?.join(".sysctl.json"))
}

fn read(key: &str) -> anyhow::Result<String> {
    let path = format!("/proc/sys/{key}");
    Ok(fs::read_to_string(&path).with_context(|| format!("reading {path}"))?.trim().to_owned())
}

fn write(key: &str, value: &str) -> anyhow::Result<()> {
    let path = format!("/proc/sys/{key}");
    fs::write(&path, value).with_context(|| format!("writing {path}"))
}
