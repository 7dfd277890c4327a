//! Label filters: the file `label-prefix-file`, the key `labels`, and the labels that they are for.

use basal_agent::identity::filter::LabelFilter;
use basal_crds::labels::{Label, Labels};

/// Three parts, with an empty line between them: the key `labels`, labels (one a line), the file.
pub(crate) fn filter(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let mut parts = text.splitn(3, "\n\n");
    let (patterns, labels, file) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default(), parts.next());
    let labels: Labels = labels.lines().filter_map(|line| Label::parse(line).ok()).collect();
    // An identity has at least one label.
    assert!(labels.is_empty() || Labels::parse_canonical(&labels.canonical()).as_ref() == Ok(&labels), "{labels:?}");
    assert_eq!(Labels::from_security_labels(&labels.to_security_labels()).as_ref(), Ok(&labels));
    match LabelFilter::new(file, patterns) {
        Ok(filter) => {
            let picked = filter.pick(&labels);
            assert!(picked.iter().all(|label| labels.get(label.key()) == Some(label)), "a label that was not there");
            assert_eq!(filter.pick(&picked), picked);
            assert!(labels.iter().filter(|label| filter.counts(label)).count() == picked.len());
        }
        Err(error) => super::explained(&error),
    }
}
