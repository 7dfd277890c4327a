//! What several tests need.

use std::{net::IpAddr, sync::Arc, time::Duration};

use basal_crds::{
    kvstore::{IpRecord, IpTarget},
    labels::Labels,
    names::Cluster,
};
use basal_kvstore::{
    directory::{DirectoryConfig, EtcdDirectory},
    kv::{Keys, Kv, LeaseId, Op, Range, Txn, TxnAnswer},
    leases::LeaseRules,
    session::Session,
};
use basal_runtime::{
    env::{SeededEnv, SharedEnv},
    outcome::Outcome,
};
use basal_sim::kv::ModelKv;

pub(crate) fn env() -> SharedEnv {
    Arc::new(SeededEnv::new(1))
}

/// A model etcd, and a session with it.
pub(crate) fn session() -> (ModelKv, Session) {
    let model = ModelKv::new(1);
    let session = session_with(&model);
    (model, session)
}

pub(crate) fn session_with(model: &ModelKv) -> Session {
    Session::start(env(), shared(model), LeaseRules::default())
}

pub(crate) fn shared(model: &ModelKv) -> Arc<dyn Kv> {
    Arc::new(model.clone())
}

pub(crate) fn put_op(key: &str, value: &str) -> Op {
    put_leased_op(key, value, 0)
}

pub(crate) fn put_leased_op(key: &str, value: &str, lease: LeaseId) -> Op {
    Op::Put { key: key.to_owned(), value: value.as_bytes().to_vec(), lease }
}

pub(crate) async fn write(kv: &dyn Kv, op: Op) -> TxnAnswer {
    match kv.txn(Txn { then: vec![op], ..Txn::default() }).await {
        Outcome::Done(answer) => answer,
        other => panic!("a write failed: {other:?}"),
    }
}

pub(crate) async fn put(kv: &dyn Kv, key: &str, value: &str) {
    write(kv, put_op(key, value)).await;
}

pub(crate) async fn delete(kv: &dyn Kv, key: &str) {
    write(kv, Op::Delete(Keys::One(key.to_owned()))).await;
}

/// The value of a key, as text.
pub(crate) async fn get(kv: &dyn Kv, key: &str) -> Option<String> {
    let answer = kv.range(Range::one(key)).await.unwrap();
    answer.kvs.into_iter().next().map(|kv| String::from_utf8(kv.value).unwrap())
}

/// The lease of a key.
pub(crate) async fn lease_of(kv: &dyn Kv, key: &str) -> LeaseId {
    kv.range(Range::one(key)).await.unwrap().kvs[0].lease
}

pub(crate) async fn pass(seconds: u64) {
    tokio::time::sleep(Duration::from_secs(seconds)).await;
}

pub(crate) fn labels(text: &str) -> Labels {
    Labels::parse_canonical(text).unwrap()
}

pub(crate) fn target(ip: &str) -> IpTarget {
    IpTarget::Host(ip.parse().unwrap())
}

pub(crate) fn ip_record(ip: &str, host: &str, identity: u32) -> IpRecord {
    IpRecord::new(target(ip), host.parse().unwrap(), basal_crds::identity::IdentityId::new(identity))
}

/// An agent of the node with this address.
pub(crate) fn agent(model: &ModelKv, node_ip: &str) -> EtcdDirectory {
    let node_ip: IpAddr = node_ip.parse().unwrap();
    let config = DirectoryConfig { cluster: Cluster::default(), node_ips: vec![node_ip], page_size: 2 };
    EtcdDirectory::start(session_with(model), config).unwrap()
}
