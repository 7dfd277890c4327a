//! Prefix arithmetic, once for both families: every address is a `u128`, an IPv4 address its lower 32 bits.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Family {
    /// IPv4, 32 bits.
    #[serde(rename = "ipv4")]
    V4,
    /// IPv6, 128 bits.
    #[serde(rename = "ipv6")]
    V6,
}

impl Family {
    /// Both, IPv4 first.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// Bits in an address.
    #[must_use]
    pub const fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }

    /// `ipv4` or `ipv6`, as metric labels and keys have it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V4 => "ipv4",
            Self::V6 => "ipv6",
        }
    }

    /// The family of an address.
    #[must_use]
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// The address with this number; bits beyond the family's are dropped.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "an IPv4 address is the lower 32 bits")]
    pub const fn address(self, number: u128) -> IpAddr {
        match self {
            Self::V4 => IpAddr::V4(Ipv4Addr::from_bits(number as u32)),
            Self::V6 => IpAddr::V6(Ipv6Addr::from_bits(number)),
        }
    }
}

/// `IPv4` or `IPv6`, for texts.
impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// The number of an address.
#[must_use]
pub const fn address_number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => v4.to_bits() as u128,
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

/// Why a text is no [`PodCidr`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PrefixError {
    /// Not of the form `<address>/<length>`.
    #[error("{0:?} is not a CIDR; write <address>/<prefix length>, 10.0.1.0/24 for example")]
    NotACidr(String),
    /// The length is beyond the family's bits.
    #[error("{text:?} has prefix length {length}; {family} allows at most {}", .family.bits())]
    TooLong {
        /// What was read.
        text: String,
        /// Its length.
        length: u8,
        /// Its family.
        family: Family,
    },
    /// Bits are set behind the prefix.
    #[error("{text:?} has bits set behind its prefix; did you mean {aligned}?")]
    HostBits {
        /// What was read.
        text: String,
        /// The prefix that the address lies in.
        aligned: PodCidr,
    },
}

/// An aligned address block: no bit is set behind the prefix.
///
/// The order is by family, then first address, then length (a wider block before the narrower ones in it).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodCidr {
    family: Family,
    base: u128,
    len: u8,
}

/// Ones in the lower `bits` bits.
const fn low_ones(bits: u8) -> u128 {
    match 1_u128.checked_shl(bits as u32) {
        Some(power) => power - 1,
        None => u128::MAX,
    }
}

impl PodCidr {
    /// The block of this length that an address lies in; a length beyond the family's bits means one address.
    #[must_use]
    pub fn containing(address: IpAddr, len: u8) -> Self {
        Self::at(Family::of(address), address_number(address), len)
    }

    fn at(family: Family, number: u128, len: u8) -> Self {
        let len = len.min(family.bits());
        Self { family, base: number & !low_ones(family.bits() - len), len }
    }

    /// The family.
    #[must_use]
    pub const fn family(&self) -> Family {
        self.family
    }

    /// The prefix length in bits.
    #[must_use]
    pub const fn prefix_len(&self) -> u8 {
        self.len
    }

    /// The first address.
    #[must_use]
    pub const fn address(&self) -> IpAddr {
        self.family.address(self.base)
    }

    /// The number of the first address.
    #[must_use]
    pub const fn first(&self) -> u128 {
        self.base
    }

    /// The number of the last address.
    #[must_use]
    pub const fn last(&self) -> u128 {
        self.base | low_ones(self.family.bits() - self.len)
    }

    /// Whether an address lies in this block.
    #[must_use]
    pub fn contains_address(&self, address: IpAddr) -> bool {
        self.family == Family::of(address) && (self.base..=self.last()).contains(&address_number(address))
    }

    /// Whether every address of `other` lies in this block.
    #[must_use]
    pub fn contains(&self, other: &Self) -> bool {
        self.family == other.family && self.len <= other.len && other.base <= self.last() && other.base >= self.base
    }

    /// Whether some address lies in both blocks.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.contains(other) || other.contains(self)
    }

    /// The block of length `len` around this one; itself when `len` is not shorter.
    #[must_use]
    pub fn supernet(&self, len: u8) -> Self {
        Self::at(self.family, self.base, len.min(self.len))
    }

    /// How many blocks of length `len` fit in: a power of two, 0 when `len` is shorter than this block's own length.
    /// 2^128 (every address of `::/0`) is given as `u128::MAX`.
    #[must_use]
    pub fn count(&self, len: u8) -> u128 {
        match len.min(self.family.bits()).checked_sub(self.len) {
            None => 0,
            Some(bits) => 1_u128.checked_shl(u32::from(bits)).unwrap_or(u128::MAX),
        }
    }

    /// The block with number `index` among those of length `len` in this one; `index` is taken modulo their count.
    #[must_use]
    pub fn nth(&self, len: u8, index: u128) -> Self {
        let len = len.clamp(self.len, self.family.bits());
        let offset = index.checked_shl(u32::from(self.family.bits() - len)).unwrap_or(0);
        Self::at(self.family, self.base | (offset & low_ones(self.family.bits() - self.len)), len)
    }

    /// The number, among the blocks of length `len` in this one, of the block that an address number lies in.
    #[must_use]
    pub fn index_of(&self, len: u8, number: u128) -> u128 {
        let len = len.clamp(self.len, self.family.bits());
        (number & low_ones(self.family.bits() - self.len)).checked_shr(u32::from(self.family.bits() - len)).unwrap_or(0)
    }

    /// The last address as a block of its own: the greatest key that can belong to a block overlapping this one.
    fn last_host(&self) -> Self {
        Self::at(self.family, self.last(), self.family.bits())
    }
}

/// The entries of a map of disjoint blocks that overlap `block`, from high to low addresses.
pub(crate) fn overlapping<'a, V>(
    map: &'a BTreeMap<PodCidr, V>,
    block: &PodCidr,
) -> impl Iterator<Item = (&'a PodCidr, &'a V)> {
    let block = *block;
    map.range(..=block.last_host()).rev().take_while(move |(other, _)| other.overlaps(&block))
}

impl fmt::Display for PodCidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address(), self.len)
    }
}

impl fmt::Debug for PodCidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PodCidr {
    type Err = PrefixError;

    fn from_str(text: &str) -> Result<Self, PrefixError> {
        let not_a_cidr = || PrefixError::NotACidr(text.to_owned());
        let (address, length) = text.split_once('/').ok_or_else(not_a_cidr)?;
        let address: IpAddr = address.parse().ok().ok_or_else(not_a_cidr)?;
        // u8's parser takes a sign and leading zeros; a CIDR has neither.
        if !length.bytes().all(|b| b.is_ascii_digit()) || (length.len() > 1 && length.starts_with('0')) {
            return Err(not_a_cidr());
        }
        let len: u8 = length.parse().ok().ok_or_else(not_a_cidr)?;
        let family = Family::of(address);
        if len > family.bits() {
            return Err(PrefixError::TooLong { text: text.to_owned(), length: len, family });
        }
        let aligned = Self::containing(address, len);
        if aligned.address() == address {
            Ok(aligned)
        } else {
            Err(PrefixError::HostBits { text: text.to_owned(), aligned })
        }
    }
}

impl Serialize for PodCidr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PodCidr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl de::Visitor<'_> for Text {
            type Value = PodCidr;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a CIDR")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<PodCidr, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_str(Text)
    }
}

#[cfg(test)]
mod tests {
    use ipnet::IpNet;
    use proptest::prelude::*;

    use super::*;

    fn cidr(text: &str) -> PodCidr {
        text.parse().unwrap()
    }

    #[test]
    fn refuses_what_is_no_aligned_cidr() {
        for text in [
            "",
            "10.0.0.0",
            "10.0.0.0/",
            "10.0.0.0/x",
            "10.0.0.0/+8",
            "10.0.0.0/08",
            "10.0.0/8",
            "a/8",
            "/8",
            "::1%eth0/64",
        ] {
            assert_eq!(text.parse::<PodCidr>(), Err(PrefixError::NotACidr(text.into())), "{text}");
        }
        assert_eq!(
            "10.0.0.0/33".parse::<PodCidr>(),
            Err(PrefixError::TooLong { text: "10.0.0.0/33".into(), length: 33, family: Family::V4 })
        );
        let error = "10.0.1.7/24".parse::<PodCidr>().unwrap_err();
        assert_eq!(error.to_string(), "\"10.0.1.7/24\" has bits set behind its prefix; did you mean 10.0.1.0/24?");
        let error = serde_json::from_str::<PodCidr>("8").unwrap_err().to_string();
        assert!(error.contains("expected a CIDR"), "{error}");
    }

    #[test]
    fn reaches_the_ends_of_both_families() {
        for (text, last) in [("0.0.0.0/0", "255.255.255.255"), ("::/0", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")] {
            let all = cidr(text);
            assert_eq!(all.family().address(all.last()).to_string(), last);
            assert_eq!(all.to_string(), text);
        }
        assert_eq!(cidr("::/0").count(128), u128::MAX);
        assert_eq!(cidr("::/0").count(126), 1 << 126);
        assert_eq!(cidr("10.0.0.0/24").count(16), 0);
        assert_eq!(cidr("10.0.0.0/8").nth(24, 65_535), cidr("10.255.255.0/24"));
        assert_eq!(cidr("10.0.0.1/32").nth(32, 0), cidr("10.0.0.1/32"));
        assert_eq!(cidr("fd00::/64").nth(120, 1 << 55), cidr("fd00::8000:0:0:0/120"));
    }

    #[test]
    fn a_family_has_one_word_in_labels_keys_and_json() {
        assert_eq!(Family::ALL.map(Family::as_str), ["ipv4", "ipv6"]);
        assert_eq!(serde_json::to_string(&Family::ALL).unwrap(), r#"["ipv4","ipv6"]"#);
    }

    fn any_cidr() -> impl Strategy<Value = PodCidr> {
        // Few distinct bases, so that blocks often touch each other.
        (any::<bool>(), any::<u128>(), 0_u8..=128, any::<bool>()).prop_map(|(v6, number, len, near)| {
            let family = if v6 { Family::V6 } else { Family::V4 };
            let number = if near { number & 0xff } else { number };
            PodCidr::containing(family.address(number), len.min(family.bits()))
        })
    }

    proptest! {
        /// The oracle is the crate ipnet, which has one implementation for each family.
        #[test]
        fn agrees_with_ipnet(a in any_cidr(), b in any_cidr(), len in 0_u8..=128, index: u128) {
            let (x, y): (IpNet, IpNet) = (a.to_string().parse().unwrap(), b.to_string().parse().unwrap());
            prop_assert_eq!(x.to_string(), a.to_string());
            prop_assert_eq!(x.trunc(), x);
            prop_assert_eq!(x.contains(&y), a.contains(&b));
            prop_assert_eq!(x.contains(&y) || y.contains(&x), a.overlaps(&b));
            prop_assert_eq!(a.contains_address(b.address()), x.contains(&b.address()));
            prop_assert_eq!(a.family().address(a.last()), x.broadcast());
            let up = a.supernet(len);
            prop_assert_eq!(up.prefix_len(), len.min(a.prefix_len()));
            prop_assert!(up.contains(&a));
            let len = len.clamp(a.prefix_len(), a.family().bits());
            let part = a.nth(len, index);
            prop_assert!(a.contains(&part));
            prop_assert_eq!(part.prefix_len(), len);
            if a.count(len) < u128::MAX {
                prop_assert_eq!(a.index_of(len, part.first()), index % a.count(len));
                prop_assert_eq!(a.index_of(len, part.last()), index % a.count(len));
            }
            prop_assert_eq!(serde_json::from_str::<PodCidr>(&serde_json::to_string(&a).unwrap()).unwrap(), a);
        }

        #[test]
        fn overlapping_finds_what_a_full_scan_finds(blocks in prop::collection::vec(any_cidr(), 0..40), probe in any_cidr()) {
            let mut map = BTreeMap::new();
            for block in blocks {
                if !map.keys().any(|other: &PodCidr| other.overlaps(&block)) {
                    map.insert(block, ());
                }
            }
            let mut found: Vec<_> = overlapping(&map, &probe).map(|(block, ())| *block).collect();
            found.reverse();
            let expected: Vec<_> = map.keys().filter(|block| block.overlaps(&probe)).copied().collect();
            prop_assert_eq!(found, expected);
        }
    }
}
