//! The BPF object inside this binary, and the hash that names a program set.

use std::{fmt, sync::LazyLock};

use basal_maps::{config::Config, spec};
use sha2::{Digest as _, Sha256};
use zerocopy::IntoBytes as _;

/// The BPF object that `cargo xtask ebpf` built; empty in a binary that was built without one.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/basal-ebpf.o"));

/// Names a program set: object, load-time constants and map specifications. Equal hashes mean interchangeable sets.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProgramHash([u8; 8]);

impl ProgramHash {
    /// Stands for a program that belongs to no set that is loaded.
    pub const FOREIGN: Self = Self([0; 8]);

    /// The hash of the set that this binary loads with these constants.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        // The object is large, and plans ask often.
        static OF_OBJECT: LazyLock<Sha256> = LazyLock::new(|| Sha256::new_with_prefix(OBJECT));
        let mut sha = OF_OBJECT.clone();
        sha.update(config.as_bytes());
        for map in spec::of(config) {
            let numbers = [map.kind as u32, map.key_size, map.value_size, map.max_entries, map.flags];
            sha.update(map.name.as_bytes());
            sha.update(numbers.as_bytes());
        }
        let mut hash = [0; 8];
        hash.copy_from_slice(&sha.finalize()[..8]);
        Self(hash)
    }

    /// From the text that [`fmt::Display`] gives: 16 lower-case hexadecimal digits.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let valid = text.len() == 16 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        valid.then(|| u64::from_str_radix(text, 16).ok().map(|hash| Self(hash.to_be_bytes())))?
    }
}

impl fmt::Display for ProgramHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", u64::from_be_bytes(self.0))
    }
}

impl fmt::Debug for ProgramHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_change_the_hash() {
        let one = ProgramHash::of(&Config::UNSET);
        assert_eq!(one, ProgramHash::of(&Config::UNSET));
        assert_ne!(one, ProgramHash::of(&Config { vxlan_ifindex: 7, ..Config::UNSET }));
        assert_eq!(ProgramHash::parse(&one.to_string()), Some(one));
        for bad in ["", "0123", "0123456789ABCDEF", "+123456789abcdef"] {
            assert_eq!(ProgramHash::parse(bad), None);
        }
    }
}
