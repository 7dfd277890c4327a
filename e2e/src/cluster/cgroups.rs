//! Control groups. Each hierarchy of version 1 is a folder of /sys/fs/cgroup, and so is version 2 where both are mounted.

use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use anyhow::Context;

use crate::wait::{self, Check};

const ROOT: &str = "/sys/fs/cgroup";

/// The roots of all hierarchies.
fn hierarchies() -> anyhow::Result<Vec<PathBuf>> {
    let root = Path::new(ROOT);
    if root.join("cgroup.controllers").exists() {
        return Ok(vec![root.to_owned()]);
    }
    let mut found: Vec<PathBuf> = fs::read_dir(root)
        .with_context(|| format!("listing {ROOT}"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| !path.is_symlink() && path.join("cgroup.procs").exists())
        .collect();
    found.sort();
    Ok(found)
}

/// Makes a group and those above it in every hierarchy.
pub(super) fn create(path: &str) -> anyhow::Result<()> {
    for hierarchy in hierarchies()? {
        let mut group = hierarchy;
        for part in path.split('/') {
            let above = group.clone();
            group.push(part);
            // Nodes start at the same time and share the upper group.
            match fs::create_dir(&group) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(error).with_context(|| format!("creating {}", group.display()));
                }
                _made_or_there => {}
            }
            // A new cpuset may use no processor and no memory, and nothing can run in it.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if above.join(file).exists() && fs::read_to_string(group.join(file))?.trim().is_empty() {
                    fs::write(group.join(file), fs::read(above.join(file))?)
                        .with_context(|| format!("filling {}", group.join(file).display()))?;
                }
            }
        }
    }
    Ok(())
}

/// Where a group exists.
pub(super) fn find(path: &str) -> anyhow::Result<Vec<PathBuf>> {
    Ok(hierarchies()?.into_iter().map(|hierarchy| hierarchy.join(path)).filter(|group| group.exists()).collect())
}

/// Removes a group with those below it, everywhere; its processes must be ending.
pub(super) fn remove(path: &str) -> anyhow::Result<()> {
    wait::until("control groups to empty", Duration::from_secs(20), Duration::from_millis(50), || {
        for group in find(path)? {
            if let Err(error) = remove_tree(&group) {
                return Ok(Check::NotYet(format!("{}: {error}", group.display())));
            }
        }
        Ok(Check::Done(()))
    })
}

fn remove_tree(group: &Path) -> io::Result<()> {
    for entry in fs::read_dir(group)? {
        let path = entry?.path();
        if path.is_dir() {
            remove_tree(&path)?;
        }
    }
    fs::remove_dir(group)
}
