//! Objects as the API server sends them: untyped, so that fields we do not know survive.

use std::{collections::BTreeMap, fmt};

use serde_json::Value;

/// A kind of object, with what a request to the API server needs to name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Resource {
    /// The API group; empty for the core group.
    pub group: &'static str,
    /// The version, `v1` for example.
    pub version: &'static str,
    /// The kind, in CamelCase.
    pub kind: &'static str,
    /// The plural, as it stands in a path.
    pub plural: &'static str,
    /// Whether its objects live in namespaces.
    pub namespaced: bool,
}

impl Resource {
    /// `group/version`, or `version` for the core group: the `apiVersion` of an object.
    #[must_use]
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.to_owned() } else { format!("{}/{}", self.group, self.version) }
    }
}

/// The kinds that Basal reads or writes.
pub mod resources {
    use super::Resource;

    const fn core(kind: &'static str, plural: &'static str, namespaced: bool) -> Resource {
        Resource { group: "", version: "v1", kind, plural, namespaced }
    }

    const fn cilium(kind: &'static str, plural: &'static str, version: &'static str, namespaced: bool) -> Resource {
        Resource { group: "cilium.io", version, kind, plural, namespaced }
    }

    /// Node.
    pub const NODE: Resource = core("Node", "nodes", false);
    /// Pod.
    pub const POD: Resource = core("Pod", "pods", true);
    /// Namespace.
    pub const NAMESPACE: Resource = core("Namespace", "namespaces", false);
    /// Event, of `events.k8s.io`.
    pub const EVENT: Resource =
        Resource { group: "events.k8s.io", version: "v1", kind: "Event", plural: "events", namespaced: true };
    /// Lease.
    pub const LEASE: Resource =
        Resource { group: "coordination.k8s.io", version: "v1", kind: "Lease", plural: "leases", namespaced: true };
    /// CustomResourceDefinition.
    pub const CRD: Resource = Resource {
        group: "apiextensions.k8s.io",
        version: "v1",
        kind: "CustomResourceDefinition",
        plural: "customresourcedefinitions",
        namespaced: false,
    };
    /// NetworkPolicy.
    pub const NETWORK_POLICY: Resource = Resource {
        group: "networking.k8s.io",
        version: "v1",
        kind: "NetworkPolicy",
        plural: "networkpolicies",
        namespaced: true,
    };
    /// CiliumNode.
    pub const CILIUM_NODE: Resource = cilium("CiliumNode", "ciliumnodes", "v2", false);
    /// CiliumIdentity.
    pub const CILIUM_IDENTITY: Resource = cilium("CiliumIdentity", "ciliumidentities", "v2", false);
    /// CiliumEndpoint.
    pub const CILIUM_ENDPOINT: Resource = cilium("CiliumEndpoint", "ciliumendpoints", "v2", true);
    /// CiliumPodIPPool.
    pub const CILIUM_POD_IP_POOL: Resource = cilium("CiliumPodIPPool", "ciliumpodippools", "v2alpha1", false);

    const fn basal(kind: &'static str, plural: &'static str) -> Resource {
        Resource { group: "basal.io", version: "v1alpha1", kind, plural, namespaced: false }
    }

    /// Ledger.
    pub const LEDGER: Resource = basal("Ledger", "ledgers");
    /// PodCIDRCell.
    pub const POD_CIDR_CELL: Resource = basal("PodCIDRCell", "podcidrcells");
}

/// Which object of a [`Resource`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// The namespace; `None` for objects without one.
    pub namespace: Option<String>,
    /// The name.
    pub name: String,
}

impl ObjectKey {
    /// An object without a namespace.
    pub fn cluster(name: impl Into<String>) -> Self {
        Self { namespace: None, name: name.into() }
    }

    /// An object in a namespace.
    pub fn namespaced(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: Some(namespace.into()), name: name.into() }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{namespace}/{}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

/// An object, as JSON. Accessors answer empty texts for what is missing: the API server fills these fields.
#[derive(Debug, Clone, PartialEq)]
pub struct Object(pub Value);

impl Object {
    fn meta(&self, field: &str) -> &str {
        self.0.pointer("/metadata").and_then(|m| m.get(field)).and_then(Value::as_str).unwrap_or_default()
    }

    fn meta_map(&self, field: &str) -> BTreeMap<&str, &str> {
        let map = self.0.pointer("/metadata").and_then(|m| m.get(field)).and_then(Value::as_object);
        map.into_iter().flatten().filter_map(|(k, v)| Some((k.as_str(), v.as_str()?))).collect()
    }

    /// Namespace and name.
    #[must_use]
    pub fn key(&self) -> ObjectKey {
        let namespace = Some(self.meta("namespace")).filter(|n| !n.is_empty()).map(str::to_owned);
        ObjectKey { namespace, name: self.name().to_owned() }
    }

    /// `kind`.
    #[must_use]
    pub fn kind(&self) -> &str {
        self.0.get("kind").and_then(Value::as_str).unwrap_or_default()
    }

    /// `metadata.name`.
    #[must_use]
    pub fn name(&self) -> &str {
        self.meta("name")
    }

    /// `metadata.uid`.
    #[must_use]
    pub fn uid(&self) -> &str {
        self.meta("uid")
    }

    /// `metadata.resourceVersion`.
    #[must_use]
    pub fn resource_version(&self) -> &str {
        self.meta("resourceVersion")
    }

    /// `metadata.generation`, 0 when missing.
    #[must_use]
    pub fn generation(&self) -> i64 {
        self.0.pointer("/metadata/generation").and_then(Value::as_i64).unwrap_or_default()
    }

    /// `metadata.labels`.
    #[must_use]
    pub fn labels(&self) -> BTreeMap<&str, &str> {
        self.meta_map("labels")
    }

    /// `metadata.annotations`.
    #[must_use]
    pub fn annotations(&self) -> BTreeMap<&str, &str> {
        self.meta_map("annotations")
    }

    /// Whether `metadata.deletionTimestamp` is set.
    #[must_use]
    pub fn is_deleting(&self) -> bool {
        !self.meta("deletionTimestamp").is_empty()
    }

    /// Reads the object as a typed one.
    ///
    /// # Errors
    /// The first field that does not parse.
    pub fn parse<T: serde::de::DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        T::deserialize(&self.0)
    }
}
