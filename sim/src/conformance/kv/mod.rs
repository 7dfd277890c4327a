//! What [`Kv`] promises.

mod leases;
mod reads;
mod txns;
mod watches;

use std::sync::Arc;

use async_trait::async_trait;
use basal_kvstore::kv::{Compare, Header, KeyValue, Keys, Kv, Op, Range, Revision, Txn, TxnAnswer};

use super::{Case, Departure, Verdict, done, read};
use crate::kv::ModelKv;

/// What a suite needs beside the port: an administrator does these.
#[async_trait]
pub trait KvAdmin: Send + Sync {
    /// Forgets the history before a revision, and returns when that is visible.
    ///
    /// # Errors
    /// What the server said.
    async fn compact(&self, revision: Revision) -> Result<(), String>;
}

#[async_trait]
impl KvAdmin for ModelKv {
    async fn compact(&self, revision: Revision) -> Result<(), String> {
        Self::compact(self, revision).map_err(|error| error.to_string())
    }
}

/// One case's view of a store: everything under its own prefix.
#[expect(missing_debug_implementations, reason = "holds trait objects")]
pub struct KvFixture {
    kv: Arc<dyn Kv>,
    admin: Arc<dyn KvAdmin>,
    prefix: String,
}

/// The suite.
#[must_use]
pub fn cases() -> Vec<Case<KvFixture>> {
    let mut all = reads::cases();
    all.extend(txns::cases());
    all.extend(watches::cases());
    all.extend(leases::cases());
    all
}

impl KvFixture {
    /// A view for one case. `run` makes the prefix unique where a store outlives the run.
    pub fn new(kv: Arc<dyn Kv>, admin: Arc<dyn KvAdmin>, run: &str, case: &str) -> Self {
        Self { kv, admin, prefix: format!("basal-conformance/{run}/{case}/") }
    }

    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn all(&self) -> Keys {
        Keys::Prefix(self.prefix.clone())
    }

    fn put_op(&self, name: &str, value: &str) -> Op {
        Op::Put { key: self.key(name), value: value.as_bytes().to_vec(), lease: 0 }
    }

    fn names<'a>(&self, kvs: &'a [KeyValue]) -> Vec<&'a str> {
        kvs.iter().map(|kv| kv.key.strip_prefix(&self.prefix).unwrap_or(&kv.key)).collect()
    }

    async fn write(&self, then: Vec<Op>) -> Verdict<TxnAnswer> {
        done("write", self.kv.txn(Txn { then, ..Txn::default() }).await)
    }

    async fn put(&self, name: &str, value: &str) -> Verdict<Header> {
        Ok(self.write(vec![self.put_op(name, value)]).await?.header)
    }

    async fn delete(&self, name: &str) -> Verdict<Header> {
        Ok(self.write(vec![Op::Delete(Keys::One(self.key(name)))]).await?.header)
    }

    async fn get(&self, name: &str) -> Verdict<Option<KeyValue>> {
        Ok(read("get", self.kv.range(Range::one(self.key(name))).await)?.kvs.pop())
    }

    async fn existing(&self, name: &str) -> Verdict<KeyValue> {
        self.get(name).await?.ok_or_else(|| Departure(format!("{name} is gone")))
    }

    async fn list(&self) -> Verdict<Vec<KeyValue>> {
        Ok(read("list", self.kv.range(Range::prefix(self.prefix.clone())).await)?.kvs)
    }

    async fn revision(&self) -> Verdict<Revision> {
        Ok(read("list", self.kv.range(Range::prefix(self.prefix.clone())).await)?.header.revision)
    }

    async fn succeeds(&self, when: Vec<Compare>) -> Verdict<bool> {
        Ok(done("compare", self.kv.txn(Txn { when, ..Txn::default() }).await)?.succeeded)
    }
}
