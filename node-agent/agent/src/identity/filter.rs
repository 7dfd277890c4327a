//! The filter that picks the labels of an identity (Cilium documentation, "Limiting identity-relevant labels").
//!
//! A pattern is a regular expression that has to match at the start of the key, with an optional source before a colon;
//! `!` behind the source makes it an exclusion. A label counts when its longest inclusion is longer than its shortest
//! exclusion, or when nothing excludes it and no user pattern includes anything (an inclusion by the user turns the
//! filter into a list of what counts).

use basal_crds::labels::{Label, Labels, SOURCE_RESERVED};
use regex::Regex;
use serde::Deserialize;

/// What Cilium includes and excludes by default, as patterns.
const DEFAULT_PATTERNS: &[&str] = &[
    "reserved:.*",
    r"io\.kubernetes\.pod\.namespace",
    r"io\.cilium\.k8s\.namespace\.labels",
    r"app\.kubernetes\.io",
    r"io\.cilium\.k8s\.policy\.cluster",
    r"io\.cilium\.k8s\.policy\.serviceaccount",
    r"!io\.kubernetes",
    r"!kubernetes\.io",
    r"!statefulset\.kubernetes\.io/pod-name",
    r"!apps\.kubernetes\.io/pod-index",
    r"!batch\.kubernetes\.io/job-completion-index",
    r"!batch\.kubernetes\.io/controller-uid",
    r"!.*beta\.kubernetes\.io",
    r"!k8s\.io",
    "!pod-template-generation",
    "!pod-template-hash",
    "!controller-revision-hash",
    "!controller-uid",
    "!annotation.*",
    "!etcd_node",
    r"!topology\.kubernetes\.io",
];

/// The version of `label-prefix-file` that is read.
const FILE_VERSION: u32 = 1;

/// Why the configuration of the filter is wrong.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// A pattern has nothing to match.
    #[error("configuration key labels: {0:?} has no pattern behind its source; write [source:][!]pattern")]
    Empty(String),
    /// A pattern is no regular expression.
    #[error("configuration key labels: {pattern:?} is no regular expression: {source}")]
    Regex {
        /// The pattern.
        pattern: String,
        /// What is wrong with it.
        source: Box<regex::Error>,
    },
    /// The file does not parse.
    #[error(
        "label-prefix-file: {0}; it looks like {{\"version\":1,\"valid-prefixes\":[{{\"prefix\":\"app\",\"source\":\"k8s\",\"invert\":false}}]}}"
    )]
    File(#[from] serde_json::Error),
    /// The file has another version.
    #[error("label-prefix-file: version {0} is not known; write 1")]
    FileVersion(u32),
}

#[derive(Debug, Clone)]
struct Pattern {
    /// Empty: any.
    source: String,
    exclude: bool,
    key: Regex,
}

impl Pattern {
    fn new(source: &str, exclude: bool, key: &str) -> Result<Self, FilterError> {
        let regex =
            Regex::new(key).map_err(|error| FilterError::Regex { pattern: key.to_owned(), source: Box::new(error) })?;
        Ok(Self { source: source.to_owned(), exclude, key: regex })
    }

    fn parse(text: &str) -> Result<Self, FilterError> {
        let (source, key) = text.split_once(':').unwrap_or(("", text));
        let (exclude, pattern) = match key.strip_prefix('!') {
            Some(rest) => (true, rest),
            None => (false, key),
        };
        if pattern.is_empty() {
            return Err(FilterError::Empty(text.to_owned()));
        }
        Self::new(source, exclude, pattern)
    }

    /// How many bytes of the key match, when the match is at its start.
    fn matches(&self, label: &Label) -> Option<usize> {
        if !self.source.is_empty() && self.source != label.source() {
            return None;
        }
        self.key.find(label.key()).filter(|found| found.start() == 0).map(|found| found.end())
    }
}

#[derive(Debug, Deserialize)]
struct PrefixFile {
    version: u32,
    #[serde(rename = "valid-prefixes")]
    valid_prefixes: Vec<PrefixEntry>,
}

#[derive(Debug, Deserialize)]
struct PrefixEntry {
    prefix: String,
    #[serde(default)]
    source: String,
    #[serde(default)]
    invert: bool,
}

/// Picks the labels that make up an identity.
#[derive(Debug, Clone)]
pub struct LabelFilter {
    patterns: Vec<Pattern>,
    /// Whether only what is included counts.
    listed_only: bool,
}

impl LabelFilter {
    /// The filter of the keys `label-prefix-file` (its content; it replaces the defaults) and `labels` (patterns
    /// separated by spaces; they are added).
    ///
    /// # Errors
    /// See [`FilterError`].
    pub fn new(file: Option<&str>, labels: &str) -> Result<Self, FilterError> {
        let mut patterns = Vec::new();
        let mut listed_only = false;
        match file {
            None => {
                for text in DEFAULT_PATTERNS {
                    patterns.push(Pattern::parse(text)?);
                }
            }
            Some(json) => {
                let file: PrefixFile = serde_json::from_str(json)?;
                if file.version != FILE_VERSION {
                    return Err(FilterError::FileVersion(file.version));
                }
                for entry in &file.valid_prefixes {
                    listed_only |= !entry.invert;
                    patterns.push(Pattern::new(&entry.source, entry.invert, &entry.prefix)?);
                }
                // Reserved labels always count: they name what no user can relabel.
                patterns.push(Pattern::new(SOURCE_RESERVED, false, ".*")?);
            }
        }
        for text in labels.split_whitespace() {
            let pattern = Pattern::parse(text)?;
            listed_only |= !pattern.exclude;
            patterns.push(pattern);
        }
        Ok(Self { patterns, listed_only })
    }

    /// Whether a label counts.
    #[must_use]
    pub fn counts(&self, label: &Label) -> bool {
        let lengths = |exclude: bool| {
            self.patterns
                .iter()
                .filter(move |pattern| pattern.exclude == exclude)
                .filter_map(|pattern| pattern.matches(label))
        };
        let included = lengths(false).max();
        let excluded = lengths(true).filter(|length| *length > 0).min();
        match (included.unwrap_or(0), excluded) {
            (included, Some(excluded)) => included > excluded,
            (included, None) => !self.listed_only || included > 0,
        }
    }

    /// The labels that count.
    #[must_use]
    pub fn pick(&self, labels: &Labels) -> Labels {
        labels.iter().filter(|label| self.counts(label)).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn label(text: &str) -> Label {
        Label::parse(text).unwrap()
    }

    fn counting(filter: &LabelFilter, keys: &[&str]) -> Vec<String> {
        keys.iter().filter(|key| filter.counts(&label(key))).map(|key| (*key).to_owned()).collect()
    }

    #[test]
    fn defaults_are_ciliums() {
        let filter = LabelFilter::new(None, "").unwrap();
        let count = [
            "k8s:app=web",
            "k8s:io.kubernetes.pod.namespace=x",
            "k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name=x",
            "k8s:app.kubernetes.io/name=web",
            "k8s:io.cilium.k8s.policy.cluster=default",
            "k8s:io.cilium.k8s.policy.serviceaccount=default",
            "reserved:init",
            "k8s:security",
        ];
        let do_not = [
            "k8s:io.kubernetes.container.name=x",
            "k8s:kubernetes.io/os=linux",
            "k8s:statefulset.kubernetes.io/pod-name=web-0",
            "k8s:apps.kubernetes.io/pod-index=0",
            "k8s:batch.kubernetes.io/job-completion-index=1",
            "k8s:batch.kubernetes.io/controller-uid=1",
            "k8s:failure-domain.beta.kubernetes.io/zone=a",
            "k8s:k8s.io/x=1",
            "k8s:pod-template-hash=1",
            "k8s:pod-template-generation=1",
            "k8s:controller-revision-hash=1",
            "k8s:controller-uid=1",
            "k8s:annotation.x=1",
            "k8s:etcd_node=1",
            "k8s:topology.kubernetes.io/zone=a",
        ];
        assert_eq!(counting(&filter, &count), count);
        assert_eq!(counting(&filter, &do_not), Vec::<String>::new());
    }

    #[test]
    fn an_inclusion_of_the_user_lists_what_counts() {
        let filter = LabelFilter::new(None, "k8s:team k8s:tier").unwrap();
        assert_eq!(
            counting(&filter, &["k8s:team=a", "k8s:app=web", "any:team=a", "k8s:io.kubernetes.pod.namespace=x"]),
            ["k8s:team=a", "k8s:io.kubernetes.pod.namespace=x"]
        );
    }

    #[test]
    fn an_exclusion_of_the_user_only_takes_away() {
        let filter = LabelFilter::new(None, "k8s:!job-id !x").unwrap();
        assert_eq!(
            counting(&filter, &["k8s:job-id=1", "k8s:xy=1", "k8s:app=web", "any:job-id=1"]),
            ["k8s:app=web", "any:job-id=1"]
        );
    }

    #[test]
    fn the_longer_of_inclusion_and_exclusion_wins() {
        let filter = LabelFilter::new(None, "!example.com example.com/team").unwrap();
        assert_eq!(
            counting(&filter, &["k8s:example.com/team=a", "k8s:example.com/other=a", "k8s:beside=1"]),
            ["k8s:example.com/team=a"]
        );
    }

    #[test]
    fn patterns_match_at_the_start_only() {
        let filter = LabelFilter::new(None, "!team").unwrap();
        assert_eq!(counting(&filter, &["k8s:my-team=a", "k8s:team=a"]), ["k8s:my-team=a"]);
    }

    #[test]
    fn a_file_replaces_the_defaults() {
        let file =
            r#"{"version":1,"valid-prefixes":[{"prefix":"app","source":"k8s"},{"prefix":"app.secret","invert":true}]}"#;
        let filter = LabelFilter::new(Some(file), "").unwrap();
        let keys = ["k8s:app=a", "k8s:app.secret=a", "k8s:io.kubernetes.pod.namespace=x", "reserved:host"];
        assert_eq!(counting(&filter, &keys), ["k8s:app=a", "reserved:host"]);
    }

    #[test]
    fn wrong_patterns_are_refused_by_name() {
        for (labels, part) in [("k8s:", "\"k8s:\""), ("!", "\"!\""), ("a(", "\"a(\"")] {
            let message = LabelFilter::new(None, labels).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
        assert!(LabelFilter::new(Some("{}"), "").unwrap_err().to_string().contains("version"));
        let newer = LabelFilter::new(Some(r#"{"version":2,"valid-prefixes":[]}"#), "").unwrap_err();
        assert!(newer.to_string().contains("version 2"));
    }

    proptest! {
        /// Where every pattern is a literal the rule can be said with `starts_with`.
        #[test]
        fn literals_equal_the_rule_in_plain_words(
            keys in proptest::collection::vec("[ab]{1,4}", 1..4),
            include in proptest::collection::vec("[ab]{1,3}", 0..3),
            exclude in proptest::collection::vec("[ab]{1,3}", 0..3),
        ) {
            let patterns: Vec<_> = include.iter().cloned().chain(exclude.iter().map(|key| format!("!{key}"))).collect();
            let filter = LabelFilter::new(Some(r#"{"version":1,"valid-prefixes":[]}"#), &patterns.join(" ")).unwrap();
            for key in keys {
                let longest = include.iter().filter(|p| key.starts_with(p.as_str())).map(String::len).max().unwrap_or(0);
                let shortest = exclude.iter().filter(|p| key.starts_with(p.as_str())).map(String::len).min().unwrap_or(0);
                let expected = longest > shortest || (include.is_empty() && shortest == 0);
                prop_assert_eq!(filter.counts(&Label::new("k8s", &key, "").unwrap()), expected, "{}", key);
            }
        }
    }
}
