//! What the chart's pods may do.

use basal_e2e::servers::{ApiServer, ApiServerOptions};
use serde_json::{Value, json};

use crate::chart::{folder, objects, only, with_etcd};

/// The one container of a workload.
fn container(workload: &Value) -> &Value {
    &workload["spec"]["template"]["spec"]["containers"][0]
}

#[test]
fn no_container_is_privileged_and_capabilities_are_listed() {
    let objects = objects(&with_etcd()).unwrap();
    let (agent, operator) = (only(&objects, "DaemonSet"), only(&objects, "Deployment"));
    for workload in [&agent, &operator] {
        let pod = &workload["spec"]["template"]["spec"];
        assert_eq!(pod["containers"].as_array().unwrap().len(), 1);
        assert_eq!(pod.get("initContainers"), None);
        assert_eq!(container(workload)["securityContext"].get("privileged"), None);
        assert_eq!(container(workload)["securityContext"]["readOnlyRootFilesystem"], true);
        assert_eq!(container(workload)["securityContext"]["capabilities"]["drop"], json!(["ALL"]));
    }
    let added = &container(&agent)["securityContext"]["capabilities"]["add"];
    assert_eq!(*added, json!(["NET_ADMIN", "SYS_ADMIN", "BPF", "PERFMON", "NET_RAW"]));
    assert_eq!(container(&operator)["securityContext"]["capabilities"].get("add"), None);
    assert_eq!(container(&operator)["securityContext"]["allowPrivilegeEscalation"], false);
    assert_eq!(operator["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"], true);
    // Nothing of the host is in the operator's reach.
    let volumes = operator["spec"]["template"]["spec"]["volumes"].as_array().unwrap();
    assert!(volumes.iter().all(|volume| volume.get("hostPath").is_none()), "{volumes:?}");
    // Bidirectional propagation is for privileged containers only.
    assert!(!agent.to_string().contains("Bidirectional"));
}

#[test]
fn the_operators_own_secret_is_not_the_agents() {
    let mut values = with_etcd();
    values["etcd"]["operatorSecretName"] = json!("operator-secret");
    let objects = objects(&values).unwrap();
    let secret = |kind: &str| {
        let workload = only(&objects, kind);
        let volumes = workload["spec"]["template"]["spec"]["volumes"].as_array().cloned().unwrap_or_default();
        volumes.into_iter().find(|volume| volume["name"] == "etcd-secrets").unwrap_or_default()["secret"].clone()
    };
    assert_eq!(secret("DaemonSet"), json!({ "secretName": "cilium-etcd-secrets", "defaultMode": 0o400 }));
    assert_eq!(secret("Deployment"), json!({ "secretName": "operator-secret", "defaultMode": 0o440 }));
}

#[test]
fn a_real_api_server_takes_every_object_and_grants_no_more_than_needed() {
    let server = ApiServer::start(ApiServerOptions::default()).unwrap();
    let install = |values: &Value| {
        for object in objects(values).unwrap() {
            // Strict: a field that the API does not know is an error.
            let apply = ["apply", "--server-side", "--validate=strict", "-f", "-"];
            server.kubectl().unwrap().args(apply).stdin(object.to_string()).done().unwrap();
        }
    };
    // kubectl answers for kinds that the API server knows.
    let kinds = folder().join("crds").canonicalize().unwrap();
    let apply = ["apply", "--server-side", "-f", kinds.to_str().unwrap()];
    server.kubectl().unwrap().args(apply).done().unwrap();
    let wait = ["wait", "--for=condition=Established", "--timeout=30s", "crd", "--all"];
    server.kubectl().unwrap().args(wait).done().unwrap();
    install(&with_etcd());
    let may = |account: &str, verb: &str, resource: &str, namespace: &str| {
        let user = format!("--as=system:serviceaccount:kube-system:{account}");
        let run = server.kubectl().unwrap().args(["auth", "can-i", verb, resource, "-n", namespace, user.as_str()]);
        String::from_utf8(run.output().unwrap().stdout).unwrap().trim().to_owned()
    };
    for (account, verb, resource, namespace, wanted) in [
        ("basal-operator", "get", "secrets", "kube-system", "no"),
        ("basal-operator", "list", "secrets", "kube-system", "no"),
        ("basal-operator", "create", "pods", "kube-system", "no"),
        ("basal-operator", "get", "pods", "default", "yes"),
        ("basal-operator", "list", "pods", "default", "yes"),
        ("basal-operator", "watch", "pods", "default", "no"),
        ("basal-operator", "delete", "pods", "default", "no"),
        ("basal-operator", "delete", "ciliumendpoints.cilium.io", "default", "yes"),
        ("basal-operator", "patch", "ciliumendpoints.cilium.io", "default", "no"),
        ("basal-operator", "patch", "nodes", "kube-system", "no"),
        ("basal-operator", "delete", "nodes", "kube-system", "no"),
        (
            "basal-operator",
            "patch",
            "customresourcedefinitions.apiextensions.k8s.io/others.example.com",
            "default",
            "no",
        ),
        (
            "basal-operator",
            "patch",
            "customresourcedefinitions.apiextensions.k8s.io/ciliumnodes.cilium.io",
            "default",
            "yes",
        ),
        (
            "basal-operator",
            "patch",
            "customresourcedefinitions.apiextensions.k8s.io/podcidrcells.basal.io",
            "default",
            "yes",
        ),
        ("basal-operator", "patch", "podcidrcells.basal.io", "default", "yes"),
        ("basal-operator", "delete", "podcidrcells.basal.io", "default", "no"),
        ("basal-operator", "patch", "ledgers.basal.io", "default", "yes"),
        ("basal-operator", "delete", "ciliumidentities.cilium.io", "default", "yes"),
        ("basal-operator", "delete", "ledgers.basal.io", "default", "no"),
        ("basal-agent", "get", "podcidrcells.basal.io", "default", "no"),
        ("basal-agent", "patch", "ledgers.basal.io", "default", "no"),
        ("basal-operator", "patch", "leases.coordination.k8s.io/cilium-operator-resource-lock", "kube-system", "yes"),
        ("basal-operator", "patch", "leases.coordination.k8s.io/kube-scheduler", "kube-system", "no"),
        ("basal-operator", "patch", "leases.coordination.k8s.io/cilium-operator-resource-lock", "default", "no"),
        ("basal-operator", "watch", "nodes", "default", "yes"),
        ("basal-operator", "create", "events.events.k8s.io", "default", "yes"),
        ("basal-agent", "get", "secrets", "kube-system", "no"),
        ("basal-agent", "patch", "nodes", "default", "no"),
        ("basal-agent", "patch", "pods", "default", "no"),
        ("basal-agent", "delete", "pods", "default", "no"),
        ("basal-agent", "create", "customresourcedefinitions.apiextensions.k8s.io", "default", "no"),
        ("basal-agent", "watch", "pods", "default", "yes"),
        ("basal-agent", "watch", "networkpolicies.networking.k8s.io", "default", "yes"),
    ] {
        assert_eq!(may(account, verb, resource, namespace), wanted, "{account} {verb} {resource} in {namespace}");
    }
    let agents_identities = |verb: &str| may("basal-agent", verb, "ciliumidentities.cilium.io", "default");
    assert_eq!(["list", "create"].map(agents_identities), ["no", "no"]);
    for agents in ["none", "moving"] {
        let mut values = with_etcd();
        values["etcd"]["agents"] = json!(agents);
        install(&values);
        assert_eq!(["list", "create"].map(agents_identities), ["yes", "yes"], "{agents}");
    }
    let create = || may("basal-operator", "create", "ciliumidentities.cilium.io", "default");
    assert_eq!(create(), "yes");
    install(&json!({}));
    assert_eq!(create(), "no");
    assert_eq!(["watch", "create", "patch", "delete"].map(agents_identities), ["yes", "yes", "yes", "no"]);
}
