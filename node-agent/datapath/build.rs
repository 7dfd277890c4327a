//! Puts the BPF object where the crate embeds it. The object is built by `cargo xtask ebpf`, never here, so that checking
//! this crate needs no BPF toolchain; without an object the crate builds too, and loading says what to run.

use std::{env, fs, io::ErrorKind, path::PathBuf};

/// The known place, relative to the workspace's root, and the variable that names another.
const KNOWN: &str = "target/bpf/basal-ebpf.o";
const VARIABLE: &str = "BASAL_EBPF_OBJECT";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let crate_dir = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or("cargo sets CARGO_MANIFEST_DIR")?);
    let embedded = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?).join("basal-ebpf.o");
    let object = env::var_os(VARIABLE).map_or_else(|| crate_dir.join("../..").join(KNOWN), PathBuf::from);
    println!("cargo::rerun-if-env-changed={VARIABLE}");
    println!("cargo::rerun-if-changed={}", object.display());

    let bytes = match fs::read(&object) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound && env::var_os(VARIABLE).is_none() => {
            println!("cargo::warning=no BPF object at {}; run `cargo xtask ebpf`", object.display());
            Vec::new()
        }
        Err(error) => return Err(format!("cannot read the BPF object {}: {error}", object.display()).into()),
    };
    fs::write(embedded, bytes)?;
    Ok(())
}
