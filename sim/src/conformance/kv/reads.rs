//! Reads: order, pages, old revisions.

use basal_kvstore::kv::{Keys, KvError, Range};

use super::{Case, KvFixture, Verdict, read};
use crate::conformance::{holds, same};

pub(super) fn cases() -> Vec<Case<KvFixture>> {
    super::super::cases![
        a_new_key_has_version_one,
        an_overwrite_keeps_the_create_revision,
        the_same_value_again_is_a_write,
        a_key_created_again_starts_anew,
        keys_come_in_order_of_bytes,
        a_limit_cuts_the_list_and_says_so,
        the_next_page_begins_behind_the_last_key,
        a_list_at_a_revision_does_not_see_later_writes,
        keys_only_leaves_the_values_out,
        every_answer_carries_the_current_revision_and_one_cluster_id,
        a_compacted_revision_is_refused,
        a_future_revision_is_refused,
    ]
}

async fn a_new_key_has_version_one(f: &KvFixture) -> Verdict {
    let before = f.revision().await?;
    let header = f.put("a", "1").await?;
    let kv = f.existing("a").await?;
    same("revision", header.revision, before + 1)?;
    same("create revision", kv.create_revision, header.revision)?;
    same("mod revision", kv.mod_revision, header.revision)?;
    same("version, lease, value", (kv.version, kv.lease, kv.value), (1, 0, b"1".to_vec()))
}

async fn an_overwrite_keeps_the_create_revision(f: &KvFixture) -> Verdict {
    let first = f.put("a", "1").await?;
    let second = f.put("a", "2").await?;
    let kv = f.existing("a").await?;
    same("create revision", kv.create_revision, first.revision)?;
    same("mod revision", kv.mod_revision, second.revision)?;
    same("version", kv.version, 2)
}

async fn the_same_value_again_is_a_write(f: &KvFixture) -> Verdict {
    let first = f.put("a", "1").await?;
    let second = f.put("a", "1").await?;
    same("revision", second.revision, first.revision + 1)?;
    same("version", f.existing("a").await?.version, 2)
}

async fn a_key_created_again_starts_anew(f: &KvFixture) -> Verdict {
    f.put("a", "1").await?;
    f.put("a", "2").await?;
    f.delete("a").await?;
    same("the key after its deletion", f.get("a").await?, None)?;
    let again = f.put("a", "3").await?;
    let kv = f.existing("a").await?;
    same("create revision, version", (kv.create_revision, kv.version), (again.revision, 1))
}

async fn keys_come_in_order_of_bytes(f: &KvFixture) -> Verdict {
    for name in ["b", "a/2", "a", "a-1", "B", "ä", "a/10", "z"] {
        f.put(name, "").await?;
    }
    same("order", f.names(&f.list().await?), ["B", "a", "a-1", "a/10", "a/2", "b", "z", "ä"])
}

async fn a_limit_cuts_the_list_and_says_so(f: &KvFixture) -> Verdict {
    for name in ["a", "b", "c"] {
        f.put(name, "").await?;
    }
    for (limit, wanted, more) in
        [(2, vec!["a", "b"], true), (3, vec!["a", "b", "c"], false), (0, vec!["a", "b", "c"], false)]
    {
        let answer = read("page", f.kv.range(Range { limit, ..Range::prefix(f.prefix.clone()) }).await)?;
        same("keys", f.names(&answer.kvs), wanted)?;
        same("more", answer.more, more)?;
    }
    Ok(())
}

async fn the_next_page_begins_behind_the_last_key(f: &KvFixture) -> Verdict {
    for name in ["a", "a/1", "b", "c"] {
        f.put(name, "").await?;
    }
    let page = |from: String| async move {
        let keys = Keys::PrefixFrom { prefix: f.prefix.clone(), from };
        read("page", f.kv.range(Range { limit: 2, keys, ..Range::prefix("") }).await)
    };
    let second = page(f.key("a\0")).await?;
    same("second page", (f.names(&second.kvs), second.more), (vec!["a/1", "b"], true))?;
    let third = page(f.key("b\0")).await?;
    same("third page", (f.names(&third.kvs), third.more), (vec!["c"], false))?;
    let before = page(String::new()).await?;
    same("page from before the prefix", f.names(&before.kvs), ["a", "a/1"])?;
    let behind = page("\u{10ffff}".to_owned()).await?;
    same("page from behind the prefix", f.names(&behind.kvs), Vec::<&str>::new())
}

async fn a_list_at_a_revision_does_not_see_later_writes(f: &KvFixture) -> Verdict {
    f.put("a", "1").await?;
    let then = f.put("b", "1").await?.revision;
    f.put("a", "2").await?;
    f.put("c", "1").await?;
    let now = f.delete("b").await?.revision;
    let answer = read("list", f.kv.range(Range { revision: then, ..Range::prefix(f.prefix.clone()) }).await)?;
    same("keys", f.names(&answer.kvs), ["a", "b"])?;
    same("value", answer.kvs.first().map(|kv| kv.value.clone()), Some(b"1".to_vec()))?;
    same("revision in the answer", answer.header.revision, now)
}

async fn keys_only_leaves_the_values_out(f: &KvFixture) -> Verdict {
    let written = f.put("a", "1").await?;
    let answer = read("list", f.kv.range(Range { keys_only: true, ..Range::prefix(f.prefix.clone()) }).await)?;
    let kv = answer.kvs.first();
    same("value", kv.map(|kv| kv.value.len()), Some(0))?;
    same("mod revision", kv.map(|kv| kv.mod_revision), Some(written.revision))
}

async fn every_answer_carries_the_current_revision_and_one_cluster_id(f: &KvFixture) -> Verdict {
    let written = f.put("a", "1").await?;
    let listed = read("list", f.kv.range(Range::prefix(f.prefix.clone())).await)?.header;
    same("header", listed, written)?;
    holds("the cluster id is set", written.cluster_id != 0)
}

async fn a_compacted_revision_is_refused(f: &KvFixture) -> Verdict {
    let first = f.put("a", "1").await?.revision;
    let second = f.put("a", "2").await?.revision;
    f.put("a", "3").await?;
    read("compact", f.admin.compact(second).await)?;
    let at = |revision| f.kv.range(Range { revision, ..Range::one(f.key("a")) });
    same("read below", at(first).await, Err(KvError::Compacted { asked: first }))?;
    let kept = read("read at the compacted revision", at(second).await)?;
    same("value", kept.kvs.first().map(|kv| kv.value.clone()), Some(b"2".to_vec()))
}

async fn a_future_revision_is_refused(f: &KvFixture) -> Verdict {
    let revision = f.put("a", "1").await?.revision + 1_000_000;
    holds("refused", f.kv.range(Range { revision, ..Range::one(f.key("a")) }).await.is_err())
}
