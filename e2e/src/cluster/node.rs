//! A node: the namespaces, and in them containerd, kubelet and kube-proxy.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::json;

use super::cgroups;
use super::names::{ClusterDir, ClusterName, MARK};
use super::node_init::{self, NodeSpec};
use super::state::{DNS_ADDRESS, NodeState, POD_CIDRS, State};
use super::underlay;
use crate::command::Run;
use crate::servers::{token_of, write_kubeconfig};
use crate::{parts, process, wait};

/// The images that every node has, by file name in the cache's `images` folder.
const IMAGES: [&str; 3] = ["pause", "coredns", "tools"];

/// Holds a pod's namespaces.
const PAUSE_IMAGE: &str = "localhost/basal-e2e/pause:1";

/// Process id and start time of a node's first process.
const INIT: &str = "init.pid";

/// What runs on a node below its pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Daemon {
    /// The container runtime. Containers run on without it.
    Containerd,
    /// The kubelet. Its pods run on without it.
    Kubelet,
}

impl Daemon {
    /// Its command.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::Kubelet => "kubelet",
        }
    }
}

/// A running node.
#[derive(Debug, Clone)]
pub struct Node {
    cluster: ClusterName,
    name: String,
    dir: PathBuf,
    addresses: [IpAddr; 2],
    init: u32,
}

impl Node {
    /// Starts a node and waits until its container runtime answers and has its images; kubelet and kube-proxy then
    /// run, and the node registers when it can.
    pub(super) fn start(name: &ClusterName, dir: &ClusterDir, state: &State, node: &NodeState) -> anyhow::Result<Self> {
        let addresses = state.node_addresses(node);
        let node_dir = dir.node(&node.name);
        cgroups::create(&format!("{}/{}", name.cgroup(), node.name))?;
        underlay::add_node(name, state, node)?;
        let spec = NodeSpec {
            name: node.name.clone(),
            cluster: name.to_string(),
            netns: name.node_netns(&node.name),
            dir: node_dir.clone(),
            address: addresses[0].to_string(),
        };
        let init = node_init::start(&spec)?;
        let start = process::start_time(init).with_context(|| format!("node {} has ended", node.name))?;
        fs::write(node_dir.join(INIT), format!("{init} {start}"))?;
        let this = Self { cluster: name.clone(), name: node.name.clone(), dir: node_dir, addresses, init };
        this.start_containerd()?;
        this.run("ctr").args(["version"]).done()?;
        for image in IMAGES {
            this.import_image(&parts::cache_dir()?.join("images").join(format!("{image}.tar")))?;
        }
        this.run("cp").args(["/usr/lib/cni/loopback", "/usr/lib/cni/portmap", "/opt/cni/bin/"]).done()?;
        this.start_kubelet(dir, state)?;
        this.start_kube_proxy(dir, state)?;
        Ok(this)
    }

    /// A node that is there already.
    pub(super) fn open(name: &ClusterName, dir: &ClusterDir, state: &State, node: &NodeState) -> anyhow::Result<Self> {
        let node_dir = dir.node(&node.name);
        let init = fs::read_to_string(node_dir.join(INIT)).with_context(|| format!("node {} is not up", node.name))?;
        let (init, start) = init.split_once(' ').with_context(|| format!("node {} has a broken {INIT}", node.name))?;
        let init = init.parse().context("the process id of a node")?;
        // The id alone may be another process's by now.
        let running = process::start_time(init).is_some_and(|now| now.to_string() == start);
        ensure!(running, "node {} has ended", node.name);
        Ok(Self {
            cluster: name.clone(),
            name: node.name.clone(),
            dir: node_dir,
            addresses: state.node_addresses(node),
            init,
        })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its folder on the machine; `var-log` in it is the node's `/var/log`.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its underlay addresses, IPv4 and IPv6.
    #[must_use]
    pub fn addresses(&self) -> [IpAddr; 2] {
        self.addresses
    }

    /// The words of the command that enters its namespaces.
    #[must_use]
    pub fn enter(&self) -> Vec<String> {
        let target = format!("--target={}", self.init);
        ["nsenter", &target, "--mount", "--net", "--uts", "--ipc", "--pid", "--"].map(str::to_owned).to_vec()
    }

    /// A command in its namespaces, ready for its arguments.
    #[must_use]
    pub fn run(&self, program: impl AsRef<std::ffi::OsStr>) -> Run {
        let enter = self.enter();
        let (nsenter, rest) = enter.split_first().map_or(("nsenter", [].as_slice()), |(head, rest)| (head, rest));
        Run::new(nsenter).args(rest).arg(program).env(MARK, self.cluster.to_string())
    }

    /// Starts a command in its namespaces that stays, its output in the node's folder as NAME.log; answers the process
    /// id (of `nsenter`, on the machine).
    pub fn spawn(&self, name: &str, words: &[&str]) -> anyhow::Result<u32> {
        let enter = self.enter();
        let (nsenter, rest) = enter.split_first().map_or(("nsenter", [].as_slice()), |(head, rest)| (head, rest));
        let mut command = Command::new(nsenter);
        command.args(rest).args(words).env(MARK, self.cluster.to_string());
        process::start_detached(name, command, &self.log(name))
    }

    /// The log of a command started by [`Node::spawn`], or of `containerd`, `kubelet`, `kube-proxy`.
    #[must_use]
    pub fn log(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.log"))
    }

    /// Loads an OCI archive into its container runtime.
    pub fn import_image(&self, archive: &Path) -> anyhow::Result<()> {
        if !archive.exists() {
            bail!("there is no {}; build it with `cargo xtask setup --only images,basal`", archive.display());
        }
        self.run("ctr").args(["--namespace=k8s.io", "images", "import", "--digests"]).arg(archive).done()
    }

    /// Ends every process of the node at once, as a power failure does.
    pub fn kill(&self) -> anyhow::Result<()> {
        process::signal_pid(self.init, Signal::SIGKILL)?;
        wait::until("the node's processes to end", Duration::from_secs(30), Duration::from_millis(50), || {
            Ok(if process::is_alive(self.init) {
                wait::Check::NotYet(format!("process {} is alive", self.init))
            } else {
                wait::Check::Done(())
            })
        })
    }

    /// Starts a daemon that was killed.
    pub(super) fn start_daemon(&self, dir: &ClusterDir, state: &State, daemon: Daemon) -> anyhow::Result<()> {
        match daemon {
            Daemon::Containerd => self.start_containerd(),
            Daemon::Kubelet => self.start_kubelet(dir, state),
        }
    }

    fn start_containerd(&self) -> anyhow::Result<()> {
        let config = self.dir.join("containerd.toml");
        fs::write(&config, containerd_config())?;
        self.spawn("containerd", &["containerd", "--config", &config.to_string_lossy()])?;
        wait::until_ok("containerd", Duration::from_secs(60), || self.run("ctr").arg("version").done())
    }

    fn start_kubelet(&self, dir: &ClusterDir, state: &State) -> anyhow::Result<()> {
        let user = format!("system:node:{}", self.name);
        let kubeconfig = self.kubeconfig(dir, state, &user, "kubelet")?;
        let config = self.dir.join("kubelet.json");
        let client_ca = dir.kubernetes_pki().join("ca.crt");
        fs::write(&config, kubelet_config(&self.cluster, &self.name, &client_ca).to_string())?;
        let [v4, v6] = self.addresses;
        let kubelet = parts::binary("kubelet")?;
        self.spawn(
            "kubelet",
            &[
                &kubelet.to_string_lossy(),
                &format!("--config={}", config.display()),
                &format!("--kubeconfig={}", kubeconfig.display()),
                &format!("--hostname-override={}", self.name),
                &format!("--node-ip={v4},{v6}"),
            ],
        )?;
        Ok(())
    }

    fn start_kube_proxy(&self, dir: &ClusterDir, state: &State) -> anyhow::Result<()> {
        let kubeconfig = self.kubeconfig(dir, state, "system:kube-proxy", "kube-proxy")?;
        let config = self.dir.join("kube-proxy.json");
        fs::write(&config, kube_proxy_config(&self.name, &kubeconfig).to_string())?;
        let kube_proxy = parts::binary("kube-proxy")?;
        self.spawn("kube-proxy", &[&kube_proxy.to_string_lossy(), &format!("--config={}", config.display())])?;
        Ok(())
    }

    fn kubeconfig(&self, dir: &ClusterDir, state: &State, user: &str, file: &str) -> anyhow::Result<PathBuf> {
        let path = self.dir.join(format!("{file}.kubeconfig"));
        let url = format!("https://{}:6443", state.control_plane()[0]);
        write_kubeconfig(&path, &url, &dir.kubernetes_pki().join("ca.crt"), &token_of(&dir.tokens(), user)?)?;
        Ok(path)
    }
}

/// containerd's configuration; its folders and its socket are where they are by default.
fn containerd_config() -> String {
    // Without CAP_SYS_RESOURCE runc may not lower OOM scores, and dies where it is asked to.
    format!(
        r#"version = 2
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE_IMAGE}"
restrict_oom_score_adj = true
disable_apparmor = true
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
"#
    )
}

/// KubeletConfiguration.
fn kubelet_config(cluster: &ClusterName, node: &str, client_ca: &Path) -> serde_json::Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": client_ca},
        },
        "authorization": {"mode": "Webhook"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": format!("/{}/{node}", cluster.cgroup()),
        "failCgroupV1": false,
        "enforceNodeAllocatable": [],
        "failSwapOn": false,
        "localStorageCapacityIsolation": false,
        // 0 is refused for memory; the disk of the machine is not the node's.
        "evictionHard": {"memory.available": "1Mi", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%", "imagefs.inodesFree": "0%"},
        "imageGCHighThresholdPercent": 100,
        "makeIPTablesUtilChains": false,
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "volumePluginDir": "/var/lib/kubelet/volumeplugins",
        "podLogsDir": "/var/log/pods",
        "clusterDNS": [DNS_ADDRESS],
        "clusterDomain": "cluster.local",
        "resolvConf": "/etc/resolv.conf",
        "maxPods": 250,
        "serializeImagePulls": false,
        "syncFrequency": "10s",
        "nodeStatusUpdateFrequency": "5s",
        "shutdownGracePeriod": "0s",
        // Tests kill what must come back; five minutes of back-off would hide whether it does.
        "featureGates": {"KubeletCrashLoopBackOffMax": true},
        "crashLoopBackOff": {"maxContainerRestartPeriod": "2s"},
        "logging": {"verbosity": 1},
    })
}

/// KubeProxyConfiguration.
fn kube_proxy_config(node: &str, kubeconfig: &Path) -> serde_json::Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": kubeconfig},
        "hostnameOverride": node,
        "mode": "iptables",
        "clusterCIDR": POD_CIDRS.join(","),
        "metricsBindAddress": "127.0.0.1:10249",
        // These limits belong to the machine, not to a network namespace.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        "iptables": {"minSyncPeriod": "100ms"},
    })
}
