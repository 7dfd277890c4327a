//! Watches: history, order, whole revisions, the end.

use basal_kvstore::kv::{Keys, KvError, Op, Revision, WatchBatch, WatchEvent};
use futures::{StreamExt as _, stream::BoxStream};

use super::{Case, KvFixture, Verdict, read};
use crate::conformance::{Departure, holds, next, same};

pub(super) fn cases() -> Vec<Case<KvFixture>> {
    super::super::cases![
        a_watch_replays_history_and_goes_on,
        a_watch_keeps_to_its_prefix,
        a_watch_from_a_later_revision_waits_for_it,
        a_revision_comes_whole_and_in_order,
        a_batch_promises_no_more_than_was_delivered,
        a_watch_below_the_compacted_revision_ends,
        a_watch_from_the_compacted_revision_sees_it,
        an_open_watch_survives_a_compaction,
    ]
}

type Watch = BoxStream<'static, Result<WatchBatch, KvError>>;

fn revision(event: &WatchEvent) -> Revision {
    match event {
        WatchEvent::Put(kv) => kv.mod_revision,
        WatchEvent::Delete { mod_revision, .. } => *mod_revision,
    }
}

/// `+key=value` or `-key`.
fn text(f: &KvFixture, event: &WatchEvent) -> String {
    let name = |key: &str| key.strip_prefix(&f.prefix).unwrap_or(key).to_owned();
    match event {
        WatchEvent::Put(kv) => format!("+{}={}", name(&kv.key), String::from_utf8_lossy(&kv.value)),
        WatchEvent::Delete { key, .. } => format!("-{}", name(key)),
    }
}

/// The next events, at least `count`.
async fn take(watch: &mut Watch, count: usize) -> Verdict<Vec<WatchEvent>> {
    let mut events = Vec::new();
    while events.len() < count {
        events.extend(read("watch", next("watch", watch).await?)?.events);
    }
    Ok(events)
}

/// The first events of the fixture's prefix from a revision on, at least `count`.
pub(super) async fn events(f: &KvFixture, from: Revision, count: usize) -> Verdict<Vec<WatchEvent>> {
    take(&mut f.kv.watch(&f.prefix, from), count).await
}

async fn texts(f: &KvFixture, watch: &mut Watch, count: usize) -> Verdict<Vec<String>> {
    Ok(take(watch, count).await?.iter().map(|event| text(f, event)).collect())
}

/// Reads on until the watch fails.
async fn failure(watch: &mut Watch) -> Verdict<KvError> {
    loop {
        if let Err(error) = next("watch", watch).await? {
            return Ok(error);
        }
    }
}

async fn a_watch_replays_history_and_goes_on(f: &KvFixture) -> Verdict {
    f.put("a", "0").await?;
    let from = f.put("a", "1").await?.revision;
    f.put("b", "1").await?;
    let deleted = f.delete("a").await?.revision;
    let mut watch = f.kv.watch(&f.prefix, from);
    let past = take(&mut watch, 3).await?;
    let words: Vec<_> = past.iter().map(|event| text(f, event)).collect();
    same("history", words, ["+a=1", "+b=1", "-a"])?;
    same("revision of the deletion", past.last().map(revision), Some(deleted))?;
    f.put("c", "1").await?;
    same("what comes then", texts(f, &mut watch, 1).await?, ["+c=1"])
}

async fn a_watch_keeps_to_its_prefix(f: &KvFixture) -> Verdict {
    let from = f.put("in/a", "1").await?.revision;
    f.put("in", "1").await?;
    f.put("in0", "1").await?;
    f.put("in/b", "1").await?;
    let mut watch = f.kv.watch(&f.key("in/"), from);
    same("events", texts(f, &mut watch, 2).await?, ["+in/a=1", "+in/b=1"])
}

async fn a_watch_from_a_later_revision_waits_for_it(f: &KvFixture) -> Verdict {
    let now = f.put("a", "0").await?.revision;
    let mut watch = f.kv.watch(&f.prefix, now + 3);
    for value in ["1", "2", "3", "4"] {
        f.put("a", value).await?;
    }
    same("events", texts(f, &mut watch, 2).await?, ["+a=3", "+a=4"])
}

async fn a_revision_comes_whole_and_in_order(f: &KvFixture) -> Verdict {
    f.put("old", "").await?;
    let mut then: Vec<Op> = (0..100).rev().map(|i| f.put_op(&format!("{i:02}"), "")).collect();
    then.push(Op::Delete(Keys::One(f.key("old"))));
    let from = f.write(then).await?.header.revision;
    f.put("later", "").await?;
    let mut watch = f.kv.watch(&f.prefix, from);
    loop {
        let batch = read("watch", next("watch", &mut watch).await?)?;
        if batch.events.is_empty() {
            continue;
        }
        let words: Vec<_> = batch.events.iter().filter(|e| revision(e) == from).map(|e| text(f, e)).collect();
        let wanted: Vec<_> = (0..100).rev().map(|i| format!("+{i:02}=")).chain(["-old".to_owned()]).collect();
        return same("the first batch's part of the revision", words, wanted);
    }
}

/// etcd catches a watch up in steps of 1,000 revisions.
async fn a_batch_promises_no_more_than_was_delivered(f: &KvFixture) -> Verdict {
    const WRITES: usize = 2_500;
    let from = f.put("a", "0").await?.revision;
    for i in 1..WRITES {
        f.put("a", &i.to_string()).await?;
    }
    let mut watch = f.kv.watch(&f.prefix, from);
    let mut seen = Vec::new();
    let mut promised = from - 1;
    while seen.len() < WRITES {
        let batch = read("watch", next("watch", &mut watch).await?)?;
        for event in &batch.events {
            holds("an event comes behind the revision that was promised before it", revision(event) > promised)?;
            holds("an event is covered by its own batch", revision(event) <= batch.header.revision)?;
        }
        holds("what is promised never falls", batch.header.revision >= promised)?;
        promised = batch.header.revision;
        seen.extend(batch.events.iter().map(revision));
    }
    holds("each revision once, in order", seen.windows(2).all(|pair| pair.first() < pair.last()))?;
    same("events", seen.len(), WRITES)
}

async fn a_watch_below_the_compacted_revision_ends(f: &KvFixture) -> Verdict {
    let first = f.put("a", "1").await?.revision;
    let second = f.put("a", "2").await?.revision;
    read("compact", f.admin.compact(second).await)?;
    let mut watch = f.kv.watch(&f.prefix, first);
    same("error", failure(&mut watch).await?, KvError::Compacted { asked: first })?;
    match tokio::time::timeout(crate::conformance::PATIENCE, watch.next()).await {
        Ok(None) => Ok(()),
        other => Err(Departure(format!("the stream goes on after its error: {other:?}"))),
    }
}

async fn a_watch_from_the_compacted_revision_sees_it(f: &KvFixture) -> Verdict {
    f.put("a", "1").await?;
    f.put("b", "1").await?;
    let write = vec![f.put_op("a", "2"), Op::Delete(Keys::One(f.key("b")))];
    let revision = f.write(write).await?.header.revision;
    f.put("c", "1").await?;
    read("compact", f.admin.compact(revision).await)?;
    let mut watch = f.kv.watch(&f.prefix, revision);
    same("events", texts(f, &mut watch, 3).await?, ["+a=2", "-b", "+c=1"])
}

async fn an_open_watch_survives_a_compaction(f: &KvFixture) -> Verdict {
    let from = f.put("a", "1").await?.revision;
    let mut watch = f.kv.watch(&f.prefix, from);
    same("before", texts(f, &mut watch, 1).await?, ["+a=1"])?;
    let last = f.put("a", "2").await?.revision;
    same("still before", texts(f, &mut watch, 1).await?, ["+a=2"])?;
    read("compact", f.admin.compact(last).await)?;
    f.put("a", "3").await?;
    same("behind", texts(f, &mut watch, 1).await?, ["+a=3"])
}
