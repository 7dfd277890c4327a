//! What must hold at the end of a schedule.

use std::{collections::BTreeMap, fmt};

use basal_crds::kvstore::{NodeRecord, keys::NODES_PREFIX};
use basal_ipam::{
    cell::BlockState,
    config::PoolConfig,
    prefix::{Family, PodCidr},
};
use basal_kvstore::ledger::{LedgerKey, LedgerKeys};
use basal_objects::object::{Object, resources};
use serde_json::Value;

use super::{Store, perform::pod_cidrs};
use crate::{safety::BlockSafety, world::World};

/// The state at the end, apart from which block, uid and version anything has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Final {
    /// Each Node, whether it is served, and whether an error stands in its CiliumNode.
    nodes: BTreeMap<String, (bool, bool)>,
    /// Nodes that are not there any more and hold blocks.
    leftovers: BTreeMap<String, bool>,
    /// CiliumNodes and node records without a Node.
    strays: Vec<String>,
}

impl Final {
    /// Whether anything is left that no Node stands behind.
    pub(super) fn has_strays(&self) -> bool {
        !self.strays.is_empty()
    }

    /// What is different; where the pool is used up it is a matter of order which node goes without.
    ///
    /// # Errors
    /// The difference.
    pub fn same(&self, expected: &Self) -> Result<(), String> {
        let all_served = |state: &Self| state.nodes.values().all(|(served, _)| *served);
        let equal = if all_served(self) && all_served(expected) {
            self == expected
        } else {
            self.nodes.keys().eq(expected.nodes.keys())
        };
        if equal { Ok(()) } else { Err(format!("the state at the end is\n  {self}\nand without faults\n  {expected}")) }
    }
}

impl fmt::Display for Final {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, (served, error)) in &self.nodes {
            let (served, error) =
                (if *served { "served" } else { "not served" }, if *error { " with an error" } else { "" });
            write!(f, "{name} {served}{error}; ")?;
        }
        for (name, usable) in &self.leftovers {
            write!(
                f,
                "{name} is gone and holds blocks{}; ",
                if *usable { " as if it were there" } else { " that rest" }
            )?;
        }
        write!(f, "strays: {}", if self.strays.is_empty() { "none".to_owned() } else { self.strays.join(", ") })
    }
}

/// Everything that is called by a node's name.
struct Named {
    uid: String,
    cilium_node: Option<Object>,
    published: Vec<String>,
    held: Vec<PodCidr>,
}

impl Named {
    /// One block at least of each family that the pool has, listed, held and published alike.
    fn is_served(&self, families: &[Family]) -> bool {
        let Some(cilium_node) = &self.cilium_node else { return false };
        let listed = pod_cidrs(cilium_node);
        let mut held: Vec<String> = self.held.iter().map(ToString::to_string).collect();
        let (mut sorted, mut published) = (listed, self.published.clone());
        [&mut held, &mut sorted, &mut published].into_iter().for_each(|list| list.sort());
        let complete = families.iter().all(|family| self.held.iter().any(|block| block.family() == *family));
        complete && held == sorted && held == published
    }

    fn error(&self) -> &str {
        let status = self.cilium_node.as_ref().and_then(|node| node.0.pointer("/status/ipam/operator-status/error"));
        status.and_then(Value::as_str).unwrap_or_default()
    }
}

fn families(pool: &PoolConfig) -> Vec<Family> {
    pool.families().map(|(family, _)| family).collect()
}

/// The blocks that the status of a CiliumNode confirms.
fn confirmed(object: &Object) -> Vec<String> {
    let entries = object.0.pointer("/status/ipam/pod-cidrs").and_then(Value::as_object).into_iter().flatten();
    let in_use = entries.filter(|(_, entry)| entry.get("status").and_then(Value::as_str) == Some("in-use"));
    in_use.map(|(block, _)| block.clone()).collect()
}

/// A cluster to judge.
pub(super) struct Judged<'a> {
    pub(super) world: &'a World,
    pub(super) cluster: &'a str,
    pub(super) store: Store,
}

impl Judged<'_> {
    fn records(&self) -> BTreeMap<String, Vec<String>> {
        let mut records = BTreeMap::new();
        let prefix = format!("{NODES_PREFIX}{}/", self.cluster);
        self.world.kv().visit(&prefix, |key, _, value| {
            let cidrs = NodeRecord::parse(value).map(|record| record.cidrs().map(|cidr| cidr.to_string()).collect());
            records.insert(key.trim_start_matches(&prefix).to_owned(), cidrs.unwrap_or_default());
        });
        records
    }

    fn nodes(&self, safety: &BlockSafety) -> BTreeMap<String, Named> {
        let mut records = self.records();
        let cilium_nodes = self.world.objects().all(&resources::CILIUM_NODE).into_iter();
        let mut cilium_nodes: BTreeMap<String, Object> =
            cilium_nodes.map(|node| (node.name().to_owned(), node)).collect();
        let named = self.world.objects().all(&resources::NODE).into_iter().map(|node| {
            let name = node.name().to_owned();
            let cilium_node = cilium_nodes.remove(&name);
            let published = match self.store {
                Store::Etcd => records.remove(&name).unwrap_or_default(),
                Store::CustomResources => cilium_node.as_ref().map(confirmed).unwrap_or_default(),
            };
            let held = safety.usable(&name, node.uid());
            (name, Named { uid: node.uid().to_owned(), cilium_node, published, held })
        });
        named.collect()
    }

    /// A node that is not served though there is a free block of each family, and why.
    pub(super) fn unserved(&self, safety: &BlockSafety, pool: &PoolConfig) -> Option<String> {
        let families = families(pool);
        let free = |family: Family| {
            let Some(settings) = pool.family(family) else { return false };
            let mask = settings.mask();
            let mut candidates =
                settings.cidrs().iter().flat_map(|cidr| (0..cidr.count(mask)).map(move |index| cidr.nth(mask, index)));
            candidates.any(|block| !safety.claims().any(|(claim, _)| claim.overlaps(&block)))
        };
        let room = families.iter().all(|family| free(*family));
        let all = self.nodes(safety);
        let (name, named) = all.iter().find(|(_, named)| {
            let has_some = families.iter().all(|family| named.held.iter().any(|block| block.family() == *family));
            // One that holds blocks needs no room.
            (room || has_some) && !named.is_served(&families)
        })?;
        let Named { uid, published, held, .. } = named;
        let listed = named.cilium_node.as_ref().map(pod_cidrs);
        Some(format!(
            "{name} ({uid}) is not served though it could be: the ledger holds {held:?} for it, its CiliumNode lists \
             {listed:?}, {published:?} is published, its error is {:?}",
            named.error()
        ))
    }

    /// The state of the world.
    pub(super) fn state(&self, safety: &BlockSafety, pool: &PoolConfig) -> Final {
        let (all, families) = (self.nodes(safety), families(pool));
        let mut leftovers = BTreeMap::new();
        for (_, block) in safety.claims().filter(|(_, block)| !all.contains_key(block.node.as_str())) {
            let usable = leftovers.entry(block.node.as_str().to_owned()).or_insert(false);
            *usable |= block.state != BlockState::Quarantined;
        }
        // What rests as long as pods run in it does so by the pods that could start, which is a matter of time.
        leftovers.retain(|name, usable| *usable || !safety.has_pods(name));
        let is_stray = |name: &String| !all.contains_key(name);
        let records = self.records().into_keys().filter(is_stray).map(|name| format!("the record of {name}"));
        let cilium_nodes = self.world.objects().all(&resources::CILIUM_NODE).into_iter();
        let cilium_nodes = cilium_nodes.map(|node| node.name().to_owned()).filter(is_stray);
        let cilium_nodes = cilium_nodes.map(|name| format!("the CiliumNode {name}"));
        let strays = records.chain(cilium_nodes).collect();
        let node = |named: &Named| (named.is_served(&families), !named.error().is_empty());
        let nodes = all.iter().map(|(name, named)| (name.clone(), node(named))).collect();
        Final { nodes, leftovers, strays }
    }

    /// The term that the ledger's fence holds.
    pub(super) fn fence(&self) -> Option<String> {
        match self.store {
            Store::Etcd => {
                let fence = self.world.kv().value(&LedgerKeys::new(self.cluster).fence())?;
                Some(String::from_utf8_lossy(&fence).into_owned())
            }
            Store::CustomResources => {
                let mut fence = None;
                self.world.objects().visit(&resources::LEDGER, |_, _, value| {
                    fence = value.pointer("/spec/term").and_then(Value::as_str).map(str::to_owned);
                });
                fence
            }
        }
    }

    /// What operators wrote for nodes, by key: the version that they wrote, or what of it tells more than the term.
    pub(super) fn written(&self) -> Written {
        let keys = LedgerKeys::new(self.cluster);
        let mut written = BTreeMap::new();
        self.world.kv().visit(keys.prefix(), |key, revision, _| {
            // The start of a term writes them: the owner where a store that was put back does not name it any more.
            if !matches!(keys.parse(key), Some(LedgerKey::Fence | LedgerKey::Owner)) {
                written.insert(key.to_owned(), revision.to_string());
            }
        });
        self.world.kv().visit(NODES_PREFIX, |key, revision, _| {
            written.insert(key.to_owned(), revision.to_string());
        });
        for kind in [resources::NODE, resources::CILIUM_NODE, resources::CRD] {
            self.world.objects().visit(&kind, |key, revision, _| {
                written.insert(key.to_owned(), revision.to_string());
            });
        }
        // The start of a term stamps them.
        for (kind, field) in [(resources::LEDGER, "cells"), (resources::POD_CIDR_CELL, "blocks")] {
            self.world.objects().visit(&kind, |key, _, value| {
                let told = value.get("spec").and_then(|spec| spec.get(field));
                written.insert(key.to_owned(), told.map(ToString::to_string).unwrap_or_default());
            });
        }
        Written(written)
    }
}

/// What operators wrote at some moment.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Written(BTreeMap<String, String>);

impl Written {
    /// # Errors
    /// The key of what was written since.
    pub(super) fn same(&self, later: &Self) -> Result<(), String> {
        let new = later.0.iter().find(|(key, what)| self.0.get(*key) != Some(what));
        let gone = self.0.keys().find(|key| !later.0.contains_key(*key));
        new.map(|(key, _)| key).or(gone).map_or(Ok(()), |key| Err(key.clone()))
    }
}
