//! Layouts of the BPF maps that the kernel programs and user space share, with the constants that travel with them:
//! map specifications, drop reasons and their texts, reserved identities, mark encodings.
//!
//! It promises that every layout equals Cilium 1.20.1's byte for byte where Cilium has that map (the one exception,
//! [`tunnel`], is our own), that no layout has padding the compiler chose, and that byte order is in the types:
//! addresses are byte arrays in network order, every integer field is in host order unless its type says otherwise.
//! No allocation, no I/O; the crate compiles for the BPF target too.
#![no_std]

pub mod addr;
pub mod config;
pub mod conntrack;
pub mod endpoint;
pub mod flow;
pub mod identity;
pub mod ipcache;
pub mod mark;
pub mod metrics;
pub mod nat;
pub mod node;
pub mod protocol;
pub mod reason;
pub mod spec;
pub mod tunnel;

/// Asserts sizes and offsets as literal numbers, so that a changed field does not change its own test.
#[cfg(test)]
macro_rules! assert_layout {
    ($type:ty, size $size:literal, { $($field:ident @ $offset:literal),* $(,)? }) => {
        assert_eq!(core::mem::size_of::<$type>(), $size, "size of {}", stringify!($type));
        $(assert_eq!(core::mem::offset_of!($type, $field), $offset, "{}.{}", stringify!($type), stringify!($field));)*
    };
}
#[cfg(test)]
pub(crate) use assert_layout;
