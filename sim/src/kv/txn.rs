//! What etcd does with a transaction, as a function of the store.
//!
//! Order of the checks and their limits: etcd 3.6 `server/etcdserver/api/v3rpc/key.go` (checkTxnRequest) and
//! `server/etcdserver/txn`, as documented in "etcd API guarantees" and "System limits".

use std::{collections::BTreeSet, sync::Arc};

use basal_kvstore::kv::{
    Compare, Header, Is, KeyValue, Keys, KvError, KvRefusal, LeaseId, Op, OpAnswer, Range, RangeAnswer, Txn,
};

use crate::store::{NoSuchRevision, Store, Stored};

/// A value; shared between the live store, its log and its snapshots.
pub(super) type Bytes = Arc<[u8]>;

/// `--max-txn-ops`: conditions, or operations of one side, in a transaction.
const MAX_TXN_OPS: usize = 128;

/// `--max-request-bytes`.
const MAX_REQUEST_BYTES: usize = 1_572_864;

/// Checks what etcd checks before it looks at the store.
pub(super) fn check_request(txn: &Txn) -> Result<(), KvRefusal> {
    let invalid = |why: &str| Err(KvRefusal::Invalid(why.to_owned()));
    let operations = txn.when.len().max(txn.then.len()).max(txn.or_else.len());
    if operations > MAX_TXN_OPS {
        return invalid("etcdserver: too many operations in txn request");
    }
    if txn.when.iter().any(|compare| compare.key.is_empty()) {
        return invalid("etcdserver: key is not provided");
    }
    for side in [&txn.then, &txn.or_else] {
        let mut puts = BTreeSet::new();
        for op in side {
            let one = match op {
                Op::Put { key, .. } => Some(key),
                Op::Delete(Keys::One(key)) | Op::Get(Range { keys: Keys::One(key), .. }) => Some(key),
                Op::Delete(_) | Op::Get(_) => None,
            };
            if one.is_some_and(String::is_empty) {
                return invalid("etcdserver: key is not provided");
            }
            if let Op::Put { key, .. } = op
                && !puts.insert(key.as_str())
            {
                return invalid("etcdserver: duplicate key given in txn request");
            }
        }
        let deleted_too = side.iter().any(|op| match op {
            Op::Delete(keys) => puts.iter().any(|key| covers(keys, key)),
            Op::Put { .. } | Op::Get(_) => false,
        });
        if deleted_too {
            return invalid("etcdserver: duplicate key given in txn request");
        }
    }
    if size(txn) > MAX_REQUEST_BYTES {
        return invalid("etcdserver: request is too large");
    }
    Ok(())
}

fn size(txn: &Txn) -> usize {
    let op = |op: &Op| match op {
        Op::Put { key, value, .. } => key.len() + value.len(),
        Op::Delete(keys) | Op::Get(Range { keys, .. }) => match keys {
            Keys::One(key) | Keys::Prefix(key) => key.len(),
            Keys::PrefixFrom { prefix, from } => prefix.len() + from.len(),
        },
    };
    let compare = |compare: &Compare| match &compare.is {
        Is::Value(value) => compare.key.len() + value.len(),
        _ => compare.key.len(),
    };
    let ops = txn.then.iter().chain(&txn.or_else).map(op).sum::<usize>();
    ops + txn.when.iter().map(compare).sum::<usize>()
}

fn covers(keys: &Keys, key: &str) -> bool {
    match keys {
        Keys::One(one) => one == key,
        Keys::Prefix(prefix) => key.starts_with(prefix.as_str()),
        Keys::PrefixFrom { prefix, from } => key.starts_with(prefix.as_str()) && key >= from.as_str(),
    }
}

/// Whether a condition holds.
pub(super) fn holds(store: &Store<Bytes>, compare: &Compare) -> bool {
    let stored = store.get(&compare.key);
    match &compare.is {
        Is::Absent => stored.is_none(),
        Is::Present => stored.is_some(),
        Is::ModRevision(revision) => stored.map_or(0, |s| s.mod_revision) == *revision,
        Is::CreateRevision(revision) => stored.map_or(0, |s| s.create_revision) == *revision,
        Is::Value(value) => stored.is_some_and(|s| s.value.as_ref() == value.as_slice()),
        Is::Lease(lease) => stored.map_or(0, |s| s.lease) == *lease,
    }
}

/// Reads. `header` is what the answer carries.
pub(super) fn range(store: &Store<Bytes>, range: &Range, header: Header) -> Result<RangeAnswer, NoSuchRevision> {
    let earlier = if range.revision > 0 { Some(store.at(range.revision)?) } else { None };
    let store = earlier.as_ref().unwrap_or(store);
    let mut kvs: Vec<KeyValue> = match &range.keys {
        Keys::One(key) => store.get(key).map(|stored| key_value(key, stored)).into_iter().collect(),
        Keys::Prefix(prefix) => store.scan(prefix, "").map(|(key, stored)| key_value(key, stored)).collect(),
        Keys::PrefixFrom { prefix, from } => {
            store.scan(prefix, from).map(|(key, stored)| key_value(key, stored)).collect()
        }
    };
    let limit = usize::try_from(range.limit).unwrap_or(0);
    let more = limit > 0 && kvs.len() > limit;
    if more {
        kvs.truncate(limit);
    }
    if range.keys_only {
        kvs.iter_mut().for_each(|kv| kv.value.clear());
    }
    Ok(RangeAnswer { header, kvs, more })
}

/// What the port says of a revision that cannot be read.
pub(super) fn read_error(error: NoSuchRevision) -> KvError {
    match error {
        NoSuchRevision::Compacted(asked) => KvError::Compacted { asked },
        NoSuchRevision::Future(_) => {
            KvError::Unavailable("etcdserver: mvcc: required revision is a future revision".to_owned())
        }
    }
}

/// A key with its value and counters, as the port shows it.
pub(super) fn key_value(key: &str, stored: &Stored<Bytes>) -> KeyValue {
    KeyValue {
        key: key.to_owned(),
        value: stored.value.to_vec(),
        create_revision: stored.create_revision,
        mod_revision: stored.mod_revision,
        version: stored.version,
        lease: stored.lease,
    }
}

/// Carries out one side of a transaction, in one revision, or nothing of it.
pub(super) fn apply(
    store: &mut Store<Bytes>,
    ops: &[Op],
    lease_exists: impl Fn(LeaseId) -> bool,
    cluster_id: u64,
) -> Result<Vec<OpAnswer>, KvRefusal> {
    for op in ops {
        match op {
            Op::Put { lease, .. } if *lease != 0 && !lease_exists(*lease) => {
                return Err(KvRefusal::LeaseNotFound(*lease));
            }
            Op::Get(get) if get.revision > 0 => {
                store.at(get.revision).map_err(|error| KvRefusal::Invalid(error.to_string()))?;
            }
            Op::Put { .. } | Op::Get(_) | Op::Delete(_) => {}
        }
    }
    let mut batch = store.write();
    let mut answers = Vec::with_capacity(ops.len());
    for op in ops {
        answers.push(match op {
            Op::Put { key, value, lease } => {
                batch.put(key, value.as_slice().into(), *lease);
                OpAnswer::Put
            }
            Op::Delete(keys) => {
                let all = Range { keys: keys.clone(), limit: 0, revision: 0, keys_only: true };
                let doomed = range(batch.store(), &all, Header::default())
                    .map_err(|error| KvRefusal::Invalid(error.to_string()))?
                    .kvs;
                for kv in &doomed {
                    batch.delete(&kv.key);
                }
                OpAnswer::Delete(i64::try_from(doomed.len()).unwrap_or(i64::MAX))
            }
            Op::Get(get) => {
                let header = Header { cluster_id, revision: batch.store().revision() };
                let answer = range(batch.store(), get, header);
                OpAnswer::Get(answer.map_err(|error| KvRefusal::Invalid(error.to_string()))?)
            }
        });
    }
    Ok(answers)
}
