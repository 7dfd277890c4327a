//! What the agent holds of all endpoints: their records, numbers and addresses.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use basal_cni::api::{Attachment, PodRef};
use basal_crds::{identity::IdentityId, labels::Labels};
use basal_ipam::{
    addresses::{AddressRefusal, Addresses as Pool, Owner},
    prefix::{Family, PodCidr},
};

use super::{
    record::{Addresses, EndpointId, EndpointRecord, Phase},
    step::Seen,
};
use crate::journal::JournalKey;

/// One endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Its number.
    pub id: EndpointId,
    /// Its addresses.
    pub addresses: Addresses,
    /// Its record; `None` when the journal's cannot be read: then only DEL and GC touch it.
    pub record: Option<EndpointRecord>,
    /// What the journal holds, as far as is known.
    pub journal: Option<Phase>,
    /// Whether it is in the datapath.
    pub connected: bool,
    /// Whether its ip records were handed to the directory.
    pub announced: bool,
    /// The labels that a reference on an identity is held for.
    pub reference: Option<Labels>,
}

impl Slot {
    /// What is seen of it.
    #[must_use]
    pub fn seen(&self) -> Seen {
        Seen { journal: self.journal, connected: self.connected, announced: self.announced, reserved: true }
    }

    /// `status.state` of the CiliumEndpoint.
    #[must_use]
    pub fn state_text(&self) -> &'static str {
        match &self.record {
            None => "restoring",
            Some(record) => match record.phase {
                Phase::Removing => "disconnecting",
                _ if !self.connected => "not-ready",
                _ if record.identity == IdentityId::INIT => "waiting-for-identity",
                Phase::Adding => "regenerating",
                Phase::Committed => "ready",
            },
        }
    }
}

/// All endpoints.
#[derive(Debug, Clone)]
pub struct State {
    slots: BTreeMap<JournalKey, Slot>,
    pool: Pool,
    families: Vec<Family>,
    /// The endpoint that a number was given to last: numbers are not used again at once.
    last_id: u16,
}

/// Why there is no place for an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReserveError {
    /// No address.
    #[error(transparent)]
    Address(#[from] AddressRefusal),
    /// No number.
    #[error("all {} endpoint ids of this node are in use", EndpointId::MAX)]
    NoId,
}

impl ReserveError {
    /// Whether waiting may help.
    #[must_use]
    pub fn is_temporary(&self) -> bool {
        match self {
            Self::Address(refusal) => refusal.is_temporary(),
            Self::NoId => true,
        }
    }
}

fn owner(key: &JournalKey) -> Owner {
    Owner::new(key.as_str())
}

/// One address of each family at most, out of a list.
#[must_use]
pub fn by_family(addresses: impl IntoIterator<Item = IpAddr>) -> Addresses {
    let mut found = Addresses::default();
    for address in addresses {
        match address {
            IpAddr::V4(ip) => found.v4 = Some(ip),
            IpAddr::V6(ip) => found.v6 = Some(ip),
        }
    }
    found
}

impl State {
    /// No endpoint and no block.
    #[must_use]
    pub fn new(families: Vec<Family>, cooldown: Duration) -> Self {
        Self { slots: BTreeMap::new(), pool: Pool::new(cooldown), families, last_id: 0 }
    }

    /// The families that every endpoint has an address of.
    #[must_use]
    pub fn families(&self) -> &[Family] {
        &self.families
    }

    /// Says which blocks new addresses come from.
    pub fn serve(&mut self, confirmed: &BTreeSet<PodCidr>) {
        self.pool.serve(&confirmed.iter().copied().collect::<Vec<_>>());
    }

    /// The addresses, for reports.
    #[must_use]
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The node's own addresses (router, health): those that it had, where they can still be had.
    ///
    /// # Errors
    /// None is free.
    pub fn own(&mut self, owner: &Owner, earlier: &[IpAddr], now: Duration) -> Result<Addresses, AddressRefusal> {
        let served: Vec<IpAddr> = earlier.iter().copied().filter(|ip| self.pool.is_served(*ip)).collect();
        let families = self.families.clone();
        let found = self.pool.allocate(owner, &families, &served, now).or_else(|_taken| {
            // Somebody else got it meanwhile, or it cannot be had at all: any other will do.
            self.pool.allocate(owner, &families, &[], now)
        })?;
        Ok(by_family(found))
    }

    /// One endpoint.
    #[must_use]
    pub fn get(&self, key: &JournalKey) -> Option<&Slot> {
        self.slots.get(key)
    }

    /// One endpoint, to change it.
    pub fn get_mut(&mut self, key: &JournalKey) -> Option<&mut Slot> {
        self.slots.get_mut(key)
    }

    /// All endpoints.
    pub fn iter(&self) -> impl Iterator<Item = (&JournalKey, &Slot)> {
        self.slots.iter()
    }

    /// The endpoints of a pod.
    pub fn of_pod<'a>(&'a self, namespace: &'a str, name: &'a str) -> impl Iterator<Item = (&'a JournalKey, &'a Slot)> {
        self.slots.iter().filter(move |(_, slot)| {
            let pod = slot.record.as_ref().and_then(|record| record.pod.as_ref());
            pod.is_some_and(|pod| pod.namespace == namespace && pod.name == name)
        })
    }

    /// Reserves number and addresses for an endpoint.
    ///
    /// # Errors
    /// See [`ReserveError`].
    pub fn reserve(
        &mut self,
        key: &JournalKey,
        wanted: &[IpAddr],
        now: Duration,
    ) -> Result<(EndpointId, Addresses), ReserveError> {
        let used: BTreeSet<EndpointId> = self.slots.values().map(|slot| slot.id).collect();
        let last = self.last_id;
        let (behind, ahead): (Vec<_>, Vec<_>) = EndpointId::all().partition(|id| id.get() <= last);
        let id = ahead.into_iter().chain(behind).find(|id| !used.contains(id)).ok_or(ReserveError::NoId)?;
        let families = self.families.clone();
        let addresses = self.pool.allocate(&owner(key), &families, wanted, now)?;
        self.last_id = id.get();
        Ok((id, by_family(addresses)))
    }

    /// Holds an endpoint whose place was reserved.
    pub fn insert(&mut self, key: JournalKey, slot: Slot) {
        self.slots.insert(key, slot);
    }

    /// Takes in an endpoint from before a restart.
    ///
    /// # Errors
    /// An address of it is somebody else's; it is not taken in.
    pub fn restore(&mut self, key: JournalKey, slot: Slot) -> Result<(), AddressRefusal> {
        let owner = owner(&key);
        for address in slot.addresses.iter() {
            if let Err(refusal) = self.pool.occupy(&owner, address) {
                // Another endpoint's record has it: what was taken so far goes back.
                self.pool.release(&owner, Duration::ZERO);
                return Err(refusal);
            }
        }
        self.slots.insert(key, slot);
        Ok(())
    }

    /// Gives number and addresses back.
    pub fn release(&mut self, key: &JournalKey, now: Duration) {
        self.pool.release(&owner(key), now);
        self.slots.remove(key);
    }

    /// Those that GC removes: all that were answered to the runtime and that it does not list, and those whose removal is
    /// not finished. Records that cannot be read are recognised by the name of their interface.
    #[must_use]
    pub fn orphans(&self, valid: &BTreeSet<Attachment>) -> Vec<JournalKey> {
        let valid: BTreeSet<JournalKey> = valid.iter().map(JournalKey::of).collect();
        let answered = |slot: &Slot| slot.record.as_ref().is_none_or(|record| record.phase != Phase::Adding);
        let orphan = |(key, slot): &(&JournalKey, &Slot)| answered(slot) && !valid.contains(*key);
        self.slots.iter().filter(orphan).map(|(key, _)| key.clone()).collect()
    }

    /// Who has an address, for reports: a pod by its name.
    #[must_use]
    pub fn owner_text(&self, owner: &Owner) -> String {
        let slot = self.slots.get(&JournalKey::found(owner.as_str()));
        let record = slot.and_then(|slot| slot.record.as_ref());
        record.map_or_else(|| owner.as_str().to_owned(), EndpointRecord::owner)
    }

    /// The pods that have endpoints.
    #[must_use]
    pub fn pods(&self) -> BTreeSet<PodRef> {
        self.slots.values().filter_map(|slot| slot.record.as_ref()?.pod.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::restore::tests::record;

    const NOW: Duration = Duration::ZERO;

    fn key(n: u32) -> JournalKey {
        JournalKey::of(&Attachment { container_id: format!("c{n}"), ifname: "eth0".into() })
    }

    fn state() -> State {
        let mut state = State::new(vec![Family::V4], Duration::from_secs(30));
        state.serve(&BTreeSet::from(["10.0.1.0/29".parse().unwrap()]));
        state
    }

    fn slot(id: EndpointId, addresses: Addresses) -> Slot {
        Slot { id, addresses, record: None, journal: None, connected: false, announced: false, reference: None }
    }

    #[test]
    fn numbers_and_addresses_are_not_used_again_at_once() {
        let mut state = state();
        let (id, addresses) = state.reserve(&key(1), &[], NOW).unwrap();
        state.insert(key(1), slot(id, addresses));
        state.release(&key(1), NOW);
        let (next_id, next_addresses) = state.reserve(&key(2), &[], NOW).unwrap();
        assert_ne!((next_id, next_addresses), (id, addresses));
    }

    #[test]
    fn the_router_keeps_its_address_where_it_can() {
        let mut state = state();
        let earlier: IpAddr = "10.0.1.3".parse().unwrap();
        assert_eq!(state.own(&Owner::router(), &[earlier], NOW).unwrap().v4, "10.0.1.3".parse().ok());
        let mut moved = State::new(vec![Family::V4], NOW);
        moved.serve(&BTreeSet::from(["10.0.2.0/29".parse().unwrap()]));
        assert_eq!(moved.own(&Owner::router(), &[earlier], NOW).unwrap().v4, "10.0.2.1".parse().ok());
    }

    #[test]
    fn a_collection_takes_all_that_the_runtime_had_an_answer_to_and_what_is_half_removed() {
        let mut state = state();
        for (n, phase) in [(1, Phase::Adding), (2, Phase::Committed), (3, Phase::Removing), (4, Phase::Committed)] {
            let record = record(n, phase, "");
            let slot = Slot { record: Some(record.clone()), ..slot(record.id, Addresses::default()) };
            state.insert(JournalKey::of(&record.attachment), slot);
        }
        let valid = record(4, Phase::Committed, "").attachment;
        let mut orphans = state.orphans(&[valid].into());
        orphans.sort();
        let mut expected = [key(2), key(3)];
        expected.sort();
        assert_eq!(orphans, expected);
    }

    #[test]
    fn an_address_that_two_records_claim_stays_with_the_first() {
        let mut state = state();
        let addresses = by_family(["10.0.1.3".parse().unwrap()]);
        let id = |n| EndpointId::new(n).unwrap();
        state.restore(key(1), slot(id(1), addresses)).unwrap();
        assert!(matches!(state.restore(key(2), slot(id(2), addresses)), Err(AddressRefusal::InUse { .. })));
        assert_eq!(state.iter().count(), 1);
    }

    #[test]
    fn a_full_block_is_a_temporary_refusal() {
        let mut state = state();
        for n in 0..6 {
            let (id, addresses) = state.reserve(&key(n), &[], NOW).unwrap();
            state.insert(key(n), slot(id, addresses));
        }
        let refusal = state.reserve(&key(9), &[], NOW).unwrap_err();
        assert!(refusal.is_temporary(), "{refusal}");
        let outside = state.reserve(&key(9), &["10.9.9.9".parse().unwrap()], NOW).unwrap_err();
        assert!(!outside.is_temporary(), "{outside}");
    }
}
