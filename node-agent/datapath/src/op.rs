//! The changes that [`crate::diff::diff`] asks for and [`crate::kernel::Kernel::apply`] makes. Each is idempotent: applied
//! twice, it has the same effect as once.

use std::{collections::BTreeSet, fmt};

use crate::{
    forward::FilterTable,
    names::IfName,
    nft::NftTable,
    program::{ProgramHash, ProgramSet},
    rows::{MapId, Row, Rows},
    state::{Address, Hook, Link, Route, RouteKey, SysctlKey},
};

/// One change to the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Writes a kernel parameter.
    SetSysctl(SysctlKey, String),
    /// Makes a device, or brings MTU, state and flags of an existing one to what is given. A pair is made with its peer.
    SetLink(IfName, Link),
    /// Removes devices (and the other ends of pairs), together: the kernel waits until no CPU looks at them any more, for all
    /// of them once.
    DeleteLinks(BTreeSet<IfName>),
    /// Puts an address on a device.
    AddAddress(Address),
    /// Takes an address from a device.
    DeleteAddress(Address),
    /// Loads a program set: maps that fit are kept, others are made and filled from `rows` before anything runs on them.
    /// Nothing is attached.
    LoadPrograms {
        /// What it is loaded from; its hash follows from that.
        set: ProgramSet,
        /// Rows for maps that are made.
        rows: Rows,
    },
    /// Unpins a program set.
    UnloadPrograms(ProgramHash),
    /// Writes a map row.
    PutRow(Row),
    /// Deletes a map row.
    DeleteRow {
        /// The map.
        map: MapId,
        /// Key in the map's layout.
        key: Vec<u8>,
    },
    /// Attaches a program of a loaded set, or replaces the one that is there, atomically.
    Attach(Hook, ProgramHash),
    /// Detaches a program.
    Detach(Hook),
    /// Adds or replaces a route.
    SetRoute(RouteKey, Route),
    /// Removes a route.
    DeleteRoute(RouteKey),
    /// Replaces an nftables table as a whole, in one transaction.
    SetNft(String, NftTable),
    /// Removes an nftables table.
    DeleteNft(String),
    /// Replaces our rules in a table of iptables, in one transaction; none takes our chain away.
    SetForward(FilterTable, Vec<String>),
}

impl Op {
    /// A short word for the kind of change: metric label and log field.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::SetSysctl(..) => "set-sysctl",
            Self::SetLink(..) => "set-link",
            Self::DeleteLinks(..) => "delete-links",
            Self::AddAddress(..) => "add-address",
            Self::DeleteAddress(..) => "delete-address",
            Self::LoadPrograms { .. } => "load-programs",
            Self::UnloadPrograms(..) => "unload-programs",
            Self::PutRow(..) => "put-row",
            Self::DeleteRow { .. } => "delete-row",
            Self::Attach(..) => "attach",
            Self::Detach(..) => "detach",
            Self::SetRoute(..) => "set-route",
            Self::DeleteRoute(..) => "delete-route",
            Self::SetNft(..) => "set-nft",
            Self::DeleteNft(..) => "delete-nft",
            Self::SetForward(..) => "set-forward",
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind())?;
        match self {
            Self::SetSysctl(key, value) => write!(f, " {}={value}", key.path()),
            Self::SetLink(name, _) => write!(f, " {name}"),
            Self::DeleteLinks(names) => names.iter().try_for_each(|name| write!(f, " {name}")),
            Self::AddAddress(address) | Self::DeleteAddress(address) => {
                write!(f, " {} on {}", address.net, address.link)
            }
            Self::LoadPrograms { set, .. } => write!(f, " {}", set.hash()),
            Self::UnloadPrograms(hash) => write!(f, " {hash}"),
            Self::PutRow(row) => write!(f, " in {} of {} bytes", row.map.spec().name, row.value.len()),
            Self::DeleteRow { map, .. } => write!(f, " from {}", map.spec().name),
            Self::Attach(hook, _) | Self::Detach(hook) => write!(f, " {hook}"),
            Self::SetRoute(key, _) | Self::DeleteRoute(key) => write!(f, " {} dev {}", key.destination, key.link),
            Self::SetNft(name, _) | Self::DeleteNft(name) => write!(f, " inet {name}"),
            Self::SetForward(table, rules) => write!(f, " {} to {} rules", table.command(), rules.len()),
        }
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device { link, symbol } => write!(f, "{} on {link}", symbol.as_str()),
            Self::Endpoint { id, link } => write!(f, "{} on {link} of endpoint {id}", self.symbol().as_str()),
            Self::Policy { id } => write!(f, "{} of endpoint {id}", self.symbol().as_str()),
        }
    }
}
