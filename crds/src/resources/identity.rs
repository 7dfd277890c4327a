//! CiliumIdentity: the labels of an identity. Its name is the identity in decimal digits.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::definition::{CILIUM, Column, Kind, Names};

/// The annotation by which the operator announces that it will delete an identity; its value is a time stamp.
pub const HEARTBEAT_ANNOTATION: &str = "io.cilium.heartbeat";

/// The labels that a numeric security identity stands for. The name of the object is the identity.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CiliumIdentity {
    /// Standard metadata.
    #[schemars(skip)]
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// The labels: source and key, with a colon between them, to value.
    #[serde(rename = "security-labels")]
    pub security_labels: BTreeMap<String, String>,
}

impl Kind for CiliumIdentity {
    const NAMES: Names = Names {
        group: CILIUM,
        kind: "CiliumIdentity",
        plural: "ciliumidentities",
        singular: "ciliumidentity",
        short: &["ciliumid"],
        version: "v2",
        namespaced: false,
        status_subresource: true,
        metadata_required: true,
        columns: &[Column::new("Namespace", "string", r".metadata.labels.io\.kubernetes\.pod\.namespace"), Column::AGE],
    };
}
