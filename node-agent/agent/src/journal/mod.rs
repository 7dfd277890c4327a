//! The port to the agent's memory on disk: one record for each endpoint.

pub mod codec;
pub mod file;

use std::{collections::BTreeMap, fmt};

use async_trait::async_trait;
use basal_cni::api::Attachment;
use basal_runtime::outcome::Outcome;

use crate::endpoint::record::EndpointRecord;

/// The name of a record: the endpoint's interface on the host, which its attachment determines.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct JournalKey(String);

impl JournalKey {
    /// The name of an attachment's record.
    #[must_use]
    pub fn of(attachment: &Attachment) -> Self {
        Self(attachment.host_interface())
    }

    /// Takes a name that was found on disk.
    #[must_use]
    pub fn found(name: &str) -> Self {
        Self(name.to_owned())
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for JournalKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A record that cannot be used. Its endpoint may well be running: what it holds must not be given to another.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// A newer agent wrote it.
    #[error("version {found} is newer than the {known} that this agent reads; was the agent downgraded?")]
    Newer {
        /// What it says.
        found: u32,
        /// What is read.
        known: u32,
    },
    /// It was cut off or changed.
    #[error("the checksum does not fit; the file was cut off or changed")]
    Checksum,
    /// It cannot be read or parsed.
    #[error("it cannot be read: {0}")]
    Unreadable(String),
}

/// What the journal holds under a name.
pub type Entry = Result<EndpointRecord, Unusable>;

/// Why the journal did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("journal {path}: {why}; endpoints cannot be added until it can be written")]
pub struct JournalError {
    /// The folder or file.
    pub path: String,
    /// What the system said.
    pub why: String,
}

/// The agent's memory on disk. What was answered `Done` outlives a crash of the machine.
#[async_trait]
pub trait Journal: Send + Sync + 'static {
    /// Reads everything.
    ///
    /// # Errors
    /// The whole cannot be read; a single record that cannot is an entry.
    async fn load(&self) -> Result<BTreeMap<JournalKey, Entry>, JournalError>;

    /// Writes one record, in the place of an older one.
    async fn put(&self, record: &EndpointRecord) -> Outcome<(), JournalError>;

    /// Deletes one record. One that does not exist is `Done`.
    async fn remove(&self, key: &JournalKey) -> Outcome<(), JournalError>;
}
