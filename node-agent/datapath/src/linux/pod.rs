//! An endpoint's device pair: one end on the host, the other in the pod.
//!
//! The pod's end is made under a temporary name beside the host's end, moved into the pod's namespace, renamed and
//! configured there. Each step looks first at what is there, so that a crash in between is finished by the next try.

use std::{fs::File, io, os::fd::AsRawFd as _, path::Path, thread};

use basal_runtime::env::{SharedEnv, TaskHandle};
use netlink_packet_route::{link::LinkMessage, route::RouteProtocol};
use nix::sched::{CloneFlags, setns};
use rtnetlink::{Handle, LinkUnspec, LinkVeth};
use tokio::runtime;

use super::{Paths, fault::Fault, links, routes};
use crate::{
    check::pod_routes,
    kernel::{PodDevice, ReadError},
    names::{ENDPOINT_PREFIX, IfName},
    state::{Link, PodSide},
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

    let has_ipv6 = pod.addresses.iter().any(|address| address.ip.is_ipv6());
    let opened = open(env, &netns, || enable_ipv6(&paths.sysctl, has_ipv6));
    let (driver, inside) = opened.map_err(|error| no_netns(pod, error))?;
    let configured = configure(&inside, &temporary, link, pod).await;
    driver.abort();
    configured
}

/// Reads a device in a namespace, and the routes over it.
pub(super) async fn look(env: &SharedEnv, netns: &Path, name: &IfName) -> Result<Option<PodDevice>, ReadError> {
    let failed = |error| ReadError::new(format!("network namespace {}", netns.display()), error);
    let (driver, inside) = File::open(netns).and_then(|file| open(env, &file, || Ok(()))).map_err(failed)?;
    let found = async {
        let Some(device) = links::find(&inside, name).await? else { return Ok(None) };
        let routes = routes::over(&inside, device.index).await?;
        Ok(Some(PodDevice { device, routes }))
    };
    let found = found.await;
    driver.abort();
    found
}

/// Opens netlink in a namespace, after `first` was done there. The task drives the socket.
fn open(
    env: &SharedEnv,
    netns: &File,
    first: impl FnOnce() -> io::Result<()> + Send,
) -> io::Result<(TaskHandle, Handle)> {
    // A netlink socket belongs to the namespace that it was opened in, whoever uses it later.
    let runtime = runtime::Handle::current();
    let opened = in_netns(netns, || {
        let _context = runtime.enter();
        first()?;
        rtnetlink::new_connection()
    });
    let (connection, inside, _) = opened.and_then(|opened| opened)?;
    Ok((env.spawn("pod-netlink", Box::pin(connection)), inside))
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
    }
    for (destination, route) in pod_routes(pod) {
        let message = routes::build(index, destination, &route, RouteProtocol::Boot)?;
        inside.route().add(message).replace().execute().await?;
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
