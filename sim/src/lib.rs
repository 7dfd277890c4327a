//! A whole cluster in one thread, driven by a seed: a model etcd ([`kv::ModelKv`]) and a model API server
//! ([`objects::ModelObjects`]) over one revisioned [`store`], held to the words of the real ones by the
//! [conformance suites](conformance); processes that reach them over wires on which time passes and [faults](fault)
//! happen; and a [`world`] that runs all that in virtual time, writes down what happened, and looks for broken promises
//! after each change.
//!
//! It promises that a run is a function of its seed, its fault plan and its scenario, and that whatever the models
//! answer, the real servers answer too.

pub mod conformance;
mod dice;
mod disturb;
pub mod explore;
pub mod fault;
mod faulty;
mod gate;
pub mod kv;
pub mod laboratory;
pub mod objects;
pub mod process;
pub mod safety;
pub mod store;
mod text;
pub mod trace;
pub mod workload;
pub mod world;
