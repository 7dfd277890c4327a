//! A prefix is followed through everything that interrupts.

use basal_kvstore::{
    kv::{KvError, WatchEvent},
    list_watch::{ListWatch, Listing, Update, list_watch},
};
use basal_sim::kv::ModelKv;
use futures::{StreamExt, stream::BoxStream};

use crate::support::{delete, env, pass, put, shared};

fn follow(model: &ModelKv) -> BoxStream<'static, Update> {
    list_watch(env(), shared(model), ListWatch { prefix: "p".to_owned(), page_size: 2 })
}

async fn listing(updates: &mut BoxStream<'static, Update>) -> Listing {
    match updates.next().await.unwrap() {
        Update::Listed(listing) => listing,
        other => panic!("a listing was expected, not {other:?}"),
    }
}

async fn events(updates: &mut BoxStream<'static, Update>) -> Vec<String> {
    match updates.next().await.unwrap() {
        Update::Changed(batch) => batch.events.iter().map(text).collect(),
        other => panic!("changes were expected, not {other:?}"),
    }
}

async fn interruption(updates: &mut BoxStream<'static, Update>) -> KvError {
    match updates.next().await.unwrap() {
        Update::Interrupted(error) => error,
        other => panic!("an interruption was expected, not {other:?}"),
    }
}

fn text(event: &WatchEvent) -> String {
    match event {
        WatchEvent::Put(kv) => format!("+{}", kv.key),
        WatchEvent::Delete { key, .. } => format!("-{key}"),
    }
}

fn changed(listing: &Listing) -> Vec<&str> {
    listing.changed.iter().map(|kv| kv.key.as_str()).collect()
}

#[tokio::test(start_paused = true)]
async fn lists_all_pages_and_then_follows() {
    let model = ModelKv::new(1);
    for key in ["p/a", "p/b", "p/c", "p/d", "p/e", "q/x", "pp/x"] {
        put(&model, key, "1").await;
    }
    let mut updates = follow(&model);
    let first = listing(&mut updates).await;
    assert_eq!(changed(&first), ["p/a", "p/b", "p/c", "p/d", "p/e"]);
    assert_eq!((first.total, first.missing.len(), first.replaced), (5, 0, false));
    put(&model, "p/f", "1").await;
    assert_eq!(events(&mut updates).await, ["+p/f"]);
    put(&model, "q/y", "1").await;
    delete(&model, "p/a").await;
    assert_eq!(events(&mut updates).await, ["-p/a"]);
}

#[tokio::test(start_paused = true)]
async fn after_an_interruption_only_the_differences_come() {
    let model = ModelKv::new(1);
    for key in ["p/a", "p/b", "p/c"] {
        put(&model, key, "1").await;
    }
    let mut updates = follow(&model);
    listing(&mut updates).await;
    model.cut_watches();
    assert!(matches!(interruption(&mut updates).await, KvError::Unavailable(_)));
    delete(&model, "p/a").await;
    put(&model, "p/b", "2").await;
    put(&model, "p/d", "1").await;
    let second = listing(&mut updates).await;
    assert_eq!(changed(&second), ["p/b", "p/d"]);
    assert_eq!((second.missing.as_slice(), second.total, second.replaced), (&["p/a".to_owned()][..], 3, false));
    assert!(!second.is_emptied());
}

#[tokio::test(start_paused = true)]
async fn what_was_compacted_away_is_listed() {
    let model = ModelKv::new(1);
    put(&model, "p/a", "1").await;
    let mut updates = follow(&model);
    listing(&mut updates).await;
    // The watch is not open yet: it opens when the stream is asked again.
    delete(&model, "p/a").await;
    put(&model, "p/b", "1").await;
    model.compact(model.header().revision).unwrap();
    assert!(matches!(interruption(&mut updates).await, KvError::Compacted { .. }));
    let second = listing(&mut updates).await;
    assert_eq!((changed(&second), second.missing.as_slice()), (vec!["p/b"], &["p/a".to_owned()][..]));
}

#[tokio::test(start_paused = true)]
async fn an_emptied_store_is_one_listing_and_no_deletion() {
    let model = ModelKv::new(1);
    let empty = model.snapshot();
    for key in ["p/a", "p/b", "p/c"] {
        put(&model, key, "1").await;
    }
    let mut updates = follow(&model);
    listing(&mut updates).await;
    model.restore(&empty, 1);
    interruption(&mut updates).await;
    let second = listing(&mut updates).await;
    assert!(second.is_emptied() && second.replaced, "the revision fell: {second:?}");
    assert_eq!(second.missing, ["p/a", "p/b", "p/c"]);
    put(&model, "p/a", "1").await;
    assert_eq!(events(&mut updates).await, ["+p/a"]);
}

#[tokio::test(start_paused = true)]
async fn a_replaced_store_is_listed_in_full() {
    let model = ModelKv::new(1);
    put(&model, "p/a", "1").await;
    let same = model.snapshot();
    let mut updates = follow(&model);
    listing(&mut updates).await;
    model.restore(&same, 2);
    interruption(&mut updates).await;
    let second = listing(&mut updates).await;
    assert!(second.replaced);
    assert_eq!(changed(&second), ["p/a"]);
}

#[tokio::test(start_paused = true)]
async fn waits_grow_while_the_store_fails_and_shrink_after_a_good_time() {
    let model = ModelKv::new(1);
    put(&model, "p/a", "1").await;
    let mut updates = follow(&model);
    listing(&mut updates).await;
    let mut waits = Vec::new();
    for _ in 0..12 {
        model.cut_watches();
        interruption(&mut updates).await;
        let asked = tokio::time::Instant::now();
        listing(&mut updates).await;
        waits.push(asked.elapsed());
    }
    assert!(waits[0] >= std::time::Duration::from_millis(25) && waits[0] <= std::time::Duration::from_millis(51));
    assert!(waits[11] >= std::time::Duration::from_secs(30) && waits[11] <= std::time::Duration::from_secs(61));
    let quiet = tokio::time::timeout(std::time::Duration::from_secs(11), updates.next()).await;
    assert!(quiet.is_err(), "nothing happens");
    model.cut_watches();
    interruption(&mut updates).await;
    let asked = tokio::time::Instant::now();
    listing(&mut updates).await;
    assert!(asked.elapsed() <= std::time::Duration::from_millis(51));
    pass(1).await;
}
