//! Attaching programs: tcx links, pinned where Cilium pins its own, and slots of `cilium_call_policy`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use aya::{
    maps::{Array, Map, MapData, ProgramArray},
    programs::{
        LinkOrder, SchedClassifier, TcAttachType,
        links::{FdLink, PinnedLink},
        tc::{SchedClassifierLink, TcAttachOptions},
    },
};
use basal_maps::spec;

use super::{
    Paths,
    fault::Fault,
    programs::{self, Loaded, chain, make_dir},
    sys,
};
use crate::{
    kernel::{Observed, ReadError},
    names::IfName,
    program::ProgramHash,
    state::{Direction, Hook, Symbol},
};

/// Puts a program of a loaded set in place.
pub(super) fn attach(paths: &Paths, hook: &Hook, hash: ProgramHash) -> Result<(), Fault> {
    let pin = programs::pin(paths, hash, hook.symbol());
    if !pin.try_exists().map_err(|error| Fault::path(&pin, error))? {
        return Err(Fault::NotLoaded(hash));
    }
    let program = SchedClassifier::from_pin(&pin).map_err(|error| Fault::path(&pin, chain(&error)))?;
    match hook {
        Hook::Policy { id } => set_slot(paths, *id, &program),
        Hook::Device { link, .. } | Hook::Endpoint { link, .. } => {
            attach_link(&link_pin(paths, hook, link), link, hook.symbol(), program)
        }
    }
}

/// Takes a program away. What is not there is no error.
pub(super) fn detach(paths: &Paths, hook: &Hook) -> Result<(), Fault> {
    let Some(link) = hook.link() else {
        let Hook::Policy { id } = hook else { return Ok(()) };
        return clear_slot(paths, *id);
    };
    let pin = link_pin(paths, hook, link);
    remove(&pin)?;
    // Folders of devices and endpoints that are gone go as well; one that is in use stays.
    for dir in pin.ancestors().skip(1).take(2) {
        match fs::remove_dir(dir) {
            Err(error) if !matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotFound) => {
                return Err(Fault::path(dir, error));
            }
            _ => {}
        }
    }
    Ok(())
}

fn link_pin(paths: &Paths, hook: &Hook, link: &IfName) -> PathBuf {
    let owner = match hook {
        Hook::Endpoint { id, .. } => paths.links().join("endpoints").join(id.to_string()),
        // bpffs takes no dots in names.
        _ => paths.links().join("devices").join(link.as_str().replace('.', "-")),
    };
    owner.join("links").join(hook.symbol().as_str())
}

/// Moves the pinned link to the program, in one step that no packet can fall into; or makes a link, at the end of those
/// that others attached.
fn attach_link(pin: &Path, link: &IfName, symbol: Symbol, mut program: SchedClassifier) -> Result<(), Fault> {
    let failed = |error: &dyn std::error::Error| Fault::at(format_args!("{} on {link}", symbol.as_str()), chain(error));
    if is_on(pin, link)? {
        let pinned = PinnedLink::from_pin(pin).map_err(|error| failed(&error))?;
        let moved = SchedClassifierLink::try_from(FdLink::from(pinned)).map_err(|error| failed(&error))?;
        let id = program.attach_to_link(moved).map_err(|error| failed(&error))?;
        // Taken from the program, so that it stays when the program is dropped; the pin holds it.
        program.take_link(id).map_err(|error| failed(&error))?;
        return Ok(());
    }

    remove(pin)?;
    if let Some(dir) = pin.parent() {
        make_dir(dir)?;
    }
    let attach_type = match symbol.direction() {
        Direction::Ingress => TcAttachType::Ingress,
        Direction::Egress => TcAttachType::Egress,
    };
    let options = TcAttachOptions::TcxOrder(LinkOrder::default());
    let id = program.attach_with_options(link.as_str(), attach_type, options).map_err(|error| failed(&error))?;
    let made = program.take_link(id).map_err(|error| failed(&error))?;
    FdLink::try_from(made).map_err(|error| failed(&error))?.pin(pin).map_err(|error| failed(&error))?;
    Ok(())
}

/// True when the pin is of a link on the device that now has this name.
fn is_on(pin: &Path, link: &IfName) -> Result<bool, Fault> {
    if !pin.try_exists().map_err(|error| Fault::path(pin, error))? {
        return Ok(false);
    }
    let found = sys::tcx_link(pin).map_err(|error| Fault::path(pin, error))?;
    let index = nix::net::if_::if_nametoindex(link.as_str()).map_err(|_gone| Fault::NoLink(link.clone()))?;
    Ok(found.is_some_and(|found| found.ifindex == Some(index)))
}

fn remove(pin: &Path) -> Result<(), Fault> {
    match fs::remove_file(pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Fault::path(pin, error)),
        _ => Ok(()),
    }
}

fn open_slots(paths: &Paths) -> Result<MapData, Fault> {
    let pin = paths.maps().join(spec::CALL_POLICY.name);
    MapData::from_pin(&pin).map_err(|error| Fault::path(&pin, chain(&error)))
}

fn set_slot(paths: &Paths, id: u16, program: &SchedClassifier) -> Result<(), Fault> {
    let failed = |error: &dyn std::error::Error| Fault::at(format_args!("slot {id}"), chain(error));
    let mut slots = ProgramArray::try_from(Map::ProgramArray(open_slots(paths)?)).map_err(|error| failed(&error))?;
    let program = program.fd().map_err(|error| failed(&error))?;
    slots.set(u32::from(id), program, 0).map_err(|error| failed(&error))
}

fn clear_slot(paths: &Paths, id: u16) -> Result<(), Fault> {
    let failed = |error: &dyn std::error::Error| Fault::at(format_args!("slot {id}"), chain(error));
    let mut slots = ProgramArray::try_from(Map::ProgramArray(open_slots(paths)?)).map_err(|error| failed(&error))?;
    match slots.clear_index(&u32::from(id)) {
        Err(aya::maps::MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
        cleared => cleared.map_err(|error| failed(&error)),
    }
}

/// Reads what is attached. `observed` has the devices already.
pub(super) fn read(paths: &Paths, loaded: &Loaded, observed: &mut Observed) -> Result<(), ReadError> {
    let name_of = |index: u32| observed.devices.iter().find(|(_, device)| device.index == index).map(|(name, _)| name);
    let mut hooks = Vec::new();
    for (owner, symbol, pin) in pins(&paths.links().join("devices"))? {
        let Some(found) = look(&pin)? else { continue };
        // A link of a device that was made again is on the old one, and nothing.
        if let Some(link) = found.ifindex.and_then(name_of).filter(|link| link.as_str().replace('.', "-") == owner) {
            let hook = Hook::Device { link: link.clone(), symbol };
            hooks.push((hook, loaded.set_of(symbol, found.program_id)));
        }
    }
    for (owner, symbol, pin) in pins(&paths.links().join("endpoints"))? {
        let (Ok(id), Some(found)) = (owner.parse(), look(&pin)?) else { continue };
        let link = found.ifindex.and_then(name_of).cloned().unwrap_or_else(IfName::gone);
        hooks.push((Hook::Endpoint { id, link }, loaded.set_of(symbol, found.program_id)));
    }
    for (id, program_id) in slots(paths)? {
        hooks.push((Hook::Policy { id }, loaded.set_of(Symbol::LxcPolicy, program_id)));
    }
    observed.state.hooks.extend(hooks);
    Ok(())
}

fn look(pin: &Path) -> Result<Option<sys::TcxLink>, ReadError> {
    sys::tcx_link(pin).map_err(|error| ReadError::new(pin.display().to_string(), error))
}

/// `<owner>/links/<symbol>` below a folder, for symbols that are ours.
fn pins(dir: &Path) -> Result<Vec<(String, Symbol, PathBuf)>, ReadError> {
    let failed = |error| ReadError::new(dir.display().to_string(), error);
    let mut pins = Vec::new();
    for owner in list(dir).map_err(failed)? {
        for symbol in Symbol::ALL {
            let pin = owner.join("links").join(symbol.as_str());
            if pin.try_exists().map_err(failed)?
                && let Some(owner) = owner.file_name().and_then(|name| name.to_str())
            {
                pins.push((owner.to_owned(), symbol, pin));
            }
        }
    }
    Ok(pins)
}

fn list(dir: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| entry.map(|entry| entry.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Slots that are in use, with the kernel's ids of their programs.
fn slots(paths: &Paths) -> Result<Vec<(u16, u32)>, ReadError> {
    let pin = paths.maps().join(spec::CALL_POLICY.name);
    let failed = |error: io::Error| ReadError::new(pin.display().to_string(), error);
    if !super::maps::fits(&pin, &spec::CALL_POLICY).map_err(failed)? {
        return Ok(Vec::new());
    }
    let data = MapData::from_pin(&pin).map_err(|error| failed(io::Error::other(error)))?;
    // To a reader, a program array is an array of program ids.
    let slots = Array::<_, u32>::try_from(Map::Array(data)).map_err(|error| failed(io::Error::other(error)))?;
    let mut found = Vec::new();
    for id in 0..=u16::MAX {
        match slots.get(&u32::from(id), 0) {
            Ok(program_id) => found.push((id, program_id)),
            Err(aya::maps::MapError::KeyNotFound) => {}
            Err(aya::maps::MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(io::Error::other(error))),
        }
    }
    Ok(found)
}
