//! The keys and records of Cilium's etcd layout (1.20.1), as pure functions: text and JSON on one side, types on the other.
//!
//! Records are read leniently (fields of other releases are ignored, both forms of a CIDR are taken) and written exactly
//! as Cilium's Go encoder writes them: same names, same order, same `null`s.

mod cluster_config;
mod fields;
mod ip;
pub mod keys;
mod node;

pub use cluster_config::{Capabilities, ClusterConfig, EndpointSlicesExportMode};
pub use fields::RecordError;
pub use ip::{IpRecord, NamedPort};
pub use keys::{IpTarget, KeyError, Synced};
pub use node::{NodeRecord, SOURCE_CUSTOM_RESOURCE, SOURCE_LOCAL};

use jiff::Timestamp;

use crate::identity::IdentityId;

/// The value of heartbeats and of canaries: RFC 3339, in UTC, to the second.
#[must_use]
pub fn timestamp_value(now: Timestamp) -> String {
    now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// Reads the value of an identity's reference key: the identity in decimal digits.
///
/// # Errors
/// [`RecordError`] for anything else.
pub fn parse_identity_value(value: &[u8]) -> Result<IdentityId, RecordError> {
    let text = fields::text("identity reference", value)?;
    text.parse().map_err(|error: crate::identity::IdentityError| RecordError::new("value", error))
}

/// Reads the value of an identity's master key: the canonical text of its labels.
///
/// # Errors
/// [`RecordError`] for anything else.
pub fn parse_identity_labels(value: &[u8]) -> Result<crate::labels::Labels, RecordError> {
    let text = fields::text("identity", value)?;
    crate::labels::Labels::parse_canonical(text).map_err(|error| RecordError::new("value", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_have_whole_seconds() {
        let now: Timestamp = "2026-03-01T12:34:56.789Z".parse().unwrap();
        assert_eq!(timestamp_value(now), "2026-03-01T12:34:56Z");
    }

    #[test]
    fn identity_values_are_checked() {
        assert_eq!(parse_identity_value(b"196915"), Ok(IdentityId::new(196_915)));
        assert_eq!(
            parse_identity_value(b"12x").unwrap_err().to_string(),
            "value: \"12x\" is not a numeric identity: a decimal number below 2^32 is wanted"
        );
        assert_eq!(parse_identity_labels(b"k8s:a=b;").unwrap().canonical(), "k8s:a=b;");
        assert_eq!(parse_identity_labels(b"\xff").unwrap_err().to_string(), "identity: the value is not UTF-8");
    }
}
