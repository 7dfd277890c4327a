//! An endpoint's device pair: one end on the host, the other in the pod.
//!
//! Each end is made where it stays, under the name that it keeps: to move a device or to rename one the kernel waits until
//! no CPU looks at it any more, with its lock on all devices held. What is inside is configured afterwards; each step can be
//! repeated, so that a crash in between is finished by the next try.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd as _, RawFd},
    path::Path,
    thread,
};

use basal_runtime::env::{SharedEnv, TaskHandle};
use netlink_packet_route::{
    link::{InfoData, InfoKind, InfoVeth},
    route::RouteProtocol,
};
use nix::{
    errno::Errno,
    sched::{CloneFlags, setns},
};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkVeth};
use tokio::runtime;

use super::{
    Paths,
    fault::{Fault, is_errno},
    links, routes,
};
use crate::{
    check::pod_routes,
    kernel::{PodDevice, ReadError},
    names::IfName,
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
    if links::index(netlink, host).await?.is_none() {
        create(netlink, host, link, pod, netns.as_raw_fd()).await?;
    }

    let has_ipv6 = pod.addresses.iter().any(|address| address.ip.is_ipv6());
    let opened = open(env, &netns, || enable_ipv6(&paths.sysctl, has_ipv6));
    let (driver, inside) = opened.map_err(|error| no_netns(pod, error))?;
    let configured = configure(&inside, link, pod).await;
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

/// Makes both ends at once. The kernel makes the pod's end first, so a name that is taken there leaves nothing behind.
async fn create(netlink: &Handle, host: &IfName, link: &Link, pod: &PodSide, netns: RawFd) -> Result<(), Fault> {
    let inside = LinkUnspec::new_with_name(pod.name.as_str()).address(pod.mac.to_vec()).mtu(link.mtu);
    let pair = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
        .name(host.as_str())
        .address(pod.host_mac.to_vec())
        .mtu(link.mtu)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(inside.setns_by_fd(netns).build())));
    match netlink.link().add(pair.build()).execute().await {
        Err(error) if is_errno(&error, Errno::EEXIST) => Err(Fault::at(
            format_args!("{host} and {} in {}", pod.name, pod.netns.display()),
            "one of the two is there already",
        )),
        made => Ok(made?),
    }
}

/// What happens inside: state, addresses, and per family a route to the gateway and the default route.
async fn configure(inside: &Handle, link: &Link, pod: &PodSide) -> Result<(), Fault> {
    let index = links::index(inside, &pod.name).await?.ok_or_else(|| Fault::NoLink(pod.name.clone()))?;
    let up = LinkUnspec::new_with_index(index).address(pod.mac.to_vec()).mtu(link.mtu).up();
    inside.link().change(up.build()).execute().await?;

    for address in &pod.addresses {
        links::put_address(inside, index, address.ip.into()).await?;
    }
    for (destination, route) in pod_routes(pod) {
        let message = routes::build(index, destination, &route, RouteProtocol::Boot)?;
        inside.route().add(message).replace().execute().await?;
    }
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
