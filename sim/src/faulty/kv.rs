//! The wire to etcd.

use std::time::Duration;

use async_trait::async_trait;
use basal_kvstore::kv::{
    Compare, Is, Keys, Kv, KvError, KvRefusal, Lease, LeaseId, Op, Range, RangeAnswer, Revision, Txn, TxnAnswer,
    WatchBatch, WatchEvent,
};
use basal_runtime::outcome::Outcome;
use futures::{FutureExt as _, future, stream::BoxStream};

use super::{
    Faulty, Request,
    answer::{NotDone, Told},
    watch::Kind,
};
use crate::trace::{Call, Port, digest};

/// Tries of the one who overtakes.
const OVERTAKING_TRIES: usize = 3;

fn call(write: bool, request: String) -> Call {
    Call { number: None, port: Port::Kv, write, request }
}

#[async_trait]
impl<P: Kv> Kv for Faulty<P> {
    async fn range(&self, range: Range) -> Result<RangeAnswer, KvError> {
        let text = range_text(&range);
        let server = self.server();
        let effect = async move { server.range(range).await }.boxed();
        self.wire.call(Request { call: call(false, text), effect, overtaking: future::ready(()).boxed() }).await
    }

    async fn txn(&self, txn: Txn) -> Outcome<TxnAnswer, KvRefusal> {
        let write = txn.then.iter().chain(&txn.or_else).any(|op| !matches!(op, Op::Get(_)));
        let text = txn_text(&txn);
        let overtaking = {
            let (server, when) = (self.server(), txn.when.clone());
            async move { overtake(&*server, &when).await }.boxed()
        };
        let server = self.server();
        let effect = async move { server.txn(txn).await }.boxed();
        self.wire.call(Request { call: call(write, text), effect, overtaking }).await
    }

    fn watch(&self, prefix: &str, from: Revision) -> BoxStream<'static, Result<WatchBatch, KvError>> {
        let kind = Kind {
            port: Port::Kv,
            text: batch_text,
            error: || KvError::Unavailable("lost on the way".to_owned()),
            // etcd numbers what it sends.
            can_be_lost: |_| false,
            goes_on: false,
        };
        let (server, asked) = (self.server(), prefix.to_owned());
        let open = move || server.watch(&asked, from);
        self.wire.watch(kind, format!("watch {prefix} from {from}"), Box::new(open))
    }

    async fn lease_grant(&self, ttl: Duration) -> Outcome<Lease, KvRefusal> {
        let server = self.server();
        let effect = async move { server.lease_grant(ttl).await }.boxed();
        let call = call(true, format!("grant {ttl:?}"));
        self.wire.call(Request { call, effect, overtaking: future::ready(()).boxed() }).await
    }

    async fn lease_keep_alive(&self, id: LeaseId) -> Result<Duration, KvError> {
        let server = self.server();
        let effect = async move { server.lease_keep_alive(id).await }.boxed();
        let call = call(false, format!("keep alive {id:x}"));
        self.wire.call(Request { call, effect, overtaking: future::ready(()).boxed() }).await
    }

    async fn lease_revoke(&self, id: LeaseId) -> Outcome<(), KvRefusal> {
        let server = self.server();
        let effect = async move { server.lease_revoke(id).await }.boxed();
        let call = call(true, format!("revoke {id:x}"));
        self.wire.call(Request { call, effect, overtaking: future::ready(()).boxed() }).await
    }
}

/// Writes each key whose revision a transaction is about to compare once more, with the value that it has.
async fn overtake<P: Kv>(server: &P, when: &[Compare]) {
    for compare in when {
        if !matches!(compare.is, Is::ModRevision(revision) if revision > 0) {
            continue;
        }
        for _ in 0..OVERTAKING_TRIES {
            let Ok(found) = server.range(Range::one(compare.key.clone())).await else { break };
            let Some(kv) = found.kvs.into_iter().next() else { break };
            let again = Txn {
                when: vec![Compare::new(kv.key.clone(), Is::ModRevision(kv.mod_revision))],
                then: vec![Op::Put { key: kv.key, value: kv.value, lease: kv.lease }],
                or_else: Vec::new(),
            };
            if matches!(server.txn(again).await, Outcome::Done(answer) if answer.succeeded) {
                break;
            }
        }
    }
}

// Texts for the trace.

fn keys_text(keys: &Keys) -> String {
    match keys {
        Keys::One(key) => key.clone(),
        Keys::Prefix(prefix) => format!("{prefix}*"),
        Keys::PrefixFrom { prefix, from } => format!("{prefix}* from {from:?}"),
    }
}

fn range_text(range: &Range) -> String {
    let mut text = format!("range {}", keys_text(&range.keys));
    if range.limit > 0 {
        text += &format!(" limit {}", range.limit);
    }
    if range.revision > 0 {
        text += &format!(" at {}", range.revision);
    }
    text
}

fn op_text(op: &Op) -> String {
    match op {
        Op::Put { key, value, lease: 0 } => format!("put {key}={}", digest(value)),
        Op::Put { key, value, lease } => format!("put {key}={} on {lease:x}", digest(value)),
        Op::Delete(keys) => format!("delete {}", keys_text(keys)),
        Op::Get(range) => range_text(range),
    }
}

fn compare_text(Compare { key, is }: &Compare) -> String {
    match is {
        Is::Absent => format!("{key} absent"),
        Is::Present => format!("{key} present"),
        Is::ModRevision(revision) => format!("{key} mod {revision}"),
        Is::CreateRevision(revision) => format!("{key} created {revision}"),
        Is::Value(value) => format!("{key} is {}", digest(value)),
        Is::Lease(lease) => format!("{key} on {lease:x}"),
    }
}

fn txn_text(txn: &Txn) -> String {
    let when: Vec<_> = txn.when.iter().map(compare_text).collect();
    let then: Vec<_> = txn.then.iter().map(op_text).collect();
    let or_else: Vec<_> = txn.or_else.iter().map(op_text).collect();
    match (when.is_empty(), or_else.is_empty()) {
        (true, true) => format!("txn {}", then.join(", ")),
        (_, true) => format!("txn if {} then {}", when.join(" and "), then.join(", ")),
        (_, false) => format!("txn if {} then {} else {}", when.join(" and "), then.join(", "), or_else.join(", ")),
    }
}

fn batch_text(batch: &WatchBatch) -> String {
    let event = |event: &WatchEvent| match event {
        WatchEvent::Put(kv) => format!(" +{}={}", kv.key, digest(&kv.value)),
        WatchEvent::Delete { key, .. } => format!(" -{key}"),
    };
    format!("rev {}{}", batch.header.revision, batch.events.iter().map(event).collect::<String>())
}

impl Told for RangeAnswer {
    fn told(&self) -> String {
        let values: Vec<u8> = self.kvs.iter().flat_map(|kv| kv.value.iter().copied()).collect();
        format!("rev {}, {} keys {}", self.header.revision, self.kvs.len(), digest(&values))
    }
}

impl Told for Duration {
    fn told(&self) -> String {
        format!("{self:?}")
    }
}

impl Told for TxnAnswer {
    fn told(&self) -> String {
        format!("{} at {}", if self.succeeded { "then" } else { "else" }, self.header.revision)
    }
}

impl Told for Lease {
    fn told(&self) -> String {
        format!("lease {:x} for {:?}", self.id, self.ttl)
    }
}

impl NotDone for KvError {
    fn unavailable(why: &str) -> Self {
        Self::Unavailable(why.to_owned())
    }

    /// etcd does not throttle reads.
    fn throttled() -> Self {
        Self::unavailable("lost on the way")
    }
}

impl NotDone for KvRefusal {
    fn unavailable(why: &str) -> Self {
        Self::Unavailable(why.to_owned())
    }

    fn throttled() -> Self {
        Self::unavailable("etcdserver: too many requests")
    }
}
