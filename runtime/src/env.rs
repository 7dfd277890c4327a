//! The port to the process's surroundings: wall clock, randomness, tasks. Monotonic time comes from `tokio::time`.

use std::{future::Future, pin::Pin, sync::Arc};

use jiff::Timestamp;
use tokio::sync::oneshot;

pub use seeded::SeededEnv;

mod seeded;

/// A future that a task runs.
pub type TaskFuture = Pin<Box<dyn Future<Output = ()> + Send + 'static>>;

/// What the daemons take from their surroundings beside the network.
///
/// Production code has [`SystemEnv`]; the simulator has one that is driven by a seed.
pub trait Env: Send + Sync + 'static {
    /// The wall clock. For texts and record fields only: decisions count on monotonic time.
    fn now(&self) -> Timestamp;

    /// A random number, uniformly over all values.
    fn random_u64(&self) -> u64;

    /// Starts a task. `name` is for logs and dumps. Dropping the handle lets the task run on.
    fn spawn(&self, name: &'static str, future: TaskFuture) -> TaskHandle;
}

/// An [`Env`] that is passed around.
pub type SharedEnv = Arc<dyn Env>;

/// A started task: tells when it ended, and can end it.
#[derive(Debug)]
pub struct TaskHandle {
    name: &'static str,
    ended: oneshot::Receiver<()>,
    abort: tokio::task::AbortHandle,
}

impl TaskHandle {
    /// The name that the task was started under.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Ends the task at its next await point.
    pub fn abort(&self) {
        self.abort.abort();
    }

    /// Waits until the task returned, panicked or was aborted.
    pub async fn join(self) {
        // An error means that the sender was dropped: the task is gone as well.
        self.ended.await.unwrap_or_default();
    }
}

/// Starts `future` on the current tokio runtime; for implementations of [`Env::spawn`].
#[expect(clippy::disallowed_methods, reason = "the one place that is allowed to start tasks")]
pub fn spawn_on_tokio(name: &'static str, future: TaskFuture) -> TaskHandle {
    let (done, ended) = oneshot::channel();
    let task = tokio::spawn(async move {
        future.await;
        // Nobody needs to wait for the end.
        done.send(()).unwrap_or_default();
    });
    TaskHandle { name, ended, abort: task.abort_handle() }
}

/// The surroundings of a real process.
#[derive(Debug, Default, Clone, Copy)]
pub struct SystemEnv;

impl Env for SystemEnv {
    #[expect(clippy::disallowed_methods, reason = "the one place that is allowed to read the wall clock")]
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    #[expect(clippy::disallowed_methods, reason = "the one place that is allowed to draw random numbers")]
    fn random_u64(&self) -> u64 {
        rand::random()
    }

    fn spawn(&self, name: &'static str, future: TaskFuture) -> TaskHandle {
        spawn_on_tokio(name, future)
    }
}
