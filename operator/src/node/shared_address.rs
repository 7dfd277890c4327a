//! Nodes that have one address: others would send the packets for both to whichever of them has it.
//!
//! No node is refused for that, since nobody can tell which of them is wrong. Both are told, by the name of the other.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use basal_crds::address::{NodeAddress, node_ip};
use basal_ipam::{names::NodeName, prefix::Family};
use basal_objects::{cache::Changes, object::ObjectKey};
use futures::{FutureExt as _, pin_mut, select_biased};

use super::{report::Reporter, views::Views};
use crate::metrics::OperatorMetrics;

/// Other nodes that a warning names; the rest is counted.
const NAMED: usize = 5;

/// Which node has which tunnel endpoints.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Endpoints {
    by_node: BTreeMap<NodeName, BTreeSet<IpAddr>>,
    by_address: BTreeMap<IpAddr, BTreeSet<NodeName>>,
    /// The nodes that share one.
    sharing: BTreeSet<NodeName>,
}

/// A node that shares an address from now on.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Clash {
    node: NodeName,
    address: IpAddr,
    others: BTreeSet<NodeName>,
}

impl Endpoints {
    /// Takes the endpoints that a node has now; answers who shares one and did not before.
    fn set(&mut self, node: &NodeName, addresses: BTreeSet<IpAddr>) -> Vec<Clash> {
        let before = if addresses.is_empty() {
            self.by_node.remove(node)
        } else {
            self.by_node.insert(node.clone(), addresses.clone())
        };
        let before = before.unwrap_or_default();
        let mut touched = BTreeSet::from([node.clone()]);
        for address in before.difference(&addresses) {
            let nodes = self.by_address.entry(*address).or_default();
            nodes.remove(node);
            match nodes.len() {
                0 => drop(self.by_address.remove(address)),
                // The last one shares it no more; of more each still does.
                1 => touched.extend(nodes.iter().cloned()),
                _ => {}
            }
        }
        for address in addresses.difference(&before) {
            let nodes = self.by_address.entry(*address).or_default();
            nodes.insert(node.clone());
            // The first one shares it from now on; of more each did before.
            if nodes.len() == 2 {
                touched.extend(nodes.iter().cloned());
            }
        }
        touched.into_iter().filter_map(|node| self.judge(node)).collect()
    }

    fn judge(&mut self, node: NodeName) -> Option<Clash> {
        let clash = self.by_node.get(&node).into_iter().flatten().find_map(|address| {
            let mut others = self.by_address.get(address)?.clone();
            others.remove(&node);
            (!others.is_empty()).then_some((*address, others))
        });
        match clash {
            Some((address, others)) => self.sharing.insert(node.clone()).then_some(Clash { node, address, others }),
            None => {
                self.sharing.remove(&node);
                None
            }
        }
    }
}

impl Clash {
    fn note(&self) -> String {
        let named: Vec<&str> = self.others.iter().take(NAMED).map(NodeName::as_str).collect();
        let more = match self.others.len().saturating_sub(NAMED) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        format!(
            "{} is an address of this node and of {}{more}: other nodes tunnel to it for all of them; correct the \
             addresses, or delete the Node that is gone",
            self.address,
            named.join(", ")
        )
    }
}

/// The endpoints of the node of this name; none while it has no Node.
fn endpoints_of(views: &Views, key: &ObjectKey) -> BTreeSet<IpAddr> {
    let cilium_node = views.nodes.get(key).and_then(|_| views.cilium_nodes.get(key));
    let addresses: Vec<NodeAddress> = cilium_node
        .as_ref()
        .and_then(|cached| cached.valid()?.facts().ok()?.object.addresses().ok())
        .unwrap_or_default();
    Family::ALL.into_iter().filter_map(|family| node_ip(&addresses, family)).collect()
}

/// Tells of every node that shares an address, for as long as it is run.
pub(crate) async fn watch(views: Views, reporter: Reporter, metrics: OperatorMetrics) {
    let (nodes, cilium_nodes) = (views.nodes.subscribe(), views.cilium_nodes.subscribe());
    let mut endpoints = Endpoints::default();
    loop {
        for key in either(&nodes, &cilium_nodes).await {
            // One that no node can have is reported where it enters the queue.
            let Ok(name) = NodeName::new(&key.name) else { continue };
            for clash in endpoints.set(&name, endpoints_of(&views, &key)) {
                reporter.shares_address(&views, &clash.node, &clash.note());
            }
        }
        metrics.upkeep.share_addresses(endpoints.sharing.len());
    }
}

async fn either(one: &Changes, other: &Changes) -> BTreeSet<ObjectKey> {
    let (one, other) = (one.next().fuse(), other.next().fuse());
    pin_mut!(one, other);
    select_biased! { keys = one => keys, keys = other => keys }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> NodeName {
        NodeName::new(name).unwrap()
    }

    fn at(addresses: &[&str]) -> BTreeSet<IpAddr> {
        addresses.iter().map(|address| address.parse().unwrap()).collect()
    }

    /// Who is told of whom.
    fn told(clashes: Vec<Clash>) -> Vec<String> {
        let others = |clash: &Clash| clash.others.iter().map(NodeName::as_str).collect::<Vec<_>>().join("+");
        clashes.iter().map(|clash| format!("{} {} {}", clash.node, clash.address, others(clash))).collect()
    }

    #[test]
    fn each_is_told_when_it_begins_to_share() {
        let mut endpoints = Endpoints::default();
        assert_eq!(told(endpoints.set(&name("a"), at(&["10.1.0.1", "fc00::1"]))), [""; 0]);
        assert_eq!(told(endpoints.set(&name("b"), at(&["10.1.0.2", "fc00::1"]))), ["a fc00::1 b", "b fc00::1 a"]);
        assert_eq!(told(endpoints.set(&name("b"), at(&["10.1.0.2", "fc00::1"]))), [""; 0]);
        assert_eq!(told(endpoints.set(&name("c"), at(&["fc00::1"]))), ["c fc00::1 a+b"]);
        assert_eq!(endpoints.sharing.len(), 3);
        // Two of them share on, the third is told when it begins again.
        assert_eq!(told(endpoints.set(&name("c"), at(&["fc00::3"]))), [""; 0]);
        assert_eq!(endpoints.sharing.len(), 2);
        assert_eq!(told(endpoints.set(&name("c"), at(&["10.1.0.1"]))), ["c 10.1.0.1 a"]);
        assert_eq!(told(endpoints.set(&name("a"), at(&[]))), [""; 0]);
        assert_eq!(endpoints.sharing, BTreeSet::new());
        assert_eq!(endpoints.by_address.len(), 3);
    }

    #[test]
    fn a_note_names_a_few_and_counts_the_rest() {
        let others: BTreeSet<NodeName> = (0..8).map(|n| name(&format!("n{n}"))).collect();
        let clash = Clash { node: name("a"), address: "10.1.0.1".parse().unwrap(), others };
        assert!(clash.note().starts_with("10.1.0.1 is an address of this node and of n0, n1, n2, n3, n4 and 3 more: "));
    }
}
