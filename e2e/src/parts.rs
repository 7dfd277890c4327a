//! Where built things live: `${BASAL_CACHE:-$HOME/.cache/basal}`.

use std::env;
use std::path::PathBuf;

use anyhow::{Context, bail};

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
