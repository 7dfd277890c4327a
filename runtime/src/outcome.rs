//! What the caller of a write knows afterwards.

/// The answer to a write at a port.
///
/// `Unknown` is the case that other code bases lose: the request left and no answer came, so the write may or may
/// not have happened. Only a later read tells; until then a caller must assume both.
#[must_use = "a write that was refused or is unknown must be handled"]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome<T, R> {
    /// The write took effect.
    Done(T),
    /// The write did not take effect, and the server said why.
    Refused(R),
    /// The write may have taken effect. The text says what was lost (a time-out, a broken connection).
    Unknown(String),
}

impl<T, R> Outcome<T, R> {
    /// Turns the value of `Done` into another.
    pub fn map<U>(self, f: impl FnOnce(T) -> U) -> Outcome<U, R> {
        match self {
            Self::Done(value) => Outcome::Done(f(value)),
            Self::Refused(refusal) => Outcome::Refused(refusal),
            Self::Unknown(why) => Outcome::Unknown(why),
        }
    }

    /// True for [`Outcome::Done`].
    pub fn is_done(&self) -> bool {
        matches!(self, Self::Done(_))
    }

    /// True for [`Outcome::Unknown`].
    pub fn is_unknown(&self) -> bool {
        matches!(self, Self::Unknown(_))
    }
}
