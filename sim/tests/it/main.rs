//! The models against the real servers, and the world with processes in it.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod disturb;
mod ended_term;
mod etcd_ledger;
mod explorer;
mod faults;
mod laboratory;
mod object_ledger;
mod real_apiserver;
mod real_etcd;
mod replay;
