//! What a port promises, as cases that run against anything behind that port: the model, and the real server.
//!
//! Where the two differ, the real server is right and the model is mended. A case isolates itself by a prefix or a
//! namespace of its own, so one server takes a whole suite.

pub mod directory;
pub mod kv;
pub mod ledger;
pub mod objects;

use std::{fmt::Debug, time::Duration};

use basal_runtime::outcome::Outcome;
use futures::{Stream, StreamExt as _, future::BoxFuture};

/// How long a case waits for something that must come. Far more than any server needs; a model gets there at once.
const PATIENCE: Duration = Duration::from_secs(60);

/// Something behind a port does not do what the suite says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Departure(String);

/// What a case found.
pub type Verdict<T = ()> = Result<T, Departure>;

/// One promise, with the name that a report prints.
#[derive(Debug)]
pub struct Case<F> {
    /// The promise, in words joined by underscores.
    pub name: &'static str,
    run: for<'a> fn(&'a F) -> BoxFuture<'a, Verdict>,
}

impl<F> Case<F> {
    /// Tries it.
    ///
    /// # Errors
    /// The first thing that is not as promised.
    pub async fn run(&self, fixture: &F) -> Verdict {
        (self.run)(fixture).await
    }
}

/// Tries every case, each on a fixture of its own; answers one line for each broken promise.
pub async fn run_all<F>(cases: &[Case<F>], mut fixture: impl AsyncFnMut(&'static str) -> Verdict<F>) -> Vec<String> {
    let mut broken = Vec::new();
    for case in cases {
        let verdict = match fixture(case.name).await {
            Ok(fixture) => case.run(&fixture).await,
            Err(departure) => Err(departure),
        };
        if let Err(departure) = verdict {
            broken.push(format!("{}: {departure}", case.name));
        }
    }
    broken
}

/// Makes a list of cases from the names of functions.
macro_rules! cases {
    ($($name:ident),+ $(,)?) => {
        vec![$($crate::conformance::Case { name: stringify!($name), run: |fixture| Box::pin($name(fixture)) }),+]
    };
}
use cases;

fn same<A: PartialEq<B> + Debug, B: Debug>(what: &str, got: A, wanted: B) -> Verdict {
    if got == wanted { Ok(()) } else { Err(Departure(format!("{what}: got {got:?}, wanted {wanted:?}"))) }
}

fn holds(what: &str, condition: bool) -> Verdict {
    if condition { Ok(()) } else { Err(Departure(format!("not so: {what}"))) }
}

fn read<T, E: Debug>(what: &str, answer: Result<T, E>) -> Verdict<T> {
    answer.map_err(|error| Departure(format!("{what}: {error:?}")))
}

fn done<T, R: Debug>(what: &str, outcome: Outcome<T, R>) -> Verdict<T> {
    match outcome {
        Outcome::Done(value) => Ok(value),
        Outcome::Refused(refusal) => Err(Departure(format!("{what}: refused: {refusal:?}"))),
        Outcome::Unknown(why) => Err(Departure(format!("{what}: unknown: {why}"))),
    }
}

fn refused<T: Debug, R: Debug>(what: &str, outcome: Outcome<T, R>) -> Verdict<R> {
    match outcome {
        Outcome::Refused(refusal) => Ok(refusal),
        other => Err(Departure(format!("{what}: got {other:?}, wanted a refusal"))),
    }
}

async fn next<S: Stream + Unpin>(what: &str, stream: &mut S) -> Verdict<S::Item> {
    match tokio::time::timeout(PATIENCE, stream.next()).await {
        Ok(Some(item)) => Ok(item),
        Ok(None) => Err(Departure(format!("{what}: the stream ended"))),
        Err(_elapsed) => Err(Departure(format!("{what}: nothing came"))),
    }
}
