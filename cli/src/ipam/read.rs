//! From keys and objects to what a check works on. What does not parse stays, as unreadable.

use basal_crds::{
    kvstore::{IpRecord, NodeRecord, keys},
    resources::{CiliumEndpoint, CiliumNode},
};
use basal_ipam::{
    cell::{Cell, CellError, Version},
    check::{CiliumNodeFact, IpFact, NodeFact, Read, RecordFact},
    ledger::StoredCell,
    names::{NodeName, NodeUid},
    prefix::PodCidr,
};
use basal_kvstore::kv::KeyValue;
use basal_objects::object::Object;
use std::net::IpAddr;

/// A Node.
pub(super) fn node(object: &Object) -> Read<NodeFact> {
    NodeName::new(object.name()).map_err(|error| format!("metadata.name: {error}"))?;
    NodeUid::new(object.uid()).map_err(|error| format!("metadata.uid: {error}"))?;
    Ok(NodeFact { uid: object.uid().to_owned(), deleting: object.is_deleting() })
}

/// A CiliumNode.
pub(super) fn cilium_node(object: &Object) -> Read<CiliumNodeFact> {
    let node: CiliumNode = object.parse().map_err(|error| error.to_string())?;
    let confirmed = node.confirmed_pod_cidrs().filter_map(|(_, text)| text.parse().ok()).collect();
    Ok(CiliumNodeFact { pod_cidrs: node.spec.ipam.pod_cidrs, confirmed, error: node.status.ipam.operator_status.error })
}

/// The addresses of a CiliumEndpoint.
pub(super) fn endpoint(object: &Object) -> Read<Vec<IpAddr>> {
    let endpoint: CiliumEndpoint = object.parse().map_err(|error| error.to_string())?;
    endpoint.addresses().into_iter().collect::<Result<_, _>>().map_err(|error| error.to_string())
}

/// A cell. One that has lost its object is not known to be empty.
pub(super) fn cell(stored: &StoredCell) -> Result<Cell, CellError> {
    if stored.version == Version::ABSENT {
        return Err(CellError::Unreadable("the Ledger lists it, and its PodCIDRCell is gone".to_owned()));
    }
    stored.cell.clone()
}

/// A node record.
pub(super) fn record(kv: &KeyValue) -> Read<RecordFact> {
    let (cluster, name) = keys::parse_node(&kv.key).map_err(|error| error.to_string())?;
    let record = NodeRecord::parse_for(&cluster, &name, &kv.value).map_err(|error| error.to_string())?;
    let blocks = record.cidrs().map(|cidr| PodCidr::containing(cidr.addr(), cidr.prefix_len())).collect();
    Ok(RecordFact { blocks, addresses: record.addresses.iter().map(|address| address.ip).collect() })
}

/// An ip→identity record.
pub(super) fn ip(kv: &KeyValue) -> Read<IpFact> {
    let target = keys::parse_ip_target(&kv.key).map_err(|error| error.to_string())?;
    let record = IpRecord::parse_for(target, &kv.value).map_err(|error| error.to_string())?;
    let network = target.network();
    Ok(IpFact { target: PodCidr::containing(network.addr(), network.prefix_len()), host: record.host_ip })
}
