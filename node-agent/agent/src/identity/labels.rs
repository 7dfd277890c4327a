//! The labels that a pod brings along for its identity (Cilium documentation, "Identity"; key names are Cilium's).

use std::collections::BTreeMap;

use basal_crds::labels::{Label, LabelError, Labels, SOURCE_K8S, SOURCE_RESERVED};

const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
const NAMESPACE_LABELS: &str = "io.cilium.k8s.namespace.labels.";
const SERVICE_ACCOUNT: &str = "io.cilium.k8s.policy.serviceaccount";
const CLUSTER: &str = "io.cilium.k8s.policy.cluster";
/// Keys of Cilium's own: a pod must not claim them.
const OWN_PREFIX: &str = "io.cilium.k8s.";

/// What of a pod and its namespace goes into labels.
#[derive(Debug, Clone, Copy)]
pub struct PodFacts<'a> {
    /// `metadata.namespace`.
    pub namespace: &'a str,
    /// `metadata.labels` of the pod.
    pub labels: &'a BTreeMap<String, String>,
    /// `metadata.labels` of its namespace.
    pub namespace_labels: &'a BTreeMap<String, String>,
    /// `spec.serviceAccountName`; empty when there is none.
    pub service_account: &'a str,
    /// The cluster's name.
    pub cluster: &'a str,
}

/// All labels of a pod, before the filter.
///
/// # Errors
/// A key or value that etcd's text form cannot hold; the API server accepts none such.
pub fn pod_labels(pod: PodFacts<'_>) -> Result<Labels, LabelError> {
    let mut labels = Vec::new();
    let mut insert = |key: &str, value: &str| -> Result<(), LabelError> {
        labels.push(Label::new(SOURCE_K8S, key, value)?);
        Ok(())
    };
    for (key, value) in pod.labels {
        if !key.starts_with(OWN_PREFIX) {
            insert(key, value)?;
        }
    }
    for (key, value) in pod.namespace_labels {
        insert(&format!("{NAMESPACE_LABELS}{key}"), value)?;
    }
    // These come last: a pod's own label of the same key does not stand.
    insert(POD_NAMESPACE, pod.namespace)?;
    if !pod.service_account.is_empty() {
        insert(SERVICE_ACCOUNT, pod.service_account)?;
    }
    insert(CLUSTER, pod.cluster)?;
    Ok(labels.into_iter().collect())
}

/// The label of a reserved identity, `reserved:init` for example.
///
/// # Errors
/// A name with a separator in it.
pub fn reserved(name: &str) -> Result<Labels, LabelError> {
    Ok(Labels::from_iter([Label::new(SOURCE_RESERVED, name, "")?]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::filter::LabelFilter;

    #[test]
    fn labels_are_those_of_cilium() {
        let map = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let pod = PodFacts {
            namespace: "shop",
            labels: &map(&[
                ("app", "web"),
                ("pod-template-hash", "5f"),
                ("io.cilium.k8s.policy.cluster", "forged"),
                ("io.kubernetes.pod.namespace", "forged"),
            ]),
            namespace_labels: &map(&[("kubernetes.io/metadata.name", "shop")]),
            service_account: "default",
            cluster: "west",
        };
        let labels = LabelFilter::new(None, "").unwrap().pick(&pod_labels(pod).unwrap());
        assert_eq!(
            labels.canonical(),
            "k8s:app=web;\
             k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name=shop;\
             k8s:io.cilium.k8s.policy.cluster=west;\
             k8s:io.cilium.k8s.policy.serviceaccount=default;\
             k8s:io.kubernetes.pod.namespace=shop;"
        );
        assert_eq!(reserved("init").unwrap().canonical(), "reserved:init=;");
    }
}
