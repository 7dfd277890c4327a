//! Devices and their addresses.

use std::net::IpAddr;

use basal_runtime::env::SharedEnv;
use futures::TryStreamExt as _;
use ipnet::IpNet;
use netlink_packet_route::{
    address::{AddressAttribute, AddressHeaderFlags, AddressMessage},
    link::{InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
};
use nix::errno::Errno;
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVxlan};

use super::{
    Paths,
    fault::{Fault, is_errno, to_io},
    pod,
};
use crate::{
    kernel::{Device, Observed, ReadError},
    names::{HOST_DEVICE, IfName, NET_DEVICE},
    state::{Address, Link, LinkKind},
};

/// Makes a device, or brings an existing one to what it should be.
pub(super) async fn set(
    netlink: &Handle,
    env: &SharedEnv,
    paths: &Paths,
    name: &IfName,
    link: &Link,
) -> Result<(), Fault> {
    if let LinkKind::Endpoint(Some(pod)) = &link.kind
        && !pod.netns.as_os_str().is_empty()
    {
        pod::make(netlink, env, paths, name, link, pod).await?;
    } else if index(netlink, name).await?.is_none() {
        let message = match &link.kind {
            LinkKind::Veth { peer } => LinkVeth::new(name.as_str(), peer.as_str()).build(),
            LinkKind::Vxlan { port } => LinkMessageBuilder::<LinkVxlan>::new(name.as_str())
                .collect_metadata(true)
                .learning(false)
                .port(*port)
                .build(),
            LinkKind::Endpoint(_) => return Err(Fault::NoLink(name.clone())),
            LinkKind::Other(kind) => return Err(Fault::at(name, format_args!("Basal makes no device of kind {kind}"))),
        };
        create(netlink, message).await?;
    }
    let index = index(netlink, name).await?.ok_or_else(|| Fault::NoLink(name.clone()))?;
    let mut change = LinkUnspec::new_with_index(index).mtu(link.mtu).arp(link.arp);
    change = if link.up { change.up() } else { change.down() };
    netlink.link().change(change.build()).execute().await?;
    Ok(())
}

/// Makes a device; one that is there already is no error.
async fn create(netlink: &Handle, message: LinkMessage) -> Result<(), Fault> {
    match netlink.link().add(message).execute().await {
        Err(error) if !is_errno(&error, Errno::EEXIST) => Err(error.into()),
        _ => Ok(()),
    }
}

/// Removes a device; one that is not there is no error.
pub(super) async fn delete(netlink: &Handle, name: &IfName) -> Result<(), Fault> {
    let Some(index) = index(netlink, name).await? else { return Ok(()) };
    match netlink.link().del(index).execute().await {
        Err(error) if !is_errno(&error, Errno::ENODEV) => Err(error.into()),
        _ => Ok(()),
    }
}

/// Interface index of a device; `None` when there is no such device.
pub(super) async fn index(netlink: &Handle, name: &IfName) -> Result<Option<u32>, Fault> {
    match netlink.link().get().match_name(name.as_str()).execute().try_next().await {
        Ok(link) => Ok(link.map(|link| link.header.index)),
        Err(error) if is_errno(&error, Errno::ENODEV) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

pub(super) async fn add_address(netlink: &Handle, address: &Address) -> Result<(), Fault> {
    let index = index(netlink, &address.link).await?.ok_or_else(|| Fault::NoLink(address.link.clone()))?;
    put_address(netlink, index, address.net).await
}

/// Puts an address on a device. IPv6 does not look for duplicates: these addresses are handed out, and a tentative one
/// cannot be used yet.
pub(super) async fn put_address(netlink: &Handle, index: u32, net: IpNet) -> Result<(), Fault> {
    let mut request = netlink.address().add(index, net.addr(), net.prefix_len()).replace();
    if net.addr().is_ipv6() {
        request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
    }
    request.execute().await?;
    Ok(())
}

pub(super) async fn delete_address(netlink: &Handle, address: &Address) -> Result<(), Fault> {
    let Some(index) = index(netlink, &address.link).await? else { return Ok(()) };
    let mut addresses = netlink.address().get().set_link_index_filter(index).execute();
    while let Some(message) = addresses.try_next().await? {
        if net_of(&message) == Some(address.net) {
            return match netlink.address().del(message).execute().await {
                Err(error) if !is_errno(&error, Errno::EADDRNOTAVAIL) => Err(error.into()),
                _ => Ok(()),
            };
        }
    }
    Ok(())
}

/// Reads one device with its addresses; `None` when there is none.
pub(super) async fn find(netlink: &Handle, name: &IfName) -> Result<Option<Device>, ReadError> {
    let failed = |error| ReadError::new(format!("device {name}"), to_io(error));
    let message = match netlink.link().get().match_name(name.as_str()).execute().try_next().await {
        Err(error) if is_errno(&error, Errno::ENODEV) => return Ok(None),
        found => found.map_err(failed)?,
    };
    let Some((_, mut found)) = message.as_ref().and_then(device) else { return Ok(None) };
    let mut addresses = netlink.address().get().set_link_index_filter(found.index).execute();
    while let Some(message) = addresses.try_next().await.map_err(failed)? {
        found.addresses.extend(net_of(&message));
    }
    Ok(Some(found))
}

/// Reads devices and addresses.
pub(super) async fn read(netlink: &Handle, observed: &mut Observed) -> Result<(), ReadError> {
    let mut messages = netlink.link().get().execute();
    while let Some(message) = messages.try_next().await.map_err(|error| ReadError::new("devices", to_io(error)))? {
        let Some((name, device)) = device(&message) else { continue };
        if name.is_managed() {
            observed.state.links.insert(name.clone(), state(&name, &device, &message));
        }
        observed.devices.insert(name, device);
    }

    let mut messages = netlink.address().get().execute();
    while let Some(message) = messages.try_next().await.map_err(|error| ReadError::new("addresses", to_io(error)))? {
        let holder = observed.devices.iter_mut().find(|(_, device)| device.index == message.header.index);
        let (Some((name, device)), Some(net)) = (holder, net_of(&message)) else { continue };
        device.addresses.push(net);
        let link_local = matches!(net.addr(), IpAddr::V6(ip) if ip.is_unicast_link_local());
        if name.is_managed() && !link_local {
            observed.state.addresses.insert(Address { link: name.clone(), net });
        }
    }
    Ok(())
}

/// The address itself; on point-to-point devices the other attribute is the peer's.
fn net_of(message: &AddressMessage) -> Option<IpNet> {
    let (mut local, mut address) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => address = Some(*ip),
            _ => {}
        }
    }
    IpNet::new(local.or(address)?, message.header.prefix_len).ok()
}

fn device(message: &LinkMessage) -> Option<(IfName, Device)> {
    let up = message.header.flags.contains(LinkFlags::Up);
    let mut device = Device { index: message.header.index, up, ..Device::default() };
    let mut name = None;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = IfName::new(text.clone()).ok(),
            LinkAttribute::Mtu(mtu) => device.mtu = *mtu,
            LinkAttribute::Link(index) => device.peer = Some(*index),
            LinkAttribute::Address(mac) => device.mac = mac.as_slice().try_into().ok(),
            LinkAttribute::LinkInfo(infos) => {
                device.kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    // Other kinds name the device below them there.
    device.peer = device.peer.filter(|_| device.kind.as_deref() == Some("veth"));
    Some((name?, device))
}

/// A device of ours as state.
fn state(name: &IfName, device: &Device, message: &LinkMessage) -> Link {
    let arp = !message.header.flags.contains(LinkFlags::Noarp);
    Link { kind: kind(name, message), mtu: device.mtu, up: device.up, arp }
}

fn kind(name: &IfName, message: &LinkMessage) -> LinkKind {
    let infos = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos.as_slice()),
        _ => None,
    });
    let infos = infos.unwrap_or_default();
    let found = infos.iter().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    });
    match found {
        Some(InfoKind::Veth) if name.is_endpoint() => LinkKind::Endpoint(None),
        // The peer's name is not in the message; a pair of ours is made with both names.
        Some(InfoKind::Veth) if name.as_str() == HOST_DEVICE => LinkKind::Veth { peer: IfName::net() },
        Some(InfoKind::Veth) if name.as_str() == NET_DEVICE => LinkKind::Veth { peer: IfName::host() },
        Some(InfoKind::Vxlan) => vxlan(infos).unwrap_or_else(|| LinkKind::Other("vxlan with an identifier".to_owned())),
        Some(other) => LinkKind::Other(other.to_string()),
        None => LinkKind::Other("physical".to_owned()),
    }
}

/// A VXLAN device that is external and does not learn.
fn vxlan(infos: &[LinkInfo]) -> Option<LinkKind> {
    let data = infos.iter().find_map(|info| match info {
        LinkInfo::Data(InfoData::Vxlan(data)) => Some(data),
        _ => None,
    })?;
    let external = data.iter().any(|item| matches!(item, InfoVxlan::CollectMetadata(true)));
    let learns = data.iter().any(|item| matches!(item, InfoVxlan::Learning(true)));
    let port = data.iter().find_map(|item| match item {
        InfoVxlan::Port(port) => Some(*port),
        _ => None,
    })?;
    (external && !learns).then_some(LinkKind::Vxlan { port })
}
