//! Names and numbers of clusters, which come from outside: parsed once, valid ever after. Those of nodes are in
//! `basal_ipam::names`.

use std::{fmt, str::FromStr};

use basal_ipam::names::is_dns_part;
use serde::{Deserialize, Serialize};

/// The longest name of a cluster, in bytes.
const CLUSTER_NAME_MAX: usize = 32;
/// The cluster name that a cluster has which was given none. It names no cluster of a mesh.
const DEFAULT_CLUSTER_NAME: &str = "default";

/// Why a name or number is not acceptable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The cluster name breaks Cilium's rule.
    #[error(
        "{0:?} is not a cluster name: at most 32 of a-z, 0-9 and - are wanted, and neither the first nor the last may be -"
    )]
    Cluster(String),
    /// The cluster id is out of range.
    #[error("{0:?} is not a cluster id: a number from 0 to 255 is wanted")]
    ClusterId(String),
    /// A cluster with an id needs a name of its own.
    #[error(
        "the cluster has id {0} and the name \"default\": set cluster-name to a name that is unique in the mesh, or cluster-id to 0"
    )]
    DefaultNameWithId(ClusterId),
}

/// The name of a cluster, as Cilium's `cluster-name` has it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ClusterName(String);

impl ClusterName {
    /// Takes a name of at most 32 characters that matches `^([a-z0-9][-a-z0-9]*)?[a-z0-9]$`.
    ///
    /// # Errors
    /// [`NameError::Cluster`].
    pub fn new(name: impl Into<String>) -> Result<Self, NameError> {
        let name = name.into();
        if name.len() <= CLUSTER_NAME_MAX && is_dns_part(&name) {
            Ok(Self(name))
        } else {
            Err(NameError::Cluster(name))
        }
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for ClusterName {
    fn default() -> Self {
        Self(DEFAULT_CLUSTER_NAME.to_owned())
    }
}

/// The number of a cluster in a mesh, 0 to 255; 0 is a cluster that is in none. It stands in bits 16 to 23 of an identity.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ClusterId(u8);

impl ClusterId {
    /// Takes any number of 8 bits.
    #[must_use]
    pub const fn new(id: u8) -> Self {
        Self(id)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u8 {
        self.0
    }
}

impl TryFrom<u32> for ClusterId {
    type Error = NameError;

    fn try_from(id: u32) -> Result<Self, NameError> {
        u8::try_from(id).map(Self).map_err(|_error| NameError::ClusterId(id.to_string()))
    }
}

impl FromStr for ClusterId {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        text.parse().map(Self).map_err(|_error| NameError::ClusterId(text.to_owned()))
    }
}

/// Name and id of a cluster, which belong together.
#[derive(Debug, Default, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cluster {
    name: ClusterName,
    id: ClusterId,
}

impl Cluster {
    /// Takes a pair.
    ///
    /// # Errors
    /// [`NameError::DefaultNameWithId`]: a cluster with an id other than 0 is in a mesh, where "default" names nobody.
    pub fn new(name: ClusterName, id: ClusterId) -> Result<Self, NameError> {
        if id.get() != 0 && name.as_str() == DEFAULT_CLUSTER_NAME {
            return Err(NameError::DefaultNameWithId(id));
        }
        Ok(Self { name, id })
    }

    /// The name.
    #[must_use]
    pub fn name(&self) -> &ClusterName {
        &self.name
    }

    /// The id.
    #[must_use]
    pub fn id(&self) -> ClusterId {
        self.id
    }
}

impl fmt::Display for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for ClusterName {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        Self::new(text)
    }
}

impl From<ClusterName> for String {
    fn from(name: ClusterName) -> Self {
        name.0
    }
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cluster_names_follow_cilium() {
        for good in ["a", "0", "cluster-1", &"a".repeat(32)] {
            assert_eq!(ClusterName::new(good).unwrap().to_string(), good);
        }
        for bad in ["", "a.b", "-a", "a-", "A", "a b", &"a".repeat(33)] {
            assert_eq!(ClusterName::new(bad), Err(NameError::Cluster(bad.to_owned())));
        }
    }

    #[test]
    fn a_cluster_with_an_id_needs_a_name_of_its_own() {
        let named = ClusterName::new("west").unwrap();
        assert_eq!(Cluster::new(named, ClusterId::new(255)).unwrap().id().get(), 255);
        assert_eq!(Cluster::new(ClusterName::default(), ClusterId::new(0)).unwrap(), Cluster::default());
        assert_eq!(
            Cluster::new(ClusterName::default(), ClusterId::new(1)),
            Err(NameError::DefaultNameWithId(ClusterId::new(1)))
        );
    }

    #[test]
    fn cluster_ids_have_eight_bits() {
        assert_eq!("255".parse(), Ok(ClusterId::new(255)));
        assert_eq!(ClusterId::try_from(256), Err(NameError::ClusterId("256".to_owned())));
        assert_eq!("-1".parse::<ClusterId>(), Err(NameError::ClusterId("-1".to_owned())));
    }

    #[test]
    fn names_are_checked_when_they_are_deserialised() {
        assert!(serde_json::from_str::<ClusterName>("\"west\"").is_ok());
        let error = serde_json::from_str::<ClusterName>("\"The West\"").unwrap_err().to_string();
        assert!(error.contains("\"The West\" is not a cluster name"), "{error}");
    }
}
