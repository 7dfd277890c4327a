//! CiliumPodIPPool: a pool of the multi-pool IPAM mode.

use std::{borrow::Cow, collections::BTreeMap};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use super::{
    definition::{CILIUM, Kind, Names},
    is_default, or_default,
};

/// A pool of addresses that nodes get blocks from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CiliumPodIpPool {
    /// Standard metadata.
    #[schemars(skip)]
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// The pool.
    pub spec: PodIpPoolSpec,
}

impl Kind for CiliumPodIpPool {
    const NAMES: Names = Names {
        group: CILIUM,
        kind: "CiliumPodIPPool",
        plural: "ciliumpodippools",
        singular: "ciliumpodippool",
        short: &["cpip"],
        version: "v2alpha1",
        namespaced: false,
        status_subresource: false,
        metadata_required: false,
        columns: &[],
    };
}

/// The CIDRs of a pool, and which pods use it.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodIpPoolSpec {
    /// Whether the first address of each block may be given to a pod. It may in any case in blocks of one or two
    /// addresses. Cannot be changed.
    #[serde(default, rename = "allowFirstIP", deserialize_with = "or_default")]
    #[schemars(extend("x-kubernetes-validations" = [{ "rule": "self == oldSelf", "message": "allowFirstIP is immutable" }]))]
    pub allow_first_ip: bool,
    /// Whether the last address of each block may be given to a pod. It may in any case in blocks of one or two
    /// addresses. Cannot be changed.
    #[serde(default, rename = "allowLastIP", deserialize_with = "or_default")]
    #[schemars(extend("x-kubernetes-validations" = [{ "rule": "self == oldSelf", "message": "allowLastIP is immutable" }]))]
    pub allow_last_ip: bool,
    /// The IPv4 part of the pool.
    #[serde(default, skip_serializing_if = "is_default")]
    pub ipv4: Option<Ipv4Pool>,
    /// The IPv6 part of the pool.
    #[serde(default, skip_serializing_if = "is_default")]
    pub ipv6: Option<Ipv6Pool>,
    /// The namespaces whose pods use this pool without asking for it by annotation. A pod must match this and
    /// podSelector, where both are set.
    #[serde(default, skip_serializing_if = "is_default")]
    pub namespace_selector: Option<LabelSelector>,
    /// The pods that use this pool without asking for it by annotation. The labels io.kubernetes.pod.namespace and
    /// io.kubernetes.pod.name can be used as well. A pod that matches several pools of one family gets no address.
    #[serde(default, skip_serializing_if = "is_default")]
    pub pod_selector: Option<LabelSelector>,
}

/// What both families of a pool have.
pub trait FamilyPool {
    /// The CIDRs, as text.
    fn cidrs(&self) -> &[String];
    /// The prefix length of the blocks.
    fn mask_size(&self) -> u8;
}

/// The IPv4 part of a pool.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Ipv4Pool {
    /// The IPv4 CIDRs of the pool.
    #[schemars(with = "Vec<Cidr>", length(min = 1))]
    pub cidrs: Vec<String>,
    /// The prefix length of the blocks that nodes get. Cannot be changed.
    #[schemars(range(min = 1, max = 32))]
    #[schemars(extend("x-kubernetes-validations" = [{ "rule": "self == oldSelf", "message": "maskSize is immutable" }]))]
    pub mask_size: u8,
}

/// The IPv6 part of a pool.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Ipv6Pool {
    /// The IPv6 CIDRs of the pool.
    #[schemars(with = "Vec<Cidr>", length(min = 1))]
    pub cidrs: Vec<String>,
    /// The prefix length of the blocks that nodes get. Cannot be changed.
    #[schemars(range(min = 1, max = 128))]
    #[schemars(extend("x-kubernetes-validations" = [{ "rule": "self == oldSelf", "message": "maskSize is immutable" }]))]
    pub mask_size: u8,
}

impl FamilyPool for Ipv4Pool {
    fn cidrs(&self) -> &[String] {
        &self.cidrs
    }

    fn mask_size(&self) -> u8 {
        self.mask_size
    }
}

impl FamilyPool for Ipv6Pool {
    fn cidrs(&self) -> &[String] {
        &self.cidrs
    }

    fn mask_size(&self) -> u8 {
        self.mask_size
    }
}

/// A label selector: all of matchLabels and matchExpressions must hold; an empty one selects everything.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-map-type" = "atomic"))]
pub struct LabelSelector {
    /// Conditions on labels.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    pub match_expressions: Vec<Requirement>,
    /// Labels with the values that they must have.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    #[schemars(with = "BTreeMap<String, LabelValue>")]
    pub match_labels: BTreeMap<String, String>,
}

/// A condition on a label.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Requirement {
    /// The key of the label.
    pub key: String,
    /// How the label is compared.
    pub operator: SelectorOperator,
    /// What it is compared with; for In and NotIn only.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    pub values: Vec<String>,
}

/// How a label is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SelectorOperator {
    /// The label has one of the values.
    In,
    /// The label has none of the values, or there is no such label.
    NotIn,
    /// There is such a label.
    Exists,
    /// There is no such label.
    DoesNotExist,
}

/// The schema of a CIDR.
pub(super) struct Cidr;

impl JsonSchema for Cidr {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Cidr".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "format": "cidr" })
    }
}

/// The schema of a label's value.
struct LabelValue;

impl JsonSchema for LabelValue {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "LabelValue".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "maxLength": 63,
            "pattern": "^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$",
        })
    }
}

#[cfg(test)]
mod tests {
    use kube::core::cel::Validator;
    use serde_json::{Value, json};

    use super::*;
    use crate::resources::Definition;

    fn pool(change: impl FnOnce(&mut Value)) -> Value {
        let mut pool = json!({
            "apiVersion": "cilium.io/v2alpha1",
            "kind": "CiliumPodIPPool",
            "metadata": { "name": "p" },
            "spec": {
                "allowFirstIP": false,
                "allowLastIP": false,
                "ipv4": { "cidrs": ["10.0.0.0/16"], "maskSize": 24 },
                "ipv6": { "cidrs": ["fd00::/104"], "maskSize": 120 },
            },
        });
        change(&mut pool["spec"]);
        pool
    }

    fn refusals(change: impl FnOnce(&mut Value)) -> Vec<(String, String)> {
        let definition = Definition::of::<CiliumPodIpPool>().object;
        let schema = definition.pointer("/spec/versions/0/schema/openAPIV3Schema").unwrap();
        let errors = Validator::new().validate(schema, &pool(change), Some(&pool(|_| ())));
        errors.err().into_iter().flatten().map(|error| (error.field_path, error.message)).collect()
    }

    #[test]
    fn what_is_immutable_cannot_be_changed() {
        let refused = |field: &str, message: &str| vec![(field.to_owned(), message.to_owned())];
        assert_eq!(refusals(|_| ()), []);
        assert_eq!(refusals(|spec| spec["ipv4"]["cidrs"] = json!(["10.0.0.0/16", "10.1.0.0/16"])), []);
        assert_eq!(
            refusals(|spec| spec["ipv4"]["maskSize"] = json!(25)),
            refused("spec.ipv4.maskSize", "maskSize is immutable")
        );
        assert_eq!(
            refusals(|spec| spec["ipv6"]["maskSize"] = json!(64)),
            refused("spec.ipv6.maskSize", "maskSize is immutable")
        );
        assert_eq!(
            refusals(|spec| spec["allowFirstIP"] = json!(true)),
            refused("spec.allowFirstIP", "allowFirstIP is immutable")
        );
        assert_eq!(
            refusals(|spec| spec["allowLastIP"] = json!(true)),
            refused("spec.allowLastIP", "allowLastIP is immutable")
        );
    }

    #[test]
    fn a_pool_is_read() {
        let pool: CiliumPodIpPool = serde_json::from_value(pool(|_| ())).unwrap();
        let ipv6 = pool.spec.ipv6.as_ref().unwrap();
        assert_eq!((ipv6.cidrs(), ipv6.mask_size()), (["fd00::/104".to_owned()].as_slice(), 120));
        assert_eq!(pool.spec.pod_selector, None);
        assert_eq!(serde_json::from_value::<CiliumPodIpPool>(pool.to_object().unwrap()).unwrap(), pool);
    }
}
