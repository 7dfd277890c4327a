//! Transactions: conditions, both sides, limits.

use basal_kvstore::kv::{Compare, Is, Keys, KvRefusal, Op, OpAnswer, Range, Txn};

use super::{Case, KvFixture, Verdict, done};
use crate::conformance::{Departure, holds, refused, same};

pub(super) fn cases() -> Vec<Case<KvFixture>> {
    super::super::cases![
        a_missing_key_compares_as_zero,
        a_condition_holds_for_what_stands_there,
        every_condition_must_hold,
        a_failed_condition_runs_the_other_side,
        a_transaction_is_one_revision,
        a_transaction_that_changes_nothing_uses_no_revision,
        a_read_sees_the_earlier_writes_of_its_transaction,
        a_delete_counts_what_went,
        a_key_twice_is_refused,
        two_deletes_of_one_key_are_taken,
        the_side_that_does_not_run_is_checked_too,
        so_many_operations_and_no_more,
        an_empty_key_is_refused,
        a_request_too_large_is_refused,
    ]
}

fn get(f: &KvFixture, name: &str) -> Op {
    Op::Get(Range::one(f.key(name)))
}

fn got(answer: Option<&OpAnswer>) -> Verdict<Vec<Vec<u8>>> {
    match answer {
        Some(OpAnswer::Get(range)) => Ok(range.kvs.iter().map(|kv| kv.value.clone()).collect()),
        other => Err(Departure(format!("got {other:?}, wanted the answer to a read"))),
    }
}

async fn a_missing_key_compares_as_zero(f: &KvFixture) -> Verdict {
    for is in [Is::Absent, Is::ModRevision(0), Is::CreateRevision(0), Is::Lease(0)] {
        holds(&format!("{is:?}"), f.succeeds(vec![Compare::new(f.key("a"), is)]).await?)?;
    }
    for is in [Is::Present, Is::Value(Vec::new()), Is::Value(b"1".to_vec()), Is::ModRevision(1)] {
        holds(&format!("not {is:?}"), !f.succeeds(vec![Compare::new(f.key("a"), is)]).await?)?;
    }
    Ok(())
}

async fn a_condition_holds_for_what_stands_there(f: &KvFixture) -> Verdict {
    let created = f.put("a", "1").await?.revision;
    let modified = f.put("a", "2").await?.revision;
    for is in
        [Is::Present, Is::ModRevision(modified), Is::CreateRevision(created), Is::Value(b"2".to_vec()), Is::Lease(0)]
    {
        holds(&format!("{is:?}"), f.succeeds(vec![Compare::new(f.key("a"), is)]).await?)?;
    }
    for is in [
        Is::Absent,
        Is::ModRevision(created),
        Is::CreateRevision(modified),
        Is::Value(b"1".to_vec()),
        Is::Value(Vec::new()),
        Is::Lease(1),
    ] {
        holds(&format!("not {is:?}"), !f.succeeds(vec![Compare::new(f.key("a"), is)]).await?)?;
    }
    Ok(())
}

async fn every_condition_must_hold(f: &KvFixture) -> Verdict {
    f.put("a", "1").await?;
    let both = vec![Compare::new(f.key("a"), Is::Present), Compare::new(f.key("b"), Is::Present)];
    holds("one of two is not enough", !f.succeeds(both).await?)?;
    f.put("b", "1").await?;
    let both = vec![Compare::new(f.key("a"), Is::Present), Compare::new(f.key("b"), Is::Present)];
    holds("two of two are", f.succeeds(both).await?)
}

async fn a_failed_condition_runs_the_other_side(f: &KvFixture) -> Verdict {
    f.put("a", "1").await?;
    let txn = Txn {
        when: vec![Compare::new(f.key("a"), Is::Absent)],
        then: vec![f.put_op("a", "2"), f.put_op("b", "2")],
        or_else: vec![get(f, "a"), f.put_op("c", "2")],
    };
    let answer = done("txn", f.kv.txn(txn).await)?;
    same("succeeded", answer.succeeded, false)?;
    same("answers", answer.answers.len(), 2)?;
    same("read", got(answer.answers.first())?, [b"1".to_vec()])?;
    same("keys", f.names(&f.list().await?), ["a", "c"])
}

async fn a_transaction_is_one_revision(f: &KvFixture) -> Verdict {
    let before = f.put("x", "").await?.revision;
    let answer = f.write(vec![f.put_op("a", "1"), f.put_op("b", "1"), Op::Delete(Keys::One(f.key("x")))]).await?;
    same("revision", answer.header.revision, before + 1)?;
    same("answers", answer.answers, [OpAnswer::Put, OpAnswer::Put, OpAnswer::Delete(1)])?;
    let revisions: Vec<_> = f.list().await?.iter().map(|kv| kv.mod_revision).collect();
    same("mod revisions", revisions, [before + 1, before + 1])
}

async fn a_transaction_that_changes_nothing_uses_no_revision(f: &KvFixture) -> Verdict {
    let before = f.put("a", "").await?.revision;
    let answer = f.write(vec![get(f, "a"), Op::Delete(Keys::One(f.key("b")))]).await?;
    same("deleted", answer.answers.get(1), Some(&OpAnswer::Delete(0)))?;
    same("revision", answer.header.revision, before)
}

async fn a_read_sees_the_earlier_writes_of_its_transaction(f: &KvFixture) -> Verdict {
    f.put("a", "1").await?;
    f.put("b", "1").await?;
    let answer = f
        .write(vec![get(f, "a"), f.put_op("a", "2"), get(f, "a"), Op::Delete(Keys::One(f.key("b"))), get(f, "b")])
        .await?;
    same("before the write", got(answer.answers.first())?, [b"1".to_vec()])?;
    same("behind it", got(answer.answers.get(2))?, [b"2".to_vec()])?;
    same("behind the delete", got(answer.answers.get(4))?, Vec::<Vec<u8>>::new())
}

async fn a_delete_counts_what_went(f: &KvFixture) -> Verdict {
    for name in ["a", "b", "c", "d"] {
        f.put(name, "").await?;
    }
    let from = Keys::PrefixFrom { prefix: f.prefix.clone(), from: f.key("c") };
    same("from c on", f.write(vec![Op::Delete(from)]).await?.answers, [OpAnswer::Delete(2)])?;
    same("left", f.names(&f.list().await?), ["a", "b"])?;
    same("all", f.write(vec![Op::Delete(f.all())]).await?.answers, [OpAnswer::Delete(2)])
}

async fn a_key_twice_is_refused(f: &KvFixture) -> Verdict {
    let pairs = [
        vec![f.put_op("a", "1"), f.put_op("a", "2")],
        vec![f.put_op("a", "1"), Op::Delete(Keys::One(f.key("a")))],
        vec![Op::Delete(f.all()), f.put_op("a", "1")],
    ];
    for then in pairs {
        let refusal = refused("txn", f.kv.txn(Txn { then, ..Txn::default() }).await)?;
        holds("invalid", matches!(refusal, KvRefusal::Invalid(_)))?;
    }
    same("keys", f.list().await?, [])
}

async fn two_deletes_of_one_key_are_taken(f: &KvFixture) -> Verdict {
    f.put("a", "1").await?;
    let answer = f.write(vec![Op::Delete(Keys::One(f.key("a"))), Op::Delete(f.all())]).await?;
    same("answers", answer.answers, [OpAnswer::Delete(1), OpAnswer::Delete(0)])
}

async fn the_side_that_does_not_run_is_checked_too(f: &KvFixture) -> Verdict {
    let or_else = vec![f.put_op("a", "1"), f.put_op("a", "2")];
    let txn = Txn { then: vec![f.put_op("b", "1")], or_else, ..Txn::default() };
    let refusal = refused("txn", f.kv.txn(txn).await)?;
    holds("invalid", matches!(refusal, KvRefusal::Invalid(_)))?;
    same("keys", f.list().await?, [])
}

async fn so_many_operations_and_no_more(f: &KvFixture) -> Verdict {
    let puts = |n: usize| (0..n).map(|i| f.put_op(&format!("{i:03}"), "")).collect::<Vec<_>>();
    let conditions = |n: usize| (0..n).map(|i| Compare::new(f.key(&i.to_string()), Is::Absent)).collect::<Vec<_>>();
    let txn = Txn { when: conditions(128), then: puts(128), or_else: puts(128) };
    same("128 of each", done("txn", f.kv.txn(txn).await)?.answers.len(), 128)?;
    let too_many = [
        Txn { then: puts(129), ..Txn::default() },
        Txn { or_else: puts(129), ..Txn::default() },
        Txn { when: conditions(129), ..Txn::default() },
    ];
    for txn in too_many {
        let refusal = refused("129 of one", f.kv.txn(txn).await)?;
        holds("invalid", matches!(refusal, KvRefusal::Invalid(_)))?;
    }
    Ok(())
}

async fn an_empty_key_is_refused(f: &KvFixture) -> Verdict {
    let put = Op::Put { key: String::new(), value: Vec::new(), lease: 0 };
    let refusal = refused("put", f.kv.txn(Txn { then: vec![put], ..Txn::default() }).await)?;
    holds("invalid", matches!(refusal, KvRefusal::Invalid(_)))?;
    let when = vec![Compare::new("", Is::Absent)];
    let refusal = refused("compare", f.kv.txn(Txn { when, ..Txn::default() }).await)?;
    holds("invalid", matches!(refusal, KvRefusal::Invalid(_)))
}

async fn a_request_too_large_is_refused(f: &KvFixture) -> Verdict {
    let put = |bytes| Op::Put { key: f.key("a"), value: vec![b'x'; bytes], lease: 0 };
    let refusal = refused("put", f.kv.txn(Txn { then: vec![put(1_600_000)], ..Txn::default() }).await)?;
    holds("invalid", matches!(refusal, KvRefusal::Invalid(_)))?;
    same("keys", f.list().await?, [])?;
    f.write(vec![put(1_400_000)]).await?;
    Ok(())
}
