//! Keys of Cilium that ask for what Basal does not do, where leaving it out would weaken security or change forwarding.

use super::{Layer, layers::Layers, values::go_bool};

/// A key with the values of it that stop the start.
#[derive(Debug, Clone, Copy)]
pub struct Refusal {
    /// The key.
    pub key: &'static str,
    /// Whether a value asks for it.
    pub asks: fn(&str) -> bool,
    /// What is asked for, as the object of "asks for".
    pub what: &'static str,
    /// The way out.
    pub instead: &'static str,
}

/// A value that was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// The key.
    pub key: &'static str,
    /// Its value.
    pub value: String,
    /// Where it stands.
    pub place: String,
    /// What is asked for.
    pub what: &'static str,
    /// The way out.
    pub instead: &'static str,
}

/// What Basal 0.1 refuses of Cilium 1.20's keys. Keys that only ask for more observability or speed are not here.
pub const REFUSALS: &[Refusal] = &[
    // Encryption: leaving it out sends in clear what the user believes to be encrypted.
    on("enable-wireguard", "WireGuard encryption", OFF),
    on("enable-ipsec", "IPsec encryption", OFF),
    on("enable-ztunnel", "encryption by ztunnel", OFF),
    on("encrypt-node", "encryption of traffic between nodes", OFF),
    on("enable-encryption-strict-mode-egress", "dropping of unencrypted traffic", OFF),
    on("enable-encryption-strict-mode-ingress", "dropping of unencrypted traffic", OFF),
    // Filtering.
    Refusal {
        key: "enable-policy",
        asks: |value| value.eq_ignore_ascii_case("always"),
        what: "traffic to be denied unless a policy allows it, and Basal does not enforce policies yet",
        instead: "set it to \"default\" or \"never\"; with \"default\" each policy is reported as NOT ENFORCED",
    },
    on("enable-host-firewall", "policies on the node itself", OFF),
    // Forwarding.
    Refusal {
        key: "tunnel-protocol",
        asks: |value| value != "vxlan",
        what: "another encapsulation than VXLAN",
        instead: "set it to \"vxlan\"",
    },
    Refusal {
        key: "datapath-mode",
        asks: |value| !matches!(value, "veth" | "auto"),
        what: "pod devices other than veth pairs",
        instead: "set it to \"veth\"",
    },
    Refusal {
        key: "kube-proxy-replacement",
        asks: |value| !matches!(value, "disabled") && go_bool(value) != Ok(false),
        what: "Services without kube-proxy",
        instead: "set it to \"false\" and run kube-proxy",
    },
    on("enable-masquerade-to-route-source", "masquerading by the address that the route names", OFF),
    on("only-masquerade-default-pool", "pods of other pools to keep their address", OFF),
    on("enable-ip-masq-agent", "masquerading by the ip-masq-agent's rules", OFF),
    on("enable-egress-gateway", "egress gateways", OFF),
    on("enable-local-redirect-policy", "local redirect policies", OFF),
    on("enable-bgp-control-plane", "routes announced by BGP", OFF),
    on("enable-l2-announcements", "addresses announced by ARP and NDP", OFF),
    on("enable-nat46x64-gateway", "translation between IPv4 and IPv6", OFF),
    on("enable-srv6", "SRv6", OFF),
    on("enable-vtep", "foreign VXLAN endpoints", OFF),
    Refusal {
        key: "cni-chaining-mode",
        asks: |value| value != "none",
        what: "another CNI plugin to make the pod's devices",
        instead: "set it to \"none\"",
    },
    Refusal {
        key: "ipam",
        asks: |value| value != "cluster-pool",
        what: "an IPAM mode that Basal does not have yet",
        instead: "set it to \"cluster-pool\"",
    },
];

const OFF: &str = "set it to \"false\" or remove it";

/// A switch that must be off. A value that is no boolean is refused, too: better than to guess what it asks for.
const fn on(key: &'static str, what: &'static str, instead: &'static str) -> Refusal {
    Refusal { key, asks: |value| go_bool(value) != Ok(false), what, instead }
}

/// What of the layers is refused. Only the value in force counts.
pub(super) fn check(refusals: &[Refusal], layers: &Layers) -> Vec<Refused> {
    let refused = |refusal: &Refusal| {
        let (layer, value): (Layer, &str) = layers.origin(refusal.key)?;
        (refusal.asks)(value).then(|| Refused {
            key: refusal.key,
            value: value.to_owned(),
            place: layers.place(layer, refusal.key),
            what: refusal.what,
            instead: refusal.instead,
        })
    };
    refusals.iter().filter_map(refused).collect()
}

/// All refusals in one text.
pub(super) fn sentence(refused: &[Refused]) -> String {
    let lines = refused.iter().map(|r| {
        format!("{}: {:?} ({}) asks for {}, which Basal does not do; {}", r.key, r.value, r.place, r.what, r.instead)
    });
    lines.collect::<Vec<_>>().join("\n")
}
