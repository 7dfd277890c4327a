//! The stage `images`: OCI archives, because no registry is at hand in a test cluster.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use super::store::{self, Key};
use crate::cache;

/// An image of `e2e/images`.
struct Image {
    /// Its folder; the image is called `localhost/basal-e2e/NAME:1`.
    name: &'static str,
    /// Commands from the cache's `parts/bin` that its Dockerfile copies.
    parts: &'static [&'static str],
    /// Debian packages that its Dockerfile adds as `root.tar`.
    packages: &'static [&'static str],
}

const IMAGES: &[Image] = &[
    Image { name: "pause", parts: &["agnhost"], packages: &[] },
    Image { name: "coredns", parts: &["coredns"], packages: &[] },
    Image {
        name: "tools",
        parts: &["agnhost"],
        packages: &[
            "ca-certificates",
            "coreutils",
            "curl",
            "dash",
            "grep",
            "iperf3",
            "iproute2",
            "iputils-ping",
            "libc-bin",
            "libc6",
            "libgcc-s1",
            "sed",
        ],
    },
];

/// What Basal's image stands on: its commands are linked against Debian's libc, and the agent masquerades with nft and
/// lets pods' traffic pass the rules of iptables.
const BASE: &[&str] = &["ca-certificates", "iptables", "libc6", "libgcc-s1", "nftables"];

/// Builds what is missing.
pub(super) fn run() -> anyhow::Result<()> {
    base()?;
    for image in IMAGES {
        let source = cache::checkout().join("e2e/images").join(image.name).join("Dockerfile");
        let mut inputs = Vec::new();
        if !image.packages.is_empty() {
            inputs.push(("root.tar", debian(image.name, image.packages)?));
        }
        for part in image.parts {
            inputs.push((part, cache::dir()?.join("parts/bin").join(part)));
        }
        build(image.name, &format!("localhost/basal-e2e/{}:1", image.name), &source, &inputs, &[])?;
    }
    Ok(())
}

/// The image that Basal's own is built on; answers its name in buildah's store.
pub(super) fn base() -> anyhow::Result<&'static str> {
    const NAME: &str = "localhost/basal-e2e/base:1";
    let root = debian("base", BASE)?;
    let dockerfile = cache::checkout().join("e2e/images/base/Dockerfile");
    build("base", NAME, &dockerfile, &[("root.tar", root)], &[])?;
    Ok(NAME)
}

/// Builds an image from a Dockerfile and files for its context into `images/NAME.tar`, unless exactly that exists.
pub(super) fn build(
    name: &str,
    reference: &str,
    dockerfile: &Path,
    inputs: &[(&str, PathBuf)],
    arguments: &[String],
) -> anyhow::Result<()> {
    let images = cache::dir()?.join("images");
    let mut key = Key::default().text(reference).file(dockerfile)?;
    for (file, path) in inputs {
        key = key.text(file).file(path)?;
    }
    for argument in arguments {
        key = key.text(argument);
    }
    let dir = images.join(format!("{name}-{}", key.finish()));
    store::entry(&dir, &format!("image {name}"), |dir| {
        let context = dir.join("context");
        fs::create_dir(&context)?;
        for (file, path) in inputs {
            fs::copy(path, context.join(file)).with_context(|| format!("copying {}", path.display()))?;
        }
        let mut bud = buildah()?;
        bud.args(["bud", "--isolation", "chroot", "--pull-never", "--file"]).arg(dockerfile).args(["--tag", reference]);
        bud.args(arguments.iter().flat_map(|argument| ["--build-arg", argument])).arg(&context);
        store::quietly(&mut bud, &format!("image-{name}"))?;
        let archive = format!("oci-archive:{}:{reference}", dir.join("image.tar").display());
        store::quietly(buildah()?.args(["push", reference, &archive]), &format!("push-{name}"))?;
        fs::remove_dir_all(&context)?;
        Ok(())
    })?;
    store::link(&dir.join("image.tar"), &images.join(format!("{name}.tar")))
}

/// A tar of Debian packages, unpacked and not configured, without documentation.
fn debian(name: &str, packages: &[&str]) -> anyhow::Result<PathBuf> {
    const SUITE: &str = "bookworm";
    // Perl comes along for scripts that nothing here calls.
    const DROP: &str = "cd \"$1\" && rm -rf usr/share/doc usr/share/man usr/share/info usr/share/locale usr/share/perl* \
                        usr/lib/*/perl* usr/lib/*/libperl* usr/bin/perl*";
    let key = Key::default().text(SUITE).text(DROP).text(&packages.join(",")).finish();
    let dir = cache::dir()?.join("images").join(format!("debian-{name}-{key}"));
    store::entry(&dir, &format!("packages of image {name}"), |dir| {
        let mut command = Command::new("mmdebstrap");
        command
            .args(["--variant=extract", &format!("--include={}", packages.join(","))])
            .args([&format!("--extract-hook={DROP}"), SUITE])
            .arg(dir.join("root.tar"));
        store::quietly(&mut command, &format!("debian-{name}"))
    })?;
    Ok(dir.join("root.tar"))
}

/// buildah on a store of ours.
fn buildah() -> anyhow::Result<Command> {
    let store = cache::dir()?.join("buildah");
    let mut command = Command::new("buildah");
    command.arg("--root").arg(store.join("root")).arg("--runroot").arg(store.join("run"));
    command.args(["--storage-driver", "overlay"]);
    Ok(command)
}
