//! The command as an administrator runs it, against a real etcd and a real kube-apiserver.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod real_check;
mod real_objects;
mod real_watch;
mod stage;
