//! What [`Directory`] promises, whatever the source behind it.

mod etcd;
mod objects;

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use async_trait::async_trait;
use basal_crds::{
    address::{AddressType, NodeAddress},
    directory::{Change, Changes, Directory, IpOwner, NodeId},
    identity::IdentityId,
    kvstore::{IpRecord, IpTarget, NodeRecord},
    labels::Labels,
    names::{ClusterId, ClusterName},
};
use basal_ipam::names::NodeName;

pub use self::{
    etcd::EtcdAdmin,
    objects::{ObjectsAdmin, prepare},
};
use super::{Case, Departure, Verdict, cases as case_list, holds, next, read, same};

/// The address of the node whose agent [`DirectoryFixture`] tries.
pub const NODE_IP: &str = "172.18.0.1";

/// The address of the other node, which has an agent of its own.
pub const OTHER_NODE_IP: &str = "172.18.0.2";

/// Where the pods of the suite are.
const POD_NAMESPACE: &str = "directory";

/// What others do to a source: the operator, agents beside their directory, and people.
#[async_trait]
pub trait DirectoryAdmin: Send + Sync {
    /// Writes a node as the operator lets it be seen, new or changed.
    async fn put_node(&self, record: &NodeRecord) -> Result<(), String>;

    /// Makes a node's record unreadable.
    async fn spoil_node(&self, name: &NodeName) -> Result<(), String>;

    /// Deletes a node's record.
    async fn delete_node(&self, name: &NodeName) -> Result<(), String>;

    /// Does what an agent does beside [`Directory::publish_ip`] for a record to be seen.
    async fn put_ip(&self, record: &IpRecord) -> Result<(), String>;

    /// Does what an agent does beside [`Directory::withdraw_ip`].
    async fn delete_ip(&self, record: &IpRecord) -> Result<(), String>;

    /// Writes a record that no running agent has published.
    async fn leave_ip(&self, record: &IpRecord) -> Result<(), String>;

    /// The labels that an identity stands for; `None` when there is no such identity.
    async fn identity(&self, id: IdentityId) -> Result<Option<Labels>, String>;

    /// Deletes an identity.
    async fn delete_identity(&self, id: IdentityId) -> Result<(), String>;
}

/// One case's view of a source: the directories of two agents, and the number that keeps its records from those of other
/// cases.
#[expect(missing_debug_implementations, reason = "holds trait objects")]
pub struct DirectoryFixture {
    one: Arc<dyn Directory>,
    other: Arc<dyn Directory>,
    admin: Arc<dyn DirectoryAdmin>,
    number: u8,
}

/// The suite.
#[must_use]
pub fn cases() -> Vec<Case<DirectoryFixture>> {
    case_list![
        what_exists_comes_first,
        a_node_is_told_as_it_was_written,
        a_node_that_goes_is_told_later_and_one_that_returns_is_not,
        a_node_that_cannot_be_read_is_told_and_stays,
        an_address_comes_and_goes_at_once,
        leftovers_are_withdrawn_and_nothing_else,
        labels_have_one_identity_on_both_nodes,
        an_identity_is_written_with_its_labels,
        an_identity_in_use_comes_back_with_its_number,
        an_identity_outlives_its_users,
    ]
}

impl DirectoryFixture {
    /// `one` is the directory of the node at [`NODE_IP`], `other` of that at [`OTHER_NODE_IP`]; `number` is the case's.
    /// Beside the case's records the source gets some that stay, for the loss of the last one is a case of its own.
    ///
    /// # Errors
    /// When these cannot be written.
    pub async fn new(
        one: Arc<dyn Directory>,
        other: Arc<dyn Directory>,
        admin: Arc<dyn DirectoryAdmin>,
        number: u8,
    ) -> Verdict<Self> {
        let fixture = Self { one, other, admin, number };
        done("put a node", fixture.admin.put_node(&fixture.node("anchor")?).await)?;
        let record = fixture.publish_far(9).await?;
        // A source may take its time to write what was published.
        upserted("the lasting address", &mut fixture.other.ips(), &record.target).await?;
        Ok(fixture)
    }

    fn name(&self, name: &str) -> Verdict<NodeName> {
        read("a name", NodeName::new(&format!("{name}-{}", self.number)))
    }

    fn node(&self, name: &str) -> Verdict<NodeRecord> {
        let name = self.name(name)?;
        let mut record = NodeRecord::new(name, ClusterName::default(), ClusterId::default());
        let address = |kind, text: String| Ok(NodeAddress { kind, ip: read("an address", text.parse())? });
        record.addresses = vec![
            address(AddressType::InternalIp, format!("172.18.{}.3", self.number))?,
            address(AddressType::CiliumInternalIp, format!("10.{}.3.1", self.number))?,
        ];
        record.ipv4_cidrs = vec![read("a block", format!("10.{}.3.0/24", self.number).parse())?];
        record.ipv6_cidrs = vec![read("a block", format!("fd00:{}::/112", self.number).parse())?];
        record.ipv4_health = format!("10.{}.3.2", self.number).parse().ok();
        record.boot_id = "boot".to_owned();
        Ok(record)
    }

    fn id(&self, name: &str) -> Verdict<NodeId> {
        Ok((ClusterName::default(), self.name(name)?))
    }

    /// The record of an address behind a node.
    fn ip(&self, last: u8, host: &str) -> Verdict<IpRecord> {
        let ip: IpAddr = read("an address", format!("10.{}.1.{last}", self.number).parse())?;
        let host = read("an address", host.parse())?;
        Ok(IpRecord {
            namespace: POD_NAMESPACE.to_owned(),
            pod_name: format!("pod-{}-{last}", self.number),
            ..IpRecord::new(IpTarget::Host(ip), host, IdentityId::new(300))
        })
    }

    /// Publishes an address behind the other node.
    async fn publish_far(&self, last: u8) -> Verdict<IpRecord> {
        let record = self.ip(last, OTHER_NODE_IP)?;
        self.other.publish_ip(&record);
        done("put an address", self.admin.put_ip(&record).await)?;
        Ok(record)
    }

    /// Labels that no other case has.
    fn labels(&self, value: &str) -> Verdict<Labels> {
        let text = format!("k8s:case={}-{value};k8s:io.kubernetes.pod.namespace=default;", self.number);
        read("labels", Labels::parse_canonical(&text))
    }
}

fn done<T>(what: &str, answer: Result<T, String>) -> Verdict<T> {
    answer.map_err(|why| Departure(format!("{what}: {why}")))
}

/// Waits for a change that is one of `wanted`; what comes before must not be one of `unwanted`.
async fn until<K, V>(
    what: &str,
    changes: &mut Changes<K, V>,
    wanted: impl Fn(&Change<K, V>) -> bool,
    unwanted: impl Fn(&Change<K, V>) -> bool,
) -> Verdict<Change<K, V>> {
    loop {
        let change = next(what, changes).await?;
        if wanted(&change) {
            return Ok(change);
        }
        holds(&format!("{what} comes before anything else"), !unwanted(&change))?;
    }
}

fn is_upsert<K: PartialEq, V>(change: &Change<K, V>, wanted: &K) -> bool {
    matches!(change, Change::Upsert(key, _) if key == wanted)
}

fn is_delete<K: PartialEq, V>(change: &Change<K, V>, wanted: &K) -> bool {
    matches!(change, Change::Delete(key) if key == wanted)
}

async fn in_sync<K, V>(changes: &mut Changes<K, V>) -> Verdict {
    until("in sync", changes, |change| matches!(change, Change::InSync), |_| false).await.map(drop)
}

async fn upserted<K: PartialEq, V>(what: &str, changes: &mut Changes<K, V>, key: &K) -> Verdict<V> {
    match until(what, changes, |change| is_upsert(change, key), |_| false).await? {
        Change::Upsert(_, value) => Ok(value),
        _ => Err(Departure(format!("{what}: no value"))),
    }
}

async fn what_exists_comes_first(f: &DirectoryFixture) -> Verdict {
    let mut nodes = f.one.nodes();
    let is_sync = |change: &Change<_, _>| matches!(change, Change::InSync);
    let anchor = f.id("anchor")?;
    until("a node", &mut nodes, |change| is_upsert(change, &anchor), is_sync).await?;
    in_sync(&mut nodes).await?;
    let mut ips = f.one.ips();
    let target = f.ip(9, OTHER_NODE_IP)?.target;
    until("an address", &mut ips, |change| is_upsert(change, &target), |c| matches!(c, Change::InSync)).await?;
    in_sync(&mut ips).await?;
    let id = read("allocate", f.one.allocate_identity(&f.labels("a")?).await)?;
    let mut identities = f.one.identities();
    until("an identity", &mut identities, |change| is_upsert(change, &id), |c| matches!(c, Change::InSync)).await?;
    in_sync(&mut identities).await
}

async fn a_node_is_told_as_it_was_written(f: &DirectoryFixture) -> Verdict {
    let mut nodes = f.one.nodes();
    in_sync(&mut nodes).await?;
    let mut record = f.node("a")?;
    done("put", f.admin.put_node(&record).await)?;
    same("the record", upserted("the node", &mut nodes, &f.id("a")?).await?, record.clone())?;
    record.boot_id = "another".to_owned();
    done("put", f.admin.put_node(&record).await)?;
    // A source may take two writes for one change.
    until(
        "the changed node",
        &mut nodes,
        |change| matches!(change, Change::Upsert(_, found) if *found == record),
        |change| matches!(change, Change::Delete(_) | Change::Invalid { .. }),
    )
    .await
    .map(drop)
}

async fn a_node_that_goes_is_told_later_and_one_that_returns_is_not(f: &DirectoryFixture) -> Verdict {
    let mut nodes = f.one.nodes();
    in_sync(&mut nodes).await?;
    for name in ["goes", "returns"] {
        done("put", f.admin.put_node(&f.node(name)?).await)?;
        upserted("the node", &mut nodes, &f.id(name)?).await?;
    }
    let (goes, returns) = (f.id("goes")?, f.id("returns")?);
    let is_gone = |change: &Change<_, _>| is_delete(change, &goes) || is_delete(change, &returns);
    for name in ["goes", "returns"] {
        done("delete", f.admin.delete_node(&f.name(name)?).await)?;
    }
    // What happens afterwards is told before.
    done("put", f.admin.put_node(&f.node("later")?).await)?;
    let later = f.id("later")?;
    until("the later node", &mut nodes, |change| is_upsert(change, &later), is_gone).await?;
    done("put", f.admin.put_node(&f.node("returns")?).await)?;
    until("the deletion", &mut nodes, |change| is_delete(change, &goes), |c| is_delete(c, &returns)).await?;
    // The other deletion would have fallen due before whatever is told after this.
    done("put", f.admin.put_node(&f.node("last")?).await)?;
    let last = f.id("last")?;
    until("the last node", &mut nodes, |change| is_upsert(change, &last), |c| is_delete(c, &returns)).await.map(drop)
}

async fn a_node_that_cannot_be_read_is_told_and_stays(f: &DirectoryFixture) -> Verdict {
    let mut nodes = f.one.nodes();
    in_sync(&mut nodes).await?;
    let (name, id) = (f.name("a")?, f.id("a")?);
    done("put", f.admin.put_node(&f.node("a")?).await)?;
    upserted("the node", &mut nodes, &id).await?;
    done("spoil", f.admin.spoil_node(&name).await)?;
    let is_invalid =
        |change: &Change<_, _>| matches!(change, Change::Invalid { name: of, .. } if of.contains(name.as_str()));
    until("the complaint", &mut nodes, is_invalid, |change| is_delete(change, &id)).await?;
    let mut record = f.node("a")?;
    record.boot_id = "mended".to_owned();
    done("put", f.admin.put_node(&record).await)?;
    let mended = |change: &Change<_, _>| matches!(change, Change::Upsert(_, found) if *found == record);
    until("the mended node", &mut nodes, mended, |change| is_delete(change, &id)).await.map(drop)
}

async fn an_address_comes_and_goes_at_once(f: &DirectoryFixture) -> Verdict {
    let mut ips = f.one.ips();
    in_sync(&mut ips).await?;
    let record = f.publish_far(5).await?;
    same("the owner", upserted("the address", &mut ips, &record.target).await?, IpOwner::from(&record))?;
    f.other.withdraw_ip(record.target);
    done("delete", f.admin.delete_ip(&record).await)?;
    let is_gone = |change: &Change<_, _>| is_delete(change, &record.target);
    until("the deletion", &mut ips, is_gone, |change| matches!(change, Change::Delete(_))).await.map(drop)
}

async fn leftovers_are_withdrawn_and_nothing_else(f: &DirectoryFixture) -> Verdict {
    let mut ips = f.one.ips();
    in_sync(&mut ips).await?;
    let (ours, leftover) = (f.ip(3, NODE_IP)?, f.ip(4, NODE_IP)?);
    let far = f.publish_far(5).await?;
    f.one.publish_ip(&ours);
    done("put", f.admin.put_ip(&ours).await)?;
    // What an agent that is gone left behind: written, and not published by the one that is there.
    done("put", f.admin.leave_ip(&leftover).await)?;
    let mut missing: BTreeSet<IpTarget> = [&ours, &leftover, &far].map(|record| record.target).into();
    while !missing.is_empty() {
        if let Change::Upsert(target, _) = next("the addresses", &mut ips).await? {
            missing.remove(&target);
        }
    }
    same("withdrawn", f.one.withdraw_leftover_ips().await, Ok(1))?;
    let is_gone = |change: &Change<_, _>| is_delete(change, &leftover.target);
    until("the deletion", &mut ips, is_gone, |change| matches!(change, Change::Delete(_))).await?;
    same("withdrawn again", f.one.withdraw_leftover_ips().await, Ok(0))
}

async fn labels_have_one_identity_on_both_nodes(f: &DirectoryFixture) -> Verdict {
    let labels = f.labels("a")?;
    let mut seen = f.other.identities();
    let id = read("allocate", f.one.allocate_identity(&labels).await)?;
    same("allocated again", read("allocate", f.one.allocate_identity(&labels).await)?, id)?;
    same("the labels", upserted("the identity", &mut seen, &id).await?, labels.clone())?;
    same("on the other node", read("allocate", f.other.allocate_identity(&labels).await)?, id)?;
    let another = read("allocate", f.other.allocate_identity(&f.labels("b")?).await)?;
    holds("other labels have another identity", another != id)
}

async fn an_identity_is_written_with_its_labels(f: &DirectoryFixture) -> Verdict {
    let labels = f.labels("a")?;
    let id = read("allocate", f.one.allocate_identity(&labels).await)?;
    holds("the identity is none of the reserved", !id.is_reserved())?;
    same("as written", done("read", f.admin.identity(id).await)?, Some(labels))
}

async fn an_identity_in_use_comes_back_with_its_number(f: &DirectoryFixture) -> Verdict {
    let (used, unused) = (f.labels("used")?, f.labels("unused")?);
    let mut seen = f.other.identities();
    let (id, other) = (
        read("allocate", f.one.allocate_identity(&used).await)?,
        read("allocate", f.one.allocate_identity(&unused).await)?,
    );
    for (id, what) in [(id, "the identity in use"), (other, "the other identity")] {
        upserted(what, &mut seen, &id).await?;
    }
    f.one.release_identity(&unused);
    for id in [other, id] {
        done("delete", f.admin.delete_identity(id).await)?;
    }
    upserted("the identity in use again", &mut seen, &id).await?;
    same("its labels", done("read", f.admin.identity(id).await)?, Some(used))?;
    same("the one without a user", done("read", f.admin.identity(other).await)?, None)
}

async fn an_identity_outlives_its_users(f: &DirectoryFixture) -> Verdict {
    let labels = f.labels("a")?;
    let id = read("allocate", f.one.allocate_identity(&labels).await)?;
    f.one.release_identity(&labels);
    same("as written", done("read", f.admin.identity(id).await)?, Some(labels.clone()))?;
    same("allocated again", read("allocate", f.one.allocate_identity(&labels).await)?, id)
}
