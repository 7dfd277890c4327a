//! Names of network devices: the fixed ones, and which names Basal owns; and the group that it owns.

use std::{fmt, str::FromStr};

/// Device with the router addresses; routes to pods point at it.
pub const HOST_DEVICE: &str = "cilium_host";
/// The other end of `cilium_host`.
pub const NET_DEVICE: &str = "cilium_net";
/// The tunnel device.
pub const VXLAN_DEVICE: &str = "cilium_vxlan";
/// What the host side of an endpoint's device pair starts with; 12 hexadecimal digits follow.
pub const ENDPOINT_PREFIX: &str = "lxc";

/// The group of devices (`ip link show group`) that devices are put into to be removed together: "basl". What a crash leaves
/// in it works as before, and goes with the next comparison.
pub const REMOVAL_GROUP: u32 = 0x6261_736c;

/// A name that the kernel takes for a device (dev_valid_name in net/core/dev.c): 1 to 15 bytes, not `.` or `..`, no
/// slash, colon or white space.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IfName(String);

/// The text is no device name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a device name: it takes 1 to 15 bytes without '/', ':' and white space, other than '.' and '..'")]
pub struct IfNameError(String);

impl IfName {
    /// Takes a name.
    ///
    /// # Errors
    /// When the kernel would refuse it.
    pub fn new(name: impl Into<String>) -> Result<Self, IfNameError> {
        let name = name.into();
        let fits = (1..=15).contains(&name.len()) && name != "." && name != "..";
        let clean = name.bytes().all(|b| b != b'/' && b != b':' && b != 0 && !b.is_ascii_whitespace() && b != 0x0b);
        if fits && clean { Ok(Self(name)) } else { Err(IfNameError(name)) }
    }

    /// `cilium_host`
    #[must_use]
    pub fn host() -> Self {
        Self(HOST_DEVICE.to_owned())
    }

    /// `cilium_net`
    #[must_use]
    pub fn net() -> Self {
        Self(NET_DEVICE.to_owned())
    }

    /// `cilium_vxlan`
    #[must_use]
    pub fn vxlan() -> Self {
        Self(VXLAN_DEVICE.to_owned())
    }

    /// Stands for a device that is gone while something of it is left. No device of ours has this name.
    #[must_use]
    pub fn gone() -> Self {
        Self("(gone)".to_owned())
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// True for the host side of an endpoint's device pair, by its name.
    #[must_use]
    pub fn is_endpoint(&self) -> bool {
        self.0
            .strip_prefix(ENDPOINT_PREFIX)
            .is_some_and(|digits| digits.len() == 12 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
    }

    /// True for devices that Basal makes and removes.
    #[must_use]
    pub fn is_managed(&self) -> bool {
        matches!(self.as_str(), HOST_DEVICE | NET_DEVICE | VXLAN_DEVICE) || self.is_endpoint()
    }
}

impl fmt::Display for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for IfName {
    type Err = IfNameError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::new(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_the_kernel_refuses_are_refused() {
        for bad in ["", ".", "..", "a/b", "a:b", "a b", "sixteen-bytes-xx", "tab\t"] {
            assert!(IfName::new(bad).is_err(), "{bad:?}");
        }
        assert!(IfName::new("fifteen-bytes-x").is_ok());
    }

    #[test]
    fn only_our_own_names_are_managed() {
        for ours in ["cilium_host", "cilium_net", "cilium_vxlan", "lxc3a6f7d4e8c73"] {
            assert!(IfName::new(ours).unwrap().is_managed(), "{ours}");
        }
        for other in ["eth0", "lxc_health", "lxc3a6f7d4e8c7", "lxc3a6f7d4e8cXY", "cilium_wg0", "lxcbr0"] {
            assert!(!IfName::new(other).unwrap().is_managed(), "{other}");
        }
    }
}
