//! The names that a claim carries.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};

/// The longest name of a node, in bytes: that of a DNS subdomain (RFC 1123).
const NODE_NAME_MAX: usize = 253;

/// Why a text is no name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// No RFC 1123 subdomain, which is what Kubernetes demands of a Node's name.
    #[error(
        "{0:?} is not a node name: a DNS subdomain is wanted (RFC 1123: at most 253 of a-z, 0-9, - and ., \
         each part begins and ends with a letter or digit)"
    )]
    Node(String),
    /// No uid.
    #[error("{0:?} is not a Node's metadata.uid: 1 to 128 printable ASCII characters")]
    Uid(String),
}

/// The name of a Kubernetes Node, of its CiliumNode, and of its record in etcd (RFC 1123 subdomain).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeName(Arc<str>);

impl NodeName {
    /// Checks a name.
    ///
    /// # Errors
    /// The text is no RFC 1123 subdomain.
    pub fn new(text: &str) -> Result<Self, NameError> {
        if text.len() <= NODE_NAME_MAX && text.split('.').all(is_dns_part) {
            Ok(Self(text.into()))
        } else {
            Err(NameError::Node(text.into()))
        }
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The `metadata.uid` of a Kubernetes Node: tells a Node from a later one of the same name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeUid(Arc<str>);

impl NodeUid {
    /// Checks a uid.
    ///
    /// # Errors
    /// The text is empty, too long, or holds characters that no uid has.
    pub fn new(text: &str) -> Result<Self, NameError> {
        if (1..=128).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic()) {
            Ok(Self(text.into()))
        } else {
            Err(NameError::Uid(text.into()))
        }
    }

    /// The uid.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What the id of a seal begins with.
const SEAL: &str = "sealed-";

/// The random id of a leader's term. Two terms never share one, so the fence's value tells whose term it is.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TermId(Arc<str>);

impl TermId {
    /// Makes an id of 128 random bits.
    #[must_use]
    pub fn from_random(high: u64, low: u64) -> Self {
        Self(format!("{high:016x}{low:016x}").into())
    }

    /// Makes the id of a term in which nothing is written, ever: as the fence of a ledger it seals it.
    #[must_use]
    pub fn seal(high: u64, low: u64) -> Self {
        Self(format!("{SEAL}{high:016x}{low:016x}").into())
    }

    /// Whether a fence that holds this text is a seal.
    #[must_use]
    pub fn is_seal(text: &str) -> bool {
        text.starts_with(SEAL)
    }

    /// The id: 32 hexadecimal digits, after `sealed-` that of a seal.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Whether a text is one part of a DNS name: `^([a-z0-9][-a-z0-9]*)?[a-z0-9]$`. Cilium's names of clusters are such parts, too.
#[must_use]
pub fn is_dns_part(part: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = part.as_bytes();
    bytes.first().copied().is_some_and(inner)
        && bytes.last().copied().is_some_and(inner)
        && bytes.iter().all(|&b| inner(b) || b == b'-')
}

macro_rules! text {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}
macro_rules! checked {
    ($name:ident) => {
        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                Self::new(&text)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0.as_ref().to_owned()
            }
        }
    };
}
text!(NodeName);
text!(NodeUid);
text!(TermId);
checked!(NodeName);
checked!(NodeUid);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_names_follow_rfc_1123() {
        for good in ["a", "node-1", "ip-10-0-0-1.eu.example.org", "1", "1.2.3", &"a".repeat(253)] {
            assert_eq!(NodeName::new(good).unwrap().as_str(), good);
        }
        for bad in ["", "-a", "a-", "A", "a/b", "a_b", ".a", "a.", "a..b", "a.-b", "a ", "ä", &"a".repeat(254)] {
            assert_eq!(NodeName::new(bad), Err(NameError::Node(bad.into())));
        }
    }

    #[test]
    fn names_are_checked_when_they_are_deserialised() {
        assert!(serde_json::from_str::<NodeName>("\"node-1\"").is_ok());
        let error = serde_json::from_str::<NodeName>("\"Node 1\"").unwrap_err().to_string();
        assert!(error.contains("\"Node 1\" is not a node name"), "{error}");
    }

    #[test]
    fn uids_are_short_and_printable() {
        let good = "6b1c0e4e-7f2c-4d39-9c2e-0e2f3d4c5b6a";
        assert_eq!(NodeUid::new(good).unwrap().as_str(), good);
        for bad in ["", "a b", "a\n", &"a".repeat(129)] {
            assert_eq!(NodeUid::new(bad), Err(NameError::Uid(bad.into())));
        }
    }

    #[test]
    fn a_term_id_keeps_all_its_bits() {
        let (term, seal) = (TermId::from_random(1, u64::MAX), TermId::seal(1, u64::MAX));
        assert_eq!(term.as_str(), "0000000000000001ffffffffffffffff");
        assert_eq!(seal.as_str(), "sealed-0000000000000001ffffffffffffffff");
        assert_eq!([&term, &seal].map(|id| TermId::is_seal(id.as_str())), [false, true]);
    }
}
