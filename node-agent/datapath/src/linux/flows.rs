//! Reading the maps of flows, and taking away what is over.

use std::{io, time::Duration};

use aya::{
    Pod,
    maps::{HashMap, Map},
};
use basal_maps::{
    conntrack::CtEntry,
    flow::{DIR_OUT, DirectConnection, Tuple, TupleV4, TupleV6},
    nat::{NatEntry, NatEntryV4, NatEntryV6},
    protocol,
    spec::{self, MapSpec},
};
use nix::{
    errno::Errno,
    time::{ClockId, clock_gettime},
};
use zerocopy::FromBytes;

use super::{
    batch,
    maps::{PinnedMaps, errno},
};
use crate::flows::{MapUse, Translation, translations_of};

/// The maps of one family.
struct Family {
    tcp: &'static MapSpec,
    any: &'static MapSpec,
    nat: &'static MapSpec,
}

const IPV4: Family = Family { tcp: &spec::CT4_TCP, any: &spec::CT4_ANY, nat: &spec::NAT4 };
const IPV6: Family = Family { tcp: &spec::CT6_TCP, any: &spec::CT6_ANY, nat: &spec::NAT6 };

/// An open map of flows with keys of so many bytes and values of so many.
struct FlowMap<const K: usize, const V: usize> {
    name: &'static str,
    max: u32,
    map: Map,
}

impl<const K: usize, const V: usize> FlowMap<K, V>
where
    [u8; K]: Pod,
    [u8; V]: Pod,
{
    /// `None` when the map is not there.
    fn open(maps: &PinnedMaps, spec: &MapSpec) -> io::Result<Option<Self>> {
        let Some((data, max)) = maps.open_of_any_size(spec)? else { return Ok(None) };
        Ok(Some(Self { name: spec.name, max, map: Map::LruHashMap(data) }))
    }

    fn each(&self, visit: impl FnMut(&[u8], &[u8]) -> io::Result<()>) -> io::Result<()> {
        match &self.map {
            Map::LruHashMap(data) => batch::each(data, K, V, visit),
            _ => Ok(()),
        }
    }

    fn get(&self, key: &impl Tuple) -> io::Result<Option<[u8; V]>> {
        let map = HashMap::<_, [u8; K], [u8; V]>::try_from(&self.map).map_err(io::Error::other)?;
        match map.get(&array(key)?, 0) {
            Ok(value) => Ok(Some(value)),
            Err(error) if errno(&error) == Some(Errno::ENOENT) => Ok(None),
            Err(error) => Err(io::Error::other(error)),
        }
    }

    /// Whether there was such a row.
    fn remove(&mut self, key: &impl Tuple) -> io::Result<bool> {
        let mut map = HashMap::<_, [u8; K], [u8; V]>::try_from(&mut self.map).map_err(io::Error::other)?;
        match map.remove(&array(key)?) {
            Ok(()) => Ok(true),
            Err(error) if errno(&error) == Some(Errno::ENOENT) => Ok(false),
            Err(error) => Err(io::Error::other(error)),
        }
    }

    /// Takes away the rows of connections that are over, and tells of each right after; answers how full the map is then.
    fn end<T: Tuple, R: FromBytes>(
        &mut self,
        is_over: impl Fn(&R, u64) -> bool,
        mut ended: impl FnMut(&T) -> io::Result<()>,
    ) -> io::Result<MapUse> {
        let (at, mut rows, mut over) = (now()?, 0, Vec::new());
        self.each(|key, row| {
            rows += 1;
            if is_over(&read(row)?, at.as_secs()) {
                over.push(read::<T>(key)?);
            }
            Ok(())
        })?;
        let mut deleted = 0;
        for key in over {
            // A packet may have come by since.
            let Some(row) = self.get(&key)? else { continue };
            if is_over(&read(&row)?, now()?.as_secs()) && self.remove(&key)? {
                deleted += 1;
                ended(&key)?;
            }
        }
        Ok(self.as_used(rows, deleted))
    }

    fn as_used(&self, rows: usize, deleted: usize) -> MapUse {
        MapUse { map: self.name, rows: rows.saturating_sub(deleted), max: self.max, deleted }
    }
}

fn array<const N: usize>(key: &impl Tuple) -> io::Result<[u8; N]> {
    read(key.as_bytes())
}

/// A row's part as its layout.
fn read<T: FromBytes>(bytes: &[u8]) -> io::Result<T> {
    T::read_from_bytes(bytes).map_err(|_other| io::Error::other(format!("{} bytes are another layout's", bytes.len())))
}

/// The time by the clock that the programs use, which starts with the machine.
fn now() -> io::Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_MONOTONIC)?.into())
}

/// Takes away what is over, and tells how full the maps are; nothing where there are none.
pub(super) fn collect(maps: &PinnedMaps) -> io::Result<Vec<MapUse>> {
    let mut used = Vec::new();
    collect_family::<TupleV4, NatEntryV4, 14, 40>(maps, &IPV4, &mut used)?;
    collect_family::<TupleV6, NatEntryV6, 38, 56>(maps, &IPV6, &mut used)?;
    used.extend(collect_direct::<TupleV4, 14>(maps, &spec::DIRECT4)?);
    used.extend(collect_direct::<TupleV6, 38>(maps, &spec::DIRECT6)?);
    Ok(used)
}

/// Takes away the notes of connections that are over; `None` where nothing goes past the stack.
fn collect_direct<T: Tuple, const K: usize>(maps: &PinnedMaps, spec: &MapSpec) -> io::Result<Option<MapUse>>
where
    [u8; K]: Pod,
{
    let notes = FlowMap::<K, { size_of::<DirectConnection>() }>::open(maps, spec)?;
    notes.map(|mut notes| notes.end::<T, DirectConnection>(DirectConnection::is_over, |_| Ok(()))).transpose()
}

fn collect_family<T: Tuple, N: NatEntry, const K: usize, const V: usize>(
    maps: &PinnedMaps,
    family: &Family,
    used: &mut Vec<MapUse>,
) -> io::Result<()>
where
    [u8; K]: Pod,
    [u8; V]: Pod,
{
    let (Some(mut tcp), Some(mut any), Some(mut nat)) =
        (Connections::open(maps, family.tcp)?, Connections::open(maps, family.any)?, FlowMap::open(maps, family.nat)?)
    else {
        return Ok(());
    };
    let ended = end_connections::<T, N, K, V>(&mut tcp, &mut nat, used)?
        + end_connections::<T, N, K, V>(&mut any, &mut nat, used)?;
    let (rows, orphans) = orphans::<T, N, K, V>(&tcp, &any, &nat)?;
    let mut deleted = 0;
    for key in orphans {
        deleted += usize::from(nat.remove(&key)?);
    }
    let left = nat.as_used(rows, deleted);
    used.push(MapUse { deleted: deleted + ended, ..left });
    Ok(())
}

/// A map of connection tracking.
type Connections<const K: usize> = FlowMap<K, { size_of::<CtEntry>() }>;

/// Takes away the connections whose time is over, each with its translations; answers how many those were.
fn end_connections<T: Tuple, N: NatEntry, const K: usize, const V: usize>(
    connections: &mut Connections<K>,
    nat: &mut FlowMap<K, V>,
    used: &mut Vec<MapUse>,
) -> io::Result<usize>
where
    [u8; K]: Pod,
    [u8; V]: Pod,
{
    let mut translations = 0;
    used.push(connections.end::<T, CtEntry>(CtEntry::is_over, |key| {
        let Some(found) = nat.get(&key.with_addresses_swapped())?.filter(|_| key.flags() == DIR_OUT) else {
            return Ok(());
        };
        for key in translations_of(key, read::<N>(&found)?.to()) {
            translations += usize::from(nat.remove(&key)?);
        }
        Ok(())
    })?);
    Ok(translations)
}

/// How many translations there are, and those that belong to no connection.
fn orphans<T: Tuple, N: NatEntry, const K: usize, const V: usize>(
    tcp: &Connections<K>,
    any: &Connections<K>,
    nat: &FlowMap<K, V>,
) -> io::Result<(usize, Vec<T>)>
where
    [u8; K]: Pod,
    [u8; V]: Pod,
{
    let (at, mut rows, mut orphans) = (now()?, 0, Vec::new());
    nat.each(|key, entry| {
        rows += 1;
        let (key, entry) = (read::<T>(key)?, read::<N>(entry)?);
        let row = Translation { key, to: entry.to(), created: Duration::from_nanos(entry.created()) };
        let of_protocol = if key.nexthdr() == protocol::TCP { tcp } else { any };
        let tracked = of_protocol.get(&row.connection())?.is_some();
        let taken = nat.get(&row.leaving())?.map(|entry| read::<N>(&entry)).transpose()?;
        if row.is_orphan(tracked, taken.map(|entry| entry.to()), at) {
            orphans.push(key);
        }
        Ok(())
    })?;
    Ok((rows, orphans))
}
