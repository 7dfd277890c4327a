//! Basal's kernel programs, under Cilium's names. On the host this binary is empty: what the programs decide is in the
//! library, and `cargo xtask ebpf` builds the object.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
#[expect(unsafe_code, reason = "programs live on kernel helpers, which take and give raw pointers")]
mod programs;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
