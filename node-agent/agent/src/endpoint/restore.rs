//! What a start finds of endpoints: records in the journal, interfaces and map rows in the kernel.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use basal_datapath::{
    kernel::Observed,
    names::{IfName, IfNameError},
    plan::{Endpoint, NodePlan},
    rows::MapId,
    state::{PodAddress, PodSide},
};
use basal_maps::endpoint::{EndpointInfo, EndpointKey};
use zerocopy::FromBytes as _;

use super::{
    record::{Addresses, EndpointId, Phase},
    state::{Slot, by_family},
};
use crate::{
    journal::{Entry, JournalKey},
    mac::MacAddr,
};

/// An endpoint as the maps show it, for one whose record cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// Its number.
    pub id: EndpointId,
    /// Its addresses.
    pub addresses: Addresses,
    /// The hardware address inside the container.
    pub mac: MacAddr,
    /// The hardware address on the host.
    pub host_mac: MacAddr,
    /// Its identity.
    pub identity: u32,
}

/// The endpoint that `cilium_lxc` shows for an interface; `None` when the interface or its rows are gone.
#[must_use]
pub fn shown(observed: &Observed, interface: &str) -> Option<Shown> {
    let name = IfName::new(interface).ok()?;
    let index = observed.devices.get(&name)?.index;
    let mut addresses: Vec<IpAddr> = Vec::new();
    let mut found = None;
    for (key, value) in observed.state.maps.get(&MapId::Endpoints)? {
        let key = EndpointKey::read_from_bytes(key).ok()?;
        let info = EndpointInfo::read_from_bytes(value).ok()?;
        if info.ifindex == index && !info.is_host() {
            addresses.extend(key.ip.to_ip(key.family));
            found = Some(info);
        }
    }
    let info = found?;
    Some(Shown {
        id: EndpointId::new(info.lxc_id).ok()?,
        addresses: by_family(addresses),
        mac: MacAddr(info.mac.octets),
        host_mac: MacAddr(info.node_mac.octets),
        identity: info.sec_id,
    })
}

/// The endpoint, as the datapath wants it. Its interface exists, so how it would be made does not matter.
///
/// # Errors
/// The interface's name is none.
pub fn endpoint(key: &JournalKey, shown: &Shown, node: &NodePlan) -> Result<Endpoint, IfNameError> {
    let address = |ip| Some(PodAddress { ip, gateway: node.routers.for_family_of(ip)? });
    Ok(Endpoint {
        link: IfName::new(key.as_str())?,
        pod: PodSide {
            netns: PathBuf::new(),
            name: IfName::new("eth0")?,
            mac: shown.mac.0,
            host_mac: shown.host_mac.0,
            addresses: shown.addresses.iter().filter_map(address).collect(),
            route_mtu: node.route_mtu(),
        },
        identity: shown.identity,
    })
}

/// What becomes of what a start finds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Restored {
    /// Endpoints that live on.
    pub kept: BTreeMap<JournalKey, Slot>,
    /// Endpoints that are removed: ADDs whose result nobody waits for, DELs that were not finished, and all from before
    /// the machine was started.
    pub removed: BTreeMap<JournalKey, Slot>,
    /// Endpoints whose records cannot be read, as the kernel shows them; they are kept until DEL or GC.
    pub unreadable: BTreeMap<JournalKey, (Slot, Shown)>,
    /// Records that cannot be read and have nothing in the kernel: there is nothing to keep.
    pub void: Vec<JournalKey>,
}

/// Sorts what a start finds.
#[must_use]
pub fn sort(entries: BTreeMap<JournalKey, Entry>, observed: &Observed, boot_id: &str) -> Restored {
    let mut restored = Restored::default();
    for (key, entry) in entries {
        match entry {
            Ok(record) => {
                let interface = IfName::new(record.host_interface()).ok();
                let connected = interface.is_some_and(|name| observed.devices.contains_key(&name));
                let keep = record.phase == Phase::Committed && record.boot_id == boot_id;
                let slot = Slot {
                    id: record.id,
                    addresses: record.addresses,
                    journal: Some(record.phase),
                    connected,
                    announced: false,
                    reference: None,
                    record: Some(record),
                };
                if keep { &mut restored.kept } else { &mut restored.removed }.insert(key, slot);
            }
            Err(why) => {
                tracing::warn!(%key, %why, "the record of an endpoint cannot be used");
                match shown(observed, key.as_str()) {
                    Some(shown) => {
                        let slot = Slot {
                            id: shown.id,
                            addresses: shown.addresses,
                            record: None,
                            journal: Some(Phase::Committed),
                            connected: true,
                            announced: false,
                            reference: None,
                        };
                        restored.unreadable.insert(key, (slot, shown));
                    }
                    None => restored.void.push(key),
                }
            }
        }
    }
    restored
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeSet;

    use basal_cni::api::Attachment;
    use basal_crds::identity::IdentityId;
    use basal_datapath::{kernel::Device, rows};
    use basal_maps::addr::Mac64;

    use super::*;
    use crate::{endpoint::record::EndpointRecord, journal::Unusable};

    /// A record of container `c<n>`.
    pub(in crate::endpoint) fn record(n: u16, phase: Phase, boot_id: &str) -> EndpointRecord {
        EndpointRecord {
            id: EndpointId::new(n).unwrap(),
            attachment: Attachment { container_id: format!("c{n}"), ifname: "eth0".into() },
            pod: None,
            netns: "/run/netns/x".into(),
            addresses: Addresses { v4: format!("10.0.0.{n}").parse().ok(), v6: None },
            mac: MacAddr([2, 0, 0, 0, 0, 1]),
            host_mac: MacAddr([2, 0, 0, 0, 0, 2]),
            identity: IdentityId::INIT,
            labels: String::new(),
            phase,
            boot_id: boot_id.into(),
        }
    }

    fn key(n: u16) -> JournalKey {
        JournalKey::of(&record(n, Phase::Adding, "").attachment)
    }

    /// A kernel with the interface and rows of one endpoint.
    fn observed(n: u16) -> Observed {
        let mut observed = Observed::default();
        let name = IfName::new(key(n).as_str()).unwrap();
        observed.devices.insert(name, Device { index: 77, ..Device::default() });
        let info = EndpointInfo {
            ifindex: 77,
            lxc_id: n,
            mac: Mac64::from([2, 0, 0, 0, 0, 1]),
            node_mac: Mac64::from([2, 0, 0, 0, 0, 2]),
            sec_id: 300,
            ..EndpointInfo::default()
        };
        for ip in [format!("10.0.0.{n}"), format!("fd00::{n}")] {
            rows::endpoint(ip.parse().unwrap(), &info).insert_into(&mut observed.state.maps);
        }
        rows::host("10.0.0.1".parse().unwrap()).insert_into(&mut observed.state.maps);
        observed
    }

    #[test]
    fn only_what_was_committed_in_this_boot_is_kept() {
        let entries = BTreeMap::from([
            (key(5), Ok(record(5, Phase::Committed, "b1"))),
            (key(6), Ok(record(6, Phase::Committed, "b0"))),
            (key(7), Ok(record(7, Phase::Adding, "b1"))),
            (key(8), Ok(record(8, Phase::Removing, "b1"))),
        ]);
        let restored = sort(entries, &observed(5), "b1");
        assert_eq!(restored.kept.keys().collect::<Vec<_>>(), [&key(5)]);
        assert!(restored.kept[&key(5)].connected);
        let removed: BTreeSet<_> = restored.removed.keys().cloned().collect();
        assert_eq!(removed, BTreeSet::from([key(6), key(7), key(8)]));
    }

    #[test]
    fn an_unreadable_record_is_completed_from_the_kernel() {
        let newer = || Err(Unusable::Newer { found: 2, known: 1 });
        let restored = sort(BTreeMap::from([(key(5), newer()), (key(6), newer())]), &observed(5), "b1");
        let (slot, shown) = &restored.unreadable[&key(5)];
        assert_eq!(slot.addresses, Addresses { v4: "10.0.0.5".parse().ok(), v6: "fd00::5".parse().ok() });
        assert_eq!((shown.id.get(), shown.identity, shown.mac), (5, 300, MacAddr([2, 0, 0, 0, 0, 1])));
        assert_eq!(restored.void, [key(6)]);
    }
}
