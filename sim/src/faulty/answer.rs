//! What a call can answer, beside what the server says: the same for both ports.

use std::fmt::Display;

use basal_runtime::outcome::Outcome;

/// The answer of a call.
pub(super) trait Answer: Send + 'static {
    /// The request or its answer got lost.
    fn lost() -> Self;
    /// The server did not take the request.
    fn unavailable() -> Self;
    /// The server asks for a pause.
    fn throttled() -> Self;
    /// The server says that what the request was made from changed; `None` for a request that it cannot say that of.
    fn conflict() -> Option<Self>
    where
        Self: Sized,
    {
        None
    }
    /// For the trace.
    fn text(&self) -> String;
}

/// What a call tells in the trace when it is done.
pub(super) trait Told: Send + 'static {
    fn told(&self) -> String;
}

impl Told for () {
    fn told(&self) -> String {
        "done".to_owned()
    }
}

/// What a port answers to a call that was not carried out.
pub(super) trait NotDone: Display + Send + 'static {
    /// The server was not reached, or did not take it.
    fn unavailable(why: &str) -> Self;
    /// The server asks for a pause.
    fn throttled() -> Self;
    /// The server says that what the request was made from changed, where it can.
    fn conflict() -> Option<Self>
    where
        Self: Sized,
    {
        None
    }
}

/// A read that got lost and one that was not taken look alike.
impl<T: Told, E: NotDone> Answer for Result<T, E> {
    fn lost() -> Self {
        Self::unavailable()
    }

    fn unavailable() -> Self {
        Err(E::unavailable("lost on the way"))
    }

    fn throttled() -> Self {
        Err(E::throttled())
    }

    fn text(&self) -> String {
        match self {
            Ok(value) => value.told(),
            Err(error) => error.to_string(),
        }
    }
}

impl<T: Told, R: NotDone> Answer for Outcome<T, R> {
    fn lost() -> Self {
        Self::Unknown("lost on the way".to_owned())
    }

    fn unavailable() -> Self {
        Self::Refused(R::unavailable("not taken"))
    }

    fn throttled() -> Self {
        Self::Refused(R::throttled())
    }

    fn conflict() -> Option<Self> {
        R::conflict().map(Self::Refused)
    }

    fn text(&self) -> String {
        match self {
            Self::Done(value) => value.told(),
            Self::Refused(refusal) => format!("refused: {refusal}"),
            Self::Unknown(why) => format!("unknown: {why}"),
        }
    }
}
