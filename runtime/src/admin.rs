//! The admin server: what probes, Prometheus and people ask a daemon.
//!
//! | path | answers |
//! |---|---|
//! | `/healthz` | 200 `ok` while the process serves; it looks at nothing outside, so an outage of the API server or of etcd kills no pod |
//! | `/readyz` | 200, or 503, with one line for each condition: `[+] name` or `[-] name: reason` |
//! | `/metrics` | the metrics, as OpenMetrics text |
//! | `/config` | the effective configuration, as JSON |
//!
//! Metrics may be served at an address of their own; nothing else is served there.

use std::{
    io,
    net::SocketAddr,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
    serve::Listener,
};
use tokio::net::{TcpListener, UnixListener};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

pub use address::{ListenAddress, ListenAddressError};

use crate::{
    env::{Env, TaskHandle},
    metrics::{CONTENT_TYPE, Metrics},
    readiness::Readiness,
};

mod address;

/// Where to listen.
#[derive(Debug, Clone, Default)]
pub struct AdminOptions {
    /// For all paths; mostly a loopback address.
    pub address: Option<ListenAddress>,
    /// For `/metrics` alone.
    pub metrics_address: Option<ListenAddress>,
    /// For all paths, readable and writable for the owner alone. An old socket at the path is replaced.
    pub unix_socket: Option<PathBuf>,
}

/// What the server shows.
#[derive(Debug, Clone)]
pub struct AdminState {
    /// The conditions of `/readyz`.
    pub readiness: Readiness,
    /// The metrics of `/metrics`.
    pub metrics: Metrics,
    /// The configuration of `/config`.
    pub config: Arc<serde_json::Value>,
}

/// The server cannot listen.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {at}: {cause}; another process may use it, choose another address")]
pub struct BindError {
    at: String,
    #[source]
    cause: io::Error,
}

/// Sockets that are bound, before they are served: a wrong address stops the start of a daemon.
#[derive(Debug)]
pub struct AdminServer {
    all: Vec<TcpListener>,
    metrics_only: Vec<TcpListener>,
    unix: Option<UnixListener>,
}

impl AdminServer {
    /// Binds the sockets.
    ///
    /// # Errors
    /// An address that cannot be bound.
    pub async fn bind(options: &AdminOptions) -> Result<Self, BindError> {
        let unix = match &options.unix_socket {
            Some(path) => Some(bind_unix(path).map_err(|cause| BindError { at: path.display().to_string(), cause })?),
            None => None,
        };
        Ok(Self {
            all: bind(options.address.as_ref()).await?,
            metrics_only: bind(options.metrics_address.as_ref()).await?,
            unix,
        })
    }

    /// The addresses that serve all paths; they tell which port the system chose where 0 was asked for.
    #[must_use]
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.all.iter().filter_map(|listener| listener.local_addr().ok()).collect()
    }

    /// The addresses that serve metrics alone.
    #[must_use]
    pub fn metrics_addresses(&self) -> Vec<SocketAddr> {
        self.metrics_only.iter().filter_map(|listener| listener.local_addr().ok()).collect()
    }

    /// Serves in tasks until `stop`; requests under way are answered. `more` adds paths of the daemon's own.
    pub fn serve(self, env: &dyn Env, state: AdminState, more: Router, stop: &CancellationToken) -> Vec<TaskHandle> {
        let metrics_only = Router::new().route("/metrics", get(metrics)).with_state(state.clone());
        let all = Router::new()
            .route("/healthz", get(async || "ok"))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
            .route("/config", get(config))
            .with_state(state)
            .merge(more);
        let tcp = self.all.into_iter().map(|listener| (listener, all.clone()));
        let tcp = tcp.chain(self.metrics_only.into_iter().map(|listener| (listener, metrics_only.clone())));
        let mut tasks: Vec<TaskHandle> =
            tcp.map(|(listener, router)| spawn(env, listener, router, stop.clone())).collect();
        tasks.extend(self.unix.map(|listener| spawn(env, listener, all.clone(), stop.clone())));
        tasks
    }
}

fn spawn<L>(env: &dyn Env, listener: L, router: Router, stop: CancellationToken) -> TaskHandle
where
    L: Listener<Addr: std::fmt::Debug>,
{
    env.spawn(
        "admin server",
        Box::pin(async move {
            info!(address = ?listener.local_addr(), "admin server listens");
            let served = axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await;
            if let Err(error) = served {
                error!(%error, "the admin server ended");
            }
        }),
    )
}

async fn bind(address: Option<&ListenAddress>) -> Result<Vec<TcpListener>, BindError> {
    let mut bound = Vec::new();
    let mut refused = None;
    for candidate in address.into_iter().flat_map(ListenAddress::candidates) {
        match TcpListener::bind(candidate.address).await {
            Ok(listener) => bound.push(listener),
            Err(cause) => {
                refused = Some(BindError { at: candidate.address.to_string(), cause });
                continue;
            }
        }
        if candidate.suffices {
            break;
        }
    }
    // A machine without IPv6 has no ::1: one of several candidates is enough.
    match refused {
        Some(error) if bound.is_empty() => Err(error),
        _ => Ok(bound),
    }
}

fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    match std::fs::symlink_metadata(path) {
        Ok(old) if old.file_type().is_socket() => std::fs::remove_file(path)?,
        Ok(_) => return Err(io::Error::new(io::ErrorKind::AlreadyExists, "the path exists and is no socket")),
        Err(_) => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

async fn readyz(State(state): State<AdminState>) -> impl IntoResponse {
    let (pending, holding) = (state.readiness.pending(), state.readiness.holding());
    let mut text = String::new();
    for name in holding {
        text += &format!("[+] {name}\n");
    }
    for condition in &pending {
        text += &format!("[-] {}: {}\n", condition.name, condition.reason);
    }
    let (status, verdict) =
        if pending.is_empty() { (StatusCode::OK, "ready\n") } else { (StatusCode::SERVICE_UNAVAILABLE, "not ready\n") };
    (status, text + verdict)
}

async fn metrics(State(state): State<AdminState>) -> impl IntoResponse {
    match state.metrics.text() {
        Ok(text) => (StatusCode::OK, [(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Err(error) => {
            (StatusCode::INTERNAL_SERVER_ERROR, format!("a metric cannot be encoded: {error}\n")).into_response()
        }
    }
}

async fn config(State(state): State<AdminState>) -> impl IntoResponse {
    axum::Json(serde_json::Value::clone(&state.config))
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;
    use serde_json::json;
    use tokio::{
        io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
        net::{TcpStream, UnixStream},
    };

    use super::*;
    use crate::env::SystemEnv;

    /// Status line and body of a GET.
    async fn get(mut stream: impl AsyncRead + AsyncWrite + Unpin, path: &str) -> (String, String) {
        let request = format!("GET {path} HTTP/1.1\r\nhost: basal\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.lines().next().unwrap().to_owned(), body.to_owned())
    }

    fn state() -> AdminState {
        let config = Arc::new(json!({"debug": "true"}));
        AdminState { readiness: Readiness::new(), metrics: Metrics::new("basal"), config }
    }

    fn on(text: &str) -> Option<ListenAddress> {
        Some(text.parse().unwrap())
    }

    #[tokio::test]
    async fn probes_metrics_and_configuration_are_served() {
        let folder = tempfile::TempDir::new().unwrap();
        let socket = folder.path().join("admin.sock");
        let options = AdminOptions {
            address: on("localhost:0"),
            metrics_address: on("127.0.0.1:0"),
            unix_socket: Some(socket.clone()),
        };
        // A socket that an earlier process left behind is replaced.
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        let server = AdminServer::bind(&options).await.unwrap();
        let (all, metrics_only) = (server.addresses()[0], server.metrics_addresses()[0]);
        assert!(all.ip().is_loopback());
        let state = state();
        let guard = state.readiness.guard("node cache");
        let grants = Counter::<u64>::default();
        state.metrics.register(|registry| registry.register("grants", "Blocks granted", grants.clone()));
        let stop = CancellationToken::new();
        let more = Router::new().route("/more", axum::routing::get(async || "own path"));
        let tasks = server.serve(&SystemEnv, state, more, &stop);

        let tcp = async |address, path| get(TcpStream::connect(address).await.unwrap(), path).await;
        let ok = |body: &str| ("HTTP/1.1 200 OK".to_owned(), body.to_owned());
        assert_eq!(tcp(all, "/healthz").await, ok("ok"));
        let unready =
            ("HTTP/1.1 503 Service Unavailable".to_owned(), "[-] node cache: not started yet\nnot ready\n".to_owned());
        assert_eq!(tcp(all, "/readyz").await, unready);
        guard.ready();
        assert_eq!(tcp(all, "/readyz").await, ok("[+] node cache\nready\n"));
        assert_eq!(tcp(all, "/config").await, ok(r#"{"debug":"true"}"#));
        assert_eq!(tcp(all, "/more").await, ok("own path"));
        assert!(tcp(metrics_only, "/metrics").await.1.contains("basal_grants_total 0"));
        assert_eq!(tcp(metrics_only, "/config").await.0, "HTTP/1.1 404 Not Found");
        assert_eq!(get(UnixStream::connect(&socket).await.unwrap(), "/healthz").await, ok("ok"));

        stop.cancel();
        for task in tasks {
            task.join().await;
        }
        TcpStream::connect(all).await.unwrap_err();
    }

    #[tokio::test]
    async fn an_address_in_use_is_named() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = taken.local_addr().unwrap().to_string();
        let options = AdminOptions { address: on(&address), ..AdminOptions::default() };
        let error = AdminServer::bind(&options).await.unwrap_err().to_string();
        assert!(error.starts_with(&format!("cannot listen on {address}: ")), "{error}");
    }

    #[tokio::test]
    async fn a_file_in_the_place_of_the_socket_is_left_alone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let options = AdminOptions { unix_socket: Some(file.path().to_owned()), ..AdminOptions::default() };
        let error = AdminServer::bind(&options).await.unwrap_err().to_string();
        assert!(error.contains("the path exists and is no socket"), "{error}");
        assert!(file.path().exists());
    }
}
