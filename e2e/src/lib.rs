//! Real Kubernetes on one machine. [`servers`] starts a real etcd or kube-apiserver on loopback for the integration
//! tests of other crates and promises that none outlives the test that started it; [`cluster`] starts whole clusters
//! with nodes, and promises that taking one down leaves nothing behind. The API blocks: it runs real processes in real
//! time, each wait is bounded, and a wait that ends without success says what it waited for and where the logs are. No
//! other crate of the workspace is needed here, so that each of them can use this one.

pub mod bench;
pub mod cluster;
pub mod command;
pub mod parts;
pub mod process;
pub mod say;
pub mod servers;
pub mod wait;
pub mod workload;
