//! The addresses inside a node's own blocks: router, health and pods, one of each family for every owner.
//!
//! Only blocks that the ledger confirmed serve. A node may lose one and get another: addresses of the old one stay
//! with their owners, new ones come from the new one. A released address rests before it is given away again, and
//! among free ones the one that was free longest comes next, so that a peer's stale entry seldom meets a new pod.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt,
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::prefix::{Family, PodCidr, address_number};

/// Whom an address belongs to. `router` and `health` are the node's own, as Cilium names them; a pod's is a name of
/// the agent's choice that is unique for each of its interfaces.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Owner(Arc<str>);

impl Owner {
    /// An owner by its name.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self(name.into())
    }

    /// The node's router address: `cilium_host`, and the pods' gateway.
    #[must_use]
    pub fn router() -> Self {
        Self::new("router")
    }

    /// The node's health endpoint.
    #[must_use]
    pub fn health() -> Self {
        Self::new("health")
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why an owner gets no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressRefusal {
    /// The node has no confirmed block of that family.
    #[error(
        "required {0} PodCIDR not available: the operator has not confirmed a block for this node; see the status of its CiliumNode"
    )]
    NoBlock(Family),
    /// Every address is in use or rests.
    #[error("no free {family} address in {}: {used} in use, {cooling} released a short while ago{}", list(blocks), wait(*next_in))]
    Exhausted {
        /// The family.
        family: Family,
        /// The blocks that serve.
        blocks: Vec<PodCidr>,
        /// Addresses in use in them.
        used: usize,
        /// Addresses that rest in them.
        cooling: usize,
        /// When the next one's rest is over.
        next_in: Option<Duration>,
    },
    /// The address lies in no block that serves.
    #[error("requested address {address} is not in this node's blocks ({})", list(blocks))]
    Outside {
        /// The address.
        address: IpAddr,
        /// The blocks that serve.
        blocks: Vec<PodCidr>,
    },
    /// The first or last address of its block.
    #[error("requested address {address} is the first or last one of {block} and serves nobody")]
    Edge {
        /// The address.
        address: IpAddr,
        /// The block.
        block: PodCidr,
    },
    /// Somebody else's.
    #[error("address {address} is in use by {owner}")]
    InUse {
        /// The address.
        address: IpAddr,
        /// Whose it is.
        owner: Owner,
    },
    /// Released a short while ago.
    #[error("requested address {address} was released a short while ago and is free in {} s", left.as_secs_f64().ceil())]
    Cooling {
        /// The address.
        address: IpAddr,
        /// What is left.
        left: Duration,
    },
    /// The owner has another one of that family.
    #[error("{owner} has {held} already and asks for {address}")]
    OwnerHasOther {
        /// The owner.
        owner: Owner,
        /// What it has.
        held: IpAddr,
        /// What it asks for.
        address: IpAddr,
    },
    /// Two addresses of one family were asked for, or one of a family that the owner does not get.
    #[error("requested address {0} is not one of one address for each enabled family")]
    NotWanted(IpAddr),
}

impl AddressRefusal {
    /// One CamelCase word, fit for an event and a metric label.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::NoBlock(_) => "PodCIDRNotAvailable",
            Self::Exhausted { .. } => "AddressesExhausted",
            Self::Outside { .. } => "AddressOutsideBlocks",
            Self::Edge { .. } => "AddressReserved",
            Self::InUse { .. } => "AddressInUse",
            Self::Cooling { .. } => "AddressCooling",
            Self::OwnerHasOther { .. } => "OwnerHasOtherAddress",
            Self::NotWanted(_) => "AddressNotWanted",
        }
    }

    /// Whether the same request may succeed later without anybody's doing.
    #[must_use]
    pub const fn is_temporary(&self) -> bool {
        matches!(self, Self::NoBlock(_) | Self::Exhausted { .. } | Self::Cooling { .. } | Self::InUse { .. })
    }
}

/// How the addresses of one block are used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AddressCounts {
    /// The block.
    pub block: PodCidr,
    /// Addresses that can have an owner: all but the first and the last, or both of a block that has but two.
    pub capacity: u128,
    /// Those that have one.
    pub used: usize,
    /// Those that rest.
    pub cooling: usize,
}

/// A block that serves.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Serving {
    block: PodCidr,
    /// The number of the address that is looked at first.
    cursor: u128,
}

impl Serving {
    fn first(&self) -> u128 {
        edges(&self.block).0
    }

    fn last(&self) -> u128 {
        edges(&self.block).1
    }
}

/// The numbers of the first and the last address that can have an owner.
fn edges(block: &PodCidr) -> (u128, u128) {
    if block.last() - block.first() <= 1 {
        (block.first(), block.last())
    } else {
        (block.first() + 1, block.last() - 1)
    }
}

/// The addresses of one node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addresses {
    /// How long a released address rests.
    cooldown: Duration,
    serving: Vec<Serving>,
    used: BTreeMap<IpAddr, Owner>,
    owners: BTreeMap<Owner, BTreeSet<IpAddr>>,
    /// Until when released addresses rest.
    cooling: BTreeMap<IpAddr, Duration>,
    /// The same in the order of their release.
    queue: VecDeque<(Duration, IpAddr)>,
}

impl Addresses {
    /// No block yet, so nobody gets an address.
    #[must_use]
    pub fn new(cooldown: Duration) -> Self {
        Self {
            cooldown,
            serving: Vec::new(),
            used: BTreeMap::new(),
            owners: BTreeMap::new(),
            cooling: BTreeMap::new(),
            queue: VecDeque::new(),
        }
    }

    /// Says which blocks the ledger holds for this node; new addresses come from these, in this order.
    pub fn serve(&mut self, confirmed: &[PodCidr]) {
        let before = std::mem::take(&mut self.serving);
        self.serving = confirmed
            .iter()
            .map(|block| {
                let known = before.iter().find(|serving| serving.block == *block);
                known.cloned().unwrap_or_else(|| Serving { block: *block, cursor: edges(block).0 })
            })
            .collect();
    }

    /// The blocks that serve.
    pub fn serving(&self) -> impl Iterator<Item = PodCidr> {
        self.serving.iter().map(|serving| serving.block)
    }

    /// Gives an owner one address of each of these families, or none; what it has already it keeps. `wanted` names
    /// addresses that it must get (CNI capability `ips`), at most one of each family.
    ///
    /// # Errors
    /// Why it gets none.
    pub fn allocate(
        &mut self,
        owner: &Owner,
        families: &[Family],
        wanted: &[IpAddr],
        now: Duration,
    ) -> Result<Vec<IpAddr>, AddressRefusal> {
        self.warm(now);
        for (index, address) in wanted.iter().enumerate() {
            let family = Family::of(*address);
            if !families.contains(&family) || wanted[..index].iter().any(|other| Family::of(*other) == family) {
                return Err(AddressRefusal::NotWanted(*address));
            }
        }
        let mut chosen = Vec::with_capacity(families.len());
        for family in families {
            let wanted = wanted.iter().find(|address| Family::of(**address) == *family);
            let held = self.of(owner).find(|address| Family::of(*address) == *family);
            chosen.push(match (held, wanted) {
                (Some(held), Some(address)) if held != *address => {
                    return Err(AddressRefusal::OwnerHasOther { owner: owner.clone(), held, address: *address });
                }
                (Some(held), _) => held,
                (None, Some(address)) => {
                    self.check(*address, now)?;
                    *address
                }
                (None, None) => self.next(*family, now)?,
            });
        }
        for address in &chosen {
            self.take(owner, *address);
        }
        Ok(chosen)
    }

    /// Notes an address that an owner has from before a restart, in whatever block it lies.
    ///
    /// # Errors
    /// [`AddressRefusal::InUse`].
    pub fn occupy(&mut self, owner: &Owner, address: IpAddr) -> Result<(), AddressRefusal> {
        match self.used.get(&address) {
            Some(other) if other != owner => Err(AddressRefusal::InUse { address, owner: other.clone() }),
            _ => {
                self.cooling.remove(&address);
                self.take(owner, address);
                Ok(())
            }
        }
    }

    /// Takes all addresses of an owner back; they rest.
    pub fn release(&mut self, owner: &Owner, now: Duration) -> Vec<IpAddr> {
        let addresses: Vec<IpAddr> = self.owners.remove(owner).into_iter().flatten().collect();
        for address in &addresses {
            self.used.remove(address);
            self.cooling.insert(*address, now + self.cooldown);
            self.queue.push_back((now + self.cooldown, *address));
        }
        addresses
    }

    /// The addresses of an owner, IPv4 first.
    pub fn of(&self, owner: &Owner) -> impl Iterator<Item = IpAddr> {
        self.owners.get(owner).into_iter().flatten().copied()
    }

    /// Every address with its owner.
    pub fn all(&self) -> impl Iterator<Item = (IpAddr, &Owner)> {
        self.used.iter().map(|(address, owner)| (*address, owner))
    }

    /// Whether an address lies in a block that serves.
    #[must_use]
    pub fn is_served(&self, address: IpAddr) -> bool {
        self.serving().any(|block| block.contains_address(address))
    }

    /// How the blocks that serve are used.
    #[must_use]
    pub fn counts(&self, now: Duration) -> Vec<AddressCounts> {
        self.serving.iter().map(|serving| self.count(serving, now)).collect()
    }

    /// The addresses that lie in no block that serves, with their owners.
    pub fn draining(&self) -> impl Iterator<Item = (IpAddr, &Owner)> {
        self.all().filter(|(address, _)| !self.is_served(*address))
    }

    fn count(&self, serving: &Serving, now: Duration) -> AddressCounts {
        let family = serving.block.family();
        let range = family.address(serving.first())..=family.address(serving.last());
        let cooling = self.cooling.range(range.clone()).filter(|(_, until)| **until > now);
        AddressCounts {
            block: serving.block,
            capacity: serving.last() - serving.first() + 1,
            used: self.used.range(range).count(),
            cooling: cooling.count(),
        }
    }

    fn take(&mut self, owner: &Owner, address: IpAddr) {
        self.used.insert(address, owner.clone());
        self.owners.entry(owner.clone()).or_default().insert(address);
    }

    /// Ends the rest of addresses whose time is over.
    fn warm(&mut self, now: Duration) {
        while let Some((until, address)) = self.queue.front().copied().filter(|(until, _)| *until <= now) {
            self.queue.pop_front();
            // Released again since, it has a later entry.
            if self.cooling.get(&address) == Some(&until) {
                self.cooling.remove(&address);
            }
        }
    }

    fn check(&self, address: IpAddr, now: Duration) -> Result<(), AddressRefusal> {
        let Some(serving) = self.serving.iter().find(|serving| serving.block.contains_address(address)) else {
            return Err(AddressRefusal::Outside { address, blocks: self.serving().collect() });
        };
        if !(serving.first()..=serving.last()).contains(&address_number(address)) {
            return Err(AddressRefusal::Edge { address, block: serving.block });
        }
        if let Some(owner) = self.used.get(&address) {
            return Err(AddressRefusal::InUse { address, owner: owner.clone() });
        }
        match self.cooling.get(&address) {
            Some(until) => Err(AddressRefusal::Cooling { address, left: until.saturating_sub(now) }),
            None => Ok(()),
        }
    }

    /// The next free address of a family; moves the cursor of its block behind it.
    fn next(&mut self, family: Family, now: Duration) -> Result<IpAddr, AddressRefusal> {
        let blocks: Vec<PodCidr> = self.serving().filter(|block| block.family() == family).collect();
        if blocks.is_empty() {
            return Err(AddressRefusal::NoBlock(family));
        }
        let free = |number: &u128| {
            let address = family.address(*number);
            !self.used.contains_key(&address) && !self.cooling.contains_key(&address)
        };
        let found = self.serving.iter().enumerate().filter(|(_, serving)| serving.block.family() == family).find_map(
            |(index, serving)| {
                let mut ahead = serving.cursor..=serving.last();
                let number = ahead.find(free).or_else(|| (serving.first()..serving.cursor).find(free))?;
                Some((index, number))
            },
        );
        let Some((index, number)) = found else {
            let counts: Vec<_> = self.counts(now).into_iter().filter(|count| blocks.contains(&count.block)).collect();
            let resting =
                self.cooling.iter().filter(|(address, _)| blocks.iter().any(|b| b.contains_address(**address)));
            return Err(AddressRefusal::Exhausted {
                family,
                used: counts.iter().map(|count| count.used).sum(),
                cooling: counts.iter().map(|count| count.cooling).sum(),
                next_in: resting.map(|(_, until)| until.saturating_sub(now)).min(),
                blocks,
            });
        };
        if let Some(serving) = self.serving.get_mut(index) {
            serving.cursor = if number < serving.last() { number + 1 } else { serving.first() };
        }
        Ok(family.address(number))
    }
}

fn list(blocks: &[PodCidr]) -> String {
    blocks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn wait(next_in: Option<Duration>) -> String {
    next_in.map(|left| format!(", the next one free in {} s", left.as_secs_f64().ceil())).unwrap_or_default()
}

#[cfg(test)]
mod tests;
