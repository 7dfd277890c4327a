//! Which addresses are in use, by the CiliumEndpoints.

use std::{collections::BTreeSet, fmt, net::IpAddr};

use basal_crds::resources::CiliumEndpoint;
use basal_ipam::{names::NodeName, prefix::PodCidr};
use basal_objects::{
    object::{Object, ObjectKey, resources},
    port::{Freshness, Objects, ReadError, Scope, gather},
};
use serde_json::Value;

/// Unreadable endpoints that a message names; the rest is counted.
const NAMED: usize = 3;

/// What all CiliumEndpoints say, read at quorum.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct InUse {
    addresses: BTreeSet<IpAddr>,
    unreadable: Vec<UnreadableEndpoint>,
}

/// A CiliumEndpoint with an address that nobody can read. It may be any of its node's, so it counts as a use of every
/// block of that node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnreadableEndpoint {
    /// Namespace and name.
    pub key: ObjectKey,
    /// Its uid.
    pub uid: String,
    /// The field, and what is wrong with it.
    pub why: String,
    /// The node of its pod; `None` when there is no pod to tell. Then it may be anybody's.
    pub node: Option<NodeName>,
}

/// Several of them, for a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnreadableEndpoints(pub Vec<UnreadableEndpoint>);

impl fmt::Display for UnreadableEndpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, one) in self.0.iter().take(NAMED).enumerate() {
            let separator = if place == 0 { "" } else { "; " };
            write!(f, "{separator}{}: {}", one.key, one.why)?;
        }
        match self.0.len().saturating_sub(NAMED) {
            0 => Ok(()),
            more => write!(f, "; and {more} more"),
        }
    }
}

impl InUse {
    /// Reads all endpoints, and the pods of those that cannot be read.
    pub(crate) async fn read(objects: &dyn Objects) -> Result<Self, ReadError> {
        let (mut found, everywhere) = (Self::default(), Scope::default());
        let unreadable = gather(objects, resources::CILIUM_ENDPOINT, &everywhere, Freshness::Quorum, |object| {
            let (addresses, wrong) = addresses(object);
            found.addresses.extend(addresses);
            wrong.map(|why| (object.clone(), why))
        });
        for (object, why) in unreadable.await? {
            let (key, uid) = (object.key(), object.uid().to_owned());
            let pod = objects.get(resources::POD, &key).await?;
            let node = pod.and_then(|pod| node_of(owning_pod(&object), &pod));
            found.unreadable.push(UnreadableEndpoint { key, uid, why, node });
        }
        Ok(found)
    }

    /// Whether an endpoint says that it has an address in the block.
    pub(crate) fn has_address_in(&self, block: &PodCidr) -> bool {
        self.addresses.iter().any(|address| block.contains_address(*address))
    }

    /// All that cannot be read.
    pub(crate) fn unreadable(&self) -> &[UnreadableEndpoint] {
        &self.unreadable
    }
}

impl UnreadableEndpoint {
    /// Whether it is the node's, as far as anybody can tell.
    #[must_use]
    pub fn may_be_of(&self, node: &NodeName) -> bool {
        self.node.as_ref().is_none_or(|of| of == node)
    }
}

/// The uid of the Pod that owns an endpoint.
pub(crate) fn owning_pod(endpoint: &Object) -> Option<&str> {
    let owners = endpoint.0.pointer("/metadata/ownerReferences").and_then(Value::as_array);
    let owner = owners?.iter().find(|owner| owner["kind"] == "Pod" && owner["apiVersion"] == "v1");
    owner?["uid"].as_str()
}

/// Whether a pod's containers have all ended and will not start again.
pub(crate) fn has_ended(pod: &Object) -> bool {
    let phase = pod.0.pointer("/status/phase").and_then(Value::as_str);
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// The node of the pod of an endpoint's name; `None` when that is another pod than the one that owns the endpoint.
pub(crate) fn node_of(owner: Option<&str>, pod: &Object) -> Option<NodeName> {
    let own = owner.is_none_or(|uid| uid == pod.uid());
    let node = pod.0.pointer("/spec/nodeName").and_then(Value::as_str).filter(|_| own)?;
    NodeName::new(node).ok()
}

/// The addresses that can be read, and what is wrong with the first one that cannot.
pub(crate) fn addresses(object: &Object) -> (Vec<IpAddr>, Option<String>) {
    let endpoint = match object.parse::<CiliumEndpoint>() {
        Ok(endpoint) => endpoint,
        Err(error) => return (Vec::new(), Some(error.to_string())),
    };
    let (mut addresses, mut wrong) = (Vec::new(), None);
    for address in endpoint.addresses() {
        match address {
            Ok(address) => addresses.push(address),
            Err(error) => {
                wrong.get_or_insert(error.to_string());
            }
        }
    }
    (addresses, wrong)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn endpoint(addressing: Value) -> Object {
        Object(json!({ "metadata": { "name": "e" }, "status": { "networking": { "addressing": addressing } } }))
    }

    #[test]
    fn what_can_be_read_counts_beside_what_cannot() {
        let (read, wrong) = addresses(&endpoint(json!([{ "ipv4": "10.0.0.7", "ipv6": "fd00::zz" }, { "ipv4": "" }])));
        assert_eq!(read, ["10.0.0.7".parse::<IpAddr>().unwrap()]);
        assert_eq!(wrong.unwrap(), "status.networking.addressing[0].ipv6: \"fd00::zz\" is not an IP address");
        assert!(addresses(&endpoint(json!("10.0.0.7"))).1.is_some());
        let none = Object(json!({ "metadata": { "name": "e" }, "status": { "state": "creating" } }));
        assert_eq!(addresses(&none), (Vec::new(), None));
    }

    #[test]
    fn the_node_is_that_of_the_pod_that_owns_it() {
        let pod = Object(json!({ "metadata": { "name": "e", "uid": "u1" }, "spec": { "nodeName": "n1" } }));
        let mut endpoint = endpoint(json!([]));
        assert_eq!(node_of(owning_pod(&endpoint), &pod), NodeName::new("n1").ok());
        for (uid, node) in [("u1", NodeName::new("n1").ok()), ("u2", None)] {
            let owner = json!([{ "apiVersion": "v1", "kind": "Pod", "name": "e", "uid": uid }]);
            endpoint.0["metadata"]["ownerReferences"] = owner;
            assert_eq!(node_of(owning_pod(&endpoint), &pod), node);
        }
    }

    #[test]
    fn a_message_names_a_few_and_counts_the_rest() {
        let one = |n: usize| UnreadableEndpoint {
            key: ObjectKey::namespaced("ns", format!("p{n}")),
            uid: String::new(),
            why: "bad".to_owned(),
            node: None,
        };
        assert_eq!(UnreadableEndpoints(vec![one(0)]).to_string(), "ns/p0: bad");
        let five = UnreadableEndpoints((0..5).map(one).collect());
        assert_eq!(five.to_string(), "ns/p0: bad; ns/p1: bad; ns/p2: bad; and 2 more");
    }
}
