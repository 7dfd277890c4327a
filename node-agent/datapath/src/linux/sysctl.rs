//! Kernel parameters, by file.

use std::{fs, io, path::Path};

use super::fault::Fault;
use crate::{
    kernel::ReadError,
    plan::DEVICE_SYSCTLS_IPV4,
    state::{NodeState, SysctlKey},
};

/// The parameters that are not per device and that Basal may set.
const GLOBAL: [&str; 4] = [
    "net/ipv4/ip_forward",
    "net/ipv4/conf/all/rp_filter",
    "net/ipv6/conf/all/disable_ipv6",
    "net/ipv6/conf/all/forwarding",
];

pub(super) fn write(root: &Path, key: &SysctlKey, value: &str) -> Result<(), Fault> {
    let path = root.join(key.path());
    fs::write(&path, value).map_err(|error| Fault::path(&path, error))
}

/// Reads every parameter that Basal may set, of the devices that were found. A parameter that this kernel does not have
/// (IPv6 may be missing) is not in the state.
pub(super) fn read(root: &Path, state: &mut NodeState) -> Result<(), ReadError> {
    let mut keys: Vec<SysctlKey> = GLOBAL.into_iter().map(SysctlKey::global).collect();
    for name in state.links.keys() {
        if name.is_endpoint() {
            keys.push(SysctlKey::device("ipv4", name, "rp_filter"));
        } else {
            keys.extend(DEVICE_SYSCTLS_IPV4.iter().map(|(key, _)| SysctlKey::device("ipv4", name, key)));
            keys.push(SysctlKey::device("ipv6", name, "forwarding"));
        }
    }
    for key in keys {
        let path = root.join(key.path());
        match fs::read_to_string(&path) {
            Ok(value) => {
                state.sysctls.insert(key, value.trim_end().to_owned());
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(ReadError::new(path.display().to_string(), error)),
        }
    }
    Ok(())
}
