//! `basal ipam check`, as an administrator runs it beside the cluster: one look, and the observer that follows all
//! changes in a process of its own.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use basal_e2e::cluster::{Cluster, MARK};
use basal_e2e::command::Run;
use basal_e2e::process::Process;
use basal_e2e::servers::client_config;
use basal_e2e::wait;
use serde_json::Value;

/// The keys that an operator with these values has, and the way to both servers.
fn arguments(cluster: &Cluster, values: &Value) -> anyhow::Result<Vec<String>> {
    let pool = &values["ipam"]["operator"];
    let cidrs = |key: &str| {
        let list = pool[key].as_array().into_iter().flatten().filter_map(Value::as_str);
        list.collect::<Vec<_>>().join(",")
    };
    let quarantine = pool["clusterPoolQuarantine"].as_str().context("the values have no quarantine")?;
    let mut arguments = vec![
        "ipam".into(),
        "check".into(),
        format!("--k8s-kubeconfig-path={}", cluster.kubeconfig().display()),
        format!("--cluster-pool-ipv4-cidr={}", cidrs("clusterPoolIPv4PodCIDRList")),
        format!("--cluster-pool-ipv6-cidr={}", cidrs("clusterPoolIPv6PodCIDRList")),
        "--cluster-pool-ipv6-mask-size=120".into(),
        format!("--cluster-pool-quarantine={quarantine}"),
    ];
    if values["etcd"]["enabled"] != false {
        let config = cluster.dir().join("root.etcd.config");
        fs::write(&config, client_config(&[cluster.etcd_url()], &cluster.etcd_user("root")?))?;
        arguments.push("--kvstore=etcd".into());
        arguments.push(format!("--kvstore-opt=etcd.config={}", config.display()));
    }
    Ok(arguments)
}

/// The command that was built beside these tests.
fn binary() -> anyhow::Result<PathBuf> {
    let tests = env::current_exe()?;
    let folder = tests.parent().and_then(|deps| deps.parent()).context("this program lies in no build tree")?;
    let path = folder.join("basal");
    ensure!(path.is_file(), "there is no {}; build it with `cargo xtask setup --only basal`", path.display());
    Ok(path)
}

/// Fails with what is wrong with the cluster's blocks.
pub(crate) fn check(cluster: &Cluster, values: &Value) -> anyhow::Result<()> {
    let output = Run::new(binary()?).args(arguments(cluster, values)?).output()?;
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).join("\n");
    ensure!(output.status.success(), "basal ipam check ended with {}:\n{said}", output.status);
    Ok(())
}

/// The running observer.
pub(crate) struct Observer {
    process: Process,
    log: PathBuf,
}

impl Observer {
    /// Starts it; answers when it follows both servers.
    pub(crate) fn start(cluster: &Cluster, values: &Value) -> anyhow::Result<Self> {
        let log = cluster.dir().join("log").join("observer.log");
        // The log of an earlier run on a cluster that was kept is not this one's.
        fs::write(&log, "").with_context(|| format!("emptying {}", log.display()))?;
        let mut command = Command::new(binary()?);
        command.args(arguments(cluster, values)?).arg("--watch").env(MARK, cluster.name().to_string());
        let mut this = Self { process: Process::start("the observer", command, &log)?, log };
        wait::until_ok("the observer", Duration::from_secs(30), || {
            ensure!(this.text()?.contains("following"), "it said: {}", this.text()?);
            Ok(())
        })?;
        this.check_running()?;
        Ok(this)
    }

    fn text(&self) -> anyhow::Result<String> {
        fs::read_to_string(&self.log).with_context(|| format!("reading {}", self.log.display()))
    }

    /// Fails when it has ended.
    pub(crate) fn check_running(&mut self) -> anyhow::Result<()> {
        self.process.check_running()
    }

    /// Ends it; fails with what it found.
    pub(crate) fn end(self) -> anyhow::Result<String> {
        let Self { process, log } = self;
        let status = process.stop(Duration::from_secs(30))?;
        let text = fs::read_to_string(&log)?;
        ensure!(status.success(), "the observer ended with {status}:\n{text}");
        Ok(text.lines().last().unwrap_or_default().to_owned())
    }
}
