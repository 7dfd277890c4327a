//! The ledger of claims as custom resources of our own: one PodCIDRCell for each aligned supernet, and a Ledger that says
//! which store is the active one, whose term it is, and which cells there are.

use std::net::IpAddr;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    definition::{BASAL, Column, Kind, Names},
    is_default, or_default,
    pool::Cidr,
    pool_state::{BlockCounts, PoolState},
};

/// The finalizer of a PodCIDRCell: a deletion waits for it, and nothing of Basal ever takes it away, since a cell that
/// goes takes claims with it.
pub const LEDGER_FINALIZER: &str = "basal.io/ledger";

/// So much of a cluster's name goes into the names of its cells: the longest text of a prefix makes up the 63 characters of
/// a DNS label (RFC 1123) with it.
const CLUSTER_PART: usize = 26;

/// The record of claims in one aligned supernet. Written by the operator alone: who changes it by hand gives a block two
/// owners.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PodCidrCell {
    /// Standard metadata.
    #[schemars(skip)]
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// The claims.
    pub spec: CellSpec,
}

impl Kind for PodCidrCell {
    const NAMES: Names = Names {
        group: BASAL,
        kind: "PodCIDRCell",
        plural: "podcidrcells",
        singular: "podcidrcell",
        short: &["pcc"],
        version: "v1alpha1",
        namespaced: false,
        status_subresource: false,
        metadata_required: true,
        columns: &[
            Column::new("Prefix", "string", ".spec.prefix"),
            Column::new("Pool", "string", ".spec.pool"),
            Column::new("Mask Size", "integer", ".spec.maskSize"),
            Column::new("Deleted", "date", ".metadata.deletionTimestamp").wide(),
            Column::new("Term", "string", ".spec.term").wide(),
            Column::AGE,
        ],
    };
}

/// The claims in one supernet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CellSpec {
    /// The cluster whose ledger this is a part of. Cannot be changed.
    #[schemars(length(min = 1, max = 32), extend("x-kubernetes-validations" = [{ "rule": "self == oldSelf", "message": "cluster is immutable" }]))]
    pub cluster: String,
    /// The supernet. Cannot be changed.
    #[schemars(with = "Cidr", extend("x-kubernetes-validations" = [{ "rule": "self == oldSelf", "message": "prefix is immutable" }]))]
    pub prefix: String,
    /// The pool CIDR that the cell was made for. Cannot be changed.
    #[schemars(with = "Cidr", extend("x-kubernetes-validations" = [{ "rule": "self == oldSelf", "message": "pool is immutable" }]))]
    pub pool: String,
    /// The mask that was in force when the pool CIDR was first used. Cannot be changed.
    #[schemars(range(min = 0, max = 128), extend("x-kubernetes-validations" = [{ "rule": "self == oldSelf", "message": "maskSize is immutable" }]))]
    pub mask_size: u8,
    /// The id of the leader's term that wrote the cell last.
    #[schemars(length(max = 64))]
    pub term: String,
    /// Every block that is not free, in the order of addresses.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    #[schemars(length(max = 4096), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["block"]))]
    pub blocks: Vec<CellBlock>,
}

/// What a cell says of one block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CellBlock {
    /// The block.
    #[schemars(with = "Cidr")]
    pub block: String,
    /// Its state.
    pub state: CellBlockState,
    /// The node whose it is; in quarantine, whose it was.
    #[schemars(length(min = 1, max = 253))]
    pub node: String,
    /// The uid of that Node. Missing when the block was adopted from a CiliumNode without a Node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 128))]
    pub uid: Option<String>,
}

/// The state of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CellBlockState {
    /// The node's.
    Granted,
    /// Going to be the node's once the block of its other family is written too.
    Pending,
    /// Nobody's yet: the node is gone, and the block rests.
    Quarantined,
    /// The node's still, and outside every pool CIDR.
    Orphaned,
}

/// What holds the cells of one cluster together. It has the name of the cluster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Ledger {
    /// Standard metadata.
    #[schemars(skip)]
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// Which store, whose term, which cells.
    pub spec: LedgerSpec,
    /// How it is.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub status: LedgerStatus,
}

impl Kind for Ledger {
    const NAMES: Names = Names {
        group: BASAL,
        kind: "Ledger",
        plural: "ledgers",
        singular: "ledger",
        short: &[],
        version: "v1alpha1",
        namespaced: false,
        status_subresource: true,
        metadata_required: true,
        columns: &[
            Column::new("Store", "string", ".spec.store"),
            Column::new("Move To", "string", ".spec.moveTo"),
            Column::new("Leaving", "string", ".spec.leaving"),
            Column::new("Ready", "string", r#".status.conditions[?(@.type=="Ready")].status"#),
            Column::new("Reason", "string", r#".status.conditions[?(@.type=="Ready")].reason"#),
            Column::new("Exhausted", "string", r#".status.conditions[?(@.type=="PoolExhausted")].reason"#),
            Column::new("Term", "string", ".spec.term").wide(),
            Column::AGE,
        ],
    };
}

/// Which store, whose term, which cells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {
        "rule": "!has(oldSelf.cells) || (has(self.cells) && size(self.cells) >= size(oldSelf.cells))",
        "message": "cells never go: a cell that is missing in the list would be taken for one that never was"
    },
    {
        "rule": "self.store == oldSelf.store || (has(oldSelf.moveTo) && oldSelf.moveTo == self.store)",
        "message": "the store is changed by moving the claims: set moveTo"
    }
]))]
pub struct LedgerSpec {
    /// The active store. An operator that is configured for the other one grants nothing. Changed by the operator, when it
    /// has moved the claims.
    pub store: LedgerStore,
    /// The store that the claims are to be moved to. Set by an administrator; taken away by the operator when that store
    /// is the active one, or before by an administrator, who so calls the move off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub move_to: Option<LedgerStore>,
    /// The store that the claims were moved from, while agents may still work with it: an operator that reaches both stores
    /// keeps the records of nodes, addresses and identities up in both. Taken away when no agent works with it any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leaving: Option<LedgerStore>,
    /// The fence: the id of the leader's term that may write. For custom resources only; in etcd the fence is a key.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    #[schemars(length(max = 64))]
    pub term: String,
    /// The last term that ended with an answer to every write of a cell. While nothing else was changed here since, no write
    /// of a former leader can change a cell any more, and the next one has less to do before it begins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<EndedTerm>,
    /// The prefix of every cell. One that has no PodCIDRCell has lost it; then its claims are read from CiliumNodes.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    #[schemars(with = "Vec<Cidr>", length(max = 8192), extend("x-kubernetes-list-type" = "set"))]
    pub cells: Vec<String>,
}

/// A term that ended, and where that stands in the history of the object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EndedTerm {
    /// Its id.
    #[schemars(length(max = 64))]
    pub term: String,
    /// The `metadata.generation` that the note made: after any other change of the specification it is worth nothing.
    pub generation: i64,
}

/// A store of claims.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LedgerStore {
    /// Basal's etcd.
    Etcd,
    /// PodCIDRCells.
    CustomResources,
}

impl LedgerStore {
    /// The word in the object.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::CustomResources => "custom-resources",
        }
    }
}

/// How a ledger is.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LedgerStatus {
    /// The generation that the conditions are about.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub observed_generation: i64,
    /// Every pool CIDR, IPv4 first, in the order in which they are used up. Counted every few seconds.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["cidr"]))]
    pub pools: Vec<PoolState>,
    /// Blocks that lie in no pool CIDR any more.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub outside: BlockCounts,
    /// Ready, Stalled; and while they hold PoolExhausted, PoolUnusable, BlocksOrphaned.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    #[schemars(with = "Vec<ConditionSchema>", extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// A condition, as `metav1.Condition` has it.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase")]
#[expect(dead_code, reason = "only the schema of this type is used")]
struct ConditionSchema {
    /// When the status changed last.
    #[schemars(extend("format" = "date-time"))]
    last_transition_time: String,
    /// A text for people.
    #[schemars(length(max = 32768))]
    message: String,
    /// The generation that the condition is about.
    #[schemars(range(min = 0))]
    observed_generation: Option<i64>,
    /// One word in CamelCase.
    #[schemars(length(min = 1, max = 1024))]
    reason: String,
    /// True, False or Unknown.
    #[schemars(extend("enum" = ["True", "False", "Unknown"]))]
    status: String,
    /// What it is about.
    #[schemars(rename = "type", length(max = 316))]
    kind: String,
}

/// The name of a PodCIDRCell: a DNS label made of the cluster's name and the prefix. `default-10-0-0-0-16` is
/// 10.0.0.0/16, `default-fd00-112` is fd00::/112 (its hexadecimal digits without groups of four zeros at the end).
#[must_use]
pub fn cell_name(cluster: &str, address: IpAddr, prefix_len: u8) -> String {
    let cluster: String = cluster.chars().take(CLUSTER_PART).collect();
    let text = match address {
        IpAddr::V4(v4) => v4.octets().map(|octet| octet.to_string()).join("-"),
        IpAddr::V6(v6) => {
            let digits = format!("{:032x}", v6.to_bits());
            let mut short = digits.as_str();
            while let Some(rest) = short.strip_suffix("0000") {
                short = rest;
            }
            if short.is_empty() { "0".to_owned() } else { short.to_owned() }
        }
    };
    format!("{cluster}-{text}-{prefix_len}")
}

#[cfg(test)]
mod tests {
    use kube::core::cel::Validator;
    use serde_json::{Value, json};

    use super::*;
    use crate::resources::Definition;

    #[test]
    fn names_of_cells_are_dns_labels() {
        for (cluster, address, len, name) in [
            ("default", "10.0.0.0", 16, "default-10-0-0-0-16"),
            ("default", "255.255.255.248", 29, "default-255-255-255-248-29"),
            ("c", "fd00::", 112, "c-fd00-112"),
            ("c", "::", 0, "c-0-0"),
            ("c", "fd00:0:0:12::", 64, "c-fd00000000000012-64"),
            (
                "abcdefghijklmnopqrstuvwxyz012345",
                "fd00:1111:2222:3333:4444:5555:6666:7777",
                128,
                "abcdefghijklmnopqrstuvwxyz-fd001111222233334444555566667777-128",
            ),
        ] {
            let made = cell_name(cluster, address.parse().unwrap(), len);
            assert_eq!(made, name);
            assert!(made.len() <= 63, "{made}");
        }
    }

    fn cell() -> Value {
        json!({
            "apiVersion": "basal.io/v1alpha1",
            "kind": "PodCIDRCell",
            "metadata": { "name": "default-10-0-0-0-16", "finalizers": [LEDGER_FINALIZER] },
            "spec": {
                "cluster": "default", "prefix": "10.0.0.0/16", "pool": "10.0.0.0/8", "maskSize": 24, "term": "t1",
                "blocks": [{ "block": "10.0.3.0/24", "state": "granted", "node": "n1", "uid": "u1" }],
            },
        })
    }

    fn ledger() -> Value {
        json!({
            "apiVersion": "basal.io/v1alpha1",
            "kind": "Ledger",
            "metadata": { "name": "default" },
            "spec": { "store": "custom-resources", "term": "t1", "cells": ["10.0.0.0/16"] },
        })
    }

    fn refusals<K: Kind>(old: &Value, change: impl FnOnce(&mut Value)) -> Vec<String> {
        let definition = Definition::of::<K>().object;
        let schema = definition.pointer("/spec/versions/0/schema/openAPIV3Schema").unwrap();
        let mut new = old.clone();
        change(&mut new["spec"]);
        let errors = Validator::new().validate(schema, &new, Some(old)).err().into_iter().flatten();
        errors.map(|error| error.message).collect()
    }

    #[test]
    fn what_a_cell_is_about_cannot_be_changed() {
        let refused = |change: fn(&mut Value)| refusals::<PodCidrCell>(&cell(), change);
        assert_eq!(refused(|_| ()), [] as [&str; 0]);
        assert_eq!(refused(|spec| spec["blocks"] = json!([])), [] as [&str; 0]);
        assert_eq!(refused(|spec| spec["cluster"] = json!("other")), ["cluster is immutable"]);
        assert_eq!(refused(|spec| spec["prefix"] = json!("10.1.0.0/16")), ["prefix is immutable"]);
        assert_eq!(refused(|spec| spec["pool"] = json!("10.0.0.0/9")), ["pool is immutable"]);
        assert_eq!(refused(|spec| spec["maskSize"] = json!(25)), ["maskSize is immutable"]);
    }

    #[test]
    fn the_list_of_cells_does_not_shrink() {
        let refused = |change: fn(&mut Value)| refusals::<Ledger>(&ledger(), change);
        assert_eq!(refused(|spec| spec["term"] = json!("t2")), [] as [&str; 0]);
        assert_eq!(refused(|spec| spec["cells"] = json!(["10.0.0.0/16", "fd00::/112"])), [] as [&str; 0]);
        assert_eq!(refused(|spec| spec["cells"] = json!([])).len(), 1);
        assert_eq!(refused(|spec| *spec = json!({ "store": "custom-resources" })).len(), 1);
    }

    #[test]
    fn the_store_is_changed_by_a_move_alone() {
        let refused = |old: &Value, change: fn(&mut Value)| refusals::<Ledger>(old, change);
        let activate: fn(&mut Value) = |spec| {
            let cells = spec["cells"].take();
            *spec = json!({ "store": "etcd", "leaving": "custom-resources", "cells": cells });
        };
        let wanted = ["the store is changed by moving the claims: set moveTo"];
        assert_eq!(refused(&ledger(), activate), wanted);
        let mut asked = ledger();
        asked["spec"]["moveTo"] = json!("etcd");
        assert_eq!(refused(&ledger(), |spec| spec["moveTo"] = json!("etcd")), [] as [&str; 0]);
        assert_eq!(refused(&asked, activate), [] as [&str; 0]);
        assert_eq!(refused(&asked, |spec| drop(spec.as_object_mut().unwrap().remove("moveTo"))), [] as [&str; 0]);
    }

    #[test]
    fn both_kinds_read_back_what_they_write() {
        let typed: PodCidrCell = serde_json::from_value(cell()).unwrap();
        assert_eq!((typed.spec.mask_size, typed.spec.blocks[0].state), (24, CellBlockState::Granted));
        assert_eq!(typed.to_object().unwrap(), cell());
        let typed: Ledger = serde_json::from_value(ledger()).unwrap();
        assert_eq!((typed.spec.store, typed.spec.store.as_str()), (LedgerStore::CustomResources, "custom-resources"));
        assert_eq!(typed.to_object().unwrap(), ledger());
    }
}
