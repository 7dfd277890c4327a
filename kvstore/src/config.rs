//! Where etcd is and how to reach it: Cilium's client file (`etcd.config`) and the `kvstore-opt` keys.

use std::{
    collections::BTreeMap,
    fmt,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use basal_runtime::{config::GoDuration, reason::Reason};
use serde::Deserialize;
use tonic::transport::Uri;

use crate::pages::PAGE_SIZE;

/// A key of the map `kvstore-opt`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptKey {
    /// The key.
    pub name: &'static str,
    /// What holds when it is not there; empty for nothing.
    pub default: &'static str,
    /// What it says.
    pub meaning: &'static str,
}

/// The `kvstore-opt` keys that exist, in the order in which the documentation lists them.
pub const KVSTORE_OPT_KEYS: [OptKey; 8] = [
    opt(
        "etcd.config",
        "",
        "path of a client file: `endpoints`, `trusted-ca-file`, `cert-file`, `key-file`, `cilium-host-aliases`",
    ),
    opt("etcd.address", "", "one `http://host:port` without TLS"),
    opt("etcd.limit", "256", "keys in one page of a list; 0 for all at once"),
    opt("etcd.maxInflight", "100", "requests under way at once"),
    opt("etcd.qps", "", "the same, where `etcd.maxInflight` is not there: Basal bounds concurrency and not rate"),
    opt("etcd.bootstrapQps", "", "read for typing errors, has no effect"),
    opt("etcd.keepaliveHeartbeat", "15s", "idle time after which a connection is probed"),
    opt("etcd.keepaliveTimeout", "25s", "how long the answer may take"),
];

const fn opt(name: &'static str, default: &'static str, meaning: &'static str) -> OptKey {
    OptKey { name, default, meaning }
}

fn known_options() -> String {
    KVSTORE_OPT_KEYS.map(|option| option.name).join(", ")
}

/// How long to wait before a missing `etcd.config` is looked for again.
pub const MISSING_FILE_RETRY: Duration = Duration::from_secs(5);

/// What was wrong with the configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A `kvstore-opt` key that Cilium does not know either.
    #[error("kvstore-opt: unknown key {key:?}; known keys are {}", known_options())]
    UnknownOption {
        /// The key.
        key: String,
    },
    /// A `kvstore-opt` value that cannot be read.
    #[error("kvstore-opt: {key} is {value:?}; it must be {expected}")]
    BadOption {
        /// The key.
        key: &'static str,
        /// What it holds.
        value: String,
        /// What it may hold.
        expected: &'static str,
    },
    /// Neither or both of the two ways to name endpoints.
    #[error("kvstore-opt: set exactly one of etcd.config (a client file) and etcd.address (one endpoint)")]
    NoSource,
    /// The client file does not exist (yet).
    #[error(
        "{path}: no such file; mount the ConfigMap that holds etcd.config there, or correct kvstore-opt etcd.config"
    )]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// The client file cannot be read.
    #[error("{path}: cannot be read: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The client file is no YAML of the right shape.
    #[error("{path}: {why}")]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column.
        why: String,
    },
    /// A key of the client file has a value that cannot be used.
    #[error("{path}: {key}: {why}")]
    BadKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What is wrong and what to write instead.
        why: String,
    },
}

impl ConfigError {
    /// The closed word for conditions, events and metrics.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::UnknownOption { .. } | Self::BadOption { .. } | Self::NoSource => {
                const { Reason::new("InvalidKvstoreOption") }
            }
            Self::Missing { .. } => const { Reason::new("EtcdConfigMissing") },
            Self::Unreadable { .. } => const { Reason::new("EtcdConfigUnreadable") },
            Self::BadFile { .. } | Self::BadKey { .. } => const { Reason::new("InvalidEtcdConfig") },
        }
    }

    /// True when waiting may help: the file may still be mounted.
    #[must_use]
    pub fn is_retried(&self) -> bool {
        matches!(self, Self::Missing { .. })
    }
}

/// The `kvstore-opt` map, parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvstoreOptions {
    /// Where the endpoints come from.
    pub source: Source,
    /// Keys in one page of a list (`etcd.limit`, 256); 0 means all at once.
    pub page_size: i64,
    /// Requests under way at once (`etcd.maxInflight`, else `etcd.qps`, else 100). Basal bounds concurrency, not rate.
    pub max_inflight: usize,
    /// Idle time after which a connection is probed (`etcd.keepaliveHeartbeat`, 15 s).
    pub keepalive_interval: Duration,
    /// How long the probe's answer may take (`etcd.keepaliveTimeout`, 25 s).
    pub keepalive_timeout: Duration,
}

/// Where the endpoints come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// `etcd.config`: the path of a client file.
    File(PathBuf),
    /// `etcd.address`: one endpoint, without TLS files.
    Address(String),
}

impl KvstoreOptions {
    /// Options with defaults for everything but the source.
    #[must_use]
    pub fn new(source: Source) -> Self {
        Self {
            source,
            page_size: PAGE_SIZE,
            max_inflight: 100,
            keepalive_interval: Duration::from_secs(15),
            keepalive_timeout: Duration::from_secs(25),
        }
    }

    /// Reads the map.
    ///
    /// # Errors
    /// `UnknownOption`, `BadOption` or `NoSource`.
    pub fn from_map(map: &BTreeMap<String, String>) -> Result<Self, ConfigError> {
        if let Some(key) = map.keys().find(|key| !KVSTORE_OPT_KEYS.iter().any(|option| option.name == *key)) {
            return Err(ConfigError::UnknownOption { key: key.clone() });
        }
        let text = |key| map.get(key).filter(|value: &&String| !value.is_empty());
        let source = match (text("etcd.config"), text("etcd.address")) {
            (Some(path), None) => Source::File(PathBuf::from(path)),
            (None, Some(address)) => Source::Address(address.clone()),
            _ => return Err(ConfigError::NoSource),
        };
        let number = |key: &'static str, least: i64| {
            text(key)
                .map(|value| {
                    value.parse::<i64>().ok().filter(|n| *n >= least).ok_or_else(|| ConfigError::BadOption {
                        key,
                        value: value.clone(),
                        expected: if least > 0 { "a whole number above 0" } else { "a whole number, 0 or more" },
                    })
                })
                .transpose()
        };
        let duration = |key: &'static str| {
            text(key)
                .map(|value| {
                    value.parse::<GoDuration>().ok().map(|d| d.0).filter(|d| !d.is_zero()).ok_or_else(|| {
                        ConfigError::BadOption { key, value: value.clone(), expected: "a duration above 0 such as 15s" }
                    })
                })
                .transpose()
        };
        let mut options = Self::new(source);
        // Read so that a typing error is found; Basal has no rate to apply it to.
        number("etcd.bootstrapQps", 0)?;
        let qps = number("etcd.qps", 1)?;
        if let Some(n) = number("etcd.maxInflight", 1)?.or(qps) {
            options.max_inflight = usize::try_from(n).unwrap_or(usize::MAX);
        }
        if let Some(n) = number("etcd.limit", 0)? {
            options.page_size = n;
        }
        if let Some(d) = duration("etcd.keepaliveHeartbeat")? {
            options.keepalive_interval = d;
        }
        if let Some(d) = duration("etcd.keepaliveTimeout")? {
            options.keepalive_timeout = d;
        }
        Ok(options)
    }

    /// Reads the client file, or makes the configuration of `etcd.address`.
    ///
    /// # Errors
    /// What [`EtcdConfig::load`] and [`EtcdConfig::from_address`] refuse.
    pub fn load(&self) -> Result<EtcdConfig, ConfigError> {
        match &self.source {
            Source::File(path) => EtcdConfig::load(path),
            Source::Address(address) => EtcdConfig::from_address(address),
        }
    }

    /// Like [`Self::load`], and looks for a missing file again every five seconds.
    ///
    /// # Errors
    /// Every error but `Missing`.
    pub async fn load_waiting(&self) -> Result<EtcdConfig, ConfigError> {
        loop {
            match self.load() {
                Err(error) if error.is_retried() => {
                    tracing::warn!(%error, retry_in = ?MISSING_FILE_RETRY, "waiting for the etcd client file");
                    tokio::time::sleep(MISSING_FILE_RETRY).await;
                }
                other => return other,
            }
        }
    }
}

/// One endpoint of etcd.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct EndpointUrl {
    /// Whether the connection is TLS.
    pub tls: bool,
    /// A name or an address, without brackets.
    pub host: String,
    /// The port; 2379 unless written.
    pub port: u16,
}

impl fmt::Display for EndpointUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        if self.host.contains(':') {
            write!(f, "{scheme}://[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{scheme}://{}:{}", self.host, self.port)
        }
    }
}

impl EndpointUrl {
    /// Reads `https://host:port`; without a scheme it is `http`.
    ///
    /// # Errors
    /// What is wrong with the text.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wanted = "write it as https://host:2379";
        let (tls, rest) = match text.split_once("://") {
            Some(("https", rest)) => (true, rest),
            Some(("http", rest)) => (false, rest),
            Some((other, _)) => return Err(format!("{text:?} has the scheme {other:?}; {wanted}")),
            None => (false, text),
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let uri: Uri =
            format!("http://{rest}").parse().map_err(|error| format!("{text:?} is no endpoint ({error}); {wanted}"))?;
        let Some(authority) = uri.authority().filter(|_| uri.path() == "/" && uri.query().is_none()) else {
            return Err(format!("{text:?} is no endpoint; {wanted}"));
        };
        if authority.as_str().contains('@') {
            return Err(format!("{text:?} carries a user; {wanted} and name the user by client certificate"));
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        if host.is_empty() {
            return Err(format!("{text:?} has no host; {wanted}"));
        }
        let port = match authority.port() {
            Some(port) => port.as_u16(),
            None if authority.as_str().ends_with(':') => return Err(format!("{text:?} has no port; {wanted}")),
            None => 2379,
        };
        Ok(Self { tls, host, port })
    }
}

/// The files of a TLS connection. They are read anew for every connection, so a renewed certificate needs no restart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// PEM certificates that the server's certificate must chain to (`trusted-ca-file`).
    pub ca: PathBuf,
    /// Client certificate chain and key, PEM (`cert-file`, `key-file`).
    pub client: Option<(PathBuf, PathBuf)>,
}

/// How to reach etcd: Cilium's client file, parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdConfig {
    /// At least one endpoint.
    pub endpoints: Vec<EndpointUrl>,
    /// Present when any endpoint is `https`.
    pub tls: Option<TlsFiles>,
    /// Addresses of names that no DNS needs to know (`cilium-host-aliases`).
    pub host_aliases: Arc<BTreeMap<String, Vec<IpAddr>>>,
}

/// The YAML as etcd's `clientv3/yaml` and Cilium write it. Keys that are not named here only tune etcd's Go client.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ClientFile {
    #[serde(default)]
    endpoints: Vec<String>,
    trusted_ca_file: Option<PathBuf>,
    cert_file: Option<PathBuf>,
    key_file: Option<PathBuf>,
    #[serde(default)]
    cilium_host_aliases: Vec<HostAlias>,
    #[serde(default)]
    insecure_skip_tls_verify: bool,
    username: Option<String>,
    password: Option<String>,
}

#[derive(Deserialize)]
struct HostAlias {
    #[serde(default)]
    hostname: String,
    #[serde(default)]
    ips: Vec<String>,
}

impl EtcdConfig {
    /// Reads a client file. Blocks for the length of a file read.
    ///
    /// # Errors
    /// `Missing`, `Unreadable`, `BadFile` or `BadKey`, each naming the file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => ConfigError::Missing { path: path.to_owned() },
            _ => ConfigError::Unreadable { path: path.to_owned(), source },
        })?;
        Self::parse(path, &text)
    }

    /// Reads the text of a client file; `path` is for the errors.
    ///
    /// # Errors
    /// `BadFile` or `BadKey`.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let file: ClientFile = serde_saphyr::from_str(text).map_err(|error| ConfigError::BadFile {
            path: path.to_owned(),
            why: format!("no client file of etcd: {error}"),
        })?;
        let bad = |key, why: String| ConfigError::BadKey { path: path.to_owned(), key, why };
        if file.insecure_skip_tls_verify {
            return Err(bad(
                "insecure-skip-tls-verify",
                "is not supported, because anybody could then pose as etcd; set trusted-ca-file".to_owned(),
            ));
        }
        if file.username.is_some() || file.password.is_some() {
            return Err(bad(
                "username",
                "is not supported; set cert-file and key-file, whose common name is the etcd user".to_owned(),
            ));
        }
        if file.endpoints.is_empty() {
            return Err(bad("endpoints", "is empty; list at least one, such as https://etcd.example:2379".to_owned()));
        }
        let mut endpoints = Vec::new();
        for text in &file.endpoints {
            let endpoint = EndpointUrl::parse(text).map_err(|why| bad("endpoints", why))?;
            if !endpoints.contains(&endpoint) {
                endpoints.push(endpoint);
            }
        }
        let client = match (file.cert_file, file.key_file) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            (Some(_), None) => return Err(bad("key-file", "is missing, but cert-file is set; set both".to_owned())),
            (None, Some(_)) => return Err(bad("cert-file", "is missing, but key-file is set; set both".to_owned())),
        };
        let tls = match file.trusted_ca_file {
            Some(ca) => Some(TlsFiles { ca, client }),
            None if endpoints.iter().any(|e| e.tls) || client.is_some() => {
                return Err(bad("trusted-ca-file", "is missing; an https endpoint is checked against it".to_owned()));
            }
            None => None,
        };
        let host_aliases = host_aliases(&file.cilium_host_aliases).map_err(|why| bad("cilium-host-aliases", why))?;
        Ok(Self { endpoints, tls, host_aliases: Arc::new(host_aliases) })
    }

    /// The configuration of `etcd.address`: one endpoint without TLS files.
    ///
    /// # Errors
    /// `BadOption` when the address cannot be read or asks for TLS.
    pub fn from_address(address: &str) -> Result<Self, ConfigError> {
        match EndpointUrl::parse(address) {
            Ok(endpoint) if !endpoint.tls => {
                Ok(Self { endpoints: vec![endpoint], tls: None, host_aliases: Arc::default() })
            }
            _ => Err(ConfigError::BadOption {
                key: "etcd.address",
                value: address.to_owned(),
                expected: "http://host:port; https needs a client file (etcd.config)",
            }),
        }
    }
}

fn host_aliases(list: &[HostAlias]) -> Result<BTreeMap<String, Vec<IpAddr>>, String> {
    let mut aliases = BTreeMap::new();
    for HostAlias { hostname, ips } in list {
        if hostname.is_empty() {
            return Err("an entry has no hostname".to_owned());
        }
        if ips.is_empty() {
            return Err(format!("{hostname} has no ips"));
        }
        let ips = ips
            .iter()
            .map(|ip| ip.parse().map_err(|error| format!("{hostname}: {ip:?} is no IP address ({error})")))
            .collect::<Result<Vec<IpAddr>, _>>()?;
        if aliases.insert(hostname.clone(), ips).is_some() {
            return Err(format!("{hostname} is listed twice"));
        }
    }
    Ok(aliases)
}

#[cfg(test)]
mod tests;
