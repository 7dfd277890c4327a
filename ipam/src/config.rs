//! The pool of a cluster as its administrator writes it (Cilium's `cluster-pool-*` keys), checked.

use serde::Serialize;

use crate::prefix::{Family, PodCidr, PrefixError};

/// The settings as they were read, under Cilium's key names.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PoolSettings {
    /// `enable-ipv4` and its `cluster-pool-ipv4-*`.
    pub ipv4: FamilySettings,
    /// `enable-ipv6` and its `cluster-pool-ipv6-*`.
    pub ipv6: FamilySettings,
}

/// The settings of one family.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FamilySettings {
    /// Whether the family is used at all.
    pub enabled: bool,
    /// The pool CIDRs, in the order in which they are used up.
    pub cidrs: Vec<String>,
    /// The prefix length of a node's block.
    pub mask_size: u8,
}

/// The pool CIDRs of one family and the prefix length of its blocks.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct FamilyPool {
    cidrs: Vec<PodCidr>,
    mask: u8,
}

impl FamilyPool {
    /// The pool CIDRs, disjoint, in the order in which they are used up. At least one.
    #[must_use]
    pub fn cidrs(&self) -> &[PodCidr] {
        &self.cidrs
    }

    /// The prefix length of a node's block.
    #[must_use]
    pub fn mask(&self) -> u8 {
        self.mask
    }
}

/// The pool of a cluster: what nodes get their blocks from. At least one family.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct PoolConfig {
    ipv4: Option<FamilyPool>,
    ipv6: Option<FamilyPool>,
}

/// What is wrong with [`PoolSettings`]. Each text names the key, the value and the way out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PoolConfigError {
    /// Neither family is enabled.
    #[error("enable-ipv4 and enable-ipv6 are both false; enable at least one")]
    NoFamily,
    /// A family is enabled without a pool CIDR.
    #[error("{} is empty although {} is true; set it, or set {} to false", key(*.0), enable_key(*.0), enable_key(*.0))]
    NoCidr(Family),
    /// A family is disabled and has a pool CIDR.
    #[error("{} is set to {cidr} although {} is false; remove it, or set {} to true", key(*.family), enable_key(*.family), enable_key(*.family))]
    Disabled {
        /// The family.
        family: Family,
        /// Its first CIDR.
        cidr: String,
    },
    /// Not a CIDR, or one with bits set behind the prefix.
    #[error("{}: {source}", key(*.family))]
    Prefix {
        /// The family whose key it is.
        family: Family,
        /// What is wrong.
        source: PrefixError,
    },
    /// A CIDR of the other family.
    #[error("{}: {cidr} is an {} CIDR; move it to {}", key(*.family), cidr.family(), key(cidr.family()))]
    WrongFamily {
        /// The family whose key it is.
        family: Family,
        /// The CIDR.
        cidr: PodCidr,
    },
    /// Two CIDRs share addresses.
    #[error("{}: requested CIDR {cidr} collides with {other}; remove one of them, or make them disjoint", key(*.family))]
    Collision {
        /// The family.
        family: Family,
        /// The later one.
        cidr: PodCidr,
        /// The earlier one.
        other: PodCidr,
    },
    /// A block would be larger than the CIDR that it comes from.
    #[error("{}: {mask} is shorter than the prefix of {cidr} in {}, which holds no block of that size; use {} or more, or a wider CIDR",
        mask_key(*.family), key(*.family), cidr.prefix_len())]
    MaskTooShort {
        /// The family.
        family: Family,
        /// The mask.
        mask: u8,
        /// The CIDR.
        cidr: PodCidr,
    },
    /// A block would hold no address for a pod.
    #[error("{}: {mask} leaves no address for pods; use {} or less", mask_key(*.family), longest_mask(*.family))]
    MaskTooLong {
        /// The family.
        family: Family,
        /// The mask.
        mask: u8,
    },
}

impl PoolConfigError {
    /// One CamelCase word, fit for a condition, an event and a metric label.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::NoFamily => "NoFamilyEnabled",
            Self::NoCidr(_) => "PoolCIDRMissing",
            Self::Disabled { .. } => "PoolFamilyDisabled",
            Self::Prefix { .. } => "PoolCIDRInvalid",
            Self::WrongFamily { .. } => "PoolCIDRWrongFamily",
            Self::Collision { .. } => "PoolCIDRCollision",
            Self::MaskTooShort { .. } | Self::MaskTooLong { .. } => "PoolMaskSizeInvalid",
        }
    }
}

/// The key that lists a family's pool CIDRs.
#[must_use]
pub const fn key(family: Family) -> &'static str {
    match family {
        Family::V4 => "cluster-pool-ipv4-cidr",
        Family::V6 => "cluster-pool-ipv6-cidr",
    }
}

/// The key that holds a family's mask.
#[must_use]
pub const fn mask_key(family: Family) -> &'static str {
    match family {
        Family::V4 => "cluster-pool-ipv4-mask-size",
        Family::V6 => "cluster-pool-ipv6-mask-size",
    }
}

const fn enable_key(family: Family) -> &'static str {
    match family {
        Family::V4 => "enable-ipv4",
        Family::V6 => "enable-ipv6",
    }
}

/// Two addresses of a block serve no pod (the first and the last), so a block has at least four.
const fn longest_mask(family: Family) -> u8 {
    family.bits() - 2
}

impl PoolConfig {
    /// Checks settings; the first fault is answered.
    ///
    /// # Errors
    /// See [`PoolConfigError`].
    pub fn new(settings: &PoolSettings) -> Result<Self, PoolConfigError> {
        let config = Self { ipv4: check(Family::V4, &settings.ipv4)?, ipv6: check(Family::V6, &settings.ipv6)? };
        if config.ipv4.is_none() && config.ipv6.is_none() {
            return Err(PoolConfigError::NoFamily);
        }
        Ok(config)
    }

    /// The pool of a family, when it is enabled.
    #[must_use]
    pub fn family(&self, family: Family) -> Option<&FamilyPool> {
        match family {
            Family::V4 => self.ipv4.as_ref(),
            Family::V6 => self.ipv6.as_ref(),
        }
    }

    /// The enabled families with their pools, IPv4 first.
    pub fn families(&self) -> impl Iterator<Item = (Family, &FamilyPool)> {
        Family::ALL.into_iter().filter_map(|family| Some((family, self.family(family)?)))
    }
}

fn check(family: Family, settings: &FamilySettings) -> Result<Option<FamilyPool>, PoolConfigError> {
    if !settings.enabled {
        return match settings.cidrs.first() {
            None => Ok(None),
            Some(cidr) => Err(PoolConfigError::Disabled { family, cidr: cidr.clone() }),
        };
    }
    if settings.cidrs.is_empty() {
        return Err(PoolConfigError::NoCidr(family));
    }
    let mask = settings.mask_size;
    if mask > longest_mask(family) {
        return Err(PoolConfigError::MaskTooLong { family, mask });
    }
    let mut cidrs: Vec<PodCidr> = Vec::with_capacity(settings.cidrs.len());
    for text in &settings.cidrs {
        let cidr: PodCidr = text.trim().parse().map_err(|source| PoolConfigError::Prefix { family, source })?;
        if cidr.family() != family {
            return Err(PoolConfigError::WrongFamily { family, cidr });
        }
        if let Some(&other) = cidrs.iter().find(|other| other.overlaps(&cidr)) {
            return Err(PoolConfigError::Collision { family, cidr, other });
        }
        if mask < cidr.prefix_len() {
            return Err(PoolConfigError::MaskTooShort { family, mask, cidr });
        }
        cidrs.push(cidr);
    }
    Ok(Some(FamilyPool { cidrs, mask }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn family(cidrs: &[&str], mask_size: u8) -> FamilySettings {
        FamilySettings { enabled: true, cidrs: cidrs.iter().map(|&c| c.to_owned()).collect(), mask_size }
    }

    fn error(ipv4: FamilySettings, ipv6: FamilySettings) -> String {
        PoolConfig::new(&PoolSettings { ipv4, ipv6 }).unwrap_err().to_string()
    }

    #[test]
    fn takes_several_cidrs_of_both_families_and_any_mask() {
        let settings = PoolSettings {
            ipv4: family(&["10.0.0.0/8", " 192.168.0.0/16"], 30),
            ipv6: family(&["fd00::/16", "2001:db8::/126"], 126),
        };
        let config = PoolConfig::new(&settings).unwrap();
        let all: Vec<_> = config.families().map(|(family, pool)| (family, pool.cidrs().len(), pool.mask())).collect();
        assert_eq!(all, [(Family::V4, 2, 30), (Family::V6, 2, 126)]);
    }

    #[test]
    fn each_fault_names_key_value_and_way_out() {
        let off = FamilySettings::default;
        let nothing = PoolConfig::new(&PoolSettings { ipv4: off(), ipv6: off() }).unwrap_err();
        assert_eq!(nothing.reason(), "NoFamilyEnabled");
        for (ipv4, ipv6, text) in [
            (off(), off(), "enable-ipv4 and enable-ipv6 are both false; enable at least one"),
            (
                family(&[], 24),
                off(),
                "cluster-pool-ipv4-cidr is empty although enable-ipv4 is true; set it, or set enable-ipv4 to false",
            ),
            (
                family(&["10.0.0.0/8"], 24),
                FamilySettings { enabled: false, ..family(&["fd00::/104"], 120) },
                "cluster-pool-ipv6-cidr is set to fd00::/104 although enable-ipv6 is false; remove it, or set enable-ipv6 to true",
            ),
            (
                family(&["10.0.0.0"], 24),
                off(),
                "cluster-pool-ipv4-cidr: \"10.0.0.0\" is not a CIDR; write <address>/<prefix length>, 10.0.1.0/24 for example",
            ),
            (
                family(&["10.0.0.1/8"], 24),
                off(),
                "cluster-pool-ipv4-cidr: \"10.0.0.1/8\" has bits set behind its prefix; did you mean 10.0.0.0/8?",
            ),
            (
                family(&["fd00::/104"], 24),
                off(),
                "cluster-pool-ipv4-cidr: fd00::/104 is an IPv6 CIDR; move it to cluster-pool-ipv6-cidr",
            ),
            (
                family(&["10.0.1.0/24", "192.168.0.0/16", "10.0.0.0/8"], 24),
                off(),
                "cluster-pool-ipv4-cidr: requested CIDR 10.0.0.0/8 collides with 10.0.1.0/24; remove one of them, or make them disjoint",
            ),
            (
                off(),
                family(&["fd00::/104", "fd01::/112"], 108),
                "cluster-pool-ipv6-mask-size: 108 is shorter than the prefix of fd01::/112 in cluster-pool-ipv6-cidr, which holds no block of that size; use 112 or more, or a wider CIDR",
            ),
            (
                family(&["10.0.0.0/24"], 31),
                off(),
                "cluster-pool-ipv4-mask-size: 31 leaves no address for pods; use 30 or less",
            ),
            (
                off(),
                family(&["fd00::/120"], 127),
                "cluster-pool-ipv6-mask-size: 127 leaves no address for pods; use 126 or less",
            ),
        ] {
            assert_eq!(error(ipv4, ipv6), text);
        }
    }
}
