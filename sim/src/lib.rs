//! A whole cluster's servers in one thread, driven by a seed: a model etcd ([`kv::ModelKv`]) and a model API server
//! ([`objects::ModelObjects`]) over one revisioned [`store`], and the [conformance suites](conformance) that hold models
//! and real servers to the same words.
//!
//! It promises that a run is a function of its seed, and that whatever the models answer, the real servers answer too.

pub mod conformance;
pub mod kv;
pub mod objects;
pub mod store;
