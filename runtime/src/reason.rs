//! One closed word for why something happened, used alike as condition reason, event reason and metric label.

use std::fmt;

/// A reason in CamelCase, as Kubernetes wants it for conditions and events (`^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$`).
///
/// It can only be made from a constant, so the set of metric label values stays closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reason(&'static str);

impl Reason {
    /// Takes a CamelCase word; anything else does not compile when called in a constant.
    #[must_use]
    pub const fn new(word: &'static str) -> Self {
        let bytes = word.as_bytes();
        assert!(!bytes.is_empty() && bytes[0].is_ascii_uppercase(), "a reason starts with an upper-case letter");
        let mut i = 0;
        while i < bytes.len() {
            assert!(bytes[i].is_ascii_alphanumeric(), "a reason has letters and digits only");
            i += 1;
        }
        Self(word)
    }

    /// The word.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        self.0
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}
