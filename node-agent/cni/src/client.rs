//! A blocking client of the agent's socket, for the plugin and the command line.

use std::{
    io,
    os::unix::net::UnixStream,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use crate::{
    api::{Ack, AddRequest, AddResult, Answer, Call, Request},
    frame::{self, FrameError},
};

/// How long to pause between two attempts to reach the agent.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// A point in time that a call must not outlast.
#[derive(Debug, Clone, Copy)]
pub struct Deadline(Instant);

impl Deadline {
    /// So far from now.
    #[must_use]
    pub fn after(duration: Duration) -> Self {
        Self(now() + duration)
    }

    /// What is left; `None` when nothing is.
    #[must_use]
    pub fn left(self) -> Option<Duration> {
        Some(self.0.saturating_duration_since(now())).filter(|left| !left.is_zero())
    }

    /// Pauses, at most until the deadline.
    pub fn pause(self, duration: Duration) {
        thread::sleep(self.left().unwrap_or_default().min(duration));
    }
}

#[expect(clippy::disallowed_methods, reason = "a short-lived process without a tokio runtime, which no simulator runs")]
fn now() -> Instant {
    Instant::now()
}

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens: the agent is away.
    #[error("the agent does not listen on {socket} ({source}); is the agent's pod running on this node?")]
    Away {
        /// The socket.
        socket: String,
        /// What connecting said.
        source: io::Error,
    },
    /// The agent listens and did not answer in time.
    #[error("the agent did not answer in time")]
    TimedOut,
    /// The connection broke: the agent stopped meanwhile.
    #[error("the agent went away during the call: {0}")]
    Broken(FrameError),
    /// The agent answered something else than was asked.
    #[error("the agent gave an answer that does not fit the question: {0}")]
    Unfit(String),
}

fn broken(error: FrameError) -> ClientError {
    match error {
        error if error.is_timeout() => ClientError::TimedOut,
        FrameError::Json(error) => ClientError::Unfit(error.to_string()),
        error => ClientError::Broken(error),
    }
}

/// A connection with a deadline.
struct Connection {
    stream: UnixStream,
    deadline: Deadline,
}

impl Connection {
    fn open(socket: &Path, deadline: Deadline) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(socket)
            .map_err(|source| ClientError::Away { socket: socket.display().to_string(), source })?;
        Ok(Self { stream, deadline })
    }

    fn send<T: serde::Serialize>(&mut self, message: &T) -> Result<(), ClientError> {
        let left = self.deadline.left().ok_or(ClientError::TimedOut)?;
        self.stream.set_write_timeout(Some(left)).map_err(|error| ClientError::Broken(error.into()))?;
        frame::write(&mut self.stream, message).map_err(broken)
    }

    fn receive(&mut self) -> Result<Answer, ClientError> {
        let left = self.deadline.left().ok_or(ClientError::TimedOut)?;
        self.stream.set_read_timeout(Some(left)).map_err(|error| ClientError::Broken(error.into()))?;
        frame::read(&mut self.stream).map_err(broken)
    }
}

/// One question, one answer; an error of the agent is [`Answer::Error`].
///
/// # Errors
/// See [`ClientError`].
pub fn call(socket: &Path, request: Request, deadline: Deadline) -> Result<Answer, ClientError> {
    let mut connection = Connection::open(socket, deadline)?;
    connection.send(&Call::new(request))?;
    connection.receive()
}

/// What became of an ADD.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Added {
    /// The attachment exists and the agent knows that its result arrived.
    Committed(AddResult),
    /// The agent refused.
    Refused(crate::api::AgentError),
}

/// Attaches a container. As long as nothing was acknowledged a missing or restarting agent is waited for.
///
/// # Errors
/// `Away` and `TimedOut` at the deadline; `Broken` and `TimedOut` after the acknowledgement, when the attachment may
/// exist: the runtime's DEL decides.
pub fn add(socket: &Path, request: &AddRequest, deadline: Deadline) -> Result<Added, ClientError> {
    loop {
        match offer(socket, request, deadline) {
            Ok((mut connection, Answer::Added(result))) => {
                connection.send(&Ack::Received)?;
                return match connection.receive()? {
                    Answer::Committed => Ok(Added::Committed(result)),
                    Answer::Error(error) => Ok(Added::Refused(error)),
                    other => Err(ClientError::Unfit(format!("{other:?}"))),
                };
            }
            Ok((_, Answer::Error(error))) => return Ok(Added::Refused(error)),
            Ok((_, other)) => return Err(ClientError::Unfit(format!("{other:?}"))),
            Err(error @ (ClientError::Away { .. } | ClientError::Broken(_))) => {
                deadline.pause(RETRY_PAUSE);
                if deadline.left().is_none() {
                    return Err(error);
                }
            }
            Err(error) => return Err(error),
        }
    }
}

fn offer(socket: &Path, request: &AddRequest, deadline: Deadline) -> Result<(Connection, Answer), ClientError> {
    let mut connection = Connection::open(socket, deadline)?;
    connection.send(&Call::new(Request::Add(request.clone())))?;
    let answer = connection.receive()?;
    Ok((connection, answer))
}
