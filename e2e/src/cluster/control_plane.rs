//! Two etcds, kube-apiserver, kube-controller-manager and kube-scheduler, on the machine's underlay address.

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use nix::sys::signal::Signal;

use super::names::{ClusterDir, ClusterName, MARK};
use super::state::{SERVICE_CIDRS, State};
use crate::command::Run;
use crate::servers::{
    CertFiles, CertRequest, EtcdFlags, Pki, StaticUser, add_users, basal_users, token_of, wait_healthy, wait_ready,
    write_kubeconfig, write_tokens,
};
use crate::wait;
use crate::{parts, process};

/// Client and peer ports of Kubernetes' etcd, then its metrics.
const KUBERNETES_ETCD: [u16; 3] = [2379, 2380, 2381];
/// The same of Basal's etcd.
const BASAL_ETCD: [u16; 3] = [2479, 2480, 2481];
const API_SERVER: u16 = 6443;
/// Tokens for nodes that may join later are made at the start: the token file is read once.
const NODE_TOKENS: [&str; 16] =
    ["n1", "n2", "n3", "n4", "n5", "n6", "n7", "n8", "n9", "n10", "n11", "n12", "n13", "n14", "n15", "n16"];

/// A server that can be killed and started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Server {
    /// Basal's etcd.
    Etcd,
    /// kube-apiserver; its own etcd goes on.
    Api,
}

impl Server {
    /// The name of its process.
    const fn name(self) -> &'static str {
        match self {
            Self::Etcd => "basal-etcd",
            Self::Api => "kube-apiserver",
        }
    }
}

/// Kills a server as a crash does; its data stays. Answers when its port is free.
pub(super) fn kill_server(dir: &ClusterDir, state: &State, server: Server) -> anyhow::Result<()> {
    let file = dir.path().join(format!("{}.pid", server.name()));
    let pid = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    let pid = pid.parse().with_context(|| format!("{} holds no process id", file.display()))?;
    process::signal_pid(pid, Signal::SIGKILL)?;
    // Of many threads the first may have ended before the last, which holds the socket.
    let port = address_of(state, server);
    let what = format!("{} to end", server.name());
    wait::until_ok(&what, Duration::from_secs(10), || Ok(TcpListener::bind(port)?)).map(drop)
}

/// Starts a killed server on its old data; answers when it serves.
pub(super) fn start_server(name: &ClusterName, dir: &ClusterDir, state: &State, server: Server) -> anyhow::Result<()> {
    let pki = Pki::open(&dir.kubernetes_pki())?;
    let plane = ControlPlane { name, dir, address: state.control_plane()[0], pki };
    match server {
        Server::Etcd => plane.start_etcd(server.name(), BASAL_ETCD, Some(&Pki::open(&dir.etcd_pki())?)),
        Server::Api => plane.start_apiserver(state),
    }
}

/// A copy of the data of Basal's etcd.
#[derive(Debug)]
pub struct SavedEtcd(PathBuf);

/// Copies the data of Basal's etcd aside.
pub(super) fn save_etcd(name: &ClusterName, dir: &ClusterDir, state: &State) -> anyhow::Result<SavedEtcd> {
    let data = dir.path().join(Server::Etcd.name());
    let copy = dir.path().join("saved-etcd");
    kill_server(dir, state, Server::Etcd)?;
    Run::new("rm").arg("-rf").arg(&copy).done()?;
    Run::new("cp").arg("-a").arg(&data).arg(&copy).done()?;
    start_server(name, dir, state, Server::Etcd)?;
    Ok(SavedEtcd(copy))
}

/// Puts a copy in place of the data of Basal's etcd.
pub(super) fn restore_etcd(
    name: &ClusterName,
    dir: &ClusterDir,
    state: &State,
    saved: &SavedEtcd,
) -> anyhow::Result<()> {
    let data = dir.path().join(Server::Etcd.name());
    kill_server(dir, state, Server::Etcd)?;
    fs::remove_dir_all(&data).with_context(|| format!("removing {}", data.display()))?;
    Run::new("cp").arg("-a").arg(&saved.0).arg(&data).done()?;
    start_server(name, dir, state, Server::Etcd)
}

/// Names of the nodes that can join a cluster.
pub(super) fn check_joinable(name: &str) -> anyhow::Result<()> {
    if NODE_TOKENS.contains(&name) {
        return Ok(());
    }
    bail!("a node is called n1 to n16, because the API server has tokens for these only; {name:?} is not")
}

/// Starts everything; answers when the API server is ready.
pub(super) fn start(name: &ClusterName, dir: &ClusterDir, state: &State) -> anyhow::Result<()> {
    let [v4, v6] = state.control_plane();
    let kubernetes = Pki::create(&dir.kubernetes_pki())?;
    let names = [v4.to_string(), v6.to_string(), "127.0.0.1".into(), "10.96.0.1".into(), "localhost".into()];
    let service = ["kubernetes", "kubernetes.default", "kubernetes.default.svc"].map(String::from);
    kubernetes.issue(&CertRequest::server("apiserver", names.iter().chain(&service).cloned()))?;
    let mut kubelet_client = CertRequest::client("apiserver-kubelet-client");
    kubelet_client.organisations.push("system:masters".into());
    kubernetes.issue(&kubelet_client)?;
    kubernetes.key_pair("service-account")?;
    let etcd = Pki::create(&dir.etcd_pki())?;
    etcd.issue(&CertRequest::server("etcd", names))?;
    for user in basal_users().iter().map(|user| user.name.as_str()).chain(["root"]) {
        etcd.issue(&CertRequest::client(user))?;
    }
    write_tokens(&dir.tokens(), &users())?;
    for user in ["admin", "system:kube-controller-manager", "system:kube-scheduler"] {
        write_kubeconfig(&dir.kubeconfig(user), &api_url(state), &kubernetes.ca(), &token_of(&dir.tokens(), user)?)?;
    }
    let plane = ControlPlane { name, dir, address: v4, pki: kubernetes };
    thread::scope(|scope| {
        let basal = scope.spawn(|| plane.start_basal_etcd(&etcd));
        plane.start_etcd("kubernetes-etcd", KUBERNETES_ETCD, None)?;
        plane.start_apiserver(state)?;
        plane.start_controllers()?;
        basal.join().unwrap_or_else(|_panic| bail!("the thread that starts Basal's etcd has panicked"))
    })
}

/// The address and port that a server's clients connect to.
pub(super) fn address_of(state: &State, server: Server) -> SocketAddr {
    let port = match server {
        Server::Etcd => BASAL_ETCD[0],
        Server::Api => API_SERVER,
    };
    SocketAddr::new(state.control_plane()[0], port)
}

/// The API server's URL.
pub(super) fn api_url(state: &State) -> String {
    format!("https://{}", address_of(state, Server::Api))
}

/// The URL of Basal's etcd.
pub(super) fn etcd_url(state: &State) -> String {
    format!("https://{}", address_of(state, Server::Etcd))
}

/// etcdctl for Basal's etcd with a user's certificate, ready for its arguments.
pub(super) fn etcdctl(dir: &ClusterDir, state: &State, user: &str) -> anyhow::Result<Run> {
    let files = Pki::open(&dir.etcd_pki())?.files(user);
    etcdctl_with(&etcd_url(state), &files)
}

fn etcdctl_with(url: &str, files: &CertFiles) -> anyhow::Result<Run> {
    Ok(Run::new(parts::binary("etcdctl")?)
        .env("ETCDCTL_ENDPOINTS", url)
        .env("ETCDCTL_CACERT", &files.ca)
        .env("ETCDCTL_CERT", &files.cert)
        .env("ETCDCTL_KEY", &files.key))
}

fn users() -> Vec<StaticUser> {
    let user = |name: &str, group: &str| StaticUser { name: name.into(), groups: vec![group.into()] };
    let mut users = vec![
        user("admin", "system:masters"),
        user("system:kube-controller-manager", ""),
        user("system:kube-scheduler", ""),
        user("system:kube-proxy", "system:node-proxier"),
    ];
    users.extend(NODE_TOKENS.map(|node| user(&format!("system:node:{node}"), "system:nodes")));
    users
}

struct ControlPlane<'a> {
    name: &'a ClusterName,
    dir: &'a ClusterDir,
    address: IpAddr,
    pki: Pki,
}

impl ControlPlane<'_> {
    fn start_basal_etcd(&self, pki: &Pki) -> anyhow::Result<()> {
        self.start_etcd(Server::Etcd.name(), BASAL_ETCD, Some(pki))?;
        let url = format!("https://{}", SocketAddr::new(self.address, BASAL_ETCD[0]));
        add_users(&basal_users(), |args| etcdctl_with(&url, &pki.files("root"))?.args(args).done())
    }

    fn start_etcd(&self, name: &str, [client, peer, metrics]: [u16; 3], pki: Option<&Pki>) -> anyhow::Result<()> {
        let mut command = Command::new(parts::binary("etcd")?);
        let flags = EtcdFlags { address: self.address, client, peer, metrics };
        flags.add(&mut command, &self.dir.path().join(name), pki);
        let pid = self.spawn(name, command)?;
        wait_healthy(SocketAddr::new(self.address, metrics), || self.check_alive(name, pid))
    }

    fn start_apiserver(&self, state: &State) -> anyhow::Result<()> {
        let (serving, client) = (self.pki.files("apiserver"), self.pki.files("apiserver-kubelet-client"));
        let pki = self.pki.dir();
        let mut command = Command::new(parts::binary("kube-apiserver")?);
        command
            .arg(format!("--etcd-servers=http://{}", SocketAddr::new(self.address, KUBERNETES_ETCD[0])))
            .arg(format!("--bind-address={}", self.address))
            .arg(format!("--advertise-address={}", self.address))
            .arg(format!("--secure-port={API_SERVER}"))
            .arg(format!("--service-cluster-ip-range={}", SERVICE_CIDRS.join(",")))
            .args(["--authorization-mode=Node,RBAC", "--allow-privileged"])
            .arg("--kubelet-preferred-address-types=InternalIP")
            .arg(format!("--kubelet-client-certificate={}", client.cert.display()))
            .arg(format!("--kubelet-client-key={}", client.key.display()))
            .arg(format!("--token-auth-file={}", self.dir.tokens().display()))
            .arg(format!("--client-ca-file={}", serving.ca.display()))
            .arg(format!("--tls-cert-file={}", serving.cert.display()))
            .arg(format!("--tls-private-key-file={}", serving.key.display()))
            .arg("--service-account-issuer=https://kubernetes.default.svc")
            .arg(format!("--service-account-signing-key-file={}", pki.join("service-account.key").display()))
            .arg(format!("--service-account-key-file={}", pki.join("service-account.pub").display()));
        let server = Server::Api.name();
        let pid = self.spawn(server, command)?;
        wait_ready(|| kubectl(self.dir), || self.check_alive(server, pid))
            .with_context(|| format!("the API server at {}", api_url(state)))
    }

    fn start_controllers(&self) -> anyhow::Result<()> {
        let serving = self.pki.files("apiserver");
        let common = |command: &mut Command, user: &str| {
            let kubeconfig = self.dir.kubeconfig(user);
            command
                .arg(format!("--kubeconfig={}", kubeconfig.display()))
                .arg(format!("--authentication-kubeconfig={}", kubeconfig.display()))
                .arg(format!("--authorization-kubeconfig={}", kubeconfig.display()))
                .arg(format!("--bind-address={}", self.address))
                .arg(format!("--tls-cert-file={}", serving.cert.display()))
                .arg(format!("--tls-private-key-file={}", serving.key.display()))
                .arg("--leader-elect=false");
        };
        let mut manager = Command::new(parts::binary("kube-controller-manager")?);
        common(&mut manager, "system:kube-controller-manager");
        let key = self.pki.dir().join("service-account.key");
        manager
            .arg(format!("--service-account-private-key-file={}", key.display()))
            .arg(format!("--root-ca-file={}", serving.ca.display()))
            .arg(format!("--service-cluster-ip-range={}", SERVICE_CIDRS.join(",")))
            .args(["--use-service-account-credentials", "--allocate-node-cidrs=false"])
            .args(["--kube-api-qps=200", "--kube-api-burst=400"]);
        self.spawn("kube-controller-manager", manager)?;
        let mut scheduler = Command::new(parts::binary("kube-scheduler")?);
        common(&mut scheduler, "system:kube-scheduler");
        scheduler.args(["--kube-api-qps=200", "--kube-api-burst=400"]);
        self.spawn("kube-scheduler", scheduler)?;
        Ok(())
    }

    fn spawn(&self, name: &str, mut command: Command) -> anyhow::Result<u32> {
        command.env(MARK, self.name.to_string());
        let pid = process::start_detached(name, command, &self.dir.log(name))?;
        fs::write(self.dir.path().join(format!("{name}.pid")), pid.to_string())?;
        Ok(pid)
    }

    fn check_alive(&self, name: &str, pid: u32) -> anyhow::Result<()> {
        if process::is_alive(pid) {
            return Ok(());
        }
        let log = self.dir.log(name);
        bail!("{name} has ended; {} ends with:\n{}", log.display(), process::tail(&log))
    }
}

/// kubectl as administrator, ready for its arguments.
pub(super) fn kubectl(dir: &ClusterDir) -> anyhow::Result<Run> {
    Ok(Run::new(parts::binary("kubectl")?).arg("--kubeconfig").arg(dir.admin()))
}
