//! Routes in the main table, `proto kernel`: on our devices, and those of ours on others.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures::TryStreamExt as _;
use ipnet::IpNet;
use netlink_packet_route::{
    AddressFamily,
    route::{
        RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType,
    },
};
use nix::errno::Errno;
use rtnetlink::{Handle, RouteMessageBuilder};

use super::{
    fault::{Fault, is_errno, to_io},
    links,
};
use crate::{
    kernel::{Observed, ReadError},
    names::IfName,
    state::{DIRECT_METRIC, Route, RouteKey},
};

/// Metric that IPv6 routes get when nobody gives one (`IP6_RT_PRIO_USER`, linux/ipv6_route.h). Routes that the kernel
/// makes for addresses have 256, which tells them apart from ours.
const IPV6_USER_METRIC: u32 = 1024;

pub(super) async fn set(netlink: &Handle, key: &RouteKey, route: &Route) -> Result<(), Fault> {
    let message = message(netlink, key, route).await?;
    netlink.route().add(message).replace().execute().await?;
    Ok(())
}

pub(super) async fn delete(netlink: &Handle, key: &RouteKey) -> Result<(), Fault> {
    let message = match message(netlink, key, &Route::default()).await {
        // The route went with its device.
        Err(Fault::NoLink(_)) => return Ok(()),
        message => {
            let mut message = message?;
            // Any scope matches (`RT_SCOPE_NOWHERE`, linux/rtnetlink.h).
            message.header.scope = RouteScope::NoWhere;
            message
        }
    };
    match netlink.route().del(message).execute().await {
        Err(error) if !is_errno(&error, Errno::ESRCH) => Err(error.into()),
        _ => Ok(()),
    }
}

async fn message(netlink: &Handle, key: &RouteKey, route: &Route) -> Result<RouteMessage, Fault> {
    let index = links::index(netlink, &key.link).await?.ok_or_else(|| Fault::NoLink(key.link.clone()))?;
    let mut message = build(index, key.destination, route, RouteProtocol::Kernel)?;
    if !key.link.is_managed() {
        message.attributes.push(RouteAttribute::Priority(DIRECT_METRIC));
    }
    Ok(message)
}

/// A route of the main table.
pub(super) fn build(
    index: u32,
    destination: IpNet,
    route: &Route,
    protocol: RouteProtocol,
) -> Result<RouteMessage, Fault> {
    let invalid = |error| Fault::at(format_args!("route to {destination}"), error);
    // IPv6 routes have no scope.
    let scope = match route.gateway {
        None if destination.addr().is_ipv4() => RouteScope::Link,
        _ => RouteScope::Universe,
    };
    let mut builder = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(destination.network(), destination.prefix_len())
        .map_err(invalid)?
        .output_interface(index)
        .protocol(protocol)
        .scope(scope);
    if let Some(gateway) = route.gateway {
        builder = builder.gateway(gateway).map_err(invalid)?;
    }
    if let Some(source) = route.source {
        builder = builder.pref_source(source).map_err(invalid)?;
    }
    if let Some(mtu) = route.mtu {
        builder.get_mut().attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)]));
    }
    Ok(builder.build())
}

/// Reads our routes, and which networks the other devices are on. `observed` has the devices already.
pub(super) async fn read(netlink: &Handle, observed: &mut Observed) -> Result<(), ReadError> {
    let names: BTreeMap<u32, IfName> =
        observed.devices.iter().map(|(name, device)| (device.index, name.clone())).collect();
    let mut others: BTreeMap<IpNet, (u32, Option<IfName>)> = BTreeMap::new();
    for family in families() {
        let mut routes = netlink.route().get(family).execute();
        while let Some(message) = routes.try_next().await.map_err(|error| ReadError::new("routes", to_io(error)))? {
            let parts = parts(&message);
            let by_default = default_devices(&message).filter_map(|index| names.get(&index));
            observed.default_devices.extend(by_default.filter(|link| !link.is_managed()).cloned());
            let link = parts.as_ref().and_then(|parts| names.get(&parts.index));
            match (parts, link) {
                (Some(parts), Some(link)) if is_ours(&message, &parts, link) => {
                    let key = RouteKey { destination: parts.destination, link: link.clone() };
                    observed.state.routes.insert(key, parts.route);
                }
                (_, Some(link)) if link.is_managed() => {}
                (_, link) => {
                    let Some((destination, metric)) = place(&message) else { continue };
                    if others.get(&destination).is_none_or(|(other, _)| metric < *other) {
                        let on_link = link.filter(|_| is_on_link(&message)).cloned();
                        others.insert(destination, (metric, on_link));
                    }
                }
            }
        }
    }
    let near: Vec<IpNet> = others.iter().filter(|(_, (_, link))| link.is_some()).map(|(net, _)| *net).collect();
    let of_interest = |net: &IpNet| near.iter().any(|near| near.contains(net));
    let networks = others.into_iter().filter(|(net, _)| of_interest(net));
    observed.networks = networks.map(|(net, (_, link))| (net, link)).collect();
    Ok(())
}

/// The destination and metric of a route of the main table that leads to others than everybody, of whatever type.
fn place(message: &RouteMessage) -> Option<(IpNet, u32)> {
    let header = &message.header;
    if header.table != RouteHeader::RT_TABLE_MAIN {
        return None;
    }
    let metric = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Priority(metric) => Some(*metric),
        _ => None,
    });
    let destination = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(address) => ip(address),
        _ => None,
    })?;
    // Each device has the link-local network of IPv6.
    let link_local = matches!(destination, IpAddr::V6(ip) if ip.is_unicast_link_local());
    let network = IpNet::new(destination, header.destination_prefix_length).ok().filter(|_| !link_local)?;
    Some((network, metric.unwrap_or_default()))
}

/// The devices that a default route of the main table leads over.
fn default_devices(message: &RouteMessage) -> impl Iterator<Item = u32> {
    let header = &message.header;
    let is_default = header.table == RouteHeader::RT_TABLE_MAIN
        && header.kind == RouteType::Unicast
        && header.destination_prefix_length == 0;
    let attributes = message.attributes.iter().filter(move |_| is_default);
    attributes.flat_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => vec![*index],
        RouteAttribute::MultiPath(hops) => hops.iter().map(|hop| hop.interface_index).collect(),
        _ => Vec::new(),
    })
}

/// Whether a route leads to hosts on a device's link, without a router in between.
fn is_on_link(message: &RouteMessage) -> bool {
    let routed = |attribute: &RouteAttribute| {
        matches!(attribute, RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::MultiPath(_))
    };
    message.header.kind == RouteType::Unicast && !message.attributes.iter().any(routed)
}

/// Reads the routes over one device of the namespace that `netlink` was opened in.
pub(super) async fn over(netlink: &Handle, index: u32) -> Result<BTreeMap<IpNet, Route>, ReadError> {
    let mut found: BTreeMap<IpNet, (u32, Route)> = BTreeMap::new();
    for family in families() {
        let mut routes = netlink.route().get(family).execute();
        while let Some(message) = routes.try_next().await.map_err(|error| ReadError::new("routes", to_io(error)))? {
            let Some(parts) = parts(&message).filter(|parts| parts.index == index) else { continue };
            let metric = parts.metric.unwrap_or_default();
            if found.get(&parts.destination).is_none_or(|(other, _)| metric < *other) {
                found.insert(parts.destination, (metric, parts.route));
            }
        }
    }
    Ok(found.into_iter().map(|(destination, (_, route))| (destination, route)).collect())
}

/// The requests that list the routes of each family.
fn families() -> [RouteMessage; 2] {
    [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()]
}

/// Whether a route over a device is ours.
fn is_ours(message: &RouteMessage, parts: &Parts, link: &IfName) -> bool {
    let metric = parts.metric;
    message.header.protocol == RouteProtocol::Kernel
        && if link.is_managed() {
            parts.destination.addr().is_ipv4() || metric == Some(IPV6_USER_METRIC)
        } else {
            metric == Some(DIRECT_METRIC) && parts.route.gateway.is_some()
        }
}

/// What a route consists of.
struct Parts {
    index: u32,
    destination: IpNet,
    metric: Option<u32>,
    route: Route,
}

/// The parts of a unicast route of the main table over one device; `None` for others.
fn parts(message: &RouteMessage) -> Option<Parts> {
    let header = &message.header;
    if header.table != RouteHeader::RT_TABLE_MAIN || header.kind != RouteType::Unicast {
        return None;
    }
    let (mut index, mut destination, mut metric, mut route) = (None, None, None, Route::default());
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(oif) => index = Some(*oif),
            RouteAttribute::Destination(address) => destination = ip(address),
            RouteAttribute::Gateway(address) => route.gateway = ip(address),
            RouteAttribute::PrefSource(address) => route.source = ip(address),
            RouteAttribute::Priority(priority) => metric = Some(*priority),
            RouteAttribute::Metrics(metrics) => {
                route.mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    // The default route names no destination.
    let everything = || match header.address_family {
        AddressFamily::Inet => Some(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        AddressFamily::Inet6 => Some(IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
        _ => None,
    };
    let destination = IpNet::new(destination.or_else(everything)?, header.destination_prefix_length).ok()?;
    Some(Parts { index: index?, destination, metric, route })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}
