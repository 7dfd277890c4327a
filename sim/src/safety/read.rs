//! What keys and objects say, read once for each version of them.

use std::collections::BTreeMap;

use basal_crds::kvstore::NodeRecord;
use basal_ipam::owners::{Holding, Source};
use basal_kvstore::kv::Revision;
use basal_objects::object::resources;
use serde_json::Value;

use crate::objects::ModelObjects;

/// What was read out of some keys, by the revision that wrote each: few of them change between two looks.
#[derive(Debug)]
pub(super) struct Parsed<T>(BTreeMap<String, (Revision, T)>);

impl<T> Default for Parsed<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T> Parsed<T> {
    /// Takes what is known of a key out of the last look, or reads it anew.
    pub(super) fn keep(&mut self, last: &mut Self, key: &str, revision: Revision, read: impl FnOnce() -> T) {
        let known = last.0.remove_entry(key).filter(|(_, (known, _))| *known == revision);
        let (key, value) = known.unwrap_or_else(|| (key.to_owned(), (revision, read())));
        self.0.insert(key, value);
    }

    pub(super) fn values(&self) -> impl Iterator<Item = (&String, &T)> {
        self.0.iter().map(|(key, (_, value))| (key, value))
    }
}

/// Which places say who owns a block. A store that was left keeps what it held at that time, and means nothing by it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Counts {
    pub(super) cells_in_etcd: bool,
    pub(super) cells_in_objects: bool,
    /// Node records.
    pub(super) records: bool,
    /// Blocks that CiliumNodes confirm.
    pub(super) confirmations: bool,
}

impl Counts {
    pub(super) const ALL: Self =
        Self { cells_in_etcd: true, cells_in_objects: true, records: true, confirmations: true };

    /// What counts by the Ledger of this cluster; everything where there is none. While a store is left, agents may read
    /// either place.
    pub(super) fn of(cluster: &str, objects: &ModelObjects) -> Self {
        let mut counts = Self::ALL;
        objects.visit(&resources::LEDGER, |_, _, value| {
            let text = |pointer| value.pointer(pointer).and_then(Value::as_str);
            if text("/metadata/name") == Some(cluster) {
                let (etcd, both) = (text("/spec/store") == Some("etcd"), text("/spec/leaving").is_some());
                counts = Self {
                    cells_in_etcd: etcd,
                    cells_in_objects: !etcd,
                    records: etcd || both,
                    confirmations: !etcd || both,
                };
            }
        });
        counts
    }
}

/// What a CiliumNode says.
#[derive(Debug, Clone)]
pub(super) struct Spec {
    pub(super) node: String,
    /// `spec.ipam.podCIDRs` as it is written.
    pub(super) list: Vec<String>,
    /// What of it, and of the blocks that its status confirms, can be read. What cannot holds nothing: nobody can use it.
    pub(super) holdings: Vec<Holding>,
}

impl Spec {
    pub(super) fn read(object: &Value) -> Self {
        let node = object.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default().to_owned();
        let list = object.pointer("/spec/ipam/podCIDRs").and_then(Value::as_array);
        let list: Vec<String> = list.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect();
        let listed = list.iter().filter_map(|text| holding(text, &node, Source::Spec));
        let confirmed = object.pointer("/status/ipam/pod-cidrs").and_then(Value::as_object).into_iter().flatten();
        let confirmed = confirmed.filter(|(_, entry)| entry.get("status").and_then(Value::as_str) == Some("in-use"));
        let confirmed = confirmed.filter_map(|(text, _)| holding(text, &node, Source::Confirmation));
        let holdings = listed.chain(confirmed).collect();
        Self { node, list, holdings }
    }
}

/// What a node record says, likewise.
pub(super) fn record(value: &[u8]) -> Vec<Holding> {
    let Ok(record) = NodeRecord::parse(value) else { return Vec::new() };
    record.cidrs().filter_map(|cidr| holding(&cidr.to_string(), record.name.as_str(), Source::Record)).collect()
}

fn holding(block: &str, node: &str, source: Source) -> Option<Holding> {
    Some(Holding { block: block.parse().ok()?, node: node.to_owned(), source })
}
