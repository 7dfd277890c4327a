//! A real kube-apiserver with an etcd of its own.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use std::{fs, io::Read};

use anyhow::Context;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::ports::{ATTEMPTS, free_port};
use super::{CertRequest, Etcd, EtcdOptions, Pki};
use crate::command::Run;
use crate::parts;
use crate::process::Process;
use crate::wait::{self, Check};

const START_LIMIT: Duration = Duration::from_secs(90);

/// How to start an API server.
#[derive(Debug, Clone, Default)]
pub struct ApiServerOptions {
    /// Users beside `admin`, who is in `system:masters`.
    pub users: Vec<StaticUser>,
    /// Where it listens, an IPv4 address of this machine; on loopback without.
    pub address: Option<Ipv4Addr>,
    /// Further flags.
    pub args: Vec<String>,
}

/// A user that a bearer token stands for.
#[derive(Debug, Clone)]
pub struct StaticUser {
    /// Its name.
    pub name: String,
    /// Its groups.
    pub groups: Vec<String>,
}

/// A running (or stopped) kube-apiserver, on loopback unless told otherwise: RBAC and node authorization, dual-stack service range
/// (10.96.0.0/16, fd00:10:96::/112), no controllers. The ServiceAccount admission plug-in is off, so that pods can be
/// created although nobody makes service accounts. Dropping it kills it and its etcd.
pub struct ApiServer {
    dir: TempDir,
    options: ApiServerOptions,
    address: Ipv4Addr,
    pki: Pki,
    port: u16,
    etcd: Etcd,
    process: Option<Process>,
}

impl ApiServer {
    /// Starts one and waits until it is ready.
    pub fn start(options: ApiServerOptions) -> anyhow::Result<Self> {
        let dir =
            tempfile::Builder::new().prefix("basal-apiserver-").tempdir().context("a folder for the API server")?;
        let etcd = Etcd::start(EtcdOptions::default())?;
        let pki = Pki::create(&dir.path().join("pki"))?;
        let address = options.address.unwrap_or(Ipv4Addr::LOCALHOST);
        let names = ["127.0.0.1", "::1", "localhost", "10.96.0.1"].map(String::from).into_iter();
        pki.issue(&CertRequest::server("apiserver", names.chain([address.to_string()])))?;
        pki.key_pair("service-account")?;
        let port = free_port(address.into())?;
        let mut server = Self { dir, options, address, pki, port, etcd, process: None };
        server.options.users.push(StaticUser { name: "admin".into(), groups: vec!["system:masters".into()] });
        write_tokens(&server.dir.path().join("tokens.csv"), &server.options.users)?;
        for attempt in 1.. {
            match server.restart() {
                Ok(()) => break,
                Err(error) if attempt == ATTEMPTS => return Err(error),
                Err(_maybe_port_taken) => server.port = free_port(address.into())?,
            }
        }
        Ok(server)
    }

    /// The URL for clients.
    #[must_use]
    pub fn url(&self) -> String {
        format!("https://{}:{}", self.address, self.port)
    }

    /// The certificate of the authority that signed the server's, PEM.
    #[must_use]
    pub fn ca(&self) -> PathBuf {
        self.pki.ca()
    }

    /// A folder that goes with it.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The etcd that it keeps its objects in.
    pub fn etcd(&mut self) -> &mut Etcd {
        &mut self.etcd
    }

    /// The bearer token of a user.
    pub fn token(&self, user: &str) -> anyhow::Result<String> {
        token_of(&self.dir.path().join("tokens.csv"), user)
    }

    /// Writes a kubeconfig for a user and answers its path.
    pub fn kubeconfig(&self, user: &str) -> anyhow::Result<PathBuf> {
        let path = self.dir.path().join(format!("{user}.kubeconfig"));
        write_kubeconfig(&path, &self.url(), &self.ca(), &self.token(user)?)?;
        Ok(path)
    }

    /// kubectl as `admin`, ready for its arguments.
    pub fn kubectl(&self) -> anyhow::Result<Run> {
        Ok(Run::new(parts::binary("kubectl")?).arg("--kubeconfig").arg(self.kubeconfig("admin")?))
    }

    /// Its metrics, in Prometheus' text form.
    pub fn metrics(&self) -> anyhow::Result<String> {
        self.kubectl()?.args(["get", "--raw", "/metrics"]).text()
    }

    /// Creates or changes an object given as JSON.
    pub fn apply(&self, object: &Value) -> anyhow::Result<()> {
        self.kubectl()?.args(["apply", "-f", "-"]).stdin(object.to_string()).done()
    }

    /// Starts it again on the same port and objects; stops it first if it runs. Answers when it is ready.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.stop()?;
        let files = self.pki.files("apiserver");
        let dir = self.dir.path();
        let mut command = Command::new(parts::binary("kube-apiserver")?);
        command
            .arg(format!("--etcd-servers={}", self.etcd.endpoint()))
            .arg(format!("--bind-address={}", self.address))
            .arg(format!("--advertise-address={}", self.address))
            .arg("--endpoint-reconciler-type=none")
            .arg(format!("--secure-port={}", self.port))
            .arg("--service-cluster-ip-range=10.96.0.0/16,fd00:10:96::/112")
            .args(["--authorization-mode=Node,RBAC", "--allow-privileged"])
            .arg("--disable-admission-plugins=ServiceAccount")
            .arg(format!("--token-auth-file={}", dir.join("tokens.csv").display()))
            .arg(format!("--client-ca-file={}", files.ca.display()))
            .arg(format!("--tls-cert-file={}", files.cert.display()))
            .arg(format!("--tls-private-key-file={}", files.key.display()))
            .arg("--service-account-issuer=https://kubernetes.default.svc")
            .arg(format!("--service-account-signing-key-file={}", self.pki.dir().join("service-account.key").display()))
            .arg(format!("--service-account-key-file={}", self.pki.dir().join("service-account.pub").display()))
            .args(&self.options.args);
        let mut process = Process::start("kube-apiserver", command, &dir.join("kube-apiserver.log"))?;
        wait_ready(|| self.kubectl(), || process.check_running())?;
        self.process = Some(process);
        Ok(())
    }

    /// Ends it in order (SIGTERM); its etcd keeps running.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        self.process.take().map_or(Ok(()), |process| process.stop(Duration::from_secs(20)).map(drop))
    }

    /// Kills it (SIGKILL); its etcd keeps running.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.process.take().map_or(Ok(()), |process| process.kill().map(drop))
    }

    /// Freezes it (SIGSTOP): connections stay open and nothing answers.
    pub fn pause(&self) -> anyhow::Result<()> {
        self.process.as_ref().map_or(Ok(()), |process| process.freeze())
    }

    /// Undoes [`ApiServer::pause`].
    pub fn resume(&self) -> anyhow::Result<()> {
        self.process.as_ref().map_or(Ok(()), |process| process.thaw())
    }
}

/// Waits until the API server says that it is ready and the default namespace exists.
pub(crate) fn wait_ready(
    kubectl: impl Fn() -> anyhow::Result<Run>,
    mut check_running: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    wait::until("kube-apiserver's /readyz", START_LIMIT, Duration::from_millis(200), || {
        check_running()?;
        let ready = kubectl()?.args(["get", "--raw", "/readyz"]).text();
        let namespace = ready.and_then(|_ok| kubectl()?.args(["get", "namespace", "default", "-o", "name"]).text());
        Ok(namespace.map_or_else(|error| Check::NotYet(error.to_string()), |_name| Check::Done(())))
    })
}

/// Writes a static token file with a fresh token for each user.
pub(crate) fn write_tokens(path: &Path, users: &[StaticUser]) -> anyhow::Result<()> {
    let mut text = String::new();
    for user in users {
        let (token, name) = (random_token()?, &user.name);
        text.push_str(&format!("{token},{name},{name},\"{}\"\n", user.groups.join(",")));
    }
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

/// The token of a user in a static token file.
pub(crate) fn token_of(path: &Path, user: &str) -> anyhow::Result<String> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let token = text.lines().find_map(|line| {
        let mut fields = line.split(',');
        fields.next().filter(|_token| fields.next() == Some(user))
    });
    Ok(token.with_context(|| format!("the API server has no user {user}"))?.to_owned())
}

/// Writes a kubeconfig that holds everything it needs.
pub(crate) fn write_kubeconfig(path: &Path, url: &str, ca: &Path, token: &str) -> anyhow::Result<()> {
    let ca = STANDARD.encode(fs::read(ca).with_context(|| format!("reading {}", ca.display()))?);
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "basal", "cluster": {"server": url, "certificate-authority-data": ca}}],
        "users": [{"name": "user", "user": {"token": token}}],
        "contexts": [{"name": "basal", "context": {"cluster": "basal", "user": "user"}}],
        "current-context": "basal",
    });
    fs::write(path, format!("{config:#}\n")).with_context(|| format!("writing {}", path.display()))
}

fn random_token() -> anyhow::Result<String> {
    let mut bytes = [0_u8; 16];
    fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).context("reading /dev/urandom")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
