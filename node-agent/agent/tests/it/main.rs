//! A whole agent over a model of etcd, of the API server and of the kernel, and over the real kernel; journal and socket are
//! real files.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod cni;
mod faults;
mod faulty;
mod kernel;
mod linux;
mod machine;
mod node;
mod objects;
mod restart;
mod routing;
mod world;
