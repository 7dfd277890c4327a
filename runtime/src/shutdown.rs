//! The end of a process in two phases: the first signal asks for an orderly end, the second for an immediate one.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::env::Env;

/// The two phases, as tokens that tasks wait for.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    /// Cancelled by the first SIGTERM or SIGINT: take no new work, finish what is under way, release the Lease.
    pub drain: CancellationToken,
    /// Cancelled by the second one: end now.
    pub abort: CancellationToken,
}

/// A signal could not be listened to.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen to the signal {signal}: {cause}")]
pub struct SignalError {
    signal: &'static str,
    #[source]
    cause: io::Error,
}

impl Shutdown {
    /// Listens to SIGTERM and SIGINT from now on.
    ///
    /// # Errors
    /// The process may not listen to signals.
    pub fn on_signals(env: &dyn Env) -> Result<Self, SignalError> {
        let listen = |kind, name| signal(kind).map_err(|cause| SignalError { signal: name, cause });
        let mut term = listen(SignalKind::terminate(), "SIGTERM")?;
        let mut int = listen(SignalKind::interrupt(), "SIGINT")?;
        let shutdown = Self::default();
        let told = shutdown.clone();
        env.spawn(
            "signals",
            Box::pin(async move {
                let first = either(&mut term, &mut int).await;
                info!(signal = first, "ending; a second signal ends at once");
                told.drain.cancel();
                let second = either(&mut term, &mut int).await;
                warn!(signal = second, "ending at once");
                told.abort.cancel();
            }),
        );
        Ok(shutdown)
    }
}

async fn either(term: &mut Signal, int: &mut Signal) -> &'static str {
    use futures::{FutureExt, pin_mut, select_biased};
    let (term, int) = (term.recv().fuse(), int.recv().fuse());
    pin_mut!(term, int);
    select_biased! { _ = term => "SIGTERM", _ = int => "SIGINT" }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::env::SystemEnv;

    /// Sends the signal to this test process, which nextest and cargo run with the handler installed before.
    fn raise(signal: &str) {
        let status = Command::new("kill").args([signal, &std::process::id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    #[tokio::test]
    async fn the_first_signal_drains_and_the_second_aborts() {
        let shutdown = Shutdown::on_signals(&SystemEnv).unwrap();
        raise("-TERM");
        shutdown.drain.cancelled().await;
        assert!(!shutdown.abort.is_cancelled());
        raise("-INT");
        shutdown.abort.cancelled().await;
    }
}
