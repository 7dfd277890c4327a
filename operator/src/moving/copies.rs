//! What makes one place say what the other one says, as data: records of nodes and addresses in etcd by the custom resources,
//! and identities in either place by the other.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use basal_crds::{
    identity::{IdentityId, IdentityRange},
    kvstore::{IpRecord, keys, parse_identity_labels, parse_identity_value},
    labels::Labels,
    names::Cluster,
    resources::{AGENT_STORE_ANNOTATION, CiliumEndpoint, CiliumNode, HEARTBEAT_ANNOTATION, LedgerStore},
};
use basal_ipam::names::NodeName;
use basal_kvstore::{
    copies::CopyWrite,
    kv::{KeyValue, Revision},
};
use basal_objects::{directory::identity_labels, object::Object};
use serde_json::Value;

use crate::ledger_state::Agents;

/// Node records by the CiliumNodes that confirm blocks. An empty list deletes nothing.
pub(super) fn nodes(cluster: &Cluster, cilium_nodes: &[Object], found: &[KeyValue]) -> Vec<CopyWrite> {
    let (mut wanted, mut kept) = (BTreeMap::new(), BTreeSet::new());
    for object in cilium_nodes {
        let Ok(name) = NodeName::new(object.name()) else { continue };
        let key = keys::node(cluster.name(), &name);
        match object.parse::<CiliumNode>().map(|node| node.confirmed_record(cluster)) {
            Ok(Ok(Some(record))) => drop(wanted.insert(key, record.to_json().into_bytes())),
            Ok(Ok(None)) => {}
            // What it said before stands.
            Ok(Err(_)) | Err(_) => drop(kept.insert(key)),
        }
    }
    let mut writes = Vec::new();
    for kv in found {
        match wanted.remove(&kv.key) {
            Some(value) if value == kv.value => {}
            Some(value) => writes.push(CopyWrite::Put { key: kv.key.clone(), value, seen: kv.mod_revision }),
            None if cilium_nodes.is_empty() || kept.contains(&kv.key) => {}
            None => writes.push(CopyWrite::Delete { key: kv.key.clone(), seen: kv.mod_revision }),
        }
    }
    writes.extend(wanted.into_iter().map(|(key, value)| CopyWrite::Put { key, value, seen: 0 }));
    writes
}

/// How many agents work with a store, of those that there are: what they say in the CiliumNodes of Nodes.
pub(super) fn agents(cilium_nodes: &[Object], store: LedgerStore) -> Agents {
    let has_node = |object: &&Object| {
        let owners = object.0.pointer("/metadata/ownerReferences").and_then(Value::as_array);
        owners.into_iter().flatten().any(|owner| owner["kind"] == "Node")
    };
    let changed = |object: &&Object| works_with(object, store);
    let of_nodes: Vec<&Object> = cilium_nodes.iter().filter(has_node).collect();
    Agents { changed: of_nodes.iter().copied().filter(changed).count(), all: of_nodes.len() }
}

/// Whether a node's agent says that it works with a store.
fn works_with(cilium_node: &Object, store: LedgerStore) -> bool {
    cilium_node.annotations().get(AGENT_STORE_ANNOTATION) == Some(&store.as_str())
}

/// The addresses of nodes whose agents work without etcd.
pub(super) fn without_etcd(cilium_nodes: &[Object]) -> BTreeSet<IpAddr> {
    let without = cilium_nodes.iter().filter(|object| works_with(object, LedgerStore::CustomResources));
    let nodes = without.filter_map(|object| object.parse::<CiliumNode>().ok());
    nodes.filter_map(|node| node.addresses().ok()).flatten().map(|address| address.ip).collect()
}

/// ip→identity records by the CiliumEndpoints. What an agent published itself, under its lease, is left alone while it works
/// with etcd; of one on the nodes in `without_etcd` it is what is left of earlier, until the lease ends. An empty list
/// deletes nothing, nor does one with an endpoint that cannot be read.
pub(super) fn addresses(endpoints: &[Object], without_etcd: &BTreeSet<IpAddr>, found: &[KeyValue]) -> Vec<CopyWrite> {
    let is_published = |kv: &KeyValue| {
        let host = || IpRecord::parse(&kv.value).ok().and_then(|record| record.host_ip);
        kv.lease != 0 && !host().is_some_and(|host| without_etcd.contains(&host))
    };
    let mut wanted: BTreeMap<String, (u64, Vec<u8>)> = BTreeMap::new();
    let mut complete = !endpoints.is_empty();
    for object in endpoints {
        let records = object.parse::<CiliumEndpoint>().ok().and_then(|endpoint| endpoint.ip_records().ok());
        complete &= records.is_some();
        let version = object.resource_version().parse().unwrap_or_default();
        for record in records.into_iter().flatten() {
            let entry = wanted.entry(keys::ip(record.target)).or_default();
            // An address that changes hands has two for a moment; the one that was written last counts.
            if entry.1.is_empty() || entry.0 < version {
                *entry = (version, record.to_json().into_bytes());
            }
        }
    }
    let mut writes = Vec::new();
    for kv in found {
        let value = wanted.remove(&kv.key).map(|(_, value)| value);
        match value {
            _ if is_published(kv) => {}
            Some(value) if value == kv.value && kv.lease == 0 => {}
            Some(value) => writes.push(CopyWrite::Put { key: kv.key.clone(), value, seen: kv.mod_revision }),
            None if complete => writes.push(CopyWrite::Delete { key: kv.key.clone(), seen: kv.mod_revision }),
            None => {}
        }
    }
    writes.extend(wanted.into_iter().map(|(key, (_, value))| CopyWrite::Put { key, value, seen: 0 }));
    writes
}

/// One write of an identity.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum IdentityWrite {
    /// In etcd.
    Key(CopyWrite),
    /// A new CiliumIdentity.
    Create(IdentityId, Labels),
    /// A CiliumIdentity loses the mark that announces its deletion: one that is on its way is refused then.
    Unmark { id: IdentityId, uid: String, resource_version: String },
    /// A CiliumIdentity goes, as it was seen.
    Delete { id: IdentityId, uid: String, resource_version: String },
}

/// A CiliumIdentity.
#[derive(Debug)]
struct SeenIdentity {
    labels: Labels,
    uid: String,
    resource_version: String,
    /// Whether its deletion is announced.
    marked: bool,
}

/// The identities of a cluster in both places.
#[derive(Debug, Default)]
pub(super) struct Identities {
    objects: BTreeMap<IdentityId, SeenIdentity>,
    keys: BTreeMap<IdentityId, (Labels, Revision)>,
    /// What agents refer to in each place.
    used_objects: BTreeSet<IdentityId>,
    used_keys: BTreeSet<IdentityId>,
}

impl Identities {
    /// What was listed: CiliumIdentities and CiliumEndpoints, keys of identities and of references to them. What cannot be
    /// read is nobody's business here.
    pub(super) fn of(
        range: &IdentityRange,
        objects: &[Object],
        endpoints: &[Object],
        ids: &[KeyValue],
        references: &[KeyValue],
    ) -> Self {
        let mut found = Self::default();
        for object in objects {
            let (Ok(id), Ok(labels)) = (object.name().parse(), identity_labels(object)) else { continue };
            if range.contains(id) {
                let (uid, resource_version) = (object.uid().to_owned(), object.resource_version().to_owned());
                let marked = object.annotations().contains_key(HEARTBEAT_ANNOTATION);
                found.objects.insert(id, SeenIdentity { labels, uid, resource_version, marked });
            }
        }
        for kv in ids {
            let (Ok(id), Ok(labels)) = (keys::parse_identity(&kv.key), parse_identity_labels(&kv.value)) else {
                continue;
            };
            if range.contains(id) {
                found.keys.insert(id, (labels, kv.mod_revision));
            }
        }
        let endpoints = endpoints.iter().filter_map(|object| object.parse::<CiliumEndpoint>().ok());
        let named = endpoints.filter_map(|endpoint| u32::try_from(endpoint.status.identity?.id).ok());
        found.used_objects = named.map(IdentityId::new).collect();
        found.used_keys = references.iter().filter_map(|kv| parse_identity_value(&kv.value).ok()).collect();
        found
    }

    /// What makes a store that nobody works with yet hold the identities of the other one, and none that is left of an
    /// earlier time: a number of then would be taken for its labels.
    pub(super) fn fill(&self, to: LedgerStore) -> Vec<IdentityWrite> {
        match to {
            LedgerStore::Etcd => self.fill_keys(),
            LedgerStore::CustomResources => self.fill_objects(),
        }
    }

    fn fill_keys(&self) -> Vec<IdentityWrite> {
        let mut writes = Vec::new();
        for (id, SeenIdentity { labels, uid, resource_version, marked }) in &self.objects {
            if *marked {
                let (uid, resource_version) = (uid.clone(), resource_version.clone());
                writes.push(IdentityWrite::Unmark { id: *id, uid, resource_version });
            }
            match self.keys.get(id) {
                Some((found, _)) if found == labels => {}
                Some(_) if self.used_keys.contains(id) => {}
                Some((_, revision)) => writes.push(put(*id, labels, *revision)),
                None => writes.push(put(*id, labels, 0)),
            }
        }
        let left = self.keys.iter().filter(|(id, _)| !self.objects.contains_key(id) && !self.used_keys.contains(id));
        writes.extend(left.map(|(id, (_, revision))| {
            IdentityWrite::Key(CopyWrite::Delete { key: keys::identity(*id), seen: *revision })
        }));
        writes
    }

    fn fill_objects(&self) -> Vec<IdentityWrite> {
        let mut writes = Vec::new();
        for (id, SeenIdentity { labels, uid, resource_version, .. }) in &self.objects {
            let other = match self.keys.get(id) {
                Some((wanted, _)) => wanted != labels,
                None => !self.used_objects.contains(id),
            };
            if other {
                let (uid, resource_version) = (uid.clone(), resource_version.clone());
                writes.push(IdentityWrite::Delete { id: *id, uid, resource_version });
            }
        }
        let missing = self.keys.iter().filter(|(id, _)| !self.objects.contains_key(id));
        writes.extend(missing.map(|(id, (labels, _))| IdentityWrite::Create(*id, labels.clone())));
        writes
    }

    /// What is missing in either place.
    pub(super) fn exchange(&self) -> Vec<IdentityWrite> {
        let objects = self.objects.iter().filter(|(id, _)| !self.keys.contains_key(id));
        let keys = self.keys.iter().filter(|(id, _)| !self.objects.contains_key(id));
        objects
            .map(|(id, seen)| put(*id, &seen.labels, 0))
            .chain(keys.map(|(id, (labels, _))| IdentityWrite::Create(*id, labels.clone())))
            .collect()
    }

    /// Numbers that stand for other labels here than there. No agent of Basal makes one, so somebody else did.
    pub(super) fn clashes(&self) -> Vec<IdentityId> {
        let other = |(id, seen): (&IdentityId, &SeenIdentity)| {
            self.keys.get(id).filter(|(found, _)| *found != seen.labels).map(|_| *id)
        };
        self.objects.iter().filter_map(other).collect()
    }
}

fn put(id: IdentityId, labels: &Labels, seen: Revision) -> IdentityWrite {
    IdentityWrite::Key(CopyWrite::Put { key: keys::identity(id), value: labels.canonical().into_bytes(), seen })
}

#[cfg(test)]
mod tests {
    use basal_crds::names::{ClusterId, ClusterName};
    use serde_json::json;

    use super::*;

    fn cluster() -> Cluster {
        Cluster::new(ClusterName::new("default").unwrap(), ClusterId::new(0)).unwrap()
    }

    fn kv(key: &str, value: &[u8], mod_revision: Revision, lease: i64) -> KeyValue {
        KeyValue { key: key.to_owned(), value: value.to_vec(), create_revision: 1, mod_revision, version: 1, lease }
    }

    fn node(name: &str, confirmed: bool, ip: &str) -> Object {
        let status = if confirmed { json!({ "10.0.1.0/24": { "status": "in-use" } }) } else { json!({}) };
        Object(json!({
            "metadata": { "name": name, "uid": "u", "resourceVersion": "1" },
            "spec": { "addresses": [{ "type": "InternalIP", "ip": ip }], "ipam": { "podCIDRs": ["10.0.1.0/24"] } },
            "status": { "ipam": { "pod-cidrs": status } },
        }))
    }

    fn endpoint(name: &str, version: u32, ip: &str, identity: u32) -> Object {
        Object(json!({
            "metadata": { "namespace": "ns", "name": name, "uid": "u", "resourceVersion": version.to_string() },
            "status": { "identity": { "id": identity }, "networking": {
                "addressing": [{ "ipv4": ip }], "node": "172.18.0.2" } },
        }))
    }

    /// What is done with each key, by the last part of it.
    fn told(writes: &[CopyWrite]) -> Vec<(String, Revision, bool)> {
        let tell = |write: &CopyWrite| {
            let (key, seen, puts) = match write {
                CopyWrite::Put { key, seen, .. } => (key, *seen, true),
                CopyWrite::Delete { key, seen } => (key, *seen, false),
            };
            (key.rsplit('/').next().unwrap_or_default().to_owned(), seen, puts)
        };
        writes.iter().map(tell).collect()
    }

    fn value(write: &CopyWrite) -> Vec<u8> {
        match write {
            CopyWrite::Put { value, .. } => value.clone(),
            CopyWrite::Delete { .. } => Vec::new(),
        }
    }

    #[test]
    fn node_records_follow_confirmed_blocks() {
        let key = |name: &str| format!("cilium/state/nodes/v1/default/{name}");
        let objects = [node("new", true, "172.18.0.2"), node("waits", false, "172.18.0.3"), node("bad", true, "x")];
        let found = [kv(&key("gone"), b"{}", 7, 0), kv(&key("bad"), b"{}", 8, 0)];
        let writes = nodes(&cluster(), &objects, &found);
        assert_eq!(told(&writes), [("gone".to_owned(), 7, false), ("new".to_owned(), 0, true)]);
        let alike = [kv(&key("new"), &value(&writes[1]), 9, 0)];
        assert_eq!(nodes(&cluster(), &objects[..1], &alike), []);
        let moved = nodes(&cluster(), &[node("new", true, "172.18.0.9")], &alike);
        assert_eq!(told(&moved), [("new".to_owned(), 9, true)]);
        assert_eq!(nodes(&cluster(), &[], &alike), [], "an emptied list deletes nothing");
    }

    #[test]
    fn addresses_are_copied_until_an_agent_publishes_them() {
        let key = |ip: &str| format!("cilium/state/ip/v1/default/{ip}");
        let objects = [endpoint("old", 3, "10.0.1.5", 300), endpoint("new", 12, "10.0.1.5", 301)];
        let found = [kv(&key("10.0.1.6"), b"{}", 7, 0), kv(&key("10.0.1.7"), b"{}", 8, 99)];
        let none = BTreeSet::new();
        let writes = addresses(&objects, &none, &found);
        assert_eq!(told(&writes), [("10.0.1.6".to_owned(), 7, false), ("10.0.1.5".to_owned(), 0, true)]);
        let text = String::from_utf8(value(&writes[1])).unwrap();
        assert!(text.contains(r#""ID":301"#), "the endpoint that was written last counts: {text}");
        let published = [kv(&key("10.0.1.5"), b"{}", 9, 99)];
        assert_eq!(addresses(&objects, &none, &published), [], "what an agent published is its own");
        assert_eq!(addresses(&[], &none, &found), [], "an emptied list deletes nothing");
        // The agent does without etcd now, and its lease has not ended yet.
        let left = [kv(&key("10.0.1.5"), &value(&writes[1]), 9, 99), kv(&key("10.0.1.8"), &value(&writes[1]), 10, 99)];
        assert_eq!(addresses(&objects, &none, &left), []);
        let without = BTreeSet::from(["172.18.0.2".parse().unwrap()]);
        let wanted = [("10.0.1.5".to_owned(), 9, true), ("10.0.1.8".to_owned(), 10, false)];
        assert_eq!(told(&addresses(&objects, &without, &left)), wanted);
        let torn = [endpoint("torn", 1, "no address", 300)];
        assert_eq!(addresses(&torn, &none, &found), [], "nor does one that cannot be read");
    }

    #[test]
    fn agents_are_counted_by_what_they_say() {
        let node = |name: &str, ip: &str, store: Option<&str>, owner: Option<&str>| {
            let mut object = node(name, true, ip);
            if let Some(store) = store {
                object.0["metadata"]["annotations"] = json!({ "basal.io/agent-store": store });
            }
            if let Some(kind) = owner {
                object.0["metadata"]["ownerReferences"] =
                    json!([{ "apiVersion": "v1", "kind": kind, "name": name, "uid": "u" }]);
            }
            object
        };
        let nodes = [
            node("a", "172.18.0.1", Some("etcd"), Some("Node")),
            node("b", "172.18.0.2", Some("custom-resources"), Some("Node")),
            node("older-version", "172.18.0.3", None, Some("Node")),
            node("kept-without-node", "172.18.0.4", Some("etcd"), None),
        ];
        assert_eq!(agents(&nodes, LedgerStore::Etcd), Agents { changed: 1, all: 3 });
        assert_eq!(agents(&nodes, LedgerStore::CustomResources), Agents { changed: 1, all: 3 });
        assert_eq!(without_etcd(&nodes), BTreeSet::from(["172.18.0.2".parse().unwrap()]));
    }

    struct Place {
        objects: Vec<Object>,
        endpoints: Vec<Object>,
        ids: Vec<KeyValue>,
        references: Vec<KeyValue>,
    }

    impl Place {
        fn new(objects: &[(u32, &str)], ids: &[(u32, &str)]) -> Self {
            let object = |(id, app): &(u32, &str)| {
                let labels: Value = json!({ "k8s:app": app });
                Object(json!({ "metadata": { "name": id.to_string(), "uid": "u", "resourceVersion": "5" },
                    "security-labels": labels }))
            };
            let key = |(id, app): &(u32, &str)| {
                kv(&format!("cilium/state/identities/v1/id/{id}"), format!("k8s:app={app};").as_bytes(), 6, 0)
            };
            Self {
                objects: objects.iter().map(object).collect(),
                ids: ids.iter().map(key).collect(),
                endpoints: Vec::new(),
                references: Vec::new(),
            }
        }

        fn identities(&self) -> Identities {
            let range = IdentityRange::of(ClusterId::new(0));
            Identities::of(&range, &self.objects, &self.endpoints, &self.ids, &self.references)
        }
    }

    /// Numbers: put into etcd, deleted there, created as objects, deleted there.
    fn numbers(writes: &[IdentityWrite]) -> [Vec<u32>; 4] {
        let mut numbers = [const { Vec::new() }; 4];
        let last = |key: &str| key.rsplit('/').next().and_then(|text| text.parse().ok()).unwrap_or_default();
        for write in writes {
            match write {
                IdentityWrite::Key(CopyWrite::Put { key, .. }) => numbers[0].push(last(key)),
                IdentityWrite::Key(CopyWrite::Delete { key, .. }) => numbers[1].push(last(key)),
                IdentityWrite::Create(id, _) => numbers[2].push(id.get()),
                IdentityWrite::Delete { id, .. } => numbers[3].push(id.get()),
                IdentityWrite::Unmark { .. } => {}
            }
        }
        numbers
    }

    #[test]
    fn a_store_that_is_filled_keeps_nothing_of_an_earlier_time() {
        let mut place = Place::new(
            &[(300, "same"), (301, "new"), (302, "mine"), (304, "left"), (70_000, "other-cluster")],
            &[(300, "same"), (302, "other"), (303, "left")],
        );
        assert_eq!(
            numbers(&place.identities().fill(LedgerStore::Etcd)),
            [vec![301, 302, 304], vec![303], vec![], vec![]]
        );
        let objects = numbers(&place.identities().fill(LedgerStore::CustomResources));
        assert_eq!(objects, [vec![], vec![], vec![303], vec![301, 302, 304]]);
        place.objects[0].0["metadata"]["annotations"] = json!({ "io.cilium.heartbeat": "2026-01-01T00:00:00Z" });
        let unmarked = |writes: Vec<IdentityWrite>| {
            writes
                .into_iter()
                .filter(|write| matches!(write, IdentityWrite::Unmark { id, .. } if id.get() == 300))
                .count()
        };
        assert_eq!(unmarked(place.identities().fill(LedgerStore::Etcd)), 1, "nobody deletes it any more");
        // Agents that were changed already use some.
        place.references = vec![kv("cilium/state/identities/v1/value/k8s:app=left;/172.18.0.2", b"303", 9, 99)];
        place.endpoints = vec![endpoint("p", 1, "10.0.1.5", 304)];
        assert_eq!(numbers(&place.identities().fill(LedgerStore::Etcd))[1], [] as [u32; 0]);
        assert_eq!(numbers(&place.identities().fill(LedgerStore::CustomResources))[3], [301, 302]);
    }

    #[test]
    fn each_place_gets_what_it_lacks() {
        let place =
            Place::new(&[(300, "same"), (301, "a"), (302, "mine")], &[(300, "same"), (302, "other"), (303, "b")]);
        let identities = place.identities();
        assert_eq!(numbers(&identities.exchange()), [vec![301], vec![], vec![303], vec![]]);
        assert_eq!(identities.clashes(), [IdentityId::new(302)]);
    }
}
