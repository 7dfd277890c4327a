//! Cilium's custom resources, and the keys and records that Cilium keeps in etcd, as types; and the names and numbers
//! that both are made of.
//!
//! It promises to read what Cilium 1.20 writes and to write what Cilium 1.20 reads: object by object, field by field, byte
//! by byte where a text is a key. Whatever is read from outside is checked here once; an error names the field. There is no
//! client in here, no clock and no randomness.

pub mod address;
pub mod directory;
pub mod identity;
pub mod kvstore;
pub mod labels;
pub mod names;
pub mod resources;

pub use resources::crds;
