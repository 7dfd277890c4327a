//! What Basal is held against: pods and nodes connected by veth, routes and VXLAN of the kernel, without any program.

use std::net::IpAddr;

use anyhow::{Context as _, Error};
use basal_datapath::{plan::RemoteNode, routing::Routing};

use crate::harness::{Netns, Node};

/// Whether packets meet connection tracking on a node, as kube-proxy's rules bring it along.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tracking {
    /// They do not.
    Off,
    /// All of them, those of the tunnel too.
    On,
}

/// Connects a node's pods by routes, and the node with those that its plan names: by VXLAN where the plan has a tunnel.
pub(crate) fn connect(node: &Node, tracking: Tracking) -> anyhow::Result<()> {
    let Node { netns, plan, .. } = node;
    run(netns, "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")?;
    for endpoint in plan.endpoints.values() {
        let (link, pod) = (&endpoint.link, &endpoint.pod);
        let (name, path) = (&pod.name, pod.netns.display());
        run(netns, &format!("ip link add {link} type veth peer name {name} netns {path}"))?;
        run(netns, &format!("ip link set {link} up"))?;
        let inside = |arguments: String| run(netns, &format!("nsenter --net={path} ip {arguments}"));
        inside(format!("link set {name} up"))?;
        for address in &pod.addresses {
            let (ip, gateway) = (address.ip, address.gateway);
            inside(format!("addr add {} dev {name} {}", whole(ip), nodad(ip)))?;
            run(netns, &format!("ip addr add {} dev {link} {}", whole(gateway), nodad(gateway)))?;
            run(netns, &format!("ip route add {} dev {link}", whole(ip)))?;
            inside(format!("route add {} dev {name}", whole(gateway)))?;
            inside(format!("route add default via {gateway} dev {name} mtu {}", pod.route_mtu))?;
        }
    }
    match plan.routing {
        Routing::Tunnel(tunnel) => {
            let own = plan.node_ips.iter().find(|ip| ip.is_ipv6() == tunnel.ipv6).context("no tunnel address")?;
            // Checksums as Basal's tunnel has them: the inner packet's only.
            let device = format!(
                "ip link add vx0 address {} mtu {} type vxlan id 1 dev u0 local {own} dstport {} nolearning noudpcsum",
                mac(plan.routers.v4.context("no router")?.octets()[2]),
                plan.route_mtu(),
                tunnel.port
            );
            run(netns, &device)?;
            run(netns, "ip link set vx0 up")?;
            plan.remote_nodes.values().try_for_each(|remote| tunnel_to(netns, remote))?;
        }
        Routing::Native(_) => plan.remote_nodes.values().try_for_each(|remote| route_to(netns, remote))?,
    }
    if tracking == Tracking::On {
        run(netns, "nft add table inet tracked")?;
        run(netns, "nft add chain inet tracked forward { type filter hook forward priority 0 ; }")?;
        run(netns, "nft add rule inet tracked forward ct state invalid drop")?;
    }
    Ok(())
}

/// Sends a node's pods what is theirs through `vx0`.
fn tunnel_to(netns: &Netns, remote: &RemoteNode) -> anyhow::Result<()> {
    let mac = mac(remote.node_id.try_into()?);
    let endpoint = remote.tunnel_endpoint.context("a node without tunnel address")?;
    run(netns, &format!("bridge fdb append {mac} dev vx0 dst {endpoint}"))?;
    for router in &remote.router_ips {
        run(netns, &format!("ip neigh add {router} lladdr {mac} dev vx0 nud permanent"))?;
        for cidr in remote.pod_cidrs.iter().filter(|cidr| cidr.contains(router)) {
            run(netns, &format!("ip route add {cidr} via {router} dev vx0 onlink"))?;
        }
    }
    Ok(())
}

/// Sends a node's pods what is theirs by the wire.
fn route_to(netns: &Netns, remote: &RemoteNode) -> anyhow::Result<()> {
    for cidr in &remote.pod_cidrs {
        for hop in remote.next_hops.iter().filter(|hop| hop.is_ipv6() == cidr.addr().is_ipv6()) {
            run(netns, &format!("ip route add {cidr} via {hop} dev u0"))?;
        }
    }
    Ok(())
}

/// Gives what leaves by a device the node's address.
pub(crate) fn masquerade(netns: &Netns, device: &str) -> anyhow::Result<()> {
    run(netns, "nft add table inet leaving")?;
    run(netns, "nft add chain inet leaving postrouting { type nat hook postrouting priority 100 ; }")?;
    run(netns, &format!("nft add rule inet leaving postrouting oifname {device} masquerade"))
}

/// Joins two pods by one veth pair; their addresses are those of the first two pods of node one.
pub(crate) fn join(client: &Netns, server: &Netns, mtu: u32) -> anyhow::Result<()> {
    run(client, &format!("ip link add eth0 type veth peer name eth0 netns {}", server.path().display()))?;
    for (netns, own, other) in [(client, 7, 8), (server, 8, 7)] {
        run(netns, "ip link set eth0 up")?;
        for prefix in ["10.1.1.", "fd00:1:1::"] {
            let (own, other) = (format!("{prefix}{own}"), format!("{prefix}{other}"));
            let (own, other): (IpAddr, IpAddr) = (own.parse()?, other.parse()?);
            run(netns, &format!("ip addr add {} dev eth0 {}", whole(own), nodad(own)))?;
            run(netns, &format!("ip route add {} dev eth0 mtu {mtu}", whole(other)))?;
        }
    }
    Ok(())
}

fn run(netns: &Netns, command: &str) -> anyhow::Result<()> {
    netns.run(command).map(drop).map_err(Error::msg)
}

/// The address of a node's VXLAN device.
fn mac(node: u8) -> String {
    format!("02:03:00:00:00:{node:02x}")
}

/// The prefix that holds one address.
fn whole(ip: IpAddr) -> String {
    format!("{ip}/{}", if ip.is_ipv6() { 128 } else { 32 })
}

/// IPv6 addresses are ready at once with this word.
fn nodad(ip: IpAddr) -> &'static str {
    if ip.is_ipv6() { "nodad" } else { "" }
}
