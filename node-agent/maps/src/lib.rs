//! Layouts of the BPF maps that the kernel programs and user space share.
#![no_std]
