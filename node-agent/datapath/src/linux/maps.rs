//! Pinned maps: rows of the maps that the agent fills, and the counters.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use aya::{
    Pod,
    maps::{HashMap, LpmTrie, Map, MapData, MapError, MapInfo, PerCpuHashMap, lpm_trie::Key},
    sys::SyscallError,
};
use basal_maps::{
    metrics::{MetricsKey, MetricsValue},
    spec::{self, MapSpec},
};
use zerocopy::FromBytes as _;

use super::{batch, fault::Fault};
use crate::{
    kernel::ReadError,
    rows::{MapId, Row},
    state::NodeState,
};

/// The maps pinned in a folder.
#[derive(Debug, Clone)]
pub struct PinnedMaps {
    dir: PathBuf,
}

impl PinnedMaps {
    /// The maps pinned in `dir`, usually [`super::Paths::maps`].
    #[must_use]
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Rows of a map; `None` when it does not exist or was made differently.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn rows(&self, map: MapId) -> io::Result<Option<BTreeMap<Vec<u8>, Vec<u8>>>> {
        let spec = map.spec();
        let Some(data) = self.open(spec)? else { return Ok(None) };
        let mut rows = BTreeMap::new();
        let read = batch::each(&data, spec.key_size as usize, spec.value_size as usize, |key, value| {
            rows.insert(key.to_vec(), value.to_vec());
            Ok(())
        });
        match read {
            Err(error) if batch::is_unsupported(&error) => self.rows_one_by_one(map),
            read => read.map(|()| Some(rows)),
        }
    }

    /// The same with two system calls for each row, for kernels that do not read tries otherwise.
    ///
    /// # Errors
    /// As [`PinnedMaps::rows`].
    pub fn rows_one_by_one(&self, map: MapId) -> io::Result<Option<BTreeMap<Vec<u8>, Vec<u8>>>> {
        let Some(data) = self.open(map.spec())? else { return Ok(None) };
        let rows = match map {
            MapId::Endpoints => hash_rows::<20, 48>(data),
            MapId::Nodes => hash_rows::<20, 4>(data),
            MapId::Ipcache => trie_rows::<20, 24>(data),
            MapId::Tunnel => trie_rows::<20, 20>(data),
            MapId::Masquerade => hash_rows::<8, 16>(data),
            MapId::Exempt4 => trie_rows::<4, 1>(data),
            MapId::Exempt6 => trie_rows::<16, 1>(data),
        };
        rows.map(Some).map_err(io::Error::other)
    }

    /// The counters of all CPUs together, by key.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn metrics(&self) -> io::Result<BTreeMap<MetricsKey, MetricsValue>> {
        let Some(data) = self.open(&spec::METRICS)? else { return Ok(BTreeMap::new()) };
        let sum = || -> Result<_, MapError> {
            let counters = PerCpuHashMap::<_, [u8; 8], [u64; 2]>::try_from(Map::PerCpuHashMap(data))?;
            let mut sums = BTreeMap::new();
            for row in counters.iter() {
                let (key, per_cpu) = row?;
                let Ok(key) = MetricsKey::read_from_bytes(&key) else { continue };
                let total = per_cpu.iter().fold(MetricsValue::default(), |sum, [count, bytes]| MetricsValue {
                    count: sum.count.wrapping_add(*count),
                    bytes: sum.bytes.wrapping_add(*bytes),
                });
                sums.insert(key, total);
            }
            Ok(sums)
        };
        sum().map_err(io::Error::other)
    }

    pub(super) fn read(&self, maps: impl Iterator<Item = MapId>, state: &mut NodeState) -> Result<(), ReadError> {
        for map in maps {
            if let Some(rows) = self.rows(map).map_err(|error| ReadError::new(map.spec().name, error))? {
                state.maps.insert(map, rows);
            }
        }
        Ok(())
    }

    pub(super) fn put(&self, row: &Row) -> Result<(), Fault> {
        let data = self.open_to_write(row.map)?;
        put(row.map, data, &row.key, &row.value)
    }

    pub(super) fn delete(&self, map: MapId, key: &[u8]) -> Result<(), Fault> {
        let data = self.open_to_write(map)?;
        let deleted = match map {
            MapId::Endpoints => hash::<20, 48>(data).and_then(|mut map| map.remove(&array(key)?)),
            MapId::Nodes => hash::<20, 4>(data).and_then(|mut map| map.remove(&array(key)?)),
            MapId::Ipcache => trie::<20, 24>(data).and_then(|mut map| map.remove(&trie_key(key)?)),
            MapId::Tunnel => trie::<20, 20>(data).and_then(|mut map| map.remove(&trie_key(key)?)),
            MapId::Masquerade => hash::<8, 16>(data).and_then(|mut map| map.remove(&array(key)?)),
            MapId::Exempt4 => trie::<4, 1>(data).and_then(|mut map| map.remove(&trie_key(key)?)),
            MapId::Exempt6 => trie::<16, 1>(data).and_then(|mut map| map.remove(&trie_key(key)?)),
        };
        match deleted {
            Err(error) if errno(&error) != Some(nix::errno::Errno::ENOENT) => Err(Fault::at(map.spec().name, error)),
            _ => Ok(()),
        }
    }

    fn open(&self, spec: &MapSpec) -> io::Result<Option<MapData>> {
        open(&self.dir.join(spec.name), spec)
    }

    /// Opens a map that is made as it should be, apart from its size; gives that, too.
    pub(super) fn open_of_any_size(&self, spec: &MapSpec) -> io::Result<Option<(MapData, u32)>> {
        let path = self.dir.join(spec.name);
        if !path.try_exists()? {
            return Ok(None);
        }
        let max_entries = MapInfo::from_pin(&path).map_err(io::Error::other)?.max_entries();
        Ok(open(&path, &MapSpec { max_entries, ..*spec })?.map(|data| (data, max_entries)))
    }

    fn open_to_write(&self, map: MapId) -> Result<MapData, Fault> {
        let name = map.spec().name;
        let data = self.open(map.spec()).map_err(|error| Fault::at(name, error))?;
        data.ok_or_else(|| Fault::at(name, "the map is not there, or is not made as it should be; load programs first"))
    }
}

/// Opens a pinned map that is made as it should be.
fn open(path: &Path, spec: &MapSpec) -> io::Result<Option<MapData>> {
    if !fits(path, spec)? {
        return Ok(None);
    }
    MapData::from_pin(path).map(Some).map_err(io::Error::other)
}

/// True when a map is pinned at the path and the kernel reports it as made to the specification.
pub(super) fn fits(path: &Path, spec: &MapSpec) -> io::Result<bool> {
    if !path.try_exists()? {
        return Ok(false);
    }
    let info = MapInfo::from_pin(path).map_err(io::Error::other)?;
    let kind = info.map_type().map(|kind| kind as u32).ok();
    let found = (kind, info.key_size(), info.value_size(), info.max_entries(), info.map_flags());
    Ok(found == (Some(spec.kind as u32), spec.key_size, spec.value_size, spec.max_entries, spec.flags))
}

/// Writes a row into an open map.
pub(super) fn put(map: MapId, data: MapData, key: &[u8], value: &[u8]) -> Result<(), Fault> {
    let written = match map {
        MapId::Endpoints => hash::<20, 48>(data).and_then(|mut map| map.insert(array(key)?, array(value)?, 0)),
        MapId::Nodes => hash::<20, 4>(data).and_then(|mut map| map.insert(array(key)?, array(value)?, 0)),
        MapId::Ipcache => trie::<20, 24>(data).and_then(|mut map| map.insert(&trie_key(key)?, array(value)?, 0)),
        MapId::Tunnel => trie::<20, 20>(data).and_then(|mut map| map.insert(&trie_key(key)?, array(value)?, 0)),
        MapId::Masquerade => hash::<8, 16>(data).and_then(|mut map| map.insert(array(key)?, array(value)?, 0)),
        MapId::Exempt4 => trie::<4, 1>(data).and_then(|mut map| map.insert(&trie_key(key)?, array(value)?, 0)),
        MapId::Exempt6 => trie::<16, 1>(data).and_then(|mut map| map.insert(&trie_key(key)?, array(value)?, 0)),
    };
    written.map_err(|error| match errno(&error) {
        // Hash maps and tries say it differently.
        Some(nix::errno::Errno::E2BIG | nix::errno::Errno::ENOSPC) => Fault::MapFull(map),
        _ => Fault::at(map.spec().name, error),
    })
}

pub(super) fn errno(error: &MapError) -> Option<nix::errno::Errno> {
    match error {
        MapError::SyscallError(SyscallError { io_error, .. }) => {
            io_error.raw_os_error().map(nix::errno::Errno::from_raw)
        }
        MapError::KeyNotFound => Some(nix::errno::Errno::ENOENT),
        _ => None,
    }
}

fn hash<const K: usize, const V: usize>(data: MapData) -> Result<HashMap<MapData, [u8; K], [u8; V]>, MapError>
where
    [u8; K]: Pod,
    [u8; V]: Pod,
{
    HashMap::try_from(Map::HashMap(data))
}

fn trie<const K: usize, const V: usize>(data: MapData) -> Result<LpmTrie<MapData, [u8; K], [u8; V]>, MapError>
where
    [u8; K]: Pod,
    [u8; V]: Pod,
{
    LpmTrie::try_from(Map::LpmTrie(data))
}

fn array<const N: usize>(bytes: &[u8]) -> Result<[u8; N], MapError> {
    bytes.try_into().map_err(|_other_size| MapError::InvalidKeySize { size: bytes.len(), expected: N })
}

/// A trie's key: the prefix length as a native u32, then the rest.
fn trie_key<const N: usize>(bytes: &[u8]) -> Result<Key<[u8; N]>, MapError> {
    let (length, rest) =
        bytes.split_first_chunk::<4>().ok_or(MapError::InvalidKeySize { size: bytes.len(), expected: N + 4 })?;
    Ok(Key::new(u32::from_ne_bytes(*length), array(rest)?))
}

fn hash_rows<const K: usize, const V: usize>(data: MapData) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, MapError>
where
    [u8; K]: Pod,
    [u8; V]: Pod,
{
    hash::<K, V>(data)?.iter().map(|row| row.map(|(key, value)| (key.to_vec(), value.to_vec()))).collect()
}

fn trie_rows<const K: usize, const V: usize>(data: MapData) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, MapError>
where
    [u8; K]: Pod,
    [u8; V]: Pod,
{
    let bytes = |key: Key<[u8; K]>| [key.prefix_len().to_ne_bytes().as_slice(), key.data().as_slice()].concat();
    trie::<K, V>(data)?.iter().map(|row| row.map(|(key, value)| (bytes(key), value.to_vec()))).collect()
}
