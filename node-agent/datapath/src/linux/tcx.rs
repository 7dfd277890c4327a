//! tcx links (kernel 6.6 and later), pinned where Cilium pins its own.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use aya::programs::{
    LinkOrder, SchedClassifier,
    links::{FdLink, PinnedLink},
    tc::{SchedClassifierLink, TcAttachOptions},
};

use super::{
    Paths,
    fault::Fault,
    hooks::attach_type,
    programs::{Loaded, chain, make_dir},
    remove_pin, sys,
};
use crate::{
    kernel::{Observed, ReadError},
    names::IfName,
    program::ProgramHash,
    state::{Hook, Symbol},
};

/// Where the link of a hook is pinned.
pub(super) fn pin(paths: &Paths, hook: &Hook, link: &IfName) -> PathBuf {
    let owner = match hook {
        Hook::Endpoint { id, .. } => paths.links().join("endpoints").join(id.to_string()),
        _ => paths.links().join("devices").join(folder(link)),
    };
    owner.join("links").join(hook.symbol().as_str())
}

/// bpffs takes no dots in names.
fn folder(link: &IfName) -> String {
    link.as_str().replace('.', "-")
}

/// Moves the pinned link to the program, in one step that no packet can fall into; or makes a link, at the end of those
/// that others attached.
pub(super) fn attach(pin: &Path, link: &IfName, symbol: Symbol, mut program: SchedClassifier) -> Result<(), Fault> {
    let failed = |error: &dyn std::error::Error| Fault::at(format_args!("{} on {link}", symbol.as_str()), chain(error));
    if is_on(pin, link)? {
        let pinned = PinnedLink::from_pin(pin).map_err(|error| failed(&error))?;
        let moved = SchedClassifierLink::try_from(FdLink::from(pinned)).map_err(|error| failed(&error))?;
        let id = program.attach_to_link(moved).map_err(|error| failed(&error))?;
        // Taken from the program, which would detach it when it is dropped; the pin holds it.
        program.take_link(id).map_err(|error| failed(&error))?;
        return Ok(());
    }

    unpin(pin)?;
    if let Some(dir) = pin.parent() {
        make_dir(dir)?;
    }
    let options = TcAttachOptions::TcxOrder(LinkOrder::default());
    let id =
        program.attach_with_options(link.as_str(), attach_type(symbol), options).map_err(|error| failed(&error))?;
    let made = program.take_link(id).map_err(|error| failed(&error))?;
    FdLink::try_from(made).map_err(|error| failed(&error))?.pin(pin).map_err(|error| failed(&error))?;
    Ok(())
}

/// Detaches by removing the pin. Folders of devices and endpoints that are gone go as well.
pub(super) fn detach(pin: &Path) -> Result<(), Fault> {
    unpin(pin)?;
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

/// True when the pin is of a link on the device that now has this name.
fn is_on(pin: &Path, link: &IfName) -> Result<bool, Fault> {
    if !pin.try_exists().map_err(|error| Fault::path(pin, error))? {
        return Ok(false);
    }
    let found = sys::tcx_link(pin).map_err(|error| Fault::path(pin, error))?;
    let index = nix::net::if_::if_nametoindex(link.as_str()).map_err(|_gone| Fault::NoLink(link.clone()))?;
    Ok(found.is_some_and(|found| found.ifindex == Some(index)))
}

fn unpin(pin: &Path) -> Result<(), Fault> {
    remove_pin(pin).map_err(|error| Fault::path(pin, error))
}

/// Reads the pinned links. `observed` has the devices already.
pub(super) fn read(paths: &Paths, loaded: &Loaded, observed: &mut Observed) -> Result<(), ReadError> {
    let name_of = |index: u32| observed.devices.iter().find(|(_, device)| device.index == index).map(|(name, _)| name);
    let mut hooks = Vec::new();
    for (owner, pin) in pins(&paths.links().join("devices"))? {
        let Some((symbol, found)) = look(pin)? else { continue };
        match found.ifindex.and_then(name_of).filter(|link| folder(link) == owner) {
            Some(link) => {
                let hook = Hook::Device { link: link.clone(), symbol };
                hooks.push((hook, loaded.set_of(symbol, found.program_id)));
            }
            // A link of a device that is gone, or was made again, is on nothing; its pin is what is left.
            None => {
                let again = observed.devices.keys().find(|link| folder(link) == owner).cloned();
                let link = again.or_else(|| IfName::new(owner).ok()).unwrap_or_else(IfName::gone);
                hooks.push((Hook::Device { link, symbol }, ProgramHash::FOREIGN));
            }
        }
    }
    for (owner, pin) in pins(&paths.links().join("endpoints"))? {
        let (Ok(id), Some((symbol, found))) = (owner.parse(), look(pin)?) else { continue };
        let link = found.ifindex.and_then(name_of).cloned().unwrap_or_else(IfName::gone);
        hooks.push((Hook::Endpoint { id, link }, loaded.set_of(symbol, found.program_id)));
    }
    observed.state.hooks.extend(hooks);
    Ok(())
}

/// What is at a pin; `None` for a link that is not tcx.
fn look(pin: Pin) -> Result<Option<(Symbol, sys::TcxLink)>, ReadError> {
    let (symbol, path) = match pin {
        Pin::Of(symbol, path) => (symbol, path),
        // Whichever program is detached, or attached, takes care of the folder.
        Pin::None => return Ok(Some((Symbol::FromContainer, sys::TcxLink { program_id: 0, ifindex: None }))),
    };
    let found = sys::tcx_link(&path).map_err(|error| ReadError::new(path.display().to_string(), error))?;
    Ok(found.map(|found| (symbol, found)))
}

/// What a device or endpoint has.
enum Pin {
    Of(Symbol, PathBuf),
    /// A folder without pins: the agent died before there was one, or after the last one went.
    None,
}

/// `<owner>/links/<symbol>` below a folder, for symbols that are ours.
fn pins(dir: &Path) -> Result<Vec<(String, Pin)>, ReadError> {
    let failed = |error| ReadError::new(dir.display().to_string(), error);
    let mut pins = Vec::new();
    for path in list(dir).map_err(failed)? {
        let Some(owner) = path.file_name().and_then(|name| name.to_str()) else { continue };
        let links = path.join("links");
        for symbol in Symbol::ALL {
            let pin = links.join(symbol.as_str());
            if pin.try_exists().map_err(failed)? {
                pins.push((owner.to_owned(), Pin::Of(symbol, pin)));
            }
        }
        let within = list(&links).map_err(failed)?;
        if within.is_empty() && list(&path).map_err(failed)?.iter().all(|found| *found == links) {
            pins.push((owner.to_owned(), Pin::None));
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
