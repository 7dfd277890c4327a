//! The stage `basal`: Basal's own commands and its image.

use std::path::PathBuf;

use anyhow::Context as _;

use super::Profile;
use super::images;
use crate::cache;

/// The commands of the image, as the Dockerfile expects them in its context.
const COMMANDS: &[&str] = &["basal-operator", "basal-agent", "basal-cni", "basal"];

/// The name of the image; charts in test clusters point to it.
const REFERENCE: &str = "localhost/basal/basal:dev";

/// Builds commands and image with a profile; `images/basal.tar` is the last one built.
pub(super) fn run(profile: Profile) -> anyhow::Result<()> {
    let base = images::base()?;
    cache::run(&["cargo", "xtask", "ebpf"])?;
    let mut build = vec!["cargo", "build"];
    for command in COMMANDS {
        build.extend(["--bin", command]);
    }
    let folder = match profile {
        Profile::Dev => "debug",
        Profile::Release => {
            build.push("--release");
            "release"
        }
    };
    cache::run(&build)?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| cache::checkout().join("target"), PathBuf::from);
    let inputs: Vec<_> = COMMANDS.iter().map(|command| (*command, target.join(folder).join(command))).collect();
    let dockerfile = cache::checkout().join("Dockerfile");
    let arguments = [format!("BASE={base}")];
    images::build("basal", REFERENCE, &dockerfile, &inputs, &arguments).context("Basal's image")
}
