//! Locks exclude each other, by the keys that Cilium's agents use.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use basal_kvstore::{
    kv::{Kv, Txn},
    lock::{LockError, Locks},
};
use basal_runtime::{env::Env, outcome::Outcome};
use basal_sim::kv::ModelKv;

use crate::support::{get, lease_of, pass, put_op, session, session_with, write};

#[tokio::test(start_paused = true)]
async fn the_key_is_the_path_and_the_lease() {
    let (model, session) = session();
    let locks = Locks::new(session);
    let held = locks.lock("l/a").await.unwrap();
    let keys: Vec<String> = model.contents().into_keys().collect();
    let lease = lease_of(&model, &keys[0]).await;
    assert_eq!(keys, [format!("l/a/{lease:x}")]);
    assert_eq!(held.unlock().await, Outcome::Done(()));
    assert!(model.contents().is_empty());
}

#[tokio::test(start_paused = true)]
async fn one_at_a_time_in_one_process_and_in_several() {
    let model = ModelKv::new(1);
    let inside = Arc::new(AtomicUsize::new(0));
    let env = basal_runtime::env::SeededEnv::new(7);
    let mut tasks = Vec::new();
    for _ in 0..4 {
        let locks = Locks::new(session_with(&model));
        for _ in 0..5 {
            let (locks, inside) = (locks.clone(), Arc::clone(&inside));
            tasks.push(env.spawn(
                "locker",
                Box::pin(async move {
                    let held = locks.lock("l/a").await.unwrap();
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                    pass(1).await;
                    assert_eq!(inside.fetch_sub(1, Ordering::SeqCst), 1);
                    assert_eq!(held.unlock().await, Outcome::Done(()));
                }),
            ));
        }
    }
    let started = tokio::time::Instant::now();
    for task in tasks {
        task.join().await;
    }
    assert_eq!(inside.load(Ordering::SeqCst), 0);
    assert_eq!(started.elapsed().as_secs(), 20, "every one had its second");
    assert!(model.contents().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_dead_holder_is_waited_out() {
    let model = ModelKv::new(1);
    let dead = model.lease_grant(std::time::Duration::from_secs(25)).await;
    let Outcome::Done(lease) = dead else { panic!("{dead:?}") };
    write(&model, crate::support::put_leased_op(&format!("l/a/{:x}", lease.id), "", lease.id)).await;
    // Keys that are no holders of this lock.
    write(&model, put_op("l/a/b/1", "")).await;
    write(&model, put_op("l/a/other", "")).await;
    let started = tokio::time::Instant::now();
    let held = Locks::new(session_with(&model)).lock("l/a").await.unwrap();
    assert_eq!(started.elapsed().as_secs(), 25);
    drop(held);
}

#[tokio::test(start_paused = true)]
async fn a_lock_that_nobody_gives_back_ends_the_wait_and_leaves_no_key() {
    let model = ModelKv::new(1);
    write(&model, put_op("l/a/ffff", "")).await;
    let session = session_with(&model);
    let failed = Locks::new(session.clone()).lock("l/a").await.err();
    assert_eq!(failed, Some(LockError::TimedOut { path: "l/a".to_owned() }));
    session.settled().await;
    assert_eq!(model.contents().into_keys().collect::<Vec<_>>(), ["l/a/ffff"]);
}

#[tokio::test(start_paused = true)]
async fn a_lost_lock_guards_nothing() {
    let (model, session) = session();
    let locks = Locks::new(session.clone());
    let held = locks.lock("l/a").await.unwrap();
    let guarded = || Txn { when: vec![held.guard()], then: vec![put_op("x", "1")], or_else: Vec::new() };
    let first = model.txn(guarded()).await;
    assert!(matches!(first, Outcome::Done(answer) if answer.succeeded));
    let key = model.contents().into_keys().next().unwrap();
    model.expire_lease(lease_of(&model, &key).await);
    let second = model.txn(guarded()).await;
    assert!(matches!(second, Outcome::Done(answer) if !answer.succeeded));
    drop(held);
    // The next one gets a lease that exists.
    let again = locks.lock("l/a").await;
    assert!(again.is_ok() || matches!(again, Err(LockError::Refused { .. })));
    let again = locks.lock("l/b").await.unwrap();
    assert_eq!(again.unlock().await, Outcome::Done(()));
    assert_eq!(get(&model, "x").await.as_deref(), Some("1"));
}

#[tokio::test(start_paused = true)]
async fn an_unused_lock_lease_is_let_go() {
    let (_model, session) = session();
    let held = Locks::new(session.clone()).lock("l/a").await.unwrap();
    pass(100).await;
    assert_eq!(session.report().lock_leases, 1, "it lives while the lock is held");
    assert_eq!(held.unlock().await, Outcome::Done(()));
    pass(30).await;
    assert_eq!(session.report().lock_leases, 0);
}
