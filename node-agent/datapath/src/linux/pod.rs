//! An endpoint's device pair: one end on the host, the other in the pod.
//!
//! The pod's end is made under a temporary name beside the host's end, moved into the pod's namespace, renamed and
//! configured there. Each step looks first at what is there, so that a crash in between is finished by the next try.

use std::{
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsRawFd as _,
    path::Path,
    thread,
};

use basal_runtime::env::SharedEnv;
use ipnet::IpNet;
use netlink_packet_route::{link::LinkMessage, route::RouteProtocol};
use nix::sched::{CloneFlags, setns};
use rtnetlink::{Handle, LinkUnspec, LinkVeth};
use tokio::runtime;

use super::{Paths, fault::Fault, links, routes};
use crate::{
    names::{ENDPOINT_PREFIX, IfName},
    state::{Link, PodSide, Route},
};

/// Makes the pair with everything in the pod. The host's end is left to the caller once it exists.
pub(super) async fn make(
    netlink: &Handle,
    env: &SharedEnv,
    paths: &Paths,
    host: &IfName,
    link: &Link,
    pod: &PodSide,
) -> Result<(), Fault> {
    let netns = File::open(&pod.netns).map_err(|error| no_netns(pod, error))?;
    let temporary = temporary_name(host)?;
    if links::index(netlink, host).await?.is_none() {
        let pair = LinkVeth::new(host.as_str(), temporary.as_str()).address(pod.host_mac.to_vec()).mtu(link.mtu);
        links::create(netlink, pair.build()).await?;
    }
    if let Some(index) = links::index(netlink, &temporary).await? {
        let to_pod =
            LinkUnspec::new_with_index(index).address(pod.mac.to_vec()).mtu(link.mtu).setns_by_fd(netns.as_raw_fd());
        netlink.link().change(to_pod.build()).execute().await?;
    }

    // A netlink socket belongs to the namespace that it was opened in, whoever uses it later.
    let runtime = runtime::Handle::current();
    let opened = in_netns(&netns, || {
        let _context = runtime.enter();
        enable_ipv6(&paths.sysctl, pod.addresses.iter().any(|address| address.ip.is_ipv6()))?;
        rtnetlink::new_connection()
    });
    let (connection, inside, _) = opened.and_then(|opened| opened).map_err(|error| no_netns(pod, error))?;
    let driver = env.spawn("pod-netlink", Box::pin(connection));
    let configured = configure(&inside, &temporary, link, pod).await;
    driver.abort();
    configured
}

fn no_netns(pod: &PodSide, error: io::Error) -> Fault {
    Fault::NoNetns { path: pod.netns.display().to_string(), message: error.to_string() }
}

/// `tmp` and the last five digits of the host side's name, as Cilium does.
fn temporary_name(host: &IfName) -> Result<IfName, Fault> {
    let digits = host.as_str().strip_prefix(ENDPOINT_PREFIX).unwrap_or(host.as_str());
    let tail = digits.get(digits.len().saturating_sub(5)..).unwrap_or(digits);
    IfName::new(format!("tmp{tail}")).map_err(|error| Fault::at(host, error))
}

/// What happens inside: name, state, addresses, and per family a route to the gateway and the default route.
async fn configure(inside: &Handle, temporary: &IfName, link: &Link, pod: &PodSide) -> Result<(), Fault> {
    if let Some(index) = links::index(inside, temporary).await? {
        let rename = LinkUnspec::new_with_index(index).name(pod.name.as_str()).build();
        change(inside, rename).await?;
    }
    let index = links::index(inside, &pod.name).await?.ok_or_else(|| Fault::NoLink(pod.name.clone()))?;
    let up = LinkUnspec::new_with_index(index).address(pod.mac.to_vec()).mtu(link.mtu).up();
    change(inside, up.build()).await?;

    for address in &pod.addresses {
        links::put_address(inside, index, address.ip.into()).await?;
        let everything = match address.ip {
            IpAddr::V4(_) => IpNet::new_assert(Ipv4Addr::UNSPECIFIED.into(), 0),
            IpAddr::V6(_) => IpNet::new_assert(Ipv6Addr::UNSPECIFIED.into(), 0),
        };
        let default = Route { gateway: Some(address.gateway), source: None, mtu: Some(pod.route_mtu) };
        for (destination, route) in [(address.gateway.into(), Route::default()), (everything, default)] {
            let message = routes::build(index, destination, &route, RouteProtocol::Boot)?;
            inside.route().add(message).replace().execute().await?;
        }
    }
    Ok(())
}

async fn change(inside: &Handle, message: LinkMessage) -> Result<(), Fault> {
    inside.link().change(message).execute().await?;
    Ok(())
}

/// Turns IPv6 on or off in the namespace that the thread is in. A kernel without IPv6 has nothing to turn off.
fn enable_ipv6(sysctl: &Path, enabled: bool) -> io::Result<()> {
    let path = sysctl.join("net/ipv6/conf/all/disable_ipv6");
    match std::fs::write(path, if enabled { "0" } else { "1" }) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && !enabled => Ok(()),
        written => written,
    }
}

/// Runs `work` on a thread of its own that entered the namespace: the calling thread never leaves its own.
fn in_netns<T: Send>(netns: &File, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let entered = scope.spawn(|| {
            setns(netns, CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        });
        entered.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
    })
}
