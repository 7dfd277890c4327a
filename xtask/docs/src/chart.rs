//! The page about the chart's values, from `values.yaml` with its comments and from `values.schema.json`.
//!
//! A comment that begins with `# --` stands above a value and tells what it is; above a mapping it tells of all that is in
//! it. Any other comment at the margin with an empty line behind it is the heading of the values that follow; the first
//! one is the introduction of the page.

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::page::{code, table};

/// What begins a comment that tells what a value is.
const TELLS: &str = "-- ";

/// A value of the chart.
#[derive(Debug, PartialEq, Eq)]
struct Setting {
    /// Its place, with dots between.
    path: String,
    meaning: String,
}

/// Settings under a heading.
#[derive(Debug, Default, PartialEq, Eq)]
struct Section {
    heading: String,
    settings: Vec<Setting>,
}

/// What the comments say.
#[derive(Debug, Default)]
struct Comments {
    introduction: String,
    sections: Vec<Section>,
}

/// Makes the page.
pub(crate) fn page(values: &str, schema: &str) -> anyhow::Result<String> {
    let defaults: Value = serde_saphyr::from_str(values).context("values.yaml does not parse")?;
    let schema: Value = serde_json::from_str(schema).context("values.schema.json does not parse")?;
    let comments = read(values, &defaults)?;
    let mut text = format!(
        "<!-- Made by `cargo xtask docs` from charts/basal/values.yaml and values.schema.json; do not edit. -->\n\n\
         # Values of the chart\n\n{}\n\n\
         [install.md](install.md) shows how the chart is installed with them, [reference.md](reference.md) which keys of the\n\
         daemons there are; `extraConfig` sets those that have no value of their own.\n",
        comments.introduction
    );
    for section in comments.sections {
        let rows = section.settings.iter().map(|setting| {
            let default = at(&defaults, &setting.path).map(Value::to_string).unwrap_or_default();
            Ok([code(&setting.path), kind(&schema, &setting.path)?, code(&default), setting.meaning.clone()])
        });
        let rows = rows.collect::<anyhow::Result<Vec<_>>>()?;
        let table = table(["value", "type", "default", "meaning"], rows);
        text += &format!("\n## {}\n\n{table}", section.heading);
    }
    Ok(text)
}

/// Reads the comments of `values.yaml`.
fn read(values: &str, defaults: &Value) -> anyhow::Result<Comments> {
    let mut comments = Comments::default();
    let mut silent = Vec::new();
    let mut comment: Vec<&str> = Vec::new();
    // The mappings around the line, with their indentation.
    let mut around: Vec<(usize, &str)> = Vec::new();
    // The indentation of the value that was told of last: what is indented more belongs to it.
    let mut told: Option<usize> = None;
    for line in values.lines() {
        let trimmed = line.trim_start();
        let indent = line.len() - trimmed.len();
        if let Some(text) = trimmed.strip_prefix('#') {
            comment.push(text.trim());
            continue;
        }
        let comment = std::mem::take(&mut comment);
        if trimmed.is_empty() {
            comments.take_heading(&comment);
            continue;
        }
        if told.is_some_and(|told| indent > told) || trimmed.starts_with("- ") {
            continue;
        }
        let (key, _) = trimmed.split_once(':').with_context(|| format!("values.yaml: {line:?} is no value"))?;
        around.retain(|(above, _)| *above < indent);
        let path = around.iter().map(|(_, key)| *key).chain([key]).collect::<Vec<_>>().join(".");
        told = None;
        let holds_more = at(defaults, &path).and_then(Value::as_object).is_some_and(|inside| !inside.is_empty());
        match comment.first().and_then(|first| first.strip_prefix(TELLS)) {
            Some(first) => {
                let meaning =
                    std::iter::once(first).chain(comment.iter().skip(1).copied()).collect::<Vec<_>>().join(" ");
                let section =
                    comments.sections.last_mut().with_context(|| format!("{path} stands under no heading"))?;
                section.settings.push(Setting { path, meaning });
                told = Some(indent);
            }
            None if holds_more => around.push((indent, key)),
            None => silent.push(path),
        }
    }
    if !silent.is_empty() {
        bail!("values.yaml tells nothing of {}; write a comment `# {TELLS}…` above", silent.join(", "));
    }
    Ok(comments)
}

impl Comments {
    /// Takes a comment with an empty line behind it.
    fn take_heading(&mut self, comment: &[&str]) {
        let text = comment.iter().map(|line| if line.is_empty() { "\n\n" } else { line }).collect::<Vec<_>>().join(" ");
        let text = text.replace(" \n\n ", "\n\n");
        match text.trim_end_matches('.') {
            "" => {}
            _ if self.introduction.is_empty() => self.introduction = text,
            heading => self.sections.push(Section { heading: heading.to_owned(), settings: Vec::new() }),
        }
    }
}

fn at<'v>(value: &'v Value, path: &str) -> Option<&'v Value> {
    path.split('.').try_fold(value, |value, key| value.get(key))
}

/// What the schema lets a value be.
fn kind(schema: &Value, path: &str) -> anyhow::Result<String> {
    let mut place = schema;
    for key in path.split('.') {
        place = resolved(schema, &place["properties"][key]);
    }
    if place.is_null() {
        bail!("values.schema.json has no {path}, which values.yaml has");
    }
    Ok(kind_of(schema, place))
}

/// What a schema stands for, where it refers to a definition.
fn resolved<'s>(schema: &'s Value, place: &'s Value) -> &'s Value {
    let pointer = place["$ref"].as_str().and_then(|reference| reference.strip_prefix('#'));
    pointer.and_then(|pointer| schema.pointer(pointer)).unwrap_or(place)
}

fn kind_of(schema: &Value, place: &Value) -> String {
    let place = resolved(schema, place);
    if let Some(title) = place["title"].as_str() {
        return title.to_owned();
    }
    if let Some(only) = place.get("const") {
        return format!("only `{only}`");
    }
    if let Some(choices) = place["enum"].as_array() {
        return choices.iter().map(|choice| code(&choice.to_string())).collect::<Vec<_>>().join(", ");
    }
    let types: Vec<&str> = match &place["type"] {
        Value::Array(types) => types.iter().filter_map(Value::as_str).collect(),
        one => one.as_str().into_iter().collect(),
    };
    let mut text = types.join(" or ");
    if place.get("items").is_some() {
        text = format!("list of {}s", kind_of(schema, &place["items"]));
    }
    match (place.get("minimum"), place.get("maximum")) {
        (Some(least), Some(most)) => text += &format!(", {least} to {most}"),
        (Some(least), None) => text += &format!(", {least} or more"),
        (None, Some(most)) => text += &format!(", at most {most}"),
        (None, None) => {}
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALUES: &str = "\
# All values.
#
# The least.

# What is shared.

# -- The name,
# in full.
name: x
group:
  # -- How many.
  # A whole number.
  count: 3
  inner:
    # -- Which.
    list: [a]

# The rest.

# -- All of it.
rest:
  # Why one.
  one: 1
  more:
    - two: 2
";

    const SCHEMA: &str = r##"{
        "definitions": {"names": {"title": "list of names", "type": "array"}},
        "properties": {
            "name": {"enum": ["x", "y|z"]},
            "group": {"properties": {
                "count": {"type": "integer", "minimum": 1, "maximum": 9},
                "inner": {"properties": {"list": {"$ref": "#/definitions/names"}}}
            }},
            "rest": {"type": ["object", "null"]}
        }
    }"##;

    #[test]
    fn every_value_has_a_row_under_its_heading() {
        let page = page(VALUES, SCHEMA).unwrap();
        let wanted = "# Values of the chart

All values.

The least.

[install.md](install.md) shows how the chart is installed with them, [reference.md](reference.md) which keys of the
daemons there are; `extraConfig` sets those that have no value of their own.

## What is shared

| value | type | default | meaning |
|---|---|---|---|
| `name` | `\"x\"`, `\"y\\|z\"` | `\"x\"` | The name, in full. |
| `group.count` | integer, 1 to 9 | `3` | How many. A whole number. |
| `group.inner.list` | list of names | `[\"a\"]` | Which. |

## The rest

| value | type | default | meaning |
|---|---|---|---|
| `rest` | object or null | `{\"one\":1,\"more\":[{\"two\":2}]}` | All of it. |
";
        assert_eq!(page.split_once("\n\n").unwrap().1, wanted);
    }

    #[test]
    fn a_value_without_a_comment_is_refused_by_name() {
        for (remove, silent) in [
            ("  # -- How many.\n  # A whole number.\n", "of group.count;"),
            ("# -- All of it.\n", "of rest.one, rest.more;"),
        ] {
            let error = page(&VALUES.replace(remove, ""), SCHEMA).unwrap_err().to_string();
            assert!(error.contains(silent), "{error}");
        }
    }

    #[test]
    fn a_value_that_the_schema_lacks_is_refused_by_name() {
        let error = page(VALUES, &SCHEMA.replace("\"count\"", "\"amount\"")).unwrap_err().to_string();
        assert!(error.contains("has no group.count"), "{error}");
    }
}
