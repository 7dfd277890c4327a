//! Where built things live: `${BASAL_CACHE:-$HOME/.cache/basal}`.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

/// Kubernetes' version, as `e2e/parts/kubernetes/go.mod` has it.
pub const KUBERNETES_VERSION: &str = "v1.35.4";

/// The cache folder: `BASAL_CACHE`, else `$HOME/.cache/basal`.
pub fn cache_dir() -> anyhow::Result<PathBuf> {
    if let Some(dir) = env::var_os("BASAL_CACHE").filter(|dir| !dir.is_empty()) {
        let dir = PathBuf::from(dir);
        if !dir.is_absolute() {
            bail!("BASAL_CACHE is {}, which is not an absolute path", dir.display());
        }
        return Ok(dir);
    }
    let home = env::var_os("HOME").filter(|home| !home.is_empty());
    let home = home.context("neither BASAL_CACHE nor HOME is set; set BASAL_CACHE to a folder for built parts")?;
    Ok(PathBuf::from(home).join(".cache/basal"))
}

/// The folder that holds the commands built by `cargo xtask setup --only parts`.
pub fn bin_dir() -> anyhow::Result<PathBuf> {
    Ok(cache_dir()?.join("parts/bin"))
}

/// The path of a built command, for example `etcd` or `kube-apiserver`.
pub fn binary(name: &str) -> anyhow::Result<PathBuf> {
    let path = bin_dir()?.join(name);
    if !path.is_file() {
        bail!("{name} is missing: there is no {}; build it with `cargo xtask setup --only parts`", path.display());
    }
    Ok(path)
}

/// The path of a command of the system, looked up in `PATH` and the `sbin` folders.
pub fn system(name: &str) -> anyhow::Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|candidate| is_file(candidate))
        .with_context(|| format!("the command {name} is missing; install it with `cargo xtask setup --only packages`"))
}

fn is_file(path: &Path) -> bool {
    path.is_file()
}
