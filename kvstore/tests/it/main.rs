//! What is built on the port, over the model etcd; and the adapter, over a real one.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod directory;
mod identity;
mod ledger;
mod list_watch;
mod locks;
mod real;
mod real_etcd;
mod real_tls;
mod records;
mod session;
mod support;
