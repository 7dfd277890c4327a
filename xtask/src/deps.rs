//! The step `deps`: dependencies between our crates point downwards only.
//!
//! Each crate has a layer; a crate may depend (dev-dependencies aside) only on crates of a lower layer.

use std::{collections::BTreeMap, process::Command};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

/// From bottom to top, as ARCHITECTURE.md draws it.
const LAYERS: &[&[&str]] = &[
    &["basal-ipam", "basal-maps", "basal-cni"],
    &["basal-crds", "basal-runtime", "basal-ebpf"],
    &["basal-kvstore", "basal-objects", "basal-datapath"],
    &["basal-sim"],
    &["basal-operator", "basal-agent", "basal", "basal-e2e", "xtask"],
    &["basal-fuzz", "xtask-docs"],
];

/// Runs it.
pub(crate) fn run() -> anyhow::Result<()> {
    let output = Command::new("cargo").args(["metadata", "--no-deps", "--format-version=1"]).output()?;
    ensure!(output.status.success(), "cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).context("cargo metadata printed no JSON")?;
    let layers: BTreeMap<&str, usize> =
        LAYERS.iter().enumerate().flat_map(|(layer, names)| names.iter().map(move |name| (*name, layer))).collect();

    let mut upward = Vec::new();
    for package in metadata["packages"].as_array().context("cargo metadata lists no packages")? {
        let name = package["name"].as_str().unwrap_or_default();
        let layer = layers.get(name).with_context(|| format!("{name} has no layer; add it to xtask/src/deps.rs"))?;
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let on = dependency["name"].as_str().unwrap_or_default();
            if dependency["kind"].as_str() != Some("dev") && layers.get(on).is_some_and(|below| below >= layer) {
                upward.push(format!("{name} -> {on}"));
            }
        }
    }
    if !upward.is_empty() {
        bail!("these dependencies do not point downwards: {}", upward.join(", "));
    }
    Ok(())
}
