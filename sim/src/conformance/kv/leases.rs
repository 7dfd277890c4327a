//! Leases: what hangs on them, how they end.

use std::time::Duration;

use basal_kvstore::kv::{Compare, Is, KvError, KvRefusal, LeaseId, Op, Txn, WatchEvent};

use super::{Case, KvFixture, Verdict, done, read, watches::events};
use crate::conformance::{Departure, holds, refused, same};

pub(super) fn cases() -> Vec<Case<KvFixture>> {
    super::super::cases![
        a_put_names_its_lease,
        a_put_with_an_unknown_lease_is_refused_and_writes_nothing,
        an_unknown_lease_on_the_side_that_does_not_run_is_no_matter,
        the_keys_of_a_revoked_lease_go_in_one_revision,
        a_key_written_again_leaves_its_lease,
        a_lease_that_is_gone_is_revoked_without_complaint,
        a_lease_that_is_gone_is_not_kept_alive,
        a_lease_without_keep_alive_ends,
        a_lease_lives_no_shorter_than_asked,
        a_grant_uses_no_revision,
    ]
}

const LONG: Duration = Duration::from_secs(600);

fn leased(f: &KvFixture, name: &str, lease: LeaseId) -> Op {
    Op::Put { key: f.key(name), value: b"1".to_vec(), lease }
}

async fn grant(f: &KvFixture) -> Verdict<LeaseId> {
    Ok(done("grant", f.kv.lease_grant(LONG).await)?.id)
}

async fn a_put_names_its_lease(f: &KvFixture) -> Verdict {
    let lease = done("grant", f.kv.lease_grant(LONG).await)?;
    same("time to live", lease.ttl, LONG)?;
    f.write(vec![leased(f, "a", lease.id)]).await?;
    same("lease", f.existing("a").await?.lease, lease.id)?;
    holds("the comparison", f.succeeds(vec![Compare::new(f.key("a"), Is::Lease(lease.id))]).await?)?;
    same("time to live after a keep-alive", read("keep-alive", f.kv.lease_keep_alive(lease.id).await)?, LONG)
}

async fn a_put_with_an_unknown_lease_is_refused_and_writes_nothing(f: &KvFixture) -> Verdict {
    let lease = grant(f).await?;
    done("revoke", f.kv.lease_revoke(lease).await)?;
    let then = vec![f.put_op("a", "1"), leased(f, "b", lease)];
    let refusal = refused("put", f.kv.txn(Txn { then, ..Txn::default() }).await)?;
    same("refusal", refusal, KvRefusal::LeaseNotFound(lease))?;
    same("keys", f.list().await?, [])
}

async fn an_unknown_lease_on_the_side_that_does_not_run_is_no_matter(f: &KvFixture) -> Verdict {
    let lease = grant(f).await?;
    done("revoke", f.kv.lease_revoke(lease).await)?;
    let txn = Txn { then: vec![f.put_op("a", "1")], or_else: vec![leased(f, "b", lease)], ..Txn::default() };
    holds("then ran", done("txn", f.kv.txn(txn).await)?.succeeded)
}

async fn the_keys_of_a_revoked_lease_go_in_one_revision(f: &KvFixture) -> Verdict {
    let lease = grant(f).await?;
    f.put("c", "1").await?;
    let from = f.write(vec![leased(f, "b", lease), leased(f, "a", lease)]).await?.header.revision + 1;
    done("revoke", f.kv.lease_revoke(lease).await)?;
    let gone: Vec<WatchEvent> =
        ["a", "b"].map(|name| WatchEvent::Delete { key: f.key(name), mod_revision: from }).to_vec();
    same("events", events(f, from, 2).await?, gone)?;
    same("keys", f.names(&f.list().await?), ["c"])
}

async fn a_key_written_again_leaves_its_lease(f: &KvFixture) -> Verdict {
    let (old, new) = (grant(f).await?, grant(f).await?);
    f.write(vec![leased(f, "free", old), leased(f, "moved", old), leased(f, "stays", old)]).await?;
    f.write(vec![leased(f, "free", 0), leased(f, "moved", new)]).await?;
    done("revoke", f.kv.lease_revoke(old).await)?;
    same("keys after the old lease", f.names(&f.list().await?), ["free", "moved"])?;
    done("revoke", f.kv.lease_revoke(new).await)?;
    same("keys after the new lease", f.names(&f.list().await?), ["free"])
}

async fn a_lease_that_is_gone_is_revoked_without_complaint(f: &KvFixture) -> Verdict {
    let lease = grant(f).await?;
    done("revoke", f.kv.lease_revoke(lease).await)?;
    done("revoke again", f.kv.lease_revoke(lease).await)
}

async fn a_lease_that_is_gone_is_not_kept_alive(f: &KvFixture) -> Verdict {
    let lease = grant(f).await?;
    done("revoke", f.kv.lease_revoke(lease).await)?;
    same("keep-alive", f.kv.lease_keep_alive(lease).await, Err(KvError::LeaseNotFound(lease)))
}

async fn a_lease_without_keep_alive_ends(f: &KvFixture) -> Verdict {
    let lease = done("grant", f.kv.lease_grant(Duration::from_secs(2)).await)?;
    let written = f.write(vec![leased(f, "a", lease.id)]).await?.header.revision;
    match events(f, written + 1, 1).await?.first() {
        Some(WatchEvent::Delete { key, mod_revision }) => {
            same("key", key, &f.key("a"))?;
            holds("the deletion has a revision of its own", *mod_revision > written)?;
        }
        other => return Err(Departure(format!("got {other:?}, wanted a deletion"))),
    }
    same("keep-alive", f.kv.lease_keep_alive(lease.id).await, Err(KvError::LeaseNotFound(lease.id)))
}

async fn a_lease_lives_no_shorter_than_asked(f: &KvFixture) -> Verdict {
    // etcd knows whole seconds, and none below 1.5 election time-outs.
    for (asked, granted) in [(1_000, 2), (5_000, 5), (5_001, 6)] {
        let lease = done("grant", f.kv.lease_grant(Duration::from_millis(asked)).await)?;
        same("time to live", lease.ttl, Duration::from_secs(granted))?;
        done("revoke", f.kv.lease_revoke(lease.id).await)?;
    }
    Ok(())
}

async fn a_grant_uses_no_revision(f: &KvFixture) -> Verdict {
    let before = f.revision().await?;
    let lease = grant(f).await?;
    done("revoke", f.kv.lease_revoke(lease).await)?;
    same("revision", f.revision().await?, before)
}
