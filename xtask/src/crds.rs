//! The step `crds`: the CustomResourceDefinitions as YAML, which users and the chart take without building anything.

use std::{fs, path::Path};

use anyhow::{Context as _, bail};

/// Where the files lie, as users find them.
const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../crds/yaml");

/// Its options.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Change nothing; fail when a committed file is not what would be written.
    #[arg(long)]
    check: bool,
}

/// Runs it.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let folder = Path::new(FOLDER);
    let mut stale = Vec::new();
    for definition in basal_crds::crds() {
        let name = format!("{}.yaml", definition.plural);
        let yaml = serde_saphyr::to_string(&definition.object).with_context(|| format!("{name} cannot be written"))?;
        let text = format!("# Made by `cargo xtask crds` from crds/src/resources; do not edit.\n{yaml}");
        let path = folder.join(&name);
        if fs::read_to_string(&path).is_ok_and(|committed| committed == text) {
            continue;
        }
        if args.check {
            stale.push(name);
        } else {
            fs::create_dir_all(folder).with_context(|| format!("{FOLDER} cannot be made"))?;
            fs::write(&path, text).with_context(|| format!("{} cannot be written", path.display()))?;
        }
    }
    if !stale.is_empty() {
        bail!("crds/yaml is not current: {}; run `cargo xtask crds` and commit the files", stale.join(", "));
    }
    Ok(())
}
