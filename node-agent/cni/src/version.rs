//! Versions of the CNI specification.

use crate::error::PluginError;

/// A version of the CNI specification that the plugin speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// 0.1.0: also what a configuration without `cniVersion` means.
    V0_1_0,
    /// 0.2.0
    V0_2_0,
    /// 0.3.0: results list interfaces.
    V0_3_0,
    /// 0.3.1
    V0_3_1,
    /// 0.4.0: CHECK.
    V0_4_0,
    /// 1.0.0: addresses no longer name their IP version.
    V1_0_0,
    /// 1.1.0: STATUS and GC; MTU in interfaces and routes.
    V1_1_0,
}

impl Version {
    /// All, oldest first.
    pub const ALL: [Self; 7] =
        [Self::V0_1_0, Self::V0_2_0, Self::V0_3_0, Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];

    /// The newest.
    pub const NEWEST: Self = Self::V1_1_0;

    /// As it stands in `cniVersion`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V0_1_0 => "0.1.0",
            Self::V0_2_0 => "0.2.0",
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// Reads `cniVersion`; an empty one is 0.1.0.
    ///
    /// # Errors
    /// `IncompatibleVersion` with the list of those that are spoken.
    pub fn parse(text: &str) -> Result<Self, PluginError> {
        if text.is_empty() {
            return Ok(Self::V0_1_0);
        }
        Self::ALL.into_iter().find(|version| version.as_str() == text).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|version| version.as_str()).collect();
            PluginError::IncompatibleVersion(format!(
                "network configuration, field cniVersion: {text:?} is not supported; use one of {}",
                known.join(", ")
            ))
        })
    }
}
