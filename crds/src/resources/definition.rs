//! CustomResourceDefinitions, made from the types.

use schemars::JsonSchema;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};

use super::{CiliumEndpoint, CiliumIdentity, CiliumNode, CiliumPodIpPool, Ledger, PodCidrCell, schema};

/// An API group with what its kinds have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group {
    /// Its name.
    pub name: &'static str,
    /// What `kubectl get` takes for all kinds of it together.
    pub category: &'static str,
    /// The version of its schemas.
    pub schema_version: &'static str,
}

/// Cilium's kinds. The version of the schemas is that of Cilium 1.20.1, whose fields and rules they hold.
pub const CILIUM: Group = Group { name: "cilium.io", category: "cilium", schema_version: "1.33.11" };
/// Our own kinds.
pub const BASAL: Group = Group { name: "basal.io", category: "basal", schema_version: "1.2.0" };
/// The label of a CustomResourceDefinition that tells the version of its schema. An operator of Cilium replaces a
/// definition that lacks it or has a lower one, and leaves others alone.
pub const SCHEMA_VERSION_LABEL: &str = "io.cilium.k8s.crd.schema.version";

/// A custom resource.
pub trait Kind: JsonSchema + Serialize + DeserializeOwned {
    /// How it is named, and what a definition says beside the schema.
    const NAMES: Names;

    /// The object as JSON, with `apiVersion` and `kind`: what a create request carries.
    ///
    /// # Errors
    /// None that a value of these types could cause; the type is serde's.
    fn to_object(&self) -> Result<Value, serde_json::Error> {
        let mut object = Map::new();
        object.insert("apiVersion".to_owned(), json!(format!("{}/{}", Self::NAMES.group.name, Self::NAMES.version)));
        object.insert("kind".to_owned(), json!(Self::NAMES.kind));
        if let Value::Object(fields) = serde_json::to_value(self)? {
            object.extend(fields);
        }
        Ok(Value::Object(object))
    }
}

/// Names and properties of a kind.
#[derive(Debug, Clone, Copy)]
pub struct Names {
    /// The group that it belongs to.
    pub group: Group,
    /// In CamelCase.
    pub kind: &'static str,
    /// As in a path.
    pub plural: &'static str,
    /// In lower case.
    pub singular: &'static str,
    /// For kubectl.
    pub short: &'static [&'static str],
    /// The one version that there is: served and stored.
    pub version: &'static str,
    /// Whether its objects live in namespaces.
    pub namespaced: bool,
    /// Whether `status` is a subresource.
    pub status_subresource: bool,
    /// Whether the schema requires `metadata`.
    pub metadata_required: bool,
    /// What `kubectl get` shows beside the name.
    pub columns: &'static [Column],
}

/// A column of `kubectl get`.
#[derive(Debug, Clone, Copy)]
pub struct Column {
    /// Its head.
    pub name: &'static str,
    /// `string`, `integer` or `date`.
    pub kind: &'static str,
    /// A JSON path.
    pub path: &'static str,
    /// 0 for always, 1 for `-o wide` only.
    pub priority: i32,
}

impl Column {
    /// The age of the object.
    pub(super) const AGE: Self = Self::new("Age", "date", ".metadata.creationTimestamp");

    /// A column that is always shown.
    pub(super) const fn new(name: &'static str, kind: &'static str, path: &'static str) -> Self {
        Self { name, kind, path, priority: 0 }
    }

    /// The same for `-o wide` only.
    pub(super) const fn wide(self) -> Self {
        Self { priority: 1, ..self }
    }
}

/// A CustomResourceDefinition.
#[derive(Debug, Clone, PartialEq)]
pub struct Definition {
    /// The group of its kind.
    pub group: Group,
    /// The plural of its kind.
    pub plural: &'static str,
    /// The object, of `apiextensions.k8s.io/v1`.
    pub object: Value,
}

impl Definition {
    /// The name of the object: `<plural>.<group>`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}.{}", self.plural, self.group.name)
    }

    /// The definition of a kind.
    #[must_use]
    pub fn of<K: Kind>() -> Self {
        let names = K::NAMES;
        let mut version = json!({
            "name": names.version,
            "served": true,
            "storage": true,
            "schema": { "openAPIV3Schema": root_schema::<K>() },
        });
        if !names.columns.is_empty() {
            version["additionalPrinterColumns"] = names.columns.iter().map(column).collect();
        }
        if names.status_subresource {
            version["subresources"] = json!({ "status": {} });
        }
        let object = json!({
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {
                "name": format!("{}.{}", names.plural, names.group.name),
                "labels": { SCHEMA_VERSION_LABEL: names.group.schema_version },
            },
            "spec": {
                "group": names.group.name,
                "names": {
                    "categories": [names.group.category],
                    "kind": names.kind,
                    "listKind": format!("{}List", names.kind),
                    "plural": names.plural,
                    "shortNames": names.short,
                    "singular": names.singular,
                },
                "scope": if names.namespaced { "Namespaced" } else { "Cluster" },
                "versions": [version],
            },
        });
        Self { group: names.group, plural: names.plural, object }
    }
}

/// The CustomResourceDefinitions that Basal works with.
#[must_use]
pub fn crds() -> Vec<Definition> {
    vec![
        Definition::of::<CiliumEndpoint>(),
        Definition::of::<CiliumIdentity>(),
        Definition::of::<CiliumNode>(),
        Definition::of::<CiliumPodIpPool>(),
        Definition::of::<Ledger>(),
        Definition::of::<PodCidrCell>(),
    ]
}

fn column(column: &Column) -> Value {
    let mut object = json!({ "name": column.name, "type": column.kind, "jsonPath": column.path });
    if column.priority != 0 {
        object["priority"] = json!(column.priority);
    }
    object
}

/// The schema of a whole object: that of its own fields, and the three that every object has.
fn root_schema<K: Kind>() -> Value {
    let mut schema = schema::of::<K>();
    let own = schema.get_mut("properties").map(Value::take);
    let text = |description: &str| json!({ "description": description, "type": "string" });
    let mut properties = Map::from_iter([
        ("apiVersion".to_owned(), text("Group and version of this object's schema.")),
        ("kind".to_owned(), text("The kind of this object.")),
        ("metadata".to_owned(), json!({ "type": "object" })),
    ]);
    if let Some(Value::Object(own)) = own {
        properties.extend(own);
    }
    let mut required: Vec<Value> = if K::NAMES.metadata_required { vec![json!("metadata")] } else { Vec::new() };
    required.extend(schema.get("required").and_then(Value::as_array).into_iter().flatten().cloned());
    schema["properties"] = Value::Object(properties);
    schema["required"] = Value::Array(required);
    schema
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
    use sha2::{Digest as _, Sha256};

    use super::*;

    /// Numbers are equal whether they are written as 0 or as 0.0: the typed form has floating point for bounds.
    fn with_floats(value: Value) -> Value {
        match value {
            Value::Number(number) => json!(number.as_f64()),
            Value::Array(items) => items.into_iter().map(with_floats).collect(),
            Value::Object(fields) => Value::Object(fields.into_iter().map(|(k, v)| (k, with_floats(v))).collect()),
            other => other,
        }
    }

    #[test]
    fn definitions_hold_nothing_that_the_api_does_not_know() {
        for definition in crds() {
            let typed: CustomResourceDefinition = serde_json::from_value(definition.object.clone()).unwrap();
            assert_eq!(typed.metadata.name, Some(definition.name()));
            let back = with_floats(serde_json::to_value(&typed).unwrap());
            assert!(back == with_floats(definition.object), "{}: a keyword is lost", definition.plural);
        }
    }

    /// An operator replaces the definitions of a lower version only: a schema that changes without one would never get into a
    /// cluster that runs.
    #[test]
    fn our_schemas_change_with_their_version() {
        // The files are what the check holds against the types.
        let files =
            [include_bytes!("../../yaml/ledgers.yaml").as_slice(), include_bytes!("../../yaml/podcidrcells.yaml")];
        let mut sha = Sha256::new();
        files.iter().for_each(|file| sha.update(file));
        let digest: String = sha.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            (BASAL.schema_version, digest.as_str()),
            ("1.2.0", "5eac5f10e90335e1"),
            "raise BASAL.schema_version with the schemas, and put both here"
        );
    }
}
