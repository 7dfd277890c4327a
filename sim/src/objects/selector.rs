//! Label and field selectors in their text form (Kubernetes documentation, "Labels and Selectors", "Field Selectors").

use basal_objects::{object::Object, port::Scope};

/// A selector that does not parse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadSelector {
    #[error("label selector term {0:?} is none of key, !key, key=value, key!=value, key in (…), key notin (…)")]
    Labels(String),
    #[error("field label not supported: {0}")]
    Fields(String),
}

/// A parsed [`Scope`].
#[derive(Debug, Clone)]
pub(super) struct Selector {
    pub(super) namespace: Option<String>,
    labels: Vec<LabelTerm>,
    fields: Vec<FieldTerm>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum LabelTerm {
    Exists(String),
    Missing(String),
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
}

#[derive(Debug, Clone)]
struct FieldTerm {
    pointer: &'static str,
    value: String,
    equal: bool,
}

impl Selector {
    pub(super) fn parse(scope: &Scope) -> Result<Self, BadSelector> {
        let labels = scope.labels.as_deref().map(terms).unwrap_or_default();
        let fields = scope.fields.as_deref().map(terms).unwrap_or_default();
        Ok(Self {
            namespace: scope.namespace.clone(),
            labels: labels.into_iter().map(label_term).collect::<Result<_, _>>()?,
            fields: fields.into_iter().map(field_term).collect::<Result<_, _>>()?,
        })
    }

    pub(super) fn matches(&self, object: &Object) -> bool {
        let labels = object.labels();
        let label = |term: &LabelTerm| match term {
            LabelTerm::Exists(key) => labels.contains_key(key.as_str()),
            LabelTerm::Missing(key) => !labels.contains_key(key.as_str()),
            LabelTerm::In(key, values) => labels.get(key.as_str()).is_some_and(|v| values.iter().any(|w| w == v)),
            LabelTerm::NotIn(key, values) => labels.get(key.as_str()).is_none_or(|v| values.iter().all(|w| w != v)),
        };
        let field = |term: &FieldTerm| {
            let value = object.0.pointer(term.pointer).and_then(serde_json::Value::as_str).unwrap_or_default();
            (value == term.value) == term.equal
        };
        self.labels.iter().all(label) && self.fields.iter().all(field)
    }
}

/// Splits at commas outside parentheses.
fn terms(text: &str) -> Vec<&str> {
    let mut depth = 0_usize;
    let parts = text.split(|c: char| {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == ',' && depth == 0
    });
    parts.map(str::trim).filter(|part| !part.is_empty()).collect()
}

fn label_term(term: &str) -> Result<LabelTerm, BadSelector> {
    let bad = || BadSelector::Labels(term.to_owned());
    let word = |text: &str| {
        let text = text.trim();
        let clean = text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/'));
        if clean { Ok(text.to_owned()) } else { Err(bad()) }
    };
    let key = |text: &str| word(text).and_then(|key| if key.is_empty() { Err(bad()) } else { Ok(key) });
    let set = |text: &str| {
        let inner = text.trim().strip_prefix('(').and_then(|rest| rest.strip_suffix(')')).ok_or_else(bad)?;
        inner.split(',').map(word).collect::<Result<Vec<_>, _>>()
    };
    if let Some(rest) = term.strip_prefix('!') {
        return Ok(LabelTerm::Missing(key(rest)?));
    }
    if let Some((left, right)) = term.split_once("!=") {
        return Ok(LabelTerm::NotIn(key(left)?, vec![word(right)?]));
    }
    if let Some((left, right)) = term.split_once("==").or_else(|| term.split_once('=')) {
        return Ok(LabelTerm::In(key(left)?, vec![word(right)?]));
    }
    if let Some((left, right)) = term.split_once(" notin ") {
        return Ok(LabelTerm::NotIn(key(left)?, set(right)?));
    }
    if let Some((left, right)) = term.split_once(" in ") {
        return Ok(LabelTerm::In(key(left)?, set(right)?));
    }
    Ok(LabelTerm::Exists(key(term)?))
}

/// The field labels that Basal asks for; the API server knows a few more.
fn field_term(term: &str) -> Result<FieldTerm, BadSelector> {
    let bad = || BadSelector::Fields(term.to_owned());
    let (left, value, equal) = match term.split_once("!=") {
        Some((left, value)) => (left, value, false),
        None => {
            let (left, value) = term.split_once("==").or_else(|| term.split_once('=')).ok_or_else(bad)?;
            (left, value, true)
        }
    };
    let pointer = match left {
        "metadata.name" => "/metadata/name",
        "metadata.namespace" => "/metadata/namespace",
        "spec.nodeName" => "/spec/nodeName",
        _ => return Err(bad()),
    };
    Ok(FieldTerm { pointer, value: value.to_owned(), equal })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn matches(labels: &str, fields: &str) -> bool {
        let some = |text: &str| Some(text.to_owned()).filter(|t| !t.is_empty());
        let scope = Scope { namespace: None, labels: some(labels), fields: some(fields) };
        let object = Object(json!({
            "metadata": {"name": "a", "labels": {"app": "web", "tier": ""}},
            "spec": {"nodeName": "n1"},
        }));
        Selector::parse(&scope).unwrap().matches(&object)
    }

    #[test]
    fn labels() {
        for yes in [
            "",
            "app",
            "app=web",
            "app==web",
            "tier=",
            "!zone",
            "zone!=x",
            "app in (db, web)",
            "app notin (db,x),tier",
            "zone notin (a)",
        ] {
            assert!(matches(yes, ""), "{yes}");
        }
        for no in ["zone", "app=db", "!app", "app!=web", "app in (db)", "app notin (web)", "app=web,zone"] {
            assert!(!matches(no, ""), "{no}");
        }
    }

    #[test]
    fn fields() {
        assert!(matches("", "metadata.name=a,spec.nodeName==n1"));
        assert!(matches("", "spec.nodeName!=n2"));
        assert!(!matches("", "metadata.name=b"));
    }

    #[test]
    fn what_does_not_parse_is_refused() {
        for labels in ["a in b", "=x", "a b", "a=(x)"] {
            let scope = Scope { labels: Some(labels.to_owned()), ..Scope::default() };
            assert!(Selector::parse(&scope).is_err(), "{labels}");
        }
        for fields in ["status.phase=Running", "metadata.name"] {
            let scope = Scope { fields: Some(fields.to_owned()), ..Scope::default() };
            assert!(Selector::parse(&scope).is_err(), "{fields}");
        }
    }
}
