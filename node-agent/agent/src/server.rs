//! The agent's unix socket: CNI calls, and what the command line asks.
//!
//! Calls come from root only (the socket's mode is 0600). Each connection is one call; see [`basal_cni::api`].

use std::{io, os::unix::fs::PermissionsExt as _, path::Path, sync::Arc, time::Duration};

use async_trait::async_trait;
use basal_cni::{
    api::{API_VERSION, Ack, AddRequest, AgentError, Answer, Attachment, Call, Request},
    frame::{self, FrameError},
};
use basal_runtime::{env::SharedEnv, metrics::Timer};
use futures::{FutureExt, select_biased};
use serde::Deserialize;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
};
use tokio_util::sync::CancellationToken;

use crate::{
    endpoint::{Added, Endpoints},
    metrics::{AgentMetrics, CallLabels, CommandLabel},
};

/// How long a caller may take for its first message, and for the acknowledgement of an ADD.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the command line asks.
#[async_trait]
pub trait Reports: Send + Sync + 'static {
    /// Answers a call that is none of CNI's.
    async fn report(&self, request: &Request) -> Answer;

    /// Why new pods are not served; `None` when they are.
    fn not_ready(&self) -> Option<String>;
}

/// What the server works with.
#[derive(Clone)]
pub struct Server {
    /// Starts a task for each connection.
    pub env: SharedEnv,
    /// Carries out CNI calls.
    pub endpoints: Endpoints,
    /// Answers the command line.
    pub reports: Arc<dyn Reports>,
    /// What is counted.
    pub metrics: AgentMetrics,
}

/// Listens at a path, in the place of whatever listened there before.
///
/// # Errors
/// The folder or the socket cannot be made.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// The version alone: it is read before the rest, which another version may have changed.
#[derive(Deserialize)]
struct Version {
    api: u32,
}

impl Server {
    /// Serves until it is stopped. Calls that are under way then end as in a crash: the caller sees its connection
    /// close, and the next start finds in the journal what was begun.
    pub async fn run(self, listener: UnixListener, stop: CancellationToken) {
        loop {
            let accepted = select_biased! {
                () = stop.cancelled().fuse() => return,
                accepted = listener.accept().fuse() => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    let (server, stop) = (self.clone(), stop.clone());
                    let call = async move { stop.run_until_cancelled(server.serve(stream)).await.unwrap_or_default() };
                    self.env.spawn("cni-call", Box::pin(call));
                }
                Err(error) => {
                    tracing::warn!(%error, "the agent's socket");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn serve(&self, mut stream: UnixStream) {
        if let Err(error) = self.call(&mut stream).await {
            tracing::debug!(%error, "a call at the agent's socket ended early");
        }
    }

    async fn call(&self, stream: &mut UnixStream) -> Result<(), FrameError> {
        let body = within(PATIENCE, receive(stream)).await?;
        let Version { api } = serde_json::from_slice(&body)?;
        if api != API_VERSION {
            let error = AgentError::ApiVersion { supported: API_VERSION, asked: api };
            return send(stream, &Answer::Error(error)).await;
        }
        let request = match serde_json::from_slice::<Call>(&body) {
            Ok(call) => call.request,
            Err(error) => {
                let error = AgentError::Invalid { field: "request".to_owned(), message: error.to_string() };
                return send(stream, &Answer::Error(error)).await;
            }
        };
        let command = command(&request);
        let timer = Timer::start(self.metrics.call_seconds.get_or_create(&CommandLabel { command }).clone());
        let answer = match request {
            Request::Add(request) => return self.add(stream, request, timer).await,
            Request::Del(request) => match self.endpoints.del(&request).await {
                Ok(()) => Answer::Deleted,
                // A removal is never refused for good: the runtime tries again, and so does the agent.
                Err(error) => Answer::Error(AgentError::TryAgain { message: error.to_string() }),
            },
            Request::Check(request) => match self.endpoints.check(&request).await {
                Ok(()) => Answer::Intact,
                Err(error) => Answer::Error(error),
            },
            Request::Gc { valid } => match self.endpoints.collect(&valid).await {
                Ok(removed) => Answer::Collected { removed },
                Err(error) => Answer::Error(AgentError::TryAgain { message: error.to_string() }),
            },
            Request::Ready => match self.reports.not_ready() {
                None => Answer::Ready,
                Some(message) => Answer::Error(AgentError::NotReady { message }),
            },
            other => self.reports.report(&other).await,
        };
        drop(timer);
        self.count(command, &answer);
        send(stream, &answer).await
    }

    /// ADD: offer, acknowledgement, commitment; when the caller goes away before, everything is undone.
    async fn add(&self, stream: &mut UnixStream, request: AddRequest, timer: Timer) -> Result<(), FrameError> {
        let given_up = CancellationToken::new();
        let added = {
            // The caller sends nothing before it has an answer: whatever comes, even nothing more, ends the wait.
            let mut probe = [0; 1];
            let add = self.endpoints.add(&request, &given_up).fuse();
            let gone = stream.read(&mut probe).fuse();
            futures::pin_mut!(add, gone);
            select_biased! {
                added = add => added,
                _ = gone => {
                    given_up.cancel();
                    add.await
                }
            }
        };
        drop(timer);
        let added = match added {
            Ok(added) => added,
            Err(error) => {
                let answer = Answer::Error(error.into());
                self.count("add", &answer);
                return send(stream, &answer).await;
            }
        };
        let acknowledged = async {
            send(stream, &Answer::Added(added.result.clone())).await?;
            let body = within(PATIENCE, receive(stream)).await?;
            let Ack::Received = serde_json::from_slice(&body)?;
            Ok::<_, FrameError>(())
        };
        if let Err(error) = acknowledged.await {
            tracing::warn!(attachment = %request.attachment, %error, "the result of an ADD was not acknowledged; it is undone");
            self.undo(&request.attachment, &added).await;
            return Err(error);
        }
        let answer = match self.endpoints.commit(&request.attachment, &added).await {
            Ok(()) => Answer::Committed,
            Err(error) => {
                self.undo(&request.attachment, &added).await;
                Answer::Error(error.into())
            }
        };
        self.count("add", &answer);
        send(stream, &answer).await
    }

    async fn undo(&self, attachment: &Attachment, added: &Added) {
        if let Err(error) = self.endpoints.undo(attachment, added).await {
            tracing::warn!(%attachment, %error, "the ADD is undone later");
        }
    }

    fn count(&self, command: &'static str, answer: &Answer) {
        let outcome = match answer {
            Answer::Error(error) => match error {
                AgentError::TryAgain { .. } => "try-again",
                AgentError::NotReady { .. } => "not-ready",
                AgentError::Invalid { .. } => "invalid",
                AgentError::UnknownAttachment { .. } => "unknown-attachment",
                AgentError::Damaged { .. } => "damaged",
                AgentError::ApiVersion { .. } => "api-version",
                AgentError::Failed { .. } => "failed",
            },
            _ => "ok",
        };
        self.metrics.calls.get_or_create(&CallLabels { command, outcome }).inc();
    }
}

fn command(request: &Request) -> &'static str {
    match request {
        Request::Add(_) => "add",
        Request::Del(_) => "del",
        Request::Check(_) => "check",
        Request::Gc { .. } => "gc",
        Request::Ready => "status",
        Request::Status | Request::Nodes | Request::Endpoints | Request::Identities | Request::Ipam => "report",
    }
}

async fn within<T>(limit: Duration, future: impl Future<Output = Result<T, FrameError>>) -> Result<T, FrameError> {
    match tokio::time::timeout(limit, future).await {
        Ok(result) => result,
        Err(_elapsed) => Err(io::Error::from(io::ErrorKind::TimedOut).into()),
    }
}

async fn receive(stream: &mut UnixStream) -> Result<Vec<u8>, FrameError> {
    let mut header = [0; 4];
    match stream.read_exact(&mut header).await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(FrameError::Closed),
        other => drop(other?),
    }
    let len = frame::body_len(header)?;
    let mut body = Vec::new();
    let got = stream.take(len as u64).read_to_end(&mut body).await?;
    if got < len {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    Ok(body)
}

async fn send(stream: &mut UnixStream, answer: &Answer) -> Result<(), FrameError> {
    stream.write_all(&frame::encode(answer)?).await?;
    Ok(())
}
