//! Removing several devices at once. The kernel waits, for each request, until no CPU looks at what it removes; all devices
//! of a group are one request (`rtnl_group_dellink`, net/core/rtnetlink.c).

use std::collections::BTreeSet;

use futures::TryStreamExt as _;
use netlink_packet_route::link::LinkAttribute;
use nix::errno::Errno;
use rtnetlink::{Handle, LinkUnspec};
use tokio::sync::Mutex;

use super::{
    fault::{Fault, is_errno},
    links,
};
use crate::names::{IfName, REMOVAL_GROUP};

/// At most so many at once. The kernel holds its lock on all devices meanwhile, and for a program attached by tcx it waits
/// once more, for each: more at once would win little and keep others waiting.
const AT_ONCE: usize = 8;

/// Removes devices; those that are not there are no error. `lists` is held while the kernel lists something.
pub(super) async fn delete(netlink: &Handle, lists: &Mutex<()>, names: &BTreeSet<IfName>) -> Result<(), Fault> {
    let names: Vec<&IfName> = names.iter().collect();
    for some in names.chunks(AT_ONCE) {
        let together = some.len() > 1 && gather(netlink, lists, some).await?;
        if together {
            delete_group(netlink).await?;
        } else {
            for name in some {
                links::delete(netlink, name).await?;
            }
        }
    }
    Ok(())
}

/// Puts devices into the group. False when there are others in it, which must stay: then each is removed by itself.
async fn gather(netlink: &Handle, lists: &Mutex<()>, names: &[&IfName]) -> Result<bool, Fault> {
    let mut ours = BTreeSet::new();
    for name in names {
        let Some(index) = links::index(netlink, name).await? else { continue };
        let change = LinkUnspec::new_with_index(index).link_group(REMOVAL_GROUP).build();
        match netlink.link().change(change).execute().await {
            Err(error) if is_errno(&error, Errno::ENODEV) => {}
            Err(error) => return Err(error.into()),
            Ok(()) => drop(ours.insert(index)),
        }
    }
    let _turn = lists.lock().await;
    let mut members = BTreeSet::new();
    let mut messages = netlink.link().get().execute();
    while let Some(message) = messages.try_next().await? {
        if message.attributes.contains(&LinkAttribute::Group(REMOVAL_GROUP)) {
            members.insert(message.header.index);
        }
    }
    Ok(members.is_subset(&ours))
}

/// Removes all devices of the group; an empty one is no error.
async fn delete_group(netlink: &Handle) -> Result<(), Fault> {
    let mut request = netlink.link().del(0);
    request.message_mut().attributes.push(LinkAttribute::Group(REMOVAL_GROUP));
    match request.execute().await {
        Err(error) if !is_errno(&error, Errno::ENODEV) => Err(error.into()),
        _ => Ok(()),
    }
}
