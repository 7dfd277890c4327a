//! Node ids (`cilium_node_map_v2`): a number for each other node, the same for all its addresses.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use basal_crds::directory::NodeId;

/// Hands out node ids, 1 to 65535; 0 is this node.
#[derive(Debug, Clone, Default)]
pub struct NodeIds {
    ids: BTreeMap<NodeId, u16>,
    /// What the map held at the start: the ids of nodes that were not heard of yet.
    restored: BTreeMap<IpAddr, u16>,
}

impl NodeIds {
    /// Takes over what is in the map, so that ids stay what they were.
    #[must_use]
    pub fn restore(rows: impl IntoIterator<Item = (IpAddr, u16)>) -> Self {
        let restored = rows.into_iter().filter(|(_, id)| *id != 0).collect();
        Self { ids: BTreeMap::new(), restored }
    }

    /// Gives each node its id, by its addresses too; nodes that are not listed lose theirs. When all ids are in use, the
    /// nodes that come last have none.
    pub fn assign<'a>(&mut self, nodes: impl IntoIterator<Item = (&'a NodeId, Vec<IpAddr>)>) -> &BTreeMap<NodeId, u16> {
        let nodes: BTreeMap<&NodeId, Vec<IpAddr>> = nodes.into_iter().collect();
        self.ids.retain(|node, _| nodes.contains_key(node));
        let mut taken: BTreeSet<u16> = self.ids.values().copied().collect();
        // First those that had one before the start: a new node must not take it.
        for (node, ips) in &nodes {
            if !self.ids.contains_key(*node) {
                let earlier = ips.iter().filter_map(|ip| self.restored.remove(ip)).find(|id| !taken.contains(id));
                if let Some(id) = earlier {
                    taken.insert(id);
                    self.ids.insert((*node).clone(), id);
                }
            }
        }
        // Ids of nodes that are not heard of yet are kept for them, as long as there are others.
        let kept: BTreeSet<u16> = self.restored.values().copied().collect();
        // Looked for only when a node needs one.
        let others = (1..=u16::MAX).filter(|id| !kept.contains(id));
        let mut free = others.chain(kept.iter().copied()).filter(|id| !taken.contains(id));
        for node in nodes.keys() {
            if !self.ids.contains_key(*node)
                && let Some(id) = free.next()
            {
                self.ids.insert((*node).clone(), id);
            }
        }
        &self.ids
    }
}

#[cfg(test)]
mod tests {
    use basal_crds::names::ClusterName;
    use basal_ipam::names::NodeName;
    use proptest::prelude::*;

    use super::*;

    fn key(n: u8) -> NodeId {
        (ClusterName::default(), NodeName::new(&format!("n{n}")).unwrap())
    }

    fn ip(n: u8, i: u8) -> IpAddr {
        IpAddr::from([172, 18, n, i])
    }

    #[test]
    fn ids_outlive_a_restart_and_a_new_address() {
        let mut ids = NodeIds::restore([(ip(1, 0), 40), (ip(2, 0), 41), (ip(3, 0), 0)]);
        let (one, two, three) = (key(1), key(2), key(3));
        let assigned = ids.assign([(&one, vec![ip(1, 0), ip(1, 1)]), (&three, vec![ip(3, 0)])]).clone();
        assert_eq!(assigned, BTreeMap::from([(one.clone(), 40), (three.clone(), 1)]));
        let assigned = ids.assign([(&one, vec![ip(9, 9)]), (&two, vec![ip(2, 0)]), (&three, vec![ip(3, 0)])]);
        assert_eq!(*assigned, BTreeMap::from([(one.clone(), 40), (two.clone(), 41), (three.clone(), 1)]));
    }

    proptest! {
        /// Also where two nodes claim one address.
        #[test]
        fn ids_are_unique_and_stay(
            restored in proptest::collection::btree_map((0_u8..5, 0_u8..2), 0_u16..6, 0..8),
            rounds in proptest::collection::vec(proptest::collection::btree_map(0_u8..5, (0_u8..5, 0_u8..2), 0..5), 1..4),
        ) {
            let mut ids = NodeIds::restore(restored.into_iter().map(|((n, i), id)| (ip(n, i), id)));
            let mut before: BTreeMap<NodeId, u16> = BTreeMap::new();
            for round in rounds {
                let keys: Vec<_> = round.keys().map(|n| key(*n)).collect();
                let nodes = keys.iter().zip(round.values()).map(|(key, (n, i))| (key, vec![ip(*n, *i)]));
                let now = ids.assign(nodes).clone();
                prop_assert_eq!(now.len(), round.len());
                prop_assert_eq!(now.values().collect::<BTreeSet<_>>().len(), now.len());
                prop_assert!(now.iter().all(|(node, id)| before.get(node).is_none_or(|earlier| earlier == id)));
                before = now;
            }
        }
    }
}
