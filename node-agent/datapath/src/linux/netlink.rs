//! The kernel's notifications.

use basal_runtime::env::SharedEnv;
use futures::{StreamExt as _, stream, stream::BoxStream};
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::{MulticastGroup, packet_core::NetlinkPayload};

use crate::kernel::KernelEvent;

/// Notifications about devices, addresses and routes. Ends at once when netlink cannot be opened.
pub(super) fn events(env: &SharedEnv) -> BoxStream<'static, KernelEvent> {
    let groups = [
        MulticastGroup::Link,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
    ];
    let (connection, handle, messages) = match rtnetlink::new_multicast_connection(&groups) {
        Ok(opened) => opened,
        Err(error) => {
            tracing::warn!(%error, "cannot subscribe to kernel notifications");
            return stream::empty().boxed();
        }
    };
    env.spawn("netlink-events", Box::pin(connection));
    messages
        .filter_map(move |(message, _)| {
            // The connection lives as long as a handle to it.
            let _open = &handle;
            std::future::ready(event(&message.payload))
        })
        .boxed()
}

fn event(payload: &NetlinkPayload<RouteNetlinkMessage>) -> Option<KernelEvent> {
    let NetlinkPayload::InnerMessage(message) = payload else { return None };
    match message {
        RouteNetlinkMessage::NewLink(_) | RouteNetlinkMessage::DelLink(_) => Some(KernelEvent::Link),
        RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::DelAddress(_) => Some(KernelEvent::Address),
        RouteNetlinkMessage::NewRoute(_) | RouteNetlinkMessage::DelRoute(_) => Some(KernelEvent::Route),
        _ => None,
    }
}
