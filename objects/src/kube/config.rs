//! How the API server is reached.

use std::{path::PathBuf, time::Duration};

use http::{HeaderValue, header::USER_AGENT};
use kube::{
    Client, Config,
    client::ClientBuilder,
    config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};
use tower::util::MapRequestLayer;

use super::watch::begin_at_quorum;

/// How long a connection may take to be made, before another URL is tried.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Flags by Cilium's names; flatten them into a daemon's flags.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
#[command(next_help_heading = "Kubernetes API server")]
pub struct KubeFlags {
    /// Path of a kubeconfig; without it the pod's service account is used
    #[arg(long, value_name = "FILE")]
    pub k8s_kubeconfig_path: Option<PathBuf>,

    /// URLs of API servers, instead of the one that kubeconfig or environment name
    #[arg(long, value_name = "URL,…")]
    pub k8s_api_server_urls: Vec<String>,
}

/// There is no usable configuration for the API server.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The kubeconfig cannot be used.
    #[error("k8s-kubeconfig-path: {0}")]
    Kubeconfig(#[from] KubeconfigError),
    /// Neither a kubeconfig was named nor does the process run in a pod with a service account.
    #[error("no k8s-kubeconfig-path is set, and the pod's service account cannot be used: {0}")]
    ServiceAccount(#[from] InClusterError),
    /// A URL does not parse.
    #[error("k8s-api-server-urls: {url:?} is no URL: {cause}")]
    Url {
        /// What was written.
        url: String,
        /// What is wrong with it.
        #[source]
        cause: http::uri::InvalidUri,
    },
    /// The name of the client cannot stand in a header.
    #[error("{0:?} cannot be the name of a client")]
    Name(String),
    /// The client cannot be made; mostly a certificate that does not parse.
    #[error("cannot make a client for the API server: {0}")]
    Client(#[from] kube::Error),
}

/// A client for each URL, at least one. By `name` the API server calls it in its audit log, and in `managedFields` of what it
/// writes.
pub(super) async fn clients(flags: &KubeFlags, name: &str) -> Result<Vec<Client>, ConnectError> {
    let mut config = match &flags.k8s_kubeconfig_path {
        Some(path) => {
            Config::from_custom_kubeconfig(Kubeconfig::read_from(path)?, &KubeConfigOptions::default()).await?
        }
        None => Config::incluster()?,
    };
    // A retried write could answer "already exists" for what it did itself; retries live above the port.
    config.default_retry = false;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    let agent = HeaderValue::try_from(format!("{name}/{}", env!("CARGO_PKG_VERSION")));
    config.headers.push((USER_AGENT, agent.map_err(|_error| ConnectError::Name(name.to_owned()))?));
    if flags.k8s_api_server_urls.is_empty() {
        return Ok(vec![client(config)?]);
    }
    let mut clients = Vec::new();
    for url in &flags.k8s_api_server_urls {
        let cluster_url = url.parse().map_err(|cause| ConnectError::Url { url: url.clone(), cause })?;
        let mut config = config.clone();
        config.cluster_url = cluster_url;
        clients.push(client(config)?);
    }
    Ok(clients)
}

fn client(config: Config) -> kube::Result<Client> {
    Ok(ClientBuilder::try_from(config)?.with_layer(&MapRequestLayer::new(begin_at_quorum)).build())
}
