//! Security labels: what an identity stands for.
//!
//! A label has a source (`k8s`, `reserved`, `gen`, …), a key and a value. A set holds one label per key, whatever the
//! source, and has one canonical text, which etcd keys are made of: two writers must agree on it byte for byte.

use std::{collections::BTreeMap, fmt, sync::Arc};

/// The source of labels that come from Kubernetes.
pub const SOURCE_K8S: &str = "k8s";
/// The source of labels with a fixed meaning.
pub const SOURCE_RESERVED: &str = "reserved";
/// The source that Cilium gives a label without one.
pub const SOURCE_UNSPEC: &str = "unspec";

/// Why a text is no label, or no set of labels.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// There is nothing there.
    #[error("the set of labels is empty: at least one source:key=value; is wanted")]
    Empty,
    /// The last label lacks its end.
    #[error("the labels {0:?} do not end with ;")]
    Unterminated(String),
    /// One label is not of the form.
    #[error("{0:?} is not a label: source:key=value is wanted, with a source and a key")]
    Form(String),
    /// A part holds a character that the canonical text is built with.
    #[error("label {0:?} cannot be stored: a source holds no : = or ;, a key no = or ;, a value no ;")]
    Separator(String),
    /// Two labels of one set have one key.
    #[error("the key {0:?} stands in the set of labels twice")]
    Duplicate(String),
    /// The labels are not in order.
    #[error("the labels {0:?} are not sorted by key")]
    Unsorted(String),
}

/// One label, as one text: thousands of identities are in the memory of every agent.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Label {
    /// `source:key=value`. A source holds no colon, a key no equals sign, so it has one reading.
    text: Box<str>,
}

impl Label {
    /// Takes the three parts; the value may be empty.
    ///
    /// # Errors
    /// [`LabelError::Form`] without source or key, [`LabelError::Separator`] for a part that could not be read back.
    pub fn new(source: &str, key: &str, value: &str) -> Result<Self, LabelError> {
        let text = || format!("{source}:{key}={value}");
        if source.is_empty() || key.is_empty() {
            return Err(LabelError::Form(text()));
        }
        if source.contains([':', '=', ';']) || key.contains(['=', ';']) || value.contains(';') {
            return Err(LabelError::Separator(text()));
        }
        Ok(Self { text: text().into_boxed_str() })
    }

    fn parts(&self) -> (&str, &str, &str) {
        let (source, rest) = self.text.split_once(':').unwrap_or_default();
        let (key, value) = rest.split_once('=').unwrap_or_default();
        (source, key, value)
    }

    /// Reads `source:key=value` or `source:key`, the form of labels in the API; without a source it is `unspec`.
    ///
    /// # Errors
    /// As [`Label::new`].
    pub fn parse(text: &str) -> Result<Self, LabelError> {
        let (head, value) = text.split_once('=').unwrap_or((text, ""));
        let (source, key) = head.split_once(':').unwrap_or((SOURCE_UNSPEC, head));
        Self::new(source, key, value)
    }

    /// Where the label comes from.
    #[must_use]
    pub fn source(&self) -> &str {
        self.parts().0
    }

    /// The key, without source.
    #[must_use]
    pub fn key(&self) -> &str {
        self.parts().1
    }

    /// The value; may be empty.
    #[must_use]
    pub fn value(&self) -> &str {
        self.parts().2
    }
}

/// `source:key=value`, or `source:key` for an empty value.
impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text.strip_suffix('=').filter(|_| self.value().is_empty()).unwrap_or(&self.text))
    }
}

/// A set of labels, one per key. Clones share them.
#[derive(Debug, Default, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Labels(
    /// Ordered by key.
    Arc<[Label]>,
);

impl Labels {
    /// The empty set.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The label of a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Label> {
        let found = self.0.binary_search_by_key(&key, Label::key);
        found.ok().map(|place| &self.0[place])
    }

    /// The labels, ordered by key.
    pub fn iter(&self) -> impl Iterator<Item = &Label> {
        self.0.iter()
    }

    /// How many labels there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The canonical text: every label as `source:key=value;`, ordered by the bytes of the *key* (the source does not
    /// count), one after the other. It is the value of an identity's key in etcd and part of other keys.
    #[must_use]
    pub fn canonical(&self) -> String {
        self.iter().flat_map(|label| [&*label.text, ";"]).collect()
    }

    /// Reads the canonical text, and nothing else: a text that another set of labels would also be read from must not
    /// name an identity.
    ///
    /// # Errors
    /// See [`LabelError`].
    pub fn parse_canonical(text: &str) -> Result<Self, LabelError> {
        if text.is_empty() {
            return Err(LabelError::Empty);
        }
        let body = text.strip_suffix(';').ok_or_else(|| LabelError::Unterminated(text.to_owned()))?;
        let mut labels = Vec::new();
        let mut last: Option<&str> = None;
        for part in body.split(';') {
            let form = || LabelError::Form(part.to_owned());
            let (head, value) = part.split_once('=').ok_or_else(form)?;
            let (source, key) = head.split_once(':').ok_or_else(form)?;
            match last.cmp(&Some(key)) {
                std::cmp::Ordering::Less => last = Some(key),
                std::cmp::Ordering::Equal => return Err(LabelError::Duplicate(key.to_owned())),
                std::cmp::Ordering::Greater => return Err(LabelError::Unsorted(text.to_owned())),
            }
            labels.push(Label::new(source, key, value)?);
        }
        Ok(Self(labels.into()))
    }

    /// The map of a CiliumIdentity's `security-labels`: `source:key` to value.
    #[must_use]
    pub fn to_security_labels(&self) -> BTreeMap<String, String> {
        let entry = |label: &Label| {
            let (source, key, value) = label.parts();
            (format!("{source}:{key}"), value.to_owned())
        };
        self.iter().map(entry).collect()
    }

    /// Reads the map of a CiliumIdentity's `security-labels`.
    ///
    /// # Errors
    /// [`LabelError::Form`] for a key without source, [`LabelError::Duplicate`] for one key from two sources.
    pub fn from_security_labels(map: &BTreeMap<String, String>) -> Result<Self, LabelError> {
        let mut labels = BTreeMap::new();
        for (key, value) in map {
            let (source, name) = key.split_once(':').ok_or_else(|| LabelError::Form(format!("{key}={value}")))?;
            if labels.insert(name, Label::new(source, name, value)?).is_some() {
                return Err(LabelError::Duplicate(name.to_owned()));
            }
        }
        Ok(Self(labels.into_values().collect()))
    }
}

/// A later label replaces an earlier one of the same key.
impl FromIterator<Label> for Labels {
    fn from_iter<I: IntoIterator<Item = Label>>(labels: I) -> Self {
        let by_key: BTreeMap<String, Label> = labels.into_iter().map(|label| (label.key().to_owned(), label)).collect();
        Self(by_key.into_values().collect())
    }
}

/// The labels with commas between them.
impl fmt::Display for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, label) in self.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(f, "{comma}{label}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A sample of Cilium's own tests.
    const SAMPLE: &str = "k8s:app=baz;k8s:io.cilium.k8s.policy.cluster=cluster3;k8s:io.kubernetes.pod.namespace=bar;";

    #[test]
    fn the_sample_is_canonical() {
        let labels = Labels::parse_canonical(SAMPLE).unwrap();
        assert_eq!(labels.len(), 3);
        assert_eq!(labels.get("app").unwrap().value(), "baz");
        assert_eq!(labels.canonical(), SAMPLE);
    }

    #[test]
    fn the_order_is_by_key_whatever_the_source() {
        let labels: Labels = [("k8s", "b", "1"), ("gen", "c", ""), ("unspec", "a", "2")]
            .map(|(s, k, v)| Label::new(s, k, v).unwrap())
            .into_iter()
            .collect();
        assert_eq!(labels.canonical(), "unspec:a=2;k8s:b=1;gen:c=;");
        assert_eq!(labels.to_string(), "unspec:a=2,k8s:b=1,gen:c");
    }

    #[test]
    fn a_key_has_one_label_whatever_the_source() {
        let labels: Labels =
            [("k8s", "1"), ("gen", "2")].map(|(s, v)| Label::new(s, "a", v).unwrap()).into_iter().collect();
        assert_eq!(labels.canonical(), "gen:a=2;");
    }

    #[test]
    fn other_texts_are_refused_by_name() {
        let form = |part: &str| Err(LabelError::Form(part.to_owned()));
        assert_eq!(Labels::parse_canonical(""), Err(LabelError::Empty));
        assert_eq!(Labels::parse_canonical("k8s:a=b"), Err(LabelError::Unterminated("k8s:a=b".to_owned())));
        assert_eq!(Labels::parse_canonical(";"), form(""));
        assert_eq!(Labels::parse_canonical("k8s:a;"), form("k8s:a"));
        assert_eq!(Labels::parse_canonical("a=b;"), form("a=b"));
        assert_eq!(Labels::parse_canonical("k8s:=b;"), form("k8s:=b"));
        assert_eq!(Labels::parse_canonical("k8s:a=b;gen:a=c;"), Err(LabelError::Duplicate("a".to_owned())));
        assert_eq!(Labels::parse_canonical("k8s:b=;k8s:a=;"), Err(LabelError::Unsorted("k8s:b=;k8s:a=;".to_owned())));
    }

    #[test]
    fn api_texts_are_read_with_and_without_value() {
        assert_eq!(Label::parse("reserved:host"), Label::new("reserved", "host", ""));
        assert_eq!(Label::parse("k8s:a=b=c"), Label::new("k8s", "a", "b=c"));
        assert_eq!(Label::parse("a=x:y"), Label::new("unspec", "a", "x:y"));
        assert_eq!(Label::parse("k8s:"), Err(LabelError::Form("k8s:=".to_owned())));
    }

    #[test]
    fn security_labels_are_a_map() {
        let labels = Labels::parse_canonical(SAMPLE).unwrap();
        let map = labels.to_security_labels();
        assert_eq!(map["k8s:app"], "baz");
        assert_eq!(Labels::from_security_labels(&map), Ok(labels));
        let twice = BTreeMap::from([("k8s:a".to_owned(), String::new()), ("gen:a".to_owned(), String::new())]);
        assert_eq!(Labels::from_security_labels(&twice), Err(LabelError::Duplicate("a".to_owned())));
    }

    proptest! {
        #[test]
        fn canonical_texts_are_read_back(
            parts in proptest::collection::vec(("[a-z0-9]{1,4}", "[a-zA-Z0-9./_:-]{1,8}", "[a-zA-Z0-9=:/._-]{0,8}"), 1..8),
        ) {
            let labels: Labels = parts.iter().map(|(s, k, v)| Label::new(s, k, v).unwrap()).collect();
            prop_assert_eq!(Labels::parse_canonical(&labels.canonical()), Ok(labels.clone()));
            prop_assert_eq!(Labels::from_security_labels(&labels.to_security_labels()), Ok(labels));
        }

        #[test]
        fn what_is_read_is_written_back_the_same(text in "[k8s:a-c=;/]{0,24}") {
            if let Ok(labels) = Labels::parse_canonical(&text) {
                prop_assert_eq!(labels.canonical(), text);
            }
        }
    }
}
