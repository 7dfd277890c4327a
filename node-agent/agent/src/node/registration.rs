//! What has to be written into this node's CiliumNode, as a pure function of what is there and what should be.
//!
//! Only fields of the agent's are touched, and only those that differ: the rest, fields that this version does not know
//! included, stays as it is.

use basal_crds::{
    address::AddressType,
    resources::{AGENT_STORE_ANNOTATION, LedgerStore},
};
use basal_objects::object::{Object, resources::CILIUM_NODE};
use serde_json::{Map, Value, json};

use super::facts::NodeFacts;
use crate::endpoint::record::Addresses;

/// The addresses that the agent took for itself out of the node's blocks; none before there are blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OwnAddresses {
    /// On `cilium_host`; the pods' gateways.
    pub router: Addresses,
    /// Of the health endpoint.
    pub health: Addresses,
}

/// What is the same as long as the agent runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThisRun {
    /// The boot of the node.
    pub boot_id: String,
    /// Where the agent reads and publishes records.
    pub store: LedgerStore,
}

/// What to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// All is as it should be.
    Nothing,
    /// Create this object.
    Create(Object),
    /// Apply this merge patch.
    Patch(Value),
}

/// Compares.
#[must_use]
pub fn plan(existing: Option<&Object>, facts: &NodeFacts, own: OwnAddresses, run: &ThisRun) -> Step {
    let (boot_id, store) = (run.boot_id.as_str(), run.store.as_str());
    let Some(existing) = existing else {
        let mut object = json!({"apiVersion": CILIUM_NODE.api_version(), "kind": CILIUM_NODE.kind,
            "metadata": {"name": facts.name, "labels": facts.labels, "annotations": {AGENT_STORE_ANNOTATION: store},
                "ownerReferences": [owner(facts)]},
            "spec": {"addresses": addresses(&Value::Null, facts, own), "bootid": boot_id, "ipam": {}}});
        if let Some(health) = health(own.health) {
            object["spec"]["health"] = health;
        }
        return Step::Create(Object(object));
    };
    let mut patch = Map::new();
    let mut change = |path: &[&str], wanted: Value| {
        let pointer: String =
            path.iter().map(|part| format!("/{}", part.replace('~', "~0").replace('/', "~1"))).collect();
        if existing.0.pointer(&pointer) != Some(&wanted) {
            insert(&mut patch, path, wanted);
        }
    };
    for (key, value) in &facts.labels {
        change(&["metadata", "labels", key], value.as_str().into());
    }
    change(&["metadata", "annotations", AGENT_STORE_ANNOTATION], store.into());
    change(&["metadata", "ownerReferences"], owners(&existing.0, facts));
    let current = existing.0.pointer("/spec/addresses").unwrap_or(&Value::Null);
    change(&["spec", "addresses"], addresses(current, facts, own));
    change(&["spec", "bootid"], boot_id.into());
    for (family, ip) in
        [("ipv4", own.health.v4.map(|ip| ip.to_string())), ("ipv6", own.health.v6.map(|ip| ip.to_string()))]
    {
        if let Some(ip) = ip {
            change(&["spec", "health", family], ip.into());
        }
    }
    if patch.is_empty() { Step::Nothing } else { Step::Patch(Value::Object(patch)) }
}

fn insert(patch: &mut Map<String, Value>, path: &[&str], value: Value) {
    let [first, rest @ ..] = path else { return };
    if rest.is_empty() {
        patch.insert((*first).to_owned(), value);
    } else if let Value::Object(inner) = patch.entry((*first).to_owned()).or_insert_with(|| json!({})) {
        insert(inner, rest, value);
    }
}

fn owner(facts: &NodeFacts) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "name": facts.name, "uid": facts.uid})
}

/// Other owners stay; a Node that had our name before does not.
fn owners(existing: &Value, facts: &NodeFacts) -> Value {
    let others = existing.pointer("/metadata/ownerReferences").and_then(Value::as_array);
    let others = others.into_iter().flatten().filter(|owner| owner.get("kind") != Some(&"Node".into()));
    let ours = others.clone().cloned().chain([owner(facts)]).collect::<Vec<_>>();
    // The API server may have added `controller: false` or the like to ours: that is no difference.
    let current = existing.pointer("/metadata/ownerReferences").and_then(Value::as_array);
    let same = current.is_some_and(|current| {
        current.len() == ours.len()
            && current.iter().any(|one| {
                one.get("uid") == Some(&facts.uid.as_str().into()) && one.get("kind") == Some(&"Node".into())
            })
    });
    if same { Value::from(current.cloned().unwrap_or_default()) } else { Value::from(ours) }
}

/// The Node's addresses, then the router addresses. As long as there are none those of an earlier run stay.
fn addresses(current: &Value, facts: &NodeFacts, own: OwnAddresses) -> Value {
    let router_kind = AddressType::CiliumInternalIp;
    let entry = |kind: &AddressType, ip: String| json!({"type": kind.as_str(), "ip": ip});
    let mut list: Vec<_> = facts.addresses.iter().map(|address| entry(&address.kind, address.ip.to_string())).collect();
    let routers: Vec<_> = own.router.iter().map(|ip| entry(&router_kind, ip.to_string())).collect();
    if routers.is_empty() {
        let earlier = current.as_array().into_iter().flatten();
        list.extend(earlier.filter(|entry| entry.get("type") == Some(&router_kind.as_str().into())).cloned());
    } else {
        list.extend(routers);
    }
    // The API server may give the fields of an entry back in another order: entries are compared as maps.
    Value::from(list)
}

fn health(health: Addresses) -> Option<Value> {
    let mut map = Map::new();
    if let Some(ip) = health.v4 {
        map.insert("ipv4".into(), ip.to_string().into());
    }
    if let Some(ip) = health.v6 {
        map.insert("ipv6".into(), ip.to_string().into());
    }
    (!map.is_empty()).then_some(Value::Object(map))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use basal_crds::address::NodeAddress;

    use super::*;

    fn facts() -> NodeFacts {
        NodeFacts {
            name: "n1".into(),
            uid: "u1".into(),
            labels: BTreeMap::from([("zone/a".into(), "b".into())]),
            addresses: vec![NodeAddress { kind: AddressType::InternalIp, ip: "172.18.0.2".parse().unwrap() }],
        }
    }

    fn own() -> OwnAddresses {
        let addresses = |ip: &str| Addresses { v4: ip.parse().ok(), v6: None };
        OwnAddresses { router: addresses("10.0.1.1"), health: addresses("10.0.1.2") }
    }

    fn run(boot_id: &str, store: LedgerStore) -> ThisRun {
        ThisRun { boot_id: boot_id.to_owned(), store }
    }

    fn first() -> ThisRun {
        run("b1", LedgerStore::CustomResources)
    }

    fn created(own: OwnAddresses) -> Object {
        let Step::Create(object) = plan(None, &facts(), own, &first()) else { panic!("nothing is created") };
        object
    }

    #[test]
    fn what_was_created_needs_no_patch() {
        let expected = json!({"apiVersion": "cilium.io/v2", "kind": "CiliumNode",
            "metadata": {"name": "n1", "labels": {"zone/a": "b"},
                "annotations": {"basal.io/agent-store": "custom-resources"},
                "ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "u1"}]},
            "spec": {"addresses": [{"type": "InternalIP", "ip": "172.18.0.2"}], "bootid": "b1", "ipam": {}}});
        assert_eq!(created(OwnAddresses::default()).0, expected);
        assert_eq!(plan(Some(&created(own())), &facts(), own(), &first()), Step::Nothing);
    }

    #[test]
    fn addresses_of_an_earlier_run_stay_until_there_are_new_ones() {
        assert_eq!(plan(Some(&created(own())), &facts(), OwnAddresses::default(), &first()), Step::Nothing);
        let expected = json!({"spec": {
            "addresses": [{"type": "InternalIP", "ip": "172.18.0.2"}, {"type": "CiliumInternalIP", "ip": "10.0.1.1"}],
            "health": {"ipv4": "10.0.1.2"},
        }});
        assert_eq!(plan(Some(&created(OwnAddresses::default())), &facts(), own(), &first()), Step::Patch(expected));
    }

    #[test]
    fn only_what_differs_is_written() {
        let mut object = created(own());
        object.0["metadata"]["labels"]["other"] = "stays".into();
        object.0["spec"]["future"] = "stays".into();
        object.0["spec"]["ipam"]["podCIDRs"] = json!(["10.0.1.0/24"]);
        assert_eq!(plan(Some(&object), &facts(), own(), &first()), Step::Nothing);
        object.0["metadata"]["labels"]["zone/a"] = "old".into();
        let expected = json!({
            "metadata": {"labels": {"zone/a": "b"}, "annotations": {"basal.io/agent-store": "etcd"}},
            "spec": {"bootid": "b2"},
        });
        assert_eq!(plan(Some(&object), &facts(), own(), &run("b2", LedgerStore::Etcd)), Step::Patch(expected));
    }

    #[test]
    fn a_new_node_of_the_same_name_becomes_the_owner() {
        let mut object = created(own());
        let other = json!({"apiVersion": "v1", "kind": "Machine", "name": "m", "uid": "um"});
        object.0["metadata"]["ownerReferences"] =
            json!([other, {"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "u0"}]);
        let Step::Patch(patch) = plan(Some(&object), &facts(), own(), &first()) else { panic!("nothing is patched") };
        let ours = json!({"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "u1"});
        assert_eq!(patch, json!({"metadata": {"ownerReferences": [other, ours]}}));
    }
}
