//! Objects as they are read from answers: without their managed fields, which are often more than the rest of an object, and
//! which nobody here reads. They are skipped while the text is read: taken apart, they were half of what a list cost.

use std::{borrow::Cow, fmt};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{Resource, api::ApiResource, core::DynamicResourceScope};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor},
};
use serde_json::{Map, Value};

/// The field of every object in which the other one stands.
const METADATA: &str = "metadata";

/// The field that is skipped.
const MANAGED_FIELDS: &str = "managedFields";

/// An object without its managed fields.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Body(pub(super) Value);

/// A page of a list.
#[derive(Debug, Deserialize)]
pub(super) struct ListBody {
    #[serde(default)]
    pub(super) metadata: ListMeta,
    #[serde(default)]
    pub(super) items: Option<Vec<Body>>,
}

/// What a page says of its list.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ListMeta {
    pub(super) resource_version: String,
    /// Where the next page begins; empty behind the last one.
    pub(super) r#continue: String,
}

/// An object of a watch. The watcher wants to see its resourceVersion.
#[derive(Debug, Clone)]
pub(super) struct Watched {
    metadata: ObjectMeta,
    pub(super) body: Body,
}

/// Which fields of a JSON object need another look.
#[derive(Debug, Clone, Copy)]
enum Fields {
    OfObject,
    OfMetadata,
}

impl<'de> DeserializeSeed<'de> for Fields {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Fields {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OfObject => "an object of the API server",
            Self::OfMetadata => "the metadata of an object",
        })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        while let Some(name) = entries.next_key::<String>()? {
            match self {
                Self::OfMetadata if name == MANAGED_FIELDS => {
                    entries.next_value::<IgnoredAny>()?;
                    continue;
                }
                Self::OfObject if name == METADATA => {
                    let metadata = entries.next_value_seed(Self::OfMetadata)?;
                    fields.insert(name, metadata);
                }
                _ => {
                    let value = entries.next_value()?;
                    fields.insert(name, value);
                }
            }
        }
        Ok(Value::Object(fields))
    }
}

impl<'de> Deserialize<'de> for Body {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Fields::OfObject.deserialize(deserializer).map(Self)
    }
}

impl<'de> Deserialize<'de> for Watched {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let body = Body::deserialize(deserializer)?;
        let resource_version = body.0.pointer("/metadata/resourceVersion").and_then(Value::as_str).map(str::to_owned);
        Ok(Self { metadata: ObjectMeta { resource_version, ..ObjectMeta::default() }, body })
    }
}

impl Resource for Watched {
    type DynamicType = ApiResource;
    type Scope = DynamicResourceScope;

    fn kind(kind: &ApiResource) -> Cow<'_, str> {
        kind.kind.as_str().into()
    }

    fn group(kind: &ApiResource) -> Cow<'_, str> {
        kind.group.as_str().into()
    }

    fn version(kind: &ApiResource) -> Cow<'_, str> {
        kind.version.as_str().into()
    }

    fn plural(kind: &ApiResource) -> Cow<'_, str> {
        kind.plural.as_str().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn managed_fields_go_where_they_are_metadata_and_nothing_else_does() {
        let object = json!({
            "kind": "Node", "metadata": { "name": "a", "managedFields": [{ "manager": "m" }], "labels": { "metadata": "x" } },
            "spec": { "metadata": { "managedFields": 1 }, "list": [1.5, -2, null, true, "ü"] },
        });
        let mut left = object.clone();
        left["metadata"].as_object_mut().unwrap().remove("managedFields");
        let Body(read) = serde_json::from_str(&object.to_string()).unwrap();
        assert_eq!(read, left);
        let page = json!({ "metadata": { "resourceVersion": "7", "continue": "c" }, "items": [object, left] });
        let page: ListBody = serde_json::from_str(&page.to_string()).unwrap();
        assert_eq!((page.metadata.resource_version.as_str(), page.metadata.r#continue.as_str()), ("7", "c"));
        assert!(page.items.unwrap().iter().all(|Body(item)| *item == left));
    }

    #[test]
    fn what_is_no_object_is_no_body() {
        for text in ["[]", "null", "7", "{", r#"{"metadata": 7}"#] {
            assert!(serde_json::from_str::<Body>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_watched_object_shows_its_version() {
        let event = json!({ "metadata": { "name": "a", "resourceVersion": "9" }, "spec": {} });
        let watched: Watched = serde_json::from_str(&event.to_string()).unwrap();
        assert_eq!((watched.meta().resource_version.as_deref(), &watched.body.0), (Some("9"), &event));
    }
}
