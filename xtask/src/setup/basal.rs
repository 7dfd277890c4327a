//! The stage `basal`: Basal's own commands and its images.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::Profile;
use super::images;
use super::next;
use crate::cache;

/// The commands of the image, as the Dockerfile expects them in its context.
const COMMANDS: &[&str] = &["basal-operator", "basal-agent", "basal-cni", "basal"];

/// The name of the image; charts in test clusters point to it.
const REFERENCE: &str = "localhost/basal/basal:dev";
/// That of the later version, for tests of upgrades.
const NEXT: &str = "localhost/basal/basal:next";

/// Builds commands and image with a profile; `images/basal.tar` is the last one built. `images/basal-next.tar` comes with
/// the profile of the tests.
pub(super) fn run(profile: Profile) -> anyhow::Result<()> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| cache::checkout().join("target"), PathBuf::from);
    let later = match profile {
        Profile::Dev => Some(next::build(&target)?),
        Profile::Release => None,
    };
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
    let built = target.join(folder);
    image("basal", REFERENCE, |_command| &built)?;
    if let Some(later) = &later {
        image("basal-next", NEXT, |command| if next::COMMANDS.contains(&command) { later } else { &built })?;
    }
    Ok(())
}

/// Builds an image of commands that are in these folders.
fn image<'a>(name: &str, reference: &str, folder_of: impl Fn(&str) -> &'a Path) -> anyhow::Result<()> {
    let inputs: Vec<_> = COMMANDS.iter().map(|command| (*command, folder_of(command).join(command))).collect();
    let dockerfile = cache::checkout().join("Dockerfile");
    let arguments = [format!("BASE={}", images::base()?)];
    images::build(name, reference, &dockerfile, &inputs, &arguments).with_context(|| format!("the image {reference}"))
}
