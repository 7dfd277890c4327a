//! Errors of the plugin, with the codes that the CNI specification gives them ("Error", well-known codes).

use serde::Serialize;

use crate::{api::AgentError, version::Version};

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum PluginError {
    /// `cniVersion` is none of ours, or older than the command.
    #[error("{0}")]
    IncompatibleVersion(String),
    /// The configuration asks for something that Basal does not do.
    #[error("unsupported field {field}: {why}")]
    UnsupportedField {
        /// The field, as a path.
        field: String,
        /// What to do instead.
        why: String,
    },
    /// The attachment is not known.
    #[error("{0}")]
    UnknownContainer(String),
    /// An environment variable is missing or wrong.
    #[error("environment variable {variable}: {why}")]
    Environment {
        /// Its name.
        variable: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// A file or a stream failed.
    #[error("{what}: {source}")]
    Io {
        /// What was read or written.
        what: String,
        /// The error of the system.
        source: std::io::Error,
    },
    /// The network configuration is no JSON.
    #[error("network configuration on stdin: {0}")]
    Decode(String),
    /// A field of the network configuration is missing or wrong.
    #[error("network configuration, field {field}: {why}")]
    Config {
        /// The field, as a path.
        field: String,
        /// What is wrong with it.
        why: String,
    },
    /// The same call may succeed later.
    #[error("{0}")]
    TryAgain(String),
    /// The agent is not ready for new pods.
    #[error("{0}")]
    NotAvailable(String),
    /// CHECK found something missing or changed.
    #[error("{0}")]
    Damaged(String),
    /// The agent failed at a step.
    #[error("{0}")]
    Agent(String),
}

impl PluginError {
    /// The code of the CNI specification; from 100 on they are the plugin's own.
    #[must_use]
    pub fn code(&self) -> u32 {
        match self {
            Self::IncompatibleVersion(_) => 1,
            Self::UnsupportedField { .. } => 2,
            Self::UnknownContainer(_) => 3,
            Self::Environment { .. } => 4,
            Self::Io { .. } => 5,
            Self::Decode(_) => 6,
            Self::Config { .. } => 7,
            Self::TryAgain(_) => 11,
            Self::NotAvailable(_) => 50,
            Self::Damaged(_) => 100,
            Self::Agent(_) => 101,
        }
    }

    /// The error as the runtime reads it from standard output.
    #[must_use]
    pub fn to_json(&self, version: Version) -> String {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Wire<'a> {
            cni_version: &'a str,
            code: u32,
            msg: String,
        }
        let wire = Wire { cni_version: version.as_str(), code: self.code(), msg: self.to_string() };
        // A struct of two texts and a number always serialises.
        serde_json::to_string(&wire).unwrap_or_default()
    }
}

impl From<AgentError> for PluginError {
    fn from(error: AgentError) -> Self {
        match error {
            AgentError::TryAgain { message } => Self::TryAgain(message),
            AgentError::NotReady { message } => Self::NotAvailable(message),
            AgentError::Invalid { field, message } => Self::Config { field, why: message },
            AgentError::UnknownAttachment { message } => Self::UnknownContainer(message),
            AgentError::Damaged { message } => Self::Damaged(message),
            AgentError::ApiVersion { supported, asked } => Self::TryAgain(format!(
                "the agent speaks version {supported} of the socket's API and this plugin {asked}: an upgrade is under way"
            )),
            AgentError::Failed { message } => Self::Agent(message),
        }
    }
}
