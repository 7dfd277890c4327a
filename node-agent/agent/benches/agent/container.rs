//! Containers, and the CNI plugins that attach them, called as a runtime does.

use std::{
    path::{Path, PathBuf},
    sync::Barrier,
    thread,
    time::Duration,
};

use anyhow::{Context as _, anyhow, ensure};
use basal_e2e::{command::Run, wait::Stopwatch};
use serde_json::Value;

use super::netns::Netns;

/// How long a call may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where Debian has the plugins of the CNI project (package `containernetworking-plugins`).
pub(crate) const DEBIAN: &str = "/usr/lib/cni";

/// Builds the plugin, which is another package's executable than this bench's, and answers where it is: beside the
/// agent.
pub(crate) fn build_plugin() -> anyhow::Result<PathBuf> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cni/Cargo.toml");
    let manifest = manifest.display().to_string();
    Run::new(env!("CARGO"))
        .args(["build", "--quiet", "--release", "--package", "basal-cni", "--manifest-path", &manifest])
        .limit(Duration::from_secs(900))
        .done()?;
    let plugin = Path::new(env!("CARGO_BIN_EXE_basal-agent")).with_file_name("basal-cni");
    ensure!(plugin.is_file(), "there is no {}; was the bench built in release?", plugin.display());
    Ok(plugin)
}

/// What a runtime asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    /// Attach a container.
    Add,
    /// Undo that.
    Del,
}

impl Verb {
    /// `CNI_COMMAND`.
    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
        }
    }
}

/// A container with a fresh network namespace.
pub(crate) struct Container {
    id: String,
    netns: Netns,
    /// `CNI_ARGS`
    args: String,
}

impl Container {
    /// The sandbox of a pod in namespace `default`.
    pub(crate) fn new(pod: &str, uid: &str) -> anyhow::Result<Self> {
        let args = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={pod};K8S_POD_UID={uid}");
        Ok(Self { id: format!("{pod}-sandbox"), netns: Netns::new()?, args })
    }
}

/// A plugin on a node.
pub(crate) struct Plugin<'a> {
    /// Its executable.
    pub(crate) executable: PathBuf,
    /// Its configuration.
    pub(crate) conf: Value,
    /// The node's network namespace.
    pub(crate) host: &'a Netns,
}

impl Plugin<'_> {
    /// Calls it for each of the containers at the same time; answers how long each call took, from before the fork until
    /// its output was read.
    pub(crate) fn call(&self, verb: Verb, containers: &[Container]) -> anyhow::Result<Vec<Duration>> {
        let start = Barrier::new(containers.len());
        let one = |container: &Container| {
            self.host.enter(|| {
                let run = self.prepare(verb, container);
                start.wait();
                let watch = Stopwatch::start();
                let output = run.output()?;
                let took = watch.elapsed();
                let said = || String::from_utf8_lossy(&output.stdout).into_owned();
                ensure!(output.status.success(), "{} of {} failed: {}", verb.text(), container.id, said());
                Ok(took)
            })
        };
        thread::scope(|scope| {
            let calls: Vec<_> = containers.iter().map(|container| scope.spawn(|| one(container))).collect();
            let ended = calls.into_iter().map(|call| call.join().map_err(|_panic| anyhow!("a call panicked"))?);
            ended.collect::<anyhow::Result<Vec<Duration>>>().with_context(|| self.executable.display().to_string())
        })
    }

    fn prepare(&self, verb: Verb, container: &Container) -> Run {
        Run::new(&self.executable)
            .env("CNI_COMMAND", verb.text())
            .env("CNI_CONTAINERID", &container.id)
            .env("CNI_NETNS", container.netns.path())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_ARGS", &container.args)
            .env("CNI_PATH", DEBIAN)
            .stdin(self.conf.to_string())
            .limit(PATIENCE)
    }
}
