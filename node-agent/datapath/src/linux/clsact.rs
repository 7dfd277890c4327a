//! Filters on the clsact qdisc: how programs are attached where there is no tcx, or `enable-tcx` is off. They live and
//! die with their device, and need no pins.

use std::{collections::BTreeMap, io};

use aya::programs::{
    SchedClassifier,
    tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle},
};
use basal_maps::endpoint::EndpointInfo;
use futures::TryStreamExt as _;
use netlink_packet_route::tc::{TcAttribute, TcFilterBpfOption, TcMessage, TcOption};
use nix::errno::Errno;
use rtnetlink::Handle;
use zerocopy::FromBytes as _;

use super::{
    fault::{Fault, is_errno, to_io},
    hooks::attach_type,
    links,
    programs::{Loaded, chain},
};
use crate::{
    kernel::{Observed, ReadError},
    names::IfName,
    rows::MapId,
    state::{Direction, Hook, NodeState, Symbol},
};

/// Priority of our filters (Cilium's `bpf-filter-priority`).
const PRIORITY: u16 = 1;
/// The kernel keeps so many bytes of a program's name (`BPF_OBJ_NAME_LEN`, linux/bpf.h, without the terminating zero).
const KERNEL_NAME: usize = 15;

/// A filter of ours, or of Cilium's, which has the same names.
struct Filter {
    priority: u16,
    handle: u32,
    symbol: Symbol,
    program_id: u32,
}

/// Replaces the filter's program in place, or makes a filter.
pub(super) async fn attach(
    netlink: &Handle,
    link: &IfName,
    symbol: Symbol,
    mut program: SchedClassifier,
) -> Result<(), Fault> {
    let failed = |error: &dyn std::error::Error| Fault::at(format_args!("{} on {link}", symbol.as_str()), chain(error));
    let index = links::index(netlink, link).await?.ok_or_else(|| Fault::NoLink(link.clone()))?;
    let found = filters(netlink, index, symbol.direction()).await?;
    let id = match found.iter().find(|filter| filter.symbol == symbol) {
        Some(filter) => {
            let handle = TcHandle::from(filter.handle);
            let present =
                SchedClassifierLink::attached(link.as_str(), attach_type(symbol), filter.priority, handle, None);
            program.attach_to_link(present.map_err(|error| failed(&error))?).map_err(|error| failed(&error))?
        }
        None => {
            match tc::qdisc_add_clsact(link.as_str()) {
                Err(error) if !exists(&error) => return Err(failed(&error)),
                _ => {}
            }
            let options = NlOptions { priority: PRIORITY, ..NlOptions::default() };
            program
                .attach_with_options(link.as_str(), attach_type(symbol), TcAttachOptions::Netlink(options))
                .map_err(|error| failed(&error))?
        }
    };
    let made = program.take_link(id).map_err(|error| failed(&error))?;
    // Dropping it would remove the filter; nothing but numbers is forgotten.
    std::mem::forget(made);
    Ok(())
}

/// Removes the filter; one that is not there is no error.
pub(super) async fn detach(netlink: &Handle, link: &IfName, symbol: Symbol) -> Result<(), Fault> {
    let Some(index) = links::index(netlink, link).await? else { return Ok(()) };
    for filter in filters(netlink, index, symbol.direction()).await? {
        if filter.symbol == symbol {
            let handle = TcHandle::from(filter.handle);
            let failed = |error: io::Error| Fault::at(format_args!("{} on {link}", symbol.as_str()), error);
            // Dropping it removes the filter.
            drop(
                SchedClassifierLink::attached(link.as_str(), attach_type(symbol), filter.priority, handle, None)
                    .map_err(failed)?,
            );
        }
    }
    Ok(())
}

/// True when the qdisc was there before.
fn exists(error: &TcError) -> bool {
    match error {
        TcError::AlreadyAttached => true,
        TcError::NetlinkError(error) => error.raw_os_error() == Some(Errno::EEXIST as i32),
        _ => false,
    }
}

/// Reads the filters with programs of ours. `observed` has devices and map rows already.
pub(super) async fn read(netlink: &Handle, loaded: &Loaded, observed: &mut Observed) -> Result<(), ReadError> {
    let ids = endpoint_ids(&observed.state);
    let mut hooks = Vec::new();
    for (name, device) in &observed.devices {
        for direction in [Direction::Ingress, Direction::Egress] {
            let found = dump(netlink, device.index, direction).await;
            for filter in found.map_err(|error| ReadError::new(format!("filters of {name}"), to_io(error)))? {
                let link = name.clone();
                let hook = match (filter.symbol, ids.get(&device.index)) {
                    (Symbol::FromContainer, Some(id)) => Hook::Endpoint { id: *id, link },
                    (symbol, _) => Hook::Device { link, symbol },
                };
                hooks.push((hook, loaded.set_of(filter.symbol, filter.program_id)));
            }
        }
    }
    observed.state.hooks.extend(hooks);
    Ok(())
}

/// Endpoint id by interface index, from the endpoints' rows.
fn endpoint_ids(state: &NodeState) -> BTreeMap<u32, u16> {
    let rows = state.maps.get(&MapId::Endpoints).into_iter().flat_map(BTreeMap::values);
    let infos = rows.filter_map(|row| EndpointInfo::read_from_bytes(row).ok());
    infos.filter(|info| !info.is_host()).map(|info| (info.ifindex, info.lxc_id)).collect()
}

async fn filters(netlink: &Handle, index: u32, direction: Direction) -> Result<Vec<Filter>, Fault> {
    Ok(dump(netlink, index, direction).await?)
}

async fn dump(netlink: &Handle, index: u32, direction: Direction) -> Result<Vec<Filter>, rtnetlink::Error> {
    let mut handle = netlink.traffic_filter(index.cast_signed());
    let request = match direction {
        Direction::Ingress => handle.get().ingress(),
        Direction::Egress => handle.get().egress(),
    };
    match request.execute().try_collect::<Vec<TcMessage>>().await {
        Ok(messages) => Ok(messages.iter().filter_map(filter).collect()),
        // The device is gone, or has no qdisc with filters.
        Err(error) if is_errno(&error, Errno::ENODEV) || is_errno(&error, Errno::EINVAL) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// A BPF filter whose program has one of our names. Chains are dumped too, without options.
fn filter(message: &TcMessage) -> Option<Filter> {
    let options = message.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    })?;
    let (mut symbol, mut program_id) = (None, None);
    for option in options {
        match option {
            TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => symbol = named(name),
            TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => program_id = Some(*id),
            _ => {}
        }
    }
    let priority = u16::try_from(message.header.info >> 16).ok()?;
    Some(Filter { priority, handle: message.header.handle.into(), symbol: symbol?, program_id: program_id? })
}

/// The program of a name that the kernel may have cut.
fn named(name: &str) -> Option<Symbol> {
    Symbol::ALL.into_iter().find(|symbol| {
        let whole = symbol.as_str();
        name == whole || (name.len() == KERNEL_NAME && whole.starts_with(name))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cut_names_are_told_apart() {
        assert_eq!(named("cil_from_contai"), Some(Symbol::FromContainer));
        assert_eq!(named("cil_from_overla"), Some(Symbol::FromOverlay));
        assert_eq!(named("cil_to_overlay"), Some(Symbol::ToOverlay));
        assert_eq!(named("cil_from_netdev"), Some(Symbol::FromNetdev));
        assert_eq!(named("cil_from"), None);
    }
}
