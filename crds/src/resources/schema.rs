//! From Rust types to the structural schemas of a CustomResourceDefinition, in the shape that Cilium's have.

use schemars::{JsonSchema, generate::SchemaSettings};
use serde_json::{Map, Value, json};

/// Formats that mean something to the API server or to readers. Others that Rust's number types bring are left out.
const FORMATS: &[&str] = &["cidr", "date-time", "int64"];

/// The structural schema of a type.
///
/// Nothing is `nullable` (the API server drops a `null` where a field is not), nothing is a reference, and an optional
/// field is one that is not in `required`.
pub(super) fn of<T: JsonSchema>() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.inline_subschemas = true;
        settings.meta_schema = None;
    });
    let mut schema = settings.into_generator().into_root_schema_for::<T>().to_value();
    make_structural(&mut schema);
    schema
}

/// Rewrites a JSON Schema, from the leaves upwards.
fn make_structural(schema: &mut Value) {
    let Value::Object(schema) = schema else { return };
    let properties = schema.get_mut("properties").and_then(Value::as_object_mut);
    properties.into_iter().flat_map(|properties| properties.values_mut()).for_each(make_structural);
    for child in ["items", "additionalProperties"] {
        schema.get_mut(child).into_iter().for_each(make_structural);
    }
    for alternatives in ["anyOf", "oneOf"] {
        let alternatives = schema.get_mut(alternatives).and_then(Value::as_array_mut);
        alternatives.into_iter().flatten().for_each(make_structural);
    }
    schema.remove("title");
    flatten_option(schema);
    flatten_enum(schema);
    if schema.get("format").is_some_and(|format| FORMATS.iter().all(|known| format != known)) {
        schema.remove("format");
    }
}

/// `Option` is `"type": [T, "null"]`, or `anyOf` of T and `null`; it becomes T.
fn flatten_option(schema: &mut Map<String, Value>) {
    let null = json!("null");
    if let Some(Value::Array(types)) = schema.get_mut("type") {
        types.retain(|kind| *kind != null);
        if let [only] = types.as_slice() {
            let only = only.clone();
            schema.insert("type".to_owned(), only);
        }
    }
    if let Some(Value::Array(values)) = schema.get_mut("enum") {
        values.retain(|value| !value.is_null());
    }
    if let Some(Value::Array(alternatives)) = schema.get("anyOf") {
        let rest: Vec<&Value> = alternatives.iter().filter(|schema| schema["type"] != null).collect();
        if let [Value::Object(only)] = rest.as_slice() {
            let only = only.clone();
            schema.remove("anyOf");
            for (keyword, value) in only {
                // A description at the place of use wins over that of the type.
                schema.entry(keyword).or_insert(value);
            }
        }
    }
}

/// An enum whose variants have comments is `oneOf` constants; it becomes `enum`.
fn flatten_enum(schema: &mut Map<String, Value>) {
    let Some(Value::Array(variants)) = schema.get("oneOf") else { return };
    let values: Option<Vec<Value>> = variants.iter().map(|variant| variant.get("const").cloned()).collect();
    if let Some(values) = values {
        schema.remove("oneOf");
        schema.insert("type".to_owned(), json!("string"));
        schema.insert("enum".to_owned(), Value::Array(values));
    }
}
