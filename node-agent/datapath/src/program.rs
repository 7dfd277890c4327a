//! BPF objects, and the hash that names a program set.

use std::{fmt, sync::LazyLock};

use basal_maps::{config::Config, spec};
use sha2::{Digest as _, Sha256};
use zerocopy::IntoBytes as _;

/// The BPF object that `cargo xtask ebpf` built; empty in a binary that was built without one.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/basal-ebpf.o"));

/// A BPF object that program sets are loaded from. Two are equal when their bytes are.
#[derive(Clone, Copy)]
pub struct Object {
    bytes: &'static [u8],
    digest: [u8; 32],
}

impl Object {
    /// An object, aligned as ELF wants it.
    #[must_use]
    pub fn new(bytes: &'static [u8]) -> Self {
        Self { bytes, digest: Sha256::digest(bytes).into() }
    }

    /// The one inside this binary.
    #[must_use]
    pub fn built_in() -> Self {
        // The object is large, and plans ask often.
        static BUILT_IN: LazyLock<Object> = LazyLock::new(|| Object::new(OBJECT));
        *BUILT_IN
    }

    /// Its bytes.
    #[must_use]
    pub const fn bytes(&self) -> &'static [u8] {
        self.bytes
    }
}

impl PartialEq for Object {
    fn eq(&self, other: &Self) -> bool {
        self.digest == other.digest
    }
}

impl Eq for Object {}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Object({} bytes)", self.bytes.len())
    }
}

/// What a program set is loaded from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProgramSet {
    /// Its programs and maps.
    pub object: Object,
    /// Its load-time constants.
    pub config: Config,
}

impl ProgramSet {
    /// The name of the set that is loaded from this.
    #[must_use]
    pub fn hash(&self) -> ProgramHash {
        let mut sha = Sha256::new_with_prefix(self.object.digest);
        sha.update(self.config.as_bytes());
        for map in spec::of(&self.config) {
            let numbers = [map.kind as u32, map.key_size, map.value_size, map.max_entries, map.flags];
            sha.update(map.name.as_bytes());
            sha.update(numbers.as_bytes());
        }
        let mut hash = [0; 8];
        hash.copy_from_slice(&sha.finalize()[..8]);
        ProgramHash(hash)
    }
}

/// Names a program set: object, load-time constants and map specifications. Equal hashes mean interchangeable sets.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProgramHash([u8; 8]);

impl ProgramHash {
    /// Stands for a program that belongs to no set that is loaded.
    pub const FOREIGN: Self = Self([0; 8]);

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
    fn object_and_constants_change_the_hash() {
        let set = ProgramSet { object: Object::new(b"one"), config: Config::UNSET };
        let hash = set.hash();
        assert_eq!(hash, ProgramSet { object: Object::new(b"one"), ..set }.hash());
        assert_ne!(hash, ProgramSet { object: Object::new(b"two"), ..set }.hash());
        assert_ne!(hash, ProgramSet { config: Config { vxlan_ifindex: 7, ..Config::UNSET }, ..set }.hash());
        assert_eq!(ProgramHash::parse(&hash.to_string()), Some(hash));
        for bad in ["", "0123", "0123456789ABCDEF", "+123456789abcdef"] {
            assert_eq!(ProgramHash::parse(bad), None);
        }
    }
}
