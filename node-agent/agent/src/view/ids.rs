//! Node ids (`cilium_node_map_v2`): a number for each other node, the same for all its addresses.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::NodeKey;

/// Hands out node ids, 1 to 65535; 0 is this node.
#[derive(Debug, Clone, Default)]
pub struct NodeIds {
    ids: BTreeMap<IpAddr, u16>,
}

impl NodeIds {
    /// Takes over what is in the map, so that ids stay what they were.
    #[must_use]
    pub fn restore(rows: impl IntoIterator<Item = (IpAddr, u16)>) -> Self {
        Self { ids: rows.into_iter().filter(|(_, id)| *id != 0).collect() }
    }

    /// Gives every address its node's id; addresses that are not listed lose theirs. Answers all rows. When all ids are
    /// in use, the nodes that come last have none.
    pub fn assign<'a>(&mut self, addresses: impl IntoIterator<Item = (&'a NodeKey, IpAddr)>) -> &BTreeMap<IpAddr, u16> {
        let mut nodes: BTreeMap<&NodeKey, Vec<IpAddr>> = BTreeMap::new();
        for (node, ip) in addresses {
            nodes.entry(node).or_default().push(ip);
        }
        // First those that have one: a new node must not take it.
        let mut taken = BTreeSet::new();
        let mut chosen: BTreeMap<&NodeKey, u16> = BTreeMap::new();
        for (node, ips) in &nodes {
            let kept = ips.iter().filter_map(|ip| self.ids.get(ip)).find(|id| !taken.contains(*id));
            if let Some(id) = kept {
                taken.insert(*id);
                chosen.insert(*node, *id);
            }
        }
        let mut free = (1..=u16::MAX).filter(|id| !taken.contains(id));
        for node in nodes.keys() {
            if !chosen.contains_key(node)
                && let Some(id) = free.next()
            {
                chosen.insert(*node, id);
            }
        }
        self.ids = nodes
            .into_iter()
            .filter_map(|(node, ips)| Some((*chosen.get(node)?, ips)))
            .flat_map(|(id, ips)| ips.into_iter().map(move |ip| (ip, id)))
            .collect();
        &self.ids
    }
}

#[cfg(test)]
mod tests {
    use basal_crds::names::{ClusterName, NodeName};
    use proptest::prelude::*;

    use super::*;

    fn key(n: u8) -> NodeKey {
        (ClusterName::default(), NodeName::new(format!("n{n}")).unwrap())
    }

    fn ip(n: u8, i: u8) -> IpAddr {
        IpAddr::from([172, 18, n, i])
    }

    #[test]
    fn ids_outlive_a_restart_and_a_new_address() {
        let mut ids = NodeIds::restore([(ip(1, 0), 40), (ip(2, 0), 41), (ip(3, 0), 0)]);
        let (one, two, three) = (key(1), key(2), key(3));
        let rows = ids.assign([(&one, ip(1, 0)), (&one, ip(1, 1)), (&two, ip(2, 0)), (&three, ip(3, 0))]);
        assert_eq!(*rows, BTreeMap::from([(ip(1, 0), 40), (ip(1, 1), 40), (ip(2, 0), 41), (ip(3, 0), 1)]));
    }

    proptest! {
        #[test]
        fn no_two_nodes_share_an_id(
            restored in proptest::collection::btree_map((0_u8..5, 0_u8..2), 0_u16..6, 0..8),
            rounds in proptest::collection::vec(proptest::collection::btree_set((0_u8..5, 0_u8..2), 0..8), 1..4),
        ) {
            let mut ids = NodeIds::restore(restored.into_iter().map(|((n, i), id)| (ip(n, i), id)));
            for round in rounds {
                let keys: Vec<_> = (0..5).map(key).collect();
                let rows = ids.assign(round.iter().map(|(n, i)| (&keys[usize::from(*n)], ip(*n, *i)))).clone();
                prop_assert_eq!(rows.len(), round.len());
                for (n, i) in &round {
                    for (m, j) in &round {
                        prop_assert_eq!(rows[&ip(*n, *i)] == rows[&ip(*m, *j)], n == m);
                    }
                }
            }
        }
    }
}
