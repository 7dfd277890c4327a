//! A real etcd.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use std::{fs, io};

use anyhow::{Context, bail};
use serde_json::json;
use tempfile::TempDir;

use super::ports::{ATTEMPTS, free_port};
use super::{CertFiles, CertRequest, Pki};
use crate::command::Run;
use crate::parts;
use crate::process::Process;
use crate::wait::{self, Check};

const START_LIMIT: Duration = Duration::from_secs(60);

/// How to start an etcd. The default has neither TLS nor users.
#[derive(Debug, Clone, Default)]
pub struct EtcdOptions {
    /// Serve TLS and ask clients for a certificate of the same authority.
    pub tls: bool,
    /// Users, each with a role of its name. Not empty: authentication is on, `root` exists too, and a client is the
    /// user that its certificate's CN names. Needs `tls`.
    pub users: Vec<EtcdUser>,
    /// Where it listens, an IPv4 address of this machine; on loopback without.
    pub address: Option<Ipv4Addr>,
    /// `--quota-backend-bytes`.
    pub quota_bytes: Option<u64>,
    /// Further flags.
    pub args: Vec<String>,
}

/// A user of etcd.
#[derive(Debug, Clone)]
pub struct EtcdUser {
    /// Its name, the CN of its certificate.
    pub name: String,
    /// What its role may do.
    pub grants: Vec<Grant>,
}

/// One permission of a role.
#[derive(Debug, Clone)]
pub struct Grant {
    /// `read`, `write` or `readwrite`.
    pub access: &'static str,
    /// Keys that begin with this.
    pub prefix: &'static str,
}

impl Grant {
    /// Reading below a prefix.
    #[must_use]
    pub fn read(prefix: &'static str) -> Self {
        Self { access: "read", prefix }
    }

    /// Reading and writing below a prefix.
    #[must_use]
    pub fn read_write(prefix: &'static str) -> Self {
        Self { access: "readwrite", prefix }
    }
}

/// The users that Basal runs as: `basal-operator` and `basal-agent`. What the agent may write is what its protocol
/// needs: addresses, identities with their locks, and the lock that probes the quorum.
#[must_use]
pub fn basal_users() -> Vec<EtcdUser> {
    vec![
        EtcdUser {
            name: "basal-operator".into(),
            grants: vec![Grant::read_write("basal/"), Grant::read_write("cilium/")],
        },
        EtcdUser {
            name: "basal-agent".into(),
            grants: vec![
                Grant::read("cilium/"),
                Grant::read("basal/ipam/"),
                Grant::read_write("cilium/state/ip/"),
                Grant::read_write("cilium/state/identities/"),
                Grant::read_write("cilium/.initlock/"),
            ],
        },
    ]
}

/// A running (or stopped) single-member etcd, on loopback unless told otherwise. Dropping it kills it and removes its data.
pub struct Etcd {
    dir: TempDir,
    options: EtcdOptions,
    pki: Pki,
    ports: EtcdFlags,
    process: Option<Process>,
}

/// A copy of an etcd's data, from [`Etcd::save_data`].
#[derive(Debug)]
pub struct SavedData(PathBuf);

impl Etcd {
    /// Starts one and waits until it serves, with its users if there are any.
    pub fn start(options: EtcdOptions) -> anyhow::Result<Self> {
        if !options.users.is_empty() && !options.tls {
            bail!("an etcd with users needs `tls`: a user is known by its certificate");
        }
        let dir = tempfile::Builder::new().prefix("basal-etcd-").tempdir().context("a folder for etcd")?;
        let pki = Pki::create(&dir.path().join("pki"))?;
        let address = options.address.unwrap_or(Ipv4Addr::LOCALHOST);
        if options.tls {
            let names = ["127.0.0.1", "::1", "localhost"].map(String::from).into_iter();
            pki.issue(&CertRequest::server("etcd", names.chain([address.to_string()])))?;
        }
        let ports = EtcdFlags::pick(address)?;
        let mut etcd = Self { dir, options, pki, ports, process: None };
        for attempt in 1.. {
            match etcd.restart() {
                Ok(()) => break,
                Err(error) if attempt == ATTEMPTS => return Err(error),
                Err(_maybe_port_taken) => etcd.ports = EtcdFlags::pick(address)?,
            }
        }
        if !etcd.options.users.is_empty() {
            let certificate = etcd.user("root")?;
            add_users(&etcd.options.users, |args| etcd.etcdctl_as(&certificate, args).map(drop))?;
        }
        Ok(etcd)
    }

    /// The URL for clients.
    #[must_use]
    pub fn endpoint(&self) -> String {
        let scheme = if self.options.tls { "https" } else { "http" };
        format!("{scheme}://{}", SocketAddr::new(self.ports.address, self.ports.client))
    }

    /// The authority that its clients' certificates come from.
    #[must_use]
    pub fn pki(&self) -> &Pki {
        &self.pki
    }

    /// A folder that goes with it.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A certificate for a user, made at the first call.
    pub fn user(&self, name: &str) -> anyhow::Result<CertFiles> {
        let files = self.pki.files(name);
        if files.cert.exists() { Ok(files) } else { self.pki.issue(&CertRequest::client(name)) }
    }

    /// Writes the client configuration that Cilium calls `etcd.config` for a user and answers its path. Without TLS it
    /// holds the endpoint only.
    pub fn client_config(&self, user: &str) -> anyhow::Result<PathBuf> {
        let path = self.dir.path().join(format!("{user}.etcd.config"));
        let text = if self.options.tls {
            client_config(&[self.endpoint()], &self.user(user)?)
        } else {
            format!("endpoints:\n- {}\n", self.endpoint())
        };
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }

    /// Runs etcdctl as `root` and answers what it printed.
    pub fn etcdctl(&self, args: &[&str]) -> anyhow::Result<String> {
        self.etcdctl_as(&self.user("root")?, args)
    }

    /// Runs etcdctl with a certificate and answers what it printed.
    pub fn etcdctl_as(&self, certificate: &CertFiles, args: &[&str]) -> anyhow::Result<String> {
        let run = Run::new(parts::binary("etcdctl")?).arg("--endpoints").arg(self.endpoint());
        let run = if self.options.tls {
            run.arg("--cacert")
                .arg(&certificate.ca)
                .arg("--cert")
                .arg(&certificate.cert)
                .arg("--key")
                .arg(&certificate.key)
        } else {
            run
        };
        run.args(args).text()
    }

    /// Its metrics, in Prometheus' text form.
    pub fn metrics(&self) -> anyhow::Result<String> {
        Ok(http_get(SocketAddr::new(self.ports.address, self.ports.metrics), "/metrics")?)
    }

    /// Ends it in order (SIGTERM), keeping its data.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        self.process.take().map_or(Ok(()), |process| process.stop(Duration::from_secs(10)).map(drop))
    }

    /// Kills it (SIGKILL), keeping its data.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.process.take().map_or(Ok(()), |process| process.kill().map(drop))
    }

    /// Starts it again on the same ports and data; stops it first if it runs. Answers when it serves.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.stop()?;
        let mut command = Command::new(parts::binary("etcd")?);
        self.ports.add(&mut command, &self.data_dir(), self.options.tls.then_some(&self.pki));
        if let Some(quota) = self.options.quota_bytes {
            command.arg(format!("--quota-backend-bytes={quota}"));
        }
        command.args(&self.options.args);
        let mut process = Process::start("etcd", command, &self.dir.path().join("etcd.log"))?;
        wait_healthy(SocketAddr::new(self.ports.address, self.ports.metrics), || process.check_running())?;
        self.process = Some(process);
        Ok(())
    }

    /// Freezes it (SIGSTOP): connections stay open and nothing answers.
    pub fn pause(&self) -> anyhow::Result<()> {
        self.process.as_ref().map_or(Ok(()), |process| process.freeze())
    }

    /// Undoes [`Etcd::pause`].
    pub fn resume(&self) -> anyhow::Result<()> {
        self.process.as_ref().map_or(Ok(()), |process| process.thaw())
    }

    /// Stops it, copies its data aside and starts it again.
    pub fn save_data(&mut self, name: &str) -> anyhow::Result<SavedData> {
        self.stop()?;
        let copy = self.dir.path().join(format!("saved-{name}"));
        Run::new("cp").arg("-a").arg(self.data_dir()).arg(&copy).done()?;
        self.restart()?;
        Ok(SavedData(copy))
    }

    /// Puts saved data back, as an administrator restores a backup: later writes are gone and the revision falls.
    pub fn restore_data(&mut self, saved: &SavedData) -> anyhow::Result<()> {
        self.wipe_stopped()?;
        Run::new("cp").arg("-a").arg(&saved.0).arg(self.data_dir()).done()?;
        self.restart()
    }

    /// Starts it with no data at all: another cluster id, no keys, no users.
    pub fn wipe(&mut self) -> anyhow::Result<()> {
        self.wipe_stopped()?;
        self.restart()
    }

    fn wipe_stopped(&mut self) -> anyhow::Result<()> {
        self.stop()?;
        fs::remove_dir_all(self.data_dir()).context("removing etcd's data")
    }

    fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }
}

/// Where an etcd listens.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EtcdFlags {
    pub(crate) address: IpAddr,
    pub(crate) client: u16,
    pub(crate) peer: u16,
    pub(crate) metrics: u16,
}

impl EtcdFlags {
    fn pick(address: Ipv4Addr) -> anyhow::Result<Self> {
        let address = IpAddr::V4(address);
        let (client, peer, metrics) = (free_port(address)?, free_port(address)?, free_port(address)?);
        Ok(Self { address, client, peer, metrics })
    }

    /// Adds the flags of a single-member etcd; with an authority it serves TLS as `etcd` and wants certificates.
    pub(crate) fn add(&self, command: &mut Command, data: &Path, pki: Option<&Pki>) {
        let scheme = if pki.is_some() { "https" } else { "http" };
        let client = format!("{scheme}://{}", SocketAddr::new(self.address, self.client));
        let peer = format!("http://{}", SocketAddr::new(self.address, self.peer));
        let metrics = format!("http://{}", SocketAddr::new(self.address, self.metrics));
        command
            .arg(format!("--data-dir={}", data.display()))
            .arg(format!("--listen-client-urls={client}"))
            .arg(format!("--advertise-client-urls={client}"))
            .arg(format!("--listen-peer-urls={peer}"))
            .arg(format!("--initial-advertise-peer-urls={peer}"))
            .arg(format!("--initial-cluster=default={peer}"))
            .arg(format!("--listen-metrics-urls={metrics}"))
            // The data need not survive the machine.
            .args(["--unsafe-no-fsync", "--enable-grpc-gateway=false"]);
        if let Some(pki) = pki {
            let files = pki.files("etcd");
            command
                .arg("--client-cert-auth")
                .arg(format!("--trusted-ca-file={}", files.ca.display()))
                .arg(format!("--cert-file={}", files.cert.display()))
                .arg(format!("--key-file={}", files.key.display()));
        }
    }
}

/// The text of Cilium's `etcd.config`.
#[must_use]
pub fn client_config(endpoints: &[String], certificate: &CertFiles) -> String {
    // JSON is YAML.
    let config = json!({
        "endpoints": endpoints,
        "trusted-ca-file": certificate.ca,
        "cert-file": certificate.cert,
        "key-file": certificate.key,
    });
    format!("{config:#}\n")
}

/// Makes `root` and the users with their roles and turns authentication on. `etcdctl` runs etcdctl with root's
/// certificate.
pub(crate) fn add_users(users: &[EtcdUser], etcdctl: impl Fn(&[&str]) -> anyhow::Result<()>) -> anyhow::Result<()> {
    etcdctl(&["user", "add", "root", "--no-password"])?;
    etcdctl(&["user", "grant-role", "root", "root"])?;
    for user in users {
        etcdctl(&["role", "add", &user.name])?;
        for grant in &user.grants {
            etcdctl(&["role", "grant-permission", &user.name, "--prefix=true", grant.access, grant.prefix])?;
        }
        etcdctl(&["user", "add", &user.name, "--no-password"])?;
        etcdctl(&["user", "grant-role", &user.name, &user.name])?;
    }
    etcdctl(&["auth", "enable"])
}

/// Waits until etcd's `/health`, on its metrics address, says that it can commit.
pub(crate) fn wait_healthy(
    metrics: SocketAddr,
    mut check_running: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    wait::until(&format!("etcd's health at {metrics}"), START_LIMIT, Duration::from_millis(20), || {
        check_running()?;
        Ok(match http_get(metrics, "/health") {
            Ok(answer) if answer.contains(r#""health":"true""#) => Check::Done(()),
            Ok(answer) => Check::NotYet(answer),
            Err(error) => Check::NotYet(error.to_string()),
        })
    })
}

fn http_get(address: SocketAddr, path: &str) -> io::Result<String> {
    let limit = Duration::from_secs(5);
    let mut stream = TcpStream::connect_timeout(&address, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
