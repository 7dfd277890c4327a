//! Attaching programs: to devices by tcx links, else clsact filters, and to slots of `cilium_call_policy`.

use std::{collections::BTreeSet, io, sync::Mutex};

use aya::{
    maps::{Array, Map, MapData, MapError, ProgramArray},
    programs::{SchedClassifier, TcAttachType},
};
use basal_maps::spec;
use basal_runtime::sync::lock;
use rtnetlink::Handle;

use super::{
    Paths, clsact,
    fault::Fault,
    programs::{self, Loaded, chain},
    tcx,
};
use crate::{
    kernel::{Observed, ReadError},
    names::IfName,
    program::ProgramHash,
    state::{Direction, Hook, Symbol},
};

/// The slots of `cilium_call_policy` that may be in use. Looking into each of the 65,536 takes longer than everything else
/// together, so that is done once: another process may have left something in any of them. After that nobody but this
/// process fills one.
#[derive(Debug, Default)]
pub(super) struct KnownSlots(Mutex<Option<BTreeSet<u16>>>);

impl KnownSlots {
    fn to_look_into(&self) -> Vec<u16> {
        let known = lock(&self.0).clone();
        known.map_or_else(|| (0..=u16::MAX).collect(), |known| known.into_iter().collect())
    }

    /// All were looked into, or those that were known.
    fn found(&self, used: impl Iterator<Item = u16>) {
        lock(&self.0).get_or_insert_default().extend(used);
    }

    fn filled(&self, id: u16) {
        if let Some(known) = &mut *lock(&self.0) {
            known.insert(id);
        }
    }

    fn cleared(&self, id: u16) {
        if let Some(known) = &mut *lock(&self.0) {
            known.remove(&id);
        }
    }
}

/// Puts a program of a loaded set in place. What the other way of attaching left on the device goes afterwards, so that
/// a packet may meet a program twice, never none.
pub(super) async fn attach(
    netlink: &Handle,
    paths: &Paths,
    tcx: bool,
    known: &KnownSlots,
    hook: &Hook,
    hash: ProgramHash,
) -> Result<(), Fault> {
    let pin = programs::pin(paths, hash, hook.symbol());
    if !pin.try_exists().map_err(|error| Fault::path(&pin, error))? {
        return Err(Fault::NotLoaded(hash));
    }
    let program = SchedClassifier::from_pin(&pin).map_err(|error| Fault::path(&pin, chain(&error)))?;
    let link = match hook {
        Hook::Policy { id } => {
            known.filled(*id);
            return set_slot(paths, *id, &program);
        }
        Hook::Device { link, .. } | Hook::Endpoint { link, .. } => link,
    };
    let link_pin = tcx::pin(paths, hook, link);
    if tcx {
        tcx::attach(&link_pin, link, hook.symbol(), program)?;
        clsact::detach(netlink, link, hook.symbol()).await
    } else {
        clsact::attach(netlink, link, hook.symbol(), program).await?;
        tcx::detach(&link_pin)
    }
}

/// Takes a program away. What is not there is no error.
pub(super) async fn detach(netlink: &Handle, paths: &Paths, known: &KnownSlots, hook: &Hook) -> Result<(), Fault> {
    match hook {
        Hook::Policy { id } => {
            clear_slot(paths, *id)?;
            known.cleared(*id);
            Ok(())
        }
        Hook::Device { link, .. } | Hook::Endpoint { link, .. } => {
            tcx::detach(&tcx::pin(paths, hook, link))?;
            if *link == IfName::gone() {
                return Ok(());
            }
            clsact::detach(netlink, link, hook.symbol()).await
        }
    }
}

/// Reads what is attached in the way that is wanted; what is attached in the other way counts as not attached.
/// `observed` has devices and map rows already.
pub(super) async fn read(
    netlink: &Handle,
    paths: &Paths,
    tcx: bool,
    known: &KnownSlots,
    loaded: &Loaded,
    observed: &mut Observed,
) -> Result<(), ReadError> {
    if tcx {
        tcx::read(paths, loaded, observed)?;
    } else {
        clsact::read(netlink, loaded, observed).await?;
    }
    let found = slots(paths, known.to_look_into())?;
    known.found(found.iter().map(|(id, _)| *id));
    for (id, program_id) in found {
        observed.state.hooks.insert(Hook::Policy { id }, loaded.set_of(Symbol::LxcPolicy, program_id));
    }
    Ok(())
}

/// Which hook of a device a program is for, as aya says it.
pub(super) fn attach_type(symbol: Symbol) -> TcAttachType {
    match symbol.direction() {
        Direction::Ingress => TcAttachType::Ingress,
        Direction::Egress => TcAttachType::Egress,
    }
}

fn open_slots(paths: &Paths) -> Result<ProgramArray<MapData>, Fault> {
    let pin = paths.maps().join(spec::CALL_POLICY.name);
    let slots = MapData::from_pin(&pin).and_then(|data| ProgramArray::try_from(Map::ProgramArray(data)));
    slots.map_err(|error| Fault::path(&pin, chain(&error)))
}

fn set_slot(paths: &Paths, id: u16, program: &SchedClassifier) -> Result<(), Fault> {
    let program = program.fd().map_err(|error| Fault::at(format_args!("slot {id}"), chain(&error)))?;
    let set = open_slots(paths)?.set(u32::from(id), program, 0);
    set.map_err(|error| Fault::at(format_args!("slot {id}"), chain(&error)))
}

fn clear_slot(paths: &Paths, id: u16) -> Result<(), Fault> {
    match open_slots(paths)?.clear_index(&u32::from(id)) {
        Err(error) if !is_empty(&error) => Err(Fault::at(format_args!("slot {id}"), chain(&error))),
        _ => Ok(()),
    }
}

/// True for the error that an empty slot gives.
fn is_empty(error: &MapError) -> bool {
    match error {
        MapError::KeyNotFound => true,
        MapError::SyscallError(error) => error.io_error.kind() == io::ErrorKind::NotFound,
        _ => false,
    }
}

/// Those of the slots that are in use, with the kernel's ids of their programs.
fn slots(paths: &Paths, ids: impl IntoIterator<Item = u16>) -> Result<Vec<(u16, u32)>, ReadError> {
    let pin = paths.maps().join(spec::CALL_POLICY.name);
    let failed = |error: io::Error| ReadError::new(pin.display().to_string(), error);
    if !super::maps::fits(&pin, &spec::CALL_POLICY).map_err(failed)? {
        return Ok(Vec::new());
    }
    let data = MapData::from_pin(&pin).map_err(|error| failed(io::Error::other(error)))?;
    // To a reader, a program array is an array of program ids.
    let slots = Array::<_, u32>::try_from(Map::Array(data)).map_err(|error| failed(io::Error::other(error)))?;
    let mut found = Vec::new();
    for id in ids {
        match slots.get(&u32::from(id), 0) {
            Ok(program_id) => found.push((id, program_id)),
            Err(error) if is_empty(&error) => {}
            Err(error) => return Err(failed(io::Error::other(error))),
        }
    }
    Ok(found)
}
