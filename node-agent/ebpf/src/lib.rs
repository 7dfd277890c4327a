//! What Basal's kernel programs decide: reading headers ([`parse`]), what becomes of a packet ([`decide`]), masquerading
//! ([`nat`]), which connections go past the stack ([`direct`]), and the answers to pods that look for their gateway ([`neighbour`]).
//!
//! It promises that nothing here touches the kernel: headers are values, maps are the traits [`decide::Tables`] and
//! [`nat::Flows`], the result is a value. The same functions run in the kernel and, in tests, on the host. The programs
//! themselves are in the binary of this crate, which is empty on the host.
#![no_std]

pub mod decide;
pub mod direct;
pub mod nat;
pub mod neighbour;
pub mod parse;
