//! What the agent reads of pods and namespaces.

use std::collections::BTreeMap;

use basal_cni::api::PodRef;
use basal_crds::kvstore::NamedPort;
use basal_objects::object::{Object, ObjectKey};
use k8s_openapi::api::core::v1::Pod;

use crate::endpoint::manager::PodDetails;

/// kubelet runs a static pod under this value as its uid; the API server gives its mirror another.
const STATIC_POD_HASH: &str = "kubernetes.io/config.hash";

/// What of a pod matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodInfo {
    /// `metadata.uid`.
    pub uid: String,
    /// The uid that kubelet uses for a static pod.
    pub static_uid: Option<String>,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// For the records of its endpoints.
    pub details: PodDetails,
}

impl PodInfo {
    /// Reads a Pod; for a cache.
    ///
    /// # Errors
    /// The field that does not parse.
    pub fn parse(object: &Object) -> Result<Self, String> {
        let pod: Pod = object.parse().map_err(|error| error.to_string())?;
        let spec = pod.spec.unwrap_or_default();
        let ports = spec.containers.into_iter().flat_map(|container| container.ports.unwrap_or_default());
        let mut named_ports: Vec<NamedPort> = ports
            .filter_map(|port| {
                let number = u16::try_from(port.container_port).ok()?;
                let protocol = port.protocol.unwrap_or_else(|| "TCP".to_owned());
                Some(NamedPort { name: port.name?, port: number, protocol })
            })
            .collect();
        named_ports.sort();
        named_ports.dedup();
        let static_uid = pod.metadata.annotations.as_ref().and_then(|annotations| annotations.get(STATIC_POD_HASH));
        Ok(Self {
            uid: pod.metadata.uid.unwrap_or_default(),
            static_uid: static_uid.cloned(),
            labels: pod.metadata.labels.unwrap_or_default(),
            details: PodDetails { service_account: spec.service_account_name.unwrap_or_default(), named_ports },
        })
    }

    /// Whether this is the pod that a caller means, and not another one of the same name.
    #[must_use]
    pub fn is(&self, pod: &PodRef) -> bool {
        pod.uid.as_ref().is_none_or(|uid| *uid == self.uid || self.static_uid.as_ref() == Some(uid))
    }
}

/// The key of a pod in a cache.
#[must_use]
pub fn pod_key(pod: &PodRef) -> ObjectKey {
    ObjectKey::namespaced(pod.namespace.clone(), pod.name.clone())
}

/// The labels of a namespace; for a cache.
///
/// # Errors
/// Never: a namespace without labels has none.
pub fn namespace_labels(object: &Object) -> Result<BTreeMap<String, String>, String> {
    Ok(object.labels().into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod() -> Object {
        Object(json!({
            "metadata": {"name": "p", "namespace": "ns", "uid": "u1", "labels": {"app": "web"},
                "annotations": {"kubernetes.io/config.hash": "h1"}},
            "spec": {"serviceAccountName": "sa", "containers": [
                {"name": "a", "ports": [{"containerPort": 80, "name": "http"}, {"containerPort": 81}]},
                {"name": "b", "ports": [{"containerPort": 53, "name": "dns", "protocol": "UDP"}]},
            ]},
        }))
    }

    #[test]
    fn named_ports_of_all_containers_are_read() {
        let info = PodInfo::parse(&pod()).unwrap();
        let names: Vec<_> =
            info.details.named_ports.iter().map(|p| (p.name.as_str(), p.port, p.protocol.as_str())).collect();
        assert_eq!(names, [("dns", 53, "UDP"), ("http", 80, "TCP")]);
        assert_eq!((info.details.service_account.as_str(), info.labels["app"].as_str()), ("sa", "web"));
    }

    #[test]
    fn another_pod_of_the_same_name_is_not_meant() {
        let info = PodInfo::parse(&pod()).unwrap();
        let with = |uid: Option<&str>| PodRef { namespace: "ns".into(), name: "p".into(), uid: uid.map(str::to_owned) };
        assert!(info.is(&with(None)) && info.is(&with(Some("u1"))) && info.is(&with(Some("h1"))));
        assert!(!info.is(&with(Some("u0"))));
    }
}
