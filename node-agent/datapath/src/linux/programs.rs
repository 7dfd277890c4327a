//! Program sets, in generations.
//!
//! A set is a folder on bpffs named by its hash: the pins of its programs, and hard links to the pins of the maps that
//! they use. It is put together in a staging folder on the same bpffs: an existing map that is made as it should be is
//! linked in, another is made fresh and filled, and the map of calls between programs is always a fresh one; programs
//! are loaded against these; then the folder is renamed and fresh maps take the public names. A failure before that
//! removes the staging folder and has changed nothing. Nothing is attached here, so the running set goes on until each
//! of its hooks is moved over; its own folder keeps the maps that it uses alive as long.
//!
//! Whatever a crash leaves is in a folder that has the set's name, here or in staging, so that the next start sees it
//! among the sets that are broken, and unloads it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use aya::{
    EbpfLoader,
    maps::{MapData, MapInfo},
    programs::{ProgramError, ProgramInfo, SchedClassifier},
};
use basal_maps::{
    config::{self, Config},
    spec::{self, MapKind, MapSpec},
};

use super::{Paths, fault::Fault, maps, remove_pin, remove_pins};
use crate::{
    kernel::ReadError,
    program::{ProgramHash, ProgramSet},
    rows::{MapId, Rows},
    state::{NodeState, Symbol},
};

/// The program sets that are pinned.
#[derive(Debug, Default)]
pub(super) struct Loaded {
    /// Those that can be used, with the kernel's ids of their programs.
    sets: BTreeMap<ProgramHash, BTreeMap<Symbol, u32>>,
    /// What there is of others.
    broken: BTreeSet<ProgramHash>,
}

impl Loaded {
    /// The set that a program is of.
    pub(super) fn set_of(&self, symbol: Symbol, program_id: u32) -> ProgramHash {
        let found = self.sets.iter().find(|(_, programs)| programs.get(&symbol) == Some(&program_id));
        found.map_or(ProgramHash::FOREIGN, |(hash, _)| *hash)
    }

    /// Tells the state which sets there are.
    pub(super) fn tell(self, state: &mut NodeState) {
        state.programs = self.sets.into_keys().collect();
        state.broken_programs = self.broken;
    }
}

/// Where a program of a set is pinned.
pub(super) fn pin(paths: &Paths, hash: ProgramHash, symbol: Symbol) -> PathBuf {
    paths.programs().join(hash.to_string()).join(symbol.as_str())
}

/// Loads a set.
pub(super) fn load(paths: &Paths, set: &ProgramSet, rows: &Rows) -> Result<(), Fault> {
    if set.object.bytes().is_empty() {
        return Err(Fault::NoObject);
    }
    let staging = paths.staging();
    remove_pins(&staging).map_err(|error| Fault::path(&staging, error))?;
    let hash = set.hash();
    let staged = staging.join(hash.to_string());
    let published = stage(paths, &staged, set, rows).and_then(|fresh| publish(paths, &staged, hash, &fresh));
    remove_pins(&staging).map_err(|error| Fault::path(&staging, error))?;
    published
}

/// Fills the staging folder; gives the names of maps that were made.
fn stage(paths: &Paths, staging: &Path, set: &ProgramSet, rows: &Rows) -> Result<BTreeSet<&'static str>, Fault> {
    let config = &set.config;
    make_dir(staging)?;
    let mut fresh = BTreeSet::new();
    let mut loader = EbpfLoader::new();
    let constants: [u8; size_of::<Config>()] = zerocopy::transmute!(*config);
    loader.override_global(config::SYMBOL, &constants, true);
    for map in spec::not_of(config) {
        // Nothing runs that looks into it, yet the loader makes every map of the object, with all of its rows.
        loader.map_max_entries(map.name, 1);
    }
    let others = sets(&paths.programs()).map_err(|error| Fault::path(&paths.programs(), error))?;
    for map in spec::of(config) {
        let (public, staged) = (paths.maps().join(map.name), staging.join(map.name));
        loader.map_max_entries(map.name, map.max_entries);
        // Programs call those of their own set: what one leaves for the other is nothing that versions agree on.
        let mut is_shared = map.kind != MapKind::ProgArray;
        if spec::OF_DIRECT_ROUTING.iter().any(|direct| direct.name == map.name) {
            // One that no set has was left by a build that does not know it, and what it says is old.
            let has = |(_, set): &(ProgramHash, PathBuf)| set.join(map.name).try_exists();
            is_shared &= any(&others, has).map_err(|error| Fault::path(&paths.programs(), error))?;
        }
        if is_shared && maps::fits(&public, &map).map_err(|error| Fault::path(&public, error))? {
            fs::hard_link(&public, &staged).map_err(|error| Fault::path(&staged, error))?;
        } else {
            fresh.insert(map.name);
        }
        loader.map_pin_path(map.name, staged);
    }
    let mut object = loader.load(set.object.bytes()).map_err(|error| Fault::at("the BPF object", chain(&error)))?;

    for (map, rows) in rows.iter().filter(|(map, _)| fresh.contains(map.spec().name)) {
        fill(*map, rows, staging)?;
    }
    for symbol in Symbol::of(config.bpf_masquerade()) {
        let name = symbol.as_str();
        let program = object.program_mut(name).ok_or_else(|| Fault::at(name, "the BPF object has no such program"))?;
        let program: &mut SchedClassifier = program.try_into().map_err(|error| Fault::at(name, chain(&error)))?;
        program.load().map_err(|error| refused(name, &error))?;
        program.pin(staging.join(name)).map_err(|error| Fault::at(name, chain(&error)))?;
    }
    for name in &fresh {
        let (own, public) = (staging.join(name), to_publish(staging, name));
        fs::hard_link(&own, &public).map_err(|error| Fault::path(&public, error))?;
    }
    Ok(fresh)
}

/// Why a program was not loaded. The verifier says at the end of its log what it does not take; before that stands what it
/// walked through, which may be megabytes.
fn refused(program: &'static str, error: &ProgramError) -> Fault {
    const LINES: usize = 12;
    let ProgramError::LoadError { io_error, verifier_log } = error else { return Fault::at(program, chain(error)) };
    let log = verifier_log.to_string();
    let lines: Vec<&str> = log.trim().lines().collect();
    let end = lines.get(lines.len().saturating_sub(LINES)..).unwrap_or_default().join("; ");
    Fault::ProgramRefused { program, message: format!("{io_error}: {end}") }
}

fn fill(map: MapId, rows: &BTreeMap<Vec<u8>, Vec<u8>>, dir: &Path) -> Result<(), Fault> {
    let path = dir.join(map.spec().name);
    for (key, value) in rows {
        let data = MapData::from_pin(&path).map_err(|error| Fault::path(&path, chain(&error)))?;
        maps::put(map, data, key, value)?;
    }
    Ok(())
}

/// The pin of a set's fresh map that becomes the public one; the other stays the set's own. bpffs takes no dots in names.
fn to_publish(set: &Path, map: &str) -> PathBuf {
    set.join(format!("{map}_new"))
}

/// Gives the staged set its name, then the maps that it was first to make theirs.
fn publish(paths: &Paths, staging: &Path, hash: ProgramHash, fresh: &BTreeSet<&str>) -> Result<(), Fault> {
    let set = paths.programs().join(hash.to_string());
    make_dir(&paths.programs())?;
    make_dir(&paths.maps())?;
    // One of this name is unusable, else nobody would have asked. What runs from it is held by its links.
    remove_pins(&set).map_err(|error| Fault::path(&set, error))?;
    fs::rename(staging, &set).map_err(|error| Fault::path(&set, error))?;
    for name in fresh {
        let public = paths.maps().join(name);
        fs::rename(to_publish(&set, name), &public).map_err(|error| Fault::path(&public, error))?;
    }
    Ok(())
}

/// Removes all that there is of a set, and before it the maps that are not always there and that no other set has: they
/// are large.
pub(super) fn unload(paths: &Paths, hash: ProgramHash) -> Result<(), Fault> {
    let (dir, staging) = (paths.programs(), paths.staging());
    let name = hash.to_string();
    let own = dir.join(&name);
    let mut others = sets(&dir).map_err(|error| Fault::path(&dir, error))?;
    others.retain(|(other, _)| *other != hash);
    for map in spec::OPTIONAL.into_iter().flatten() {
        let has = |set: &Path| set.join(map.name).try_exists();
        let last = || -> io::Result<bool> { Ok(has(&own)? && !any(&others, |(_, set)| has(set))?) };
        let public = paths.maps().join(map.name);
        if last().map_err(|error| Fault::path(&dir, error))? {
            remove_pin(&public).map_err(|error| Fault::path(&public, error))?;
        }
    }
    for of_set in [own, staging.join(name)] {
        remove_pins(&of_set).map_err(|error| Fault::path(&of_set, error))?;
    }
    match fs::remove_dir(&staging) {
        // Others may be in it.
        Err(error) if !matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotFound) => {
            Err(Fault::path(&staging, error))
        }
        _ => Ok(()),
    }
}

/// Lists the sets. One that lacks a program, or whose maps are not those under the public names, is broken: it is loaded
/// again when it is wanted, and removed when it is not. So is one that was never finished.
pub(super) fn read(paths: &Paths) -> Result<Loaded, ReadError> {
    let (dir, staging) = (paths.programs(), paths.staging());
    let failed = |error| ReadError::new(dir.display().to_string(), error);
    let mut loaded = Loaded::default();
    for (hash, set) in sets(&dir).map_err(failed)? {
        match usable(paths, &set).map_err(failed)? {
            Some(programs) => drop(loaded.sets.insert(hash, programs)),
            None => drop(loaded.broken.insert(hash)),
        }
    }
    loaded.broken.extend(sets(&staging).map_err(failed)?.into_iter().map(|(hash, _)| hash));
    Ok(loaded)
}

/// The folders of sets.
fn sets(dir: &Path) -> io::Result<Vec<(ProgramHash, PathBuf)>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut sets = Vec::new();
    for entry in entries {
        let entry = entry?;
        sets.extend(entry.file_name().to_str().and_then(ProgramHash::parse).map(|hash| (hash, entry.path())));
    }
    Ok(sets)
}

/// The ids of a set's programs; `None` when the set is not usable. One that has anything of masquerading, or of direct
/// routing, has to have everything.
fn usable(paths: &Paths, set: &Path) -> io::Result<Option<BTreeMap<Symbol, u32>>> {
    let same = |own: &Path, public: &Path| -> io::Result<bool> {
        Ok(own.try_exists()? && public.try_exists()? && map_id(own)? == map_id(public)?)
    };
    for map in &spec::BASE {
        let (own, public) = (set.join(map.name), paths.maps().join(map.name));
        if !maps::fits(&own, map)? || !maps::fits(&public, map)? || !same(&own, &public)? {
            return Ok(None);
        }
    }
    let has = |name: &&str| set.join(name).try_exists();
    let symbols = Symbol::ALL.into_iter().filter(|symbol| symbol.is_for_masquerading()).map(Symbol::as_str);
    let names_of = |maps: &[MapSpec]| maps.iter().map(|map| map.name).collect::<Vec<_>>();
    let masquerades = any(&names_of(&spec::OF_MASQUERADING).into_iter().chain(symbols).collect::<Vec<_>>(), has)?;
    let is_direct = any(&names_of(&spec::OF_DIRECT_ROUTING), has)?;
    let masquerading = spec::OF_MASQUERADING.iter().filter(|_| masquerades);
    for map in masquerading.chain(spec::OF_DIRECT_ROUTING.iter().filter(|_| is_direct)) {
        // How large it is made is part of the set's hash.
        if !same(&set.join(map.name), &paths.maps().join(map.name))? {
            return Ok(None);
        }
    }
    let mut programs = BTreeMap::new();
    for symbol in Symbol::of(masquerades) {
        let path = set.join(symbol.as_str());
        if !path.try_exists()? {
            return Ok(None);
        }
        programs.insert(symbol, ProgramInfo::from_pin(&path).map_err(io::Error::other)?.id());
    }
    Ok(Some(programs))
}

/// True when one of the things is so.
fn any<T>(things: &[T], is_so: impl Fn(&T) -> io::Result<bool>) -> io::Result<bool> {
    for thing in things {
        if is_so(thing)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn map_id(path: &Path) -> io::Result<u32> {
    MapInfo::from_pin(path).map(|info| info.id()).map_err(io::Error::other)
}

pub(super) fn make_dir(dir: &Path) -> Result<(), Fault> {
    fs::create_dir_all(dir).map_err(|error| Fault::path(dir, error))
}

/// An error with its causes: aya's say what failed, their sources why.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
