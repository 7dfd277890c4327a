//! Keys stay where a session put them.

use std::time::Duration;

use basal_kvstore::{
    kv::{Compare, Is, Kv, Txn},
    leases::LeaseRules,
    session::Session,
};
use basal_runtime::outcome::Outcome;
use basal_sim::kv::ModelKv;

use crate::support::{delete, env, get, lease_of, pass, put_leased_op, session, shared};

#[tokio::test(start_paused = true)]
async fn keys_outlive_many_times_the_lease() {
    let (model, session) = session();
    session.put("a", b"1");
    session.put("b", b"2");
    session.settled().await;
    let lease = lease_of(&model, "a").await;
    pass(24 * 3600).await;
    assert_eq!((get(&model, "a").await.as_deref(), get(&model, "b").await.as_deref()), (Some("1"), Some("2")));
    assert_eq!(lease_of(&model, "a").await, lease);
    session.put("a", b"3");
    session.delete("b");
    session.settled().await;
    assert_eq!((get(&model, "a").await.as_deref(), get(&model, "b").await), (Some("3"), None));
    assert_eq!(session.report().keys, 1);
}

#[tokio::test(start_paused = true)]
async fn the_keys_of_a_revoked_lease_come_back() {
    let (model, session) = session();
    for i in 0..100 {
        session.put(&format!("k{i}"), b"1");
    }
    session.settled().await;
    let lease = lease_of(&model, "k0").await;
    assert!(model.expire_lease(lease));
    assert!(model.contents().is_empty());
    // The next keep-alive tells.
    pass(301).await;
    session.settled().await;
    assert_eq!(model.contents().len(), 100);
    assert_ne!(lease_of(&model, "k0").await, lease);
    assert_eq!(session.report().lost_leases, 1);
}

#[tokio::test(start_paused = true)]
async fn a_session_whose_process_ends_leaves_its_keys_for_the_time_of_the_lease() {
    let (model, session) = session();
    session.put("a", b"1");
    session.settled().await;
    drop(session);
    pass(14 * 60).await;
    assert_eq!(get(&model, "a").await.as_deref(), Some("1"));
    pass(2 * 60).await;
    assert_eq!(get(&model, "a").await, None);
}

#[tokio::test(start_paused = true)]
async fn revoking_takes_the_keys_away_at_once() {
    let (model, session) = session();
    session.put("a", b"1");
    session.settled().await;
    assert_eq!(session.revoke().await, Outcome::Done(()));
    assert_eq!(get(&model, "a").await, None);
}

#[tokio::test(start_paused = true)]
async fn keys_spread_over_leases() {
    let model = ModelKv::new(1);
    let rules = LeaseRules { max_keys: 10, ..LeaseRules::default() };
    let session = Session::start(env(), shared(&model), rules);
    for i in 0..35 {
        session.put(&format!("k{i:02}"), b"1");
    }
    session.settled().await;
    assert_eq!(session.report().leases, 4);
    assert_eq!(model.contents().len(), 35);
}

#[tokio::test(start_paused = true)]
async fn a_guarded_write_is_kept_when_it_succeeds() {
    let (model, session) = session();
    let txn = |lease| Txn {
        when: vec![Compare::new("a", Is::Absent)],
        then: vec![put_leased_op("a", "1", lease)],
        or_else: Vec::new(),
    };
    let first = session.put_by("a", b"1", txn).await;
    assert!(matches!(first, Outcome::Done(answer) if answer.succeeded));
    let again = session.put_by("a", b"1", txn).await;
    assert!(matches!(again, Outcome::Done(answer) if !answer.succeeded));
    model.expire_lease(lease_of(&model, "a").await);
    pass(301).await;
    session.settled().await;
    assert_eq!(get(&model, "a").await.as_deref(), Some("1"));
}

#[tokio::test(start_paused = true)]
async fn what_somebody_else_deletes_is_written_again_once_it_is_known() {
    let (model, session) = session();
    session.put("a", b"1");
    session.settled().await;
    delete(&model, "a").await;
    session.rewrite("a");
    session.rewrite("never wanted");
    session.settled().await;
    assert_eq!(get(&model, "a").await.as_deref(), Some("1"));
    assert_eq!(model.contents().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_lease_lives_at_least_as_long_as_was_asked_for() {
    let model = ModelKv::new(1);
    let granted = model.lease_grant(Duration::from_millis(2500)).await;
    assert!(matches!(granted, Outcome::Done(lease) if lease.ttl == Duration::from_secs(3)));
}
