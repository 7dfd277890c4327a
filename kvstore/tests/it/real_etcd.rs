//! The adapter against a real etcd: what is refused, what is unknown, and what comes back.

use std::{sync::Arc, time::Duration};

use basal_e2e::servers::{Etcd, EtcdOptions};
use basal_kvstore::{
    config::EtcdConfig,
    etcd::EtcdKv,
    kv::{Compare, Is, Kv, KvError, KvRefusal, Op, Range, Txn},
    leases::LeaseRules,
    ledger::{LedgerKeys, OwnerError, look},
    list_watch::{ListWatch, Update, list_watch},
    lock::Locks,
    session::Session,
};
use basal_runtime::outcome::Outcome;
use futures::StreamExt;

use crate::{
    real::{blocking, connect, connect_to, limits, plain, system_env},
    support::{get, put, put_op},
};

fn create(key: &str, value: &str) -> Txn {
    Txn { when: vec![Compare::new(key, Is::Absent)], then: vec![put_op(key, value)], or_else: Vec::new() }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_server_nothing_was_sent() {
    let mut etcd = plain();
    let kv = connect(&etcd, "x").await;
    put(&kv, "a", "1").await;
    blocking(|| etcd.kill());
    // The broken connection may be found out by the first write; then it is not known what became of it.
    let first = kv.txn(create("b", "1")).await;
    assert!(!first.is_done(), "{first:?}");
    let second = kv.txn(create("b", "1")).await;
    assert!(
        matches!(&second, Outcome::Refused(KvRefusal::Unavailable(why)) if why.contains("cannot connect")),
        "{second:?}"
    );
    let read = kv.range(Range::one("a")).await;
    assert!(matches!(&read, Err(KvError::Unavailable(why)) if why.contains(&etcd.endpoint())), "{read:?}");
    blocking(|| etcd.restart());
    assert_eq!(get(&kv, "a").await.as_deref(), Some("1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_hangs_leaves_a_write_unknown() {
    let etcd = plain();
    let kv = connect(&etcd, "x").await;
    put(&kv, "a", "1").await;
    blocking(|| etcd.pause());
    let write = kv.txn(create("b", "1")).await;
    let read = kv.range(Range::one("a")).await;
    blocking(|| etcd.resume());
    assert!(write.is_unknown(), "{write:?}");
    assert!(matches!(read, Err(KvError::Unavailable(_))), "{read:?}");
    assert_eq!(get(&kv, "a").await.as_deref(), Some("1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_endpoint_takes_over() {
    let (mut first, second) = (plain(), plain());
    // Two stores behind one name: that is how it shows who answered.
    for (etcd, value) in [(&first, "first"), (&second, "second")] {
        put(&connect(etcd, "x").await, "who", value).await;
    }
    let mut config = EtcdConfig::from_address(&first.endpoint()).unwrap();
    config.endpoints.extend(EtcdConfig::from_address(&second.endpoint()).unwrap().endpoints);
    let kv = connect_to(&config).await;
    let answered = get(&kv, "who").await.unwrap();
    assert_eq!(get(&kv, "who").await.as_deref(), Some(answered.as_str()), "it stays where it was answered");
    blocking(|| first.kill());
    assert_eq!(get(&kv, "who").await.as_deref(), Some("second"));
    let write = kv.txn(create("b", "1")).await;
    assert!(write.is_done(), "{write:?}");
    blocking(|| second.pause());
    blocking(|| first.restart());
    let read = get(&kv, "who").await;
    blocking(|| second.resume());
    assert_eq!(read.as_deref(), Some("first"), "a read goes on to the next after a time-out");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_store_is_a_refusal_where_the_keys_prove_it() {
    let quota = 4 << 20;
    let etcd = blocking(|| Etcd::start(EtcdOptions { quota_bytes: Some(quota), ..EtcdOptions::default() }));
    let kv = connect(&etcd, "x").await;
    let big = "x".repeat(1 << 20);
    let mut last = Outcome::Unknown(String::new());
    for i in 0..40 {
        last = kv.txn(create(&format!("k{i}"), &big)).await;
        if !last.is_done() {
            break;
        }
    }
    assert!(!last.is_done(), "the quota is used up");
    let guarded = kv.txn(create("new", "1")).await;
    assert!(matches!(guarded, Outcome::Refused(KvRefusal::NoSpace(_))), "{guarded:?}");
    assert_eq!(get(&kv, "new").await, None);
    let blind = kv.txn(Txn { then: vec![put_op("new", "1")], ..Txn::default() }).await;
    assert!(matches!(&blind, Outcome::Unknown(why) if why.contains("full")), "{blind:?}");
    let looked = look(&kv, &LedgerKeys::new("default"), "uid").await;
    assert!(matches!(looked, Err(OwnerError::Refused(KvRefusal::NoSpace(_)))), "reads would be answered: {looked:?}");
    // Deleting is how it gets better.
    let delete = Op::Delete(basal_kvstore::kv::Keys::Prefix("k".to_owned()));
    assert!(kv.txn(Txn { then: vec![delete], ..Txn::default() }).await.is_done());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_gets_through_restart_compaction_and_loss() {
    let mut etcd = plain();
    let kv: Arc<dyn Kv> = Arc::new(connect(&etcd, "x").await);
    put(&*kv, "p/a", "1").await;
    let mut updates = list_watch(system_env(), Arc::clone(&kv), ListWatch::new("p"));
    let Some(Update::Listed(first)) = updates.next().await else { panic!("no listing") };
    assert_eq!(first.changed.len(), 1);
    put(&*kv, "p/b", "1").await;
    let Some(Update::Changed(batch)) = updates.next().await else { panic!("no change") };
    assert_eq!((batch.events[0].key(), batch.header.revision), ("p/b", batch.events[0].mod_revision()));

    blocking(|| etcd.stop());
    let Some(Update::Interrupted(_)) = updates.next().await else { panic!("no interruption") };
    blocking(|| etcd.restart());
    put(&*kv, "p/c", "1").await;
    crate::support::delete(&*kv, "p/a").await;
    let header = kv.range(Range::one("p/c")).await.unwrap().header;
    blocking(|| etcd.etcdctl(&["compact", &header.revision.to_string()]));
    let second = next_listing(&mut updates).await;
    assert_eq!(second.changed.iter().map(|kv| kv.key.as_str()).collect::<Vec<_>>(), ["p/c"]);
    assert_eq!((second.missing, second.replaced), (vec!["p/a".to_owned()], false));

    blocking(|| etcd.wipe());
    let third = next_listing(&mut updates).await;
    assert!(third.is_emptied() && third.replaced, "{third:?}");
}

async fn next_listing(updates: &mut futures::stream::BoxStream<'static, Update>) -> basal_kvstore::list_watch::Listing {
    loop {
        match updates.next().await.unwrap() {
            Update::Listed(listing) => return listing,
            Update::Interrupted(_) => {}
            Update::Changed(batch) => panic!("a listing was expected, not {batch:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_of_compacted_history_says_so() {
    let etcd = plain();
    let kv = connect(&etcd, "x").await;
    for value in ["1", "2", "3"] {
        put(&kv, "p/a", value).await;
    }
    blocking(|| etcd.etcdctl(&["compact", "4"]));
    let mut watch = kv.watch("p/", 2);
    let error = loop {
        match watch.next().await {
            Some(Ok(batch)) => assert!(batch.events.is_empty(), "{batch:?}"),
            Some(Err(error)) => break error,
            None => panic!("the watch ended without an error"),
        }
    };
    assert_eq!(error, KvError::Compacted { asked: 2 });
    assert!(watch.next().await.is_none());
    let read = kv.range(Range { revision: 2, ..Range::one("p/a") }).await;
    assert_eq!(read, Err(KvError::Compacted { asked: 2 }));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_catches_up_reports_no_more_than_it_delivered() {
    let etcd = plain();
    let kv = connect(&etcd, "x").await;
    let batches = 30;
    for i in 0..batches {
        // Many revisions: etcd hands out a thousand at a time.
        let writes = (0..100).map(|j| {
            let kv = kv.clone();
            async move { put(&kv, &format!("p/{i}-{j}"), "1").await }
        });
        futures::future::join_all(writes).await;
    }
    let mut watch = kv.watch("p/", 1);
    let mut delivered = 0;
    while delivered < batches * 100 {
        let batch = watch.next().await.unwrap().unwrap();
        delivered += batch.events.len();
        if let Some(last) = batch.events.last() {
            assert_eq!(batch.header.revision, last.mod_revision());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_keys_of_a_session_survive_its_leases() {
    let etcd = plain();
    let kv: Arc<dyn Kv> = Arc::new(connect(&etcd, "x").await);
    let rules = LeaseRules { data_ttl: Duration::from_secs(3), ..LeaseRules::default() };
    let session = Session::start(system_env(), Arc::clone(&kv), rules);
    for i in 0..50 {
        session.put(&format!("s/{i:02}"), b"1");
    }
    session.settled().await;
    let lease = crate::support::lease_of(&*kv, "s/00").await;
    blocking(|| etcd.etcdctl(&["lease", "revoke", &format!("{lease:x}")]));
    assert_eq!(kv.lease_keep_alive(lease).await, Err(KvError::LeaseNotFound(lease)));
    while session.report().lost_leases == 0 {
        session.changed().await;
    }
    session.settled().await;
    assert_eq!(kv.range(Range::prefix("s/")).await.unwrap().kvs.len(), 50);
    let held = Locks::new(session.clone()).lock("l/a").await.unwrap();
    assert!(held.unlock().await.is_done());
    assert_eq!(session.revoke().await, Outcome::Done(()));
    assert!(kv.range(Range::prefix("s/")).await.unwrap().kvs.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_at_once_share_the_slots() {
    let etcd = plain();
    let config = EtcdConfig::from_address(&etcd.endpoint()).unwrap();
    let one_at_a_time = basal_kvstore::etcd::Limits { max_inflight: 1, ..limits() };
    let kv = EtcdKv::new(&system_env(), &config, one_at_a_time).await.unwrap();
    let writes = (0..50).map(|i| {
        let kv = kv.clone();
        async move { put(&kv, &format!("w/{i}"), "1").await }
    });
    futures::future::join_all(writes).await;
    assert_eq!(kv.range(Range::prefix("w/")).await.unwrap().kvs.len(), 50);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_may_be_large() {
    let etcd = plain();
    let kv = connect(&etcd, "x").await;
    let big = "x".repeat(1 << 20);
    for i in 0..6 {
        put(&kv, &format!("b/{i}"), &big).await;
    }
    assert_eq!(kv.range(Range::prefix("b/")).await.unwrap().kvs.len(), 6);
    // etcd's own limit is 1.5 MiB.
    let refused = kv.txn(create("c", &"x".repeat(1_700_000))).await;
    assert!(matches!(refused, Outcome::Refused(KvRefusal::Invalid(_))), "{refused:?}");
}
