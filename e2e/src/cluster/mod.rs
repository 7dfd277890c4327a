//! Whole clusters: a real control plane on the machine, and nodes that are namespaces with a real containerd, kubelet
//! and kube-proxy in them. Several clusters live side by side under names of their own. Processes of a cluster outlive
//! the program that started them, until [`down`], which also cleans up after a start that was cut short.

mod addons;
mod basal;
mod bridge;
mod cgroups;
mod cleanup;
mod collect;
mod control_plane;
mod environment;
mod machine;
mod names;
mod node;
mod node_init;
mod state;
mod underlay;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::Value;

pub use basal::{BasalOptions, IMAGE, NAMESPACE};
pub use cleanup::leftovers;
pub use control_plane::{SavedEtcd, Server};
pub use names::{ClusterName, MARK};
pub use node::{Daemon, Node};
pub use node_init::run_if_asked;
pub use state::{Cni, DNS_ADDRESS, OUTSIDE, POD_CIDRS, SERVICE_CIDRS, all_names};

use crate::command::Run;
use crate::say::say;
use crate::servers::{CertFiles, Pki};
use crate::wait::{self, Check, Stopwatch};
use names::{ClusterDir, check_node_name};
use state::State;

/// How to start a cluster.
#[derive(Debug, Clone)]
pub struct Options {
    /// Its name.
    pub name: ClusterName,
    /// Number of nodes, called n1, n2, …
    pub nodes: u16,
    /// Pod network.
    pub cni: Cni,
    /// How Basal is installed, with [`Cni::Basal`].
    pub basal: BasalOptions,
}

/// A running cluster.
pub struct Cluster {
    name: ClusterName,
    dir: ClusterDir,
    state: State,
}

/// Starts a cluster and waits until its nodes are ready and CoreDNS answers; without a pod network, until its nodes have
/// registered. What a failed start leaves behind is for [`down`].
pub fn up(options: &Options) -> anyhow::Result<Cluster> {
    let watch = Stopwatch::start();
    let (dir, state) = State::create(&options.name, options.cni)?;
    let mut cluster = Cluster { name: options.name.clone(), dir, state };
    machine::prepare()?;
    say(format!("cluster {}: network and control plane", cluster.name));
    underlay::create(&cluster.name, &cluster.state)?;
    control_plane::start(&cluster.name, &cluster.dir, &cluster.state)?;
    addons::install(&cluster)?;
    say(format!("cluster {}: {} nodes ({} s so far)", cluster.name, options.nodes, watch.elapsed().as_secs()));
    let names: Vec<String> = (1..=options.nodes).map(|number| format!("n{number}")).collect();
    cluster.add_nodes(&names)?;
    match options.cni {
        Cni::None => {}
        Cni::Bridge => cluster.wait_ready(Duration::from_secs(120))?,
        Cni::Basal => {
            say(format!("cluster {}: installing Basal ({} s so far)", cluster.name, watch.elapsed().as_secs()));
            cluster.install_basal(&options.basal)?;
            cluster.wait_ready(Duration::from_secs(180))?;
        }
    }
    say(format!("cluster {}: up after {} s", cluster.name, watch.elapsed().as_secs()));
    Ok(cluster)
}

/// Takes a cluster down, whatever there is of it, and fails with a list if anything is left.
pub fn down(name: &ClusterName) -> anyhow::Result<()> {
    cleanup::down(name)?;
    say(format!("cluster {name}: down, nothing is left"));
    Ok(())
}

impl Cluster {
    /// A cluster that is up.
    pub fn open(name: &ClusterName) -> anyhow::Result<Self> {
        let dir = name.dir()?;
        let state = State::load(&dir)?;
        Ok(Self { name: name.clone(), dir, state })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &ClusterName {
        &self.name
    }

    /// Its folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The administrator's kubeconfig.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.admin()
    }

    /// kubectl as administrator, ready for its arguments.
    pub fn kubectl(&self) -> anyhow::Result<Run> {
        control_plane::kubectl(&self.dir)
    }

    /// Creates or changes objects given as YAML or JSON.
    pub fn apply(&self, manifest: &str) -> anyhow::Result<()> {
        self.kubectl()?.args(["apply", "--server-side", "--force-conflicts", "-f", "-"]).stdin(manifest).done()
    }

    /// `kubectl get ARGS -o json`.
    pub fn get(&self, args: &[&str]) -> anyhow::Result<Value> {
        self.kubectl()?.arg("get").args(args).args(["-o", "json"]).json()
    }

    /// The items of `kubectl get ARGS -o json`.
    pub fn list(&self, args: &[&str]) -> anyhow::Result<Vec<Value>> {
        match self.get(args)? {
            Value::Object(mut list) => match list.remove("items") {
                Some(Value::Array(items)) => Ok(items),
                _other => bail!("kubectl get {} answered no list", args.join(" ")),
            },
            _other => bail!("kubectl get {} answered no object", args.join(" ")),
        }
    }

    /// Runs a command in a pod and answers what it printed.
    pub fn exec(&self, namespace: &str, pod: &str, words: &[&str]) -> anyhow::Result<String> {
        self.kubectl()?.args(["exec", "-n", namespace, pod, "--"]).args(words).text()
    }

    /// etcdctl for Basal's etcd as `root`, ready for its arguments.
    pub fn etcdctl(&self) -> anyhow::Result<Run> {
        control_plane::etcdctl(&self.dir, &self.state, "root")
    }

    /// The address and port that a server's clients connect to.
    #[must_use]
    pub fn address_of(&self, server: Server) -> SocketAddr {
        control_plane::address_of(&self.state, server)
    }

    /// Kills a server as a crash does; its data stays. Answers when its port is free.
    pub fn kill_server(&self, server: Server) -> anyhow::Result<()> {
        control_plane::kill_server(&self.dir, &self.state, server)
    }

    /// Starts a killed server on its old data; answers when it serves.
    pub fn start_server(&self, server: Server) -> anyhow::Result<()> {
        control_plane::start_server(&self.name, &self.dir, &self.state, server)
    }

    /// Copies the data of Basal's etcd aside, as a backup; etcd is away for that moment.
    pub fn save_etcd(&self) -> anyhow::Result<SavedEtcd> {
        control_plane::save_etcd(&self.name, &self.dir, &self.state)
    }

    /// Puts a backup of Basal's etcd back: what was written since is gone, and the revision falls.
    pub fn restore_etcd(&self, saved: &SavedEtcd) -> anyhow::Result<()> {
        control_plane::restore_etcd(&self.name, &self.dir, &self.state, saved)
    }

    /// The URL of the API server.
    #[must_use]
    pub fn api_url(&self) -> String {
        control_plane::api_url(&self.state)
    }

    /// The URL of Basal's etcd.
    #[must_use]
    pub fn etcd_url(&self) -> String {
        control_plane::etcd_url(&self.state)
    }

    /// The certificate of a user of Basal's etcd.
    pub fn etcd_user(&self, user: &str) -> anyhow::Result<CertFiles> {
        Ok(Pki::open(&self.dir.etcd_pki())?.files(user))
    }

    /// Its nodes.
    pub fn nodes(&self) -> anyhow::Result<Vec<Node>> {
        self.state.nodes.iter().map(|node| Node::open(&self.name, &self.dir, &self.state, node)).collect()
    }

    /// One node.
    pub fn node(&self, name: &str) -> anyhow::Result<Node> {
        let node = self.state.nodes.iter().find(|node| node.name == name);
        Node::open(&self.name, &self.dir, &self.state, node.with_context(|| format!("there is no node {name}"))?)
    }

    /// A command in the namespace of the underlay bridge and of the world outside, ready for its arguments.
    #[must_use]
    pub fn outside(&self, program: &str) -> Run {
        underlay::inside(&self.name.underlay()).arg(program)
    }

    /// Starts nodes at the same time and waits until they have registered.
    pub fn add_nodes(&mut self, names: &[String]) -> anyhow::Result<()> {
        let mut added = Vec::new();
        for name in names {
            check_node_name(name)?;
            control_plane::check_joinable(name)?;
            added.push(self.state.add_node(name)?);
        }
        self.state.save(&self.dir)?;
        let this = &*self;
        thread::scope(|scope| {
            let starts: Vec<_> = added.iter().map(|node| scope.spawn(move || this.start_node(node))).collect();
            starts.into_iter().try_for_each(|start| start.join().unwrap_or_else(|_panic| bail!("a start has panicked")))
        })?;
        if self.state.cni == Cni::Bridge {
            bridge::connect(self)?;
        }
        Ok(())
    }

    fn start_node(&self, node: &state::NodeState) -> anyhow::Result<()> {
        let started = Node::start(&self.name, &self.dir, &self.state, node);
        let started = started.with_context(|| format!("starting node {}", node.name))?;
        if self.state.cni == Cni::Basal {
            basal::import_image(&started)?;
        }
        let what = format!("node {} to register", node.name);
        wait::until_ok(&what, Duration::from_secs(90), || self.kubectl()?.args(["get", "node", &node.name]).done())
            .with_context(|| format!("the kubelet's log is {}", started.log("kubelet").display()))
    }

    /// Kills a node and removes it from the underlay; its Node object goes too when `forget`, as a cloud's controller
    /// does it.
    pub fn remove_node(&mut self, name: &str, forget: bool) -> anyhow::Result<()> {
        let node = self.node(name)?;
        node.kill()?;
        underlay::remove_node(&self.name, name)?;
        cgroups::remove(&format!("{}/{name}", self.name.cgroup()))?;
        if forget {
            self.kubectl()?.args(["delete", "node", name, "--ignore-not-found"]).done()?;
        }
        self.state.nodes.retain(|node| node.name != name);
        self.state.save(&self.dir)?;
        Ok(std::fs::remove_dir_all(node.dir())?)
    }

    /// Kills a daemon of a node, and starts it again when `meanwhile` is over, however that ended.
    pub fn without_daemon(
        &self,
        node: &str,
        daemon: Daemon,
        meanwhile: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let handle = self.node(node)?;
        let pid = handle.run("pidof").args(["-s", daemon.as_str()]).text()?;
        handle.run("kill").args(["-KILL", pid.trim()]).done()?;
        let result = meanwhile();
        handle.start_daemon(&self.dir, &self.state, daemon)?;
        result
    }

    /// Waits until every node is ready and CoreDNS runs.
    pub fn wait_ready(&self, limit: Duration) -> anyhow::Result<()> {
        wait::until("the nodes to be ready", limit, Duration::from_millis(300), || {
            let nodes = self.list(&["nodes"])?;
            let waiting: Vec<String> = nodes.iter().filter_map(not_ready).collect();
            Ok(if waiting.is_empty() && nodes.len() >= self.state.nodes.len() {
                Check::Done(())
            } else {
                Check::NotYet(waiting.join("; "))
            })
        })?;
        self.wait_rollout("kube-system", "deployment/coredns", limit)
    }

    /// Waits until a Deployment or DaemonSet has rolled out.
    pub fn wait_rollout(&self, namespace: &str, what: &str, limit: Duration) -> anyhow::Result<()> {
        let timeout = format!("--timeout={}s", limit.as_secs());
        self.kubectl()?
            .args(["rollout", "status", "-n", namespace, what, &timeout])
            .done()
            .with_context(|| format!("waited {} s for {what} in {namespace}", limit.as_secs()))
    }

    /// Writes logs, objects, etcd keys, maps and routes into a folder of the cache and answers its path.
    pub fn collect(&self) -> anyhow::Result<PathBuf> {
        collect::collect(self)
    }

    /// The shell assignments that point other tools at the cluster.
    pub fn environment(&self) -> anyhow::Result<String> {
        environment::assignments(self)
    }

    /// Installs or upgrades Basal with helm; answers when the release is deployed.
    pub fn install_basal(&self, options: &BasalOptions) -> anyhow::Result<()> {
        basal::install(self, options)
    }
}

/// Why a Node object is not ready.
fn not_ready(node: &Value) -> Option<String> {
    let conditions = node["status"]["conditions"].as_array();
    let ready = conditions.and_then(|all| all.iter().find(|condition| condition["type"] == "Ready"));
    let name = node["metadata"]["name"].as_str().unwrap_or_default();
    match ready {
        Some(condition) if condition["status"] == "True" => None,
        Some(condition) => Some(format!("{name}: {}", condition["message"].as_str().unwrap_or_default())),
        None => Some(format!("{name}: no Ready condition")),
    }
}
