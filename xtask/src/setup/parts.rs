//! The stage `parts`: what a test cluster runs beside Basal, built from Go modules that `e2e/parts` pins.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use super::store::{self, Key};
use crate::cache;

/// A Go module of ours in `e2e/parts` and the commands that it builds.
struct Part {
    /// Its folder.
    folder: &'static str,
    /// The module whose version names the cache entry.
    module: &'static str,
    /// Package and command name.
    commands: &'static [(&'static str, &'static str)],
    about: &'static str,
}

const PARTS: &[Part] = &[
    Part {
        folder: "etcd",
        module: "go.etcd.io/etcd/server/v3",
        commands: &[("go.etcd.io/etcd/server/v3", "etcd"), ("go.etcd.io/etcd/etcdctl/v3", "etcdctl")],
        about: "about a minute on 2 cores",
    },
    Part {
        folder: "kubernetes",
        module: "k8s.io/kubernetes",
        commands: &[
            ("k8s.io/kubernetes/cmd/kube-apiserver", "kube-apiserver"),
            ("k8s.io/kubernetes/cmd/kubectl", "kubectl"),
            ("k8s.io/kubernetes/cmd/kubelet", "kubelet"),
            ("k8s.io/kubernetes/cmd/kube-controller-manager", "kube-controller-manager"),
            ("k8s.io/kubernetes/cmd/kube-scheduler", "kube-scheduler"),
            ("k8s.io/kubernetes/cmd/kube-proxy", "kube-proxy"),
            ("k8s.io/kubernetes/test/images/agnhost", "agnhost"),
        ],
        about: "about 7 minutes on 2 cores",
    },
    Part {
        folder: "cnitool",
        module: "github.com/containernetworking/cni",
        commands: &[("github.com/containernetworking/cni/cnitool", "cnitool")],
        about: "seconds",
    },
    Part {
        folder: "helm",
        module: "helm.sh/helm/v4",
        commands: &[("helm.sh/helm/v4/cmd/helm", "helm")],
        about: "about 3 minutes on 2 cores",
    },
    Part {
        folder: "coredns",
        module: "github.com/coredns/coredns",
        commands: &[("github.com/coredns/coredns", "coredns")],
        about: "about 3 minutes on 2 cores",
    },
];

/// Builds what is missing.
pub(super) fn run() -> anyhow::Result<()> {
    let parts = cache::dir()?.join("parts");
    for part in PARTS {
        let source = cache::checkout().join("e2e/parts").join(part.folder);
        let version = version(&source, part.module)?;
        let flags = linker_flags(part, &version);
        let key = Key::default().file(&source.join("go.mod"))?.file(&source.join("go.sum"))?.text(&flags).finish();
        let dir = parts.join(format!("{}-{version}-{key}", part.folder));
        store::entry(&dir, &format!("{} {version} ({})", part.folder, part.about), |dir| {
            fs::create_dir(dir.join("bin"))?;
            part.commands
                .iter()
                .try_for_each(|(package, name)| build(&source, package, &flags, &dir.join("bin").join(name)))
        })?;
        for (_package, name) in part.commands {
            store::link(&dir.join("bin").join(name), &parts.join("bin").join(name))?;
        }
    }
    Ok(())
}

fn build(source: &Path, package: &str, flags: &str, target: &Path) -> anyhow::Result<()> {
    let name = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let cache: PathBuf = cache::dir()?.join("go");
    let mut go = Command::new("nice");
    go.args(["go", "build", "-trimpath", "-ldflags", flags, "-o"])
        .arg(target)
        .arg(package)
        .current_dir(source)
        .env("CGO_ENABLED", "0")
        .env("GOFLAGS", "-mod=readonly")
        .env("GOTOOLCHAIN", "local")
        .env("GOCACHE", cache.join("build"))
        .env("GOMODCACHE", cache.join("mod"));
    store::quietly(&mut go, &format!("go-{name}"))
}

/// Kubernetes' commands read their version from variables that the linker sets; clients refuse the default.
fn linker_flags(part: &Part, version: &str) -> String {
    let mut flags = "-s -w".to_owned();
    if part.folder == "kubernetes" {
        let package = "k8s.io/component-base/version";
        let mut numbers = version.trim_start_matches('v').split('.');
        let (major, minor) = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
        for (variable, value) in [("gitVersion", version), ("gitMajor", major), ("gitMinor", minor)] {
            flags.push_str(&format!(" -X {package}.{variable}={value}"));
        }
    }
    flags
}

/// The version of a module that a go.mod requires.
fn version(source: &Path, module: &str) -> anyhow::Result<String> {
    let path = source.join("go.mod");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    required(&text, module).with_context(|| format!("{} does not require {module}", path.display()))
}

fn required(go_mod: &str, module: &str) -> Option<String> {
    go_mod.lines().find_map(|line| {
        let mut words = line.trim().trim_start_matches("require ").split_whitespace();
        let version = words.next().filter(|word| *word == module).and_then(|_module| words.next())?;
        version.starts_with('v').then(|| version.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::{Part, linker_flags, required};

    #[test]
    fn a_required_version_is_found_in_both_notations() {
        let block = "tool example.com/a\n\nrequire (\n\texample.com/ab v9.0.0\n\texample.com/a v1.2.3 // indirect\n)\n";
        assert_eq!(required(block, "example.com/a").as_deref(), Some("v1.2.3"));
        assert_eq!(required("require example.com/a v1.0.0", "example.com/a").as_deref(), Some("v1.0.0"));
        assert_eq!(required("replace example.com/a => ../a", "example.com/a"), None);
    }

    #[test]
    fn kubernetes_commands_learn_their_version() {
        let part = Part { folder: "kubernetes", module: "", commands: &[], about: "" };
        let flags = linker_flags(&part, "v1.35.4");
        assert!(flags.contains("version.gitVersion=v1.35.4 "), "{flags}");
        assert!(flags.ends_with("version.gitMinor=35"), "{flags}");
    }
}
