//! From an endpoint's record to what the datapath and the container runtime want.

use std::{net::IpAddr, path::PathBuf};

use basal_cni::api::{AddResult, AddressResult, InterfaceResult, RouteResult};
use basal_datapath::{
    names::{IfName, IfNameError},
    plan::{Endpoint, NodePlan},
    state::{PodAddress, PodSide},
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::record::EndpointRecord;
use crate::mac::MacAddr;

/// What ADD answers for a record, on the node as it is.
#[must_use]
pub fn result(record: &EndpointRecord, node: &NodePlan) -> AddResult {
    let interface = |name: String, mac: MacAddr| InterfaceResult { name, mac: mac.to_string(), mtu: node.device_mtu };
    let mut addresses = Vec::new();
    let mut routes = Vec::new();
    for ip in record.addresses.iter() {
        let Some(gateway) = node.routers.for_family_of(ip) else { continue };
        let everything = match ip {
            IpAddr::V4(_) => IpNet::from(Ipv4Net::default()),
            IpAddr::V6(_) => IpNet::from(Ipv6Net::default()),
        };
        addresses.push(AddressResult { address: ip.into(), gateway });
        routes.push(RouteResult { dst: gateway.into(), gateway: None, mtu: None });
        routes.push(RouteResult { dst: everything, gateway: Some(gateway), mtu: Some(node.route_mtu()) });
    }
    AddResult {
        host: interface(record.host_interface(), record.host_mac),
        container: interface(record.attachment.ifname.clone(), record.mac),
        netns: record.netns.clone(),
        addresses,
        routes,
    }
}

/// The endpoint of a record, as the datapath wants it on the node as it is.
///
/// # Errors
/// The interface's name inside the container is none.
pub fn endpoint(record: &EndpointRecord, node: &NodePlan) -> Result<Endpoint, IfNameError> {
    let address = |ip| Some(PodAddress { ip, gateway: node.routers.for_family_of(ip)? });
    Ok(Endpoint {
        link: IfName::new(record.host_interface())?,
        pod: PodSide {
            netns: PathBuf::from(&record.netns),
            name: IfName::new(record.attachment.ifname.clone())?,
            mac: record.mac.0,
            host_mac: record.host_mac.0,
            addresses: record.addresses.iter().filter_map(address).collect(),
            route_mtu: node.route_mtu(),
        },
        identity: record.identity.get(),
    })
}
