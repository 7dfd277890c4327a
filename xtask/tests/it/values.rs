//! Values, and what becomes of them.

use serde_json::{Value, json};

use crate::chart::{helm, objects, only, with_etcd};

/// The values with etcd, with one more at a JSON pointer.
fn with(pointer: &str, value: Value) -> Value {
    let mut values = with_etcd();
    let mut place = &mut values;
    for part in pointer.split('/') {
        place = &mut place[part];
    }
    *place = value;
    values
}

#[test]
fn the_least_values_pass_the_linter() {
    helm(&["lint", "--strict"], &json!({})).unwrap();
    helm(&["lint", "--strict"], &with_etcd()).unwrap();
}

#[test]
fn values_that_cannot_work_are_refused_by_name() {
    for (pointer, value, wanted) in [
        ("etcd/endpoints", json!([]), "at '/etcd/endpoints': minItems: got 0, want 1"),
        ("etcd/endpoints", json!(["etcd.example:2379"]), "at '/etcd/endpoints/0': "),
        ("etcd/enabled", json!("yes"), "at '/etcd/enabled': got string, want boolean"),
        ("ipam/mode", json!("multi-pool"), "at '/ipam/mode': value must be 'cluster-pool'"),
        ("ipam/operator/clusterPoolIPv4PodCIDRList", json!([]), "at '/ipam/operator/clusterPoolIPv4PodCIDRList': "),
        ("ipam/operator/clusterPoolIPv4MaskSize", json!(31), "at '/ipam/operator/clusterPoolIPv4MaskSize': "),
        ("ipam/operator/clusterPoolIPv6MaskSize", json!(127), "at '/ipam/operator/clusterPoolIPv6MaskSize': "),
        ("ipv4/enabled", json!(false), "at '/ipv6/enabled': value must be true"),
        ("cluster/name", json!("A"), "at '/cluster/name': "),
        ("cluster/id", json!(256), "at '/cluster/id': "),
        ("encryption/enabled", json!(true), "at '/encryption/enabled': value must be false"),
        ("routingMode", json!("disabled"), "at '/routingMode': value must be one of 'tunnel', 'native'"),
        ("autoDirectNodeRoutes", json!(true), "at '/routingMode': value must be 'native'"),
        ("directRoutingSkipUnreachable", json!(true), "at '/autoDirectNodeRoutes': value must be true"),
        ("ipv4NativeRoutingCIDR", json!("10.0.0.0"), "at '/ipv4NativeRoutingCIDR': "),
        ("ipv6NativeRoutingCIDR", json!("fd00::"), "at '/ipv6NativeRoutingCIDR': "),
        ("tunnelProtocol", json!("geneve"), "at '/tunnelProtocol': value must be 'vxlan'"),
        ("kubeProxyReplacement", json!("true"), "at '/kubeProxyReplacement': "),
        ("policyEnforcementMode", json!("always"), "at '/policyEnforcementMode': "),
        ("operator/replicas", json!(0), "at '/operator/replicas': "),
        ("operator/identityGCInterval", json!("often"), "at '/operator/identityGCInterval': "),
        ("operator/affinity", json!({ "podAntiAffinity": {} }), "at '/operator/affinity': "),
        ("image/digest", json!("latest"), "at '/image/digest': "),
    ] {
        let error = helm(&["template", "basal"], &with(pointer, value)).expect_err(pointer).to_string();
        assert!(error.contains(wanted), "{pointer}: wanted {wanted:?}, helm said: {error}");
    }
}

#[test]
fn values_become_keys_of_cilium() {
    let mut values = with("ipv6/enabled", json!(true));
    values["ipam"]["operator"]["clusterPoolIPv4PodCIDRList"] = json!(["10.1.0.0/16", "10.2.0.0/16"]);
    values["cluster"] = json!({ "name": "west", "id": 3 });
    values["etcd"]["endpoints"] = json!(["https://a:2379", "https://b:2379"]);
    values["routingMode"] = json!("native");
    values["autoDirectNodeRoutes"] = json!(true);
    values["ipv4NativeRoutingCIDR"] = json!("10.0.0.0/8");
    values["extraConfig"] = json!({ "identity-gc-interval": "30s", "own": true });
    let config = only(&objects(&values).unwrap(), "ConfigMap");
    assert_eq!(config["metadata"]["name"], "cilium-config");
    for (key, value) in [
        ("cluster-name", "west"),
        ("cluster-id", "3"),
        ("cluster-pool-ipv4-cidr", "10.1.0.0/16 10.2.0.0/16"),
        ("cluster-pool-ipv6-mask-size", "120"),
        ("enable-ipv6", "true"),
        ("routing-mode", "native"),
        ("auto-direct-node-routes", "true"),
        ("direct-routing-skip-unreachable", "false"),
        ("ipv4-native-routing-cidr", "10.0.0.0/8"),
        ("identity-allocation-mode", "kvstore"),
        ("kvstore-opt", r#"{"etcd.config": "/var/lib/etcd-config/etcd.config"}"#),
        ("identity-gc-interval", "30s"),
        ("own", "true"),
    ] {
        assert_eq!(config["data"][key], value, "{key}");
    }
    let etcd: Value = serde_saphyr::from_str(config["data"]["etcd-config"].as_str().unwrap()).unwrap();
    assert_eq!(etcd["endpoints"], json!(["https://a:2379", "https://b:2379"]));
    assert_eq!(etcd["key-file"], "/var/lib/etcd-secrets/etcd-client.key");
    assert_eq!(config["data"].get("ipv6-native-routing-cidr"), None);
    for value in config["data"].as_object().unwrap().values() {
        assert!(value.is_string(), "a ConfigMap holds texts: {value}");
    }
}

#[test]
fn a_family_that_is_off_has_no_pool() {
    let config = only(&objects(&with_etcd()).unwrap(), "ConfigMap");
    assert_eq!(config["data"]["enable-ipv6"], "false");
    assert_eq!(config["data"].get("cluster-pool-ipv6-cidr"), None);
}

#[test]
fn without_etcd_nothing_of_it_is_left() {
    let objects = objects(&json!({})).unwrap();
    let config = only(&objects, "ConfigMap")["data"].clone();
    assert_eq!(config["identity-allocation-mode"], "crd");
    assert!(config.get("kvstore").is_none() && !config.to_string().contains("etcd"), "{config}");
    for kind in ["DaemonSet", "Deployment"] {
        let workload = only(&objects, kind).to_string();
        assert!(!workload.contains("etcd-secrets") && !workload.contains("etcd-config"), "{kind}");
    }
}

#[test]
fn without_tls_no_secret_is_mounted() {
    let objects = objects(&with("etcd/ssl", json!(false))).unwrap();
    let etcd = only(&objects, "ConfigMap")["data"]["etcd-config"].clone();
    assert!(!etcd.as_str().unwrap().contains("file"), "{etcd}");
    for kind in ["DaemonSet", "Deployment"] {
        assert!(!only(&objects, kind).to_string().contains("etcd-secrets"), "{kind}");
    }
}

#[test]
fn pods_are_replaced_for_keys_of_their_own_only() {
    let checksum = |values: &Value, kind: &str| {
        let object = only(&objects(values).unwrap(), kind);
        object["spec"]["template"]["metadata"]["annotations"]["cilium.io/cilium-configmap-checksum"].clone()
    };
    let changes =
        |values: Value| ["DaemonSet", "Deployment"].map(|kind| checksum(&values, kind) != checksum(&with_etcd(), kind));
    assert_eq!(changes(with_etcd()), [false, false]);
    let longer = json!(["10.0.0.0/8", "11.0.0.0/8"]);
    assert_eq!(changes(with("ipam/operator/clusterPoolIPv4PodCIDRList", longer)), [false, true]);
    assert_eq!(changes(with("MTU", json!(9000))), [true, false]);
    assert_eq!(changes(with("debug/enabled", json!(true))), [true, true]);
}

#[test]
fn images_are_named_by_tag_or_digest() {
    let digest = format!("sha256:{}", "0".repeat(64));
    let images = |image: Value, operator: Value| {
        let mut values = with("image", image);
        values["operator"]["image"] = operator;
        let objects = objects(&values).unwrap();
        ["DaemonSet", "Deployment"].map(|kind| {
            let image = &only(&objects, kind)["spec"]["template"]["spec"]["containers"][0]["image"];
            image.as_str().unwrap_or_default().to_owned()
        })
    };
    assert_eq!(images(json!({ "repository": "r", "tag": "t" }), json!({})), ["r:t", "r:t"]);
    assert_eq!(images(json!({ "repository": "r" }), json!({ "repository": "o" })), ["r:0.1.0", "o:0.1.0"]);
    let both = images(json!({ "repository": "r", "tag": "t", "digest": digest }), json!({ "tag": "x" }));
    assert_eq!(both, [format!("r@{digest}"), "r:x".to_owned()]);
}

#[test]
fn values_of_ciliums_chart_that_basal_has_no_use_for_are_let_pass() {
    objects(&with("hubble", json!({ "enabled": true }))).unwrap();
}
