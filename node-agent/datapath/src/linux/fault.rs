//! Why a change did not happen, before the change itself is named.

use std::{fmt::Display, io, path::Path};

use basal_runtime::outcome::Outcome;
use nix::errno::Errno;

use crate::{kernel::OpError, names::IfName, op::Op, program::ProgramHash, rows::MapId};

/// A change that did not happen, or of which nobody knows.
#[derive(Debug)]
pub(super) enum Fault {
    /// The kernel, or a command that speaks for it, refused.
    Refused(String),
    /// There is no such device.
    NoLink(IfName),
    /// The pod's namespace cannot be entered.
    NoNetns { path: String, message: String },
    /// The kernel's verifier refused a program.
    ProgramRefused { program: &'static str, message: String },
    /// There are no programs in this binary.
    NoObject,
    /// The set is not loaded.
    NotLoaded(ProgramHash),
    /// The map is full.
    MapFull(MapId),
    /// The request left and no answer came.
    Lost(String),
}

impl Fault {
    /// A refusal at a thing.
    pub(super) fn at(what: impl Display, error: impl Display) -> Self {
        Self::Refused(format!("{what}: {error}"))
    }

    /// A refusal at a path.
    pub(super) fn path(path: &Path, error: impl Display) -> Self {
        Self::at(path.display(), error)
    }

    /// What the port answers.
    pub(super) fn answer(self, op: &Op) -> Outcome<(), OpError> {
        let op = op.to_string();
        Outcome::Refused(match self {
            Self::Lost(message) => return Outcome::Unknown(format!("{op}: {message}")),
            Self::Refused(message) => OpError::Refused { op, message },
            Self::NoLink(link) => OpError::NoLink { op, link },
            Self::NoNetns { path, message } => OpError::NoNetns { op, path, message },
            Self::ProgramRefused { program, message } => OpError::ProgramRefused { op, program, message },
            Self::NoObject => OpError::NoObject { op },
            Self::NotLoaded(hash) => OpError::NotLoaded { op, hash: hash.to_string() },
            Self::MapFull(map) => OpError::MapFull { op, map: map.spec().name, max: map.spec().max_entries },
        })
    }
}

impl From<rtnetlink::Error> for Fault {
    fn from(error: rtnetlink::Error) -> Self {
        match &error {
            rtnetlink::Error::NetlinkError(message) => Self::Refused(message.to_io().to_string()),
            rtnetlink::Error::RequestFailed => Self::Lost("the netlink connection broke".to_owned()),
            _ => Self::Refused(error.to_string()),
        }
    }
}

/// True when netlink refused with this errno.
pub(super) fn is_errno(error: &rtnetlink::Error, errno: Errno) -> bool {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io().raw_os_error() == Some(errno as i32),
        _ => false,
    }
}

/// A netlink error as an [`io::Error`], for reads.
pub(super) fn to_io(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}
