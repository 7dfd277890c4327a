//! Others, at etcd.

use std::sync::Arc;

use async_trait::async_trait;
use basal_crds::{
    identity::IdentityId,
    kvstore::{IpRecord, NodeRecord, keys, parse_identity_labels},
    labels::Labels,
    names::ClusterName,
};
use basal_ipam::names::NodeName;
use basal_kvstore::kv::{Keys, Kv, Op, Range, Txn};
use basal_runtime::outcome::Outcome;

use super::DirectoryAdmin;

/// Others, at etcd.
#[expect(missing_debug_implementations, reason = "holds a trait object")]
pub struct EtcdAdmin(pub Arc<dyn Kv>);

impl EtcdAdmin {
    async fn write(&self, op: Op) -> Result<(), String> {
        match self.0.txn(Txn { then: vec![op], ..Txn::default() }).await {
            Outcome::Done(_) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    }

    async fn put(&self, key: String, value: String) -> Result<(), String> {
        self.write(Op::Put { key, value: value.into_bytes(), lease: 0 }).await
    }
}

fn node_key(name: &NodeName) -> String {
    keys::node(&ClusterName::default(), name)
}

#[async_trait]
impl DirectoryAdmin for EtcdAdmin {
    async fn put_node(&self, record: &NodeRecord) -> Result<(), String> {
        self.put(node_key(&record.name), record.to_json()).await
    }

    async fn spoil_node(&self, name: &NodeName) -> Result<(), String> {
        self.put(node_key(name), "{\"Name\":7}".to_owned()).await
    }

    async fn delete_node(&self, name: &NodeName) -> Result<(), String> {
        self.write(Op::Delete(Keys::One(node_key(name)))).await
    }

    /// The directory writes the record itself.
    async fn put_ip(&self, _: &IpRecord) -> Result<(), String> {
        Ok(())
    }

    /// The directory deletes the record itself.
    async fn delete_ip(&self, _: &IpRecord) -> Result<(), String> {
        Ok(())
    }

    async fn leave_ip(&self, record: &IpRecord) -> Result<(), String> {
        self.put(keys::ip(record.target), record.to_json()).await
    }

    async fn identity(&self, id: IdentityId) -> Result<Option<Labels>, String> {
        let found = self.0.range(Range::one(keys::identity(id))).await.map_err(|error| error.to_string())?;
        let labels = found.kvs.first().map(|kv| parse_identity_labels(&kv.value)).transpose();
        labels.map_err(|error| error.to_string())
    }

    async fn delete_identity(&self, id: IdentityId) -> Result<(), String> {
        self.write(Op::Delete(Keys::One(keys::identity(id)))).await
    }
}
