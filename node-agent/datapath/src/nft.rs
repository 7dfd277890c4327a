//! The nftables table of the node: masquerading, keeping tunnel packets out of connection tracking, and answering for
//! addresses that nobody has.
//!
//! Rules are held in nft's own JSON (libnftables-json(5)), in the form in which `nft -j list` prints them, so that a
//! rule that somebody changed or removed shows as a difference. What varies sits in named sets.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use basal_maps::mark;
use ipnet::IpNet;
use serde_json::{Value, json};

use crate::names::{HOST_DEVICE, IfName};

/// Name of our table, family inet.
pub const TABLE: &str = "basal";

/// Every device name of ours, as nft writes a wildcard.
const OUR_DEVICES: &str = "cilium_*";

/// A table of family inet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NftTable {
    /// Sets of prefixes by name.
    pub sets: BTreeMap<String, NftSet>,
    /// Base chains by name.
    pub chains: BTreeMap<String, NftChain>,
}

/// A set of address prefixes (flag interval).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NftSet {
    /// `ipv4_addr` or `ipv6_addr`.
    pub element_type: String,
    /// The prefixes.
    pub elements: BTreeSet<IpNet>,
}

/// A base chain with policy accept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NftChain {
    /// `nat` or `filter`.
    pub kind: String,
    /// `prerouting`, `output`, `postrouting`.
    pub hook: String,
    /// Priority: -300 is raw, 100 is srcnat.
    pub priority: i64,
    /// Each rule's list of expressions.
    pub rules: Vec<Value>,
}

/// What the table depends on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NftPlan {
    /// Pod CIDRs of this node.
    pub local_cidrs: BTreeSet<IpNet>,
    /// The router addresses of this node.
    pub routers: Vec<IpAddr>,
    /// UDP port of the tunnel; `None` in native routing.
    pub tunnel_port: Option<u16>,
    /// How IPv4 from pods to the outside is masqueraded, if it is.
    pub masquerade_ipv4: Option<Masquerade>,
    /// How IPv6 is.
    pub masquerade_ipv6: Option<Masquerade>,
}

/// How packets from pods to the outside are masqueraded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Masquerade {
    /// What goes to these keeps its source; `None` where no rule has to ask. A set takes no networks that overlap.
    pub keeps_source: Option<BTreeSet<IpNet>>,
    /// Devices that programs masquerade on.
    pub by_programs: BTreeSet<IfName>,
}

impl NftPlan {
    /// The table.
    ///
    /// - `raw_prerouting`: the sender of a packet that programs hand to the stack, because no pod has its destination, is
    ///   told. Here, and in `raw_output`, tunnel packets are not tracked.
    /// - `postrouting`: what a pod sends over a device that is not ours takes that device's address, unless it goes to a
    ///   native network, or programs masquerade there; what enters `cilium_host` for another node's pods from an address that is not a local pod's (the node's own,
    ///   or a client's that kube-proxy translated) takes the router address, because the reply must come back through the tunnel.
    #[must_use]
    pub fn table(&self) -> NftTable {
        let mut sets = BTreeMap::new();
        let mut postrouting = Vec::new();
        for (v6, masquerade) in [(false, &self.masquerade_ipv4), (true, &self.masquerade_ipv6)] {
            let router = self.routers.iter().find(|ip| ip.is_ipv6() == v6);
            let Some(router) = router else { continue };
            let (ip, element_type, [local_pods, native]) = if v6 {
                ("ip6", "ipv6_addr", ["local_pods6", "native6"])
            } else {
                ("ip", "ipv4_addr", ["local_pods4", "native4"])
            };
            let mut set = |name: &str, elements| {
                sets.insert(name.to_owned(), NftSet { element_type: element_type.to_owned(), elements });
            };
            set(local_pods, of_family(&self.local_cidrs, v6).collect());

            let address = |field: &str, op: &str, set: &str| matches(op, payload(ip, field), json!(format!("@{set}")));
            let device = |op: &str, name: &str| matches(op, meta("oifname"), json!(name));
            if let Some(masquerade) = masquerade {
                let mut rule = vec![address("saddr", "==", local_pods)];
                if let Some(elements) = masquerade.keeps_source.clone() {
                    set(native, elements);
                    rule.push(address("daddr", "!=", native));
                }
                rule.push(device("!=", OUR_DEVICES));
                rule.extend(masquerade.by_programs.iter().map(|link| device("!=", link.as_str())));
                rule.push(json!({"masquerade": null}));
                postrouting.push(json!(rule));
            }
            if self.tunnel_port.is_some() {
                postrouting.push(json!([
                    device("==", HOST_DEVICE),
                    address("saddr", "!=", local_pods),
                    address("daddr", "!=", local_pods),
                    {"snat": {"family": ip, "addr": router}},
                ]));
            }
        }

        let chain = |kind: &str, hook: &str, priority, rules| NftChain {
            kind: kind.to_owned(),
            hook: hook.to_owned(),
            priority,
            rules,
        };
        let mut chains = BTreeMap::from([("postrouting".to_owned(), chain("nat", "postrouting", 100, postrouting))]);
        let mut received = vec![json!([
            // The mark first: every packet that the node receives comes by here.
            matches("==", json!({"&": [meta("mark"), mark::MAGIC_MASK]}), json!(mark::MAGIC_UNREACHABLE)),
            matches("==", meta("iifname"), json!(OUR_DEVICES)),
            {"reject": {"type": "icmpx", "expr": "host-unreachable"}},
        ])];
        if let Some(port) = self.tunnel_port {
            let untracked = json!([matches("==", payload("udp", "dport"), json!(port)), {"notrack": null}]);
            chains.insert("raw_output".to_owned(), chain("filter", "output", -300, vec![untracked.clone()]));
            received.push(untracked);
        }
        chains.insert("raw_prerouting".to_owned(), chain("filter", "prerouting", -300, received));
        NftTable { sets, chains }
    }
}

fn of_family(networks: &BTreeSet<IpNet>, v6: bool) -> impl Iterator<Item = IpNet> {
    networks.iter().filter(move |network| network.addr().is_ipv6() == v6).map(IpNet::trunc)
}

fn meta(key: &str) -> Value {
    json!({"meta": {"key": key}})
}

fn payload(protocol: &str, field: &str) -> Value {
    json!({"payload": {"protocol": protocol, "field": field}})
}

fn matches(op: &str, left: Value, right: Value) -> Value {
    json!({"match": {"op": op, "left": left, "right": right}})
}

impl NftTable {
    /// One transaction that makes the table `name` what this is, whatever it was.
    #[must_use]
    pub fn replacing(&self, name: &str) -> Value {
        let table = json!({"family": "inet", "name": name});
        // Adding first makes the deletion succeed where there was none.
        let mut commands = vec![
            json!({"add": {"table": table}}),
            json!({"delete": {"table": table}}),
            json!({"add": {"table": table}}),
        ];
        for (set_name, set) in &self.sets {
            let mut object = json!({
                "family": "inet", "table": name, "name": set_name, "type": set.element_type, "flags": ["interval"],
            });
            if !set.elements.is_empty() {
                object["elem"] = set
                    .elements
                    .iter()
                    .map(|net| json!({"prefix": {"addr": net.network(), "len": net.prefix_len()}}))
                    .collect();
            }
            commands.push(json!({"add": {"set": object}}));
        }
        for (chain_name, chain) in &self.chains {
            commands.push(json!({"add": {"chain": {
                "family": "inet", "table": name, "name": chain_name,
                "type": chain.kind, "hook": chain.hook, "prio": chain.priority, "policy": "accept",
            }}}));
            for rule in &chain.rules {
                commands.push(json!({"add": {"rule": {
                    "family": "inet", "table": name, "chain": chain_name, "expr": rule,
                }}}));
            }
        }
        json!({"nftables": commands})
    }

    /// Reads what `nft -j list table inet <name>` printed. Objects that [`NftTable`] has no place for are ignored.
    #[must_use]
    pub fn from_listing(listing: &Value) -> Self {
        let mut table = Self::default();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        for object in listing["nftables"].as_array().into_iter().flatten() {
            if let Some(set) = object.get("set") {
                let elements = set["elem"].as_array().into_iter().flatten().filter_map(prefix).collect();
                table.sets.insert(text(&set["name"]), NftSet { element_type: text(&set["type"]), elements });
            } else if let Some(chain) = object.get("chain") {
                let found = NftChain {
                    kind: text(&chain["type"]),
                    hook: text(&chain["hook"]),
                    priority: chain["prio"].as_i64().unwrap_or_default(),
                    rules: Vec::new(),
                };
                table.chains.insert(text(&chain["name"]), found);
            } else if let Some(rule) = object.get("rule")
                && let Some(chain) = table.chains.get_mut(rule["chain"].as_str().unwrap_or_default())
            {
                chain.rules.push(rule["expr"].clone());
            }
        }
        table
    }
}

/// A set element: a bare address, or a prefix.
fn prefix(element: &Value) -> Option<IpNet> {
    match element.get("prefix") {
        Some(prefix) => {
            let addr: IpAddr = prefix["addr"].as_str()?.parse().ok()?;
            IpNet::new(addr, u8::try_from(prefix["len"].as_u64()?).ok()?).ok()
        }
        None => element.as_str()?.parse::<IpAddr>().ok().map(IpNet::from),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> NftPlan {
        NftPlan {
            local_cidrs: BTreeSet::from(["10.0.1.0/24".parse().unwrap(), "fd00:0:1::/64".parse().unwrap()]),
            routers: vec!["10.0.1.1".parse().unwrap(), "fd00:0:1::1".parse().unwrap()],
            tunnel_port: Some(8472),
            masquerade_ipv4: Some(Masquerade::default()),
            masquerade_ipv6: None,
        }
    }

    /// What goes to these networks keeps its source.
    fn keeping(networks: &[&str]) -> Option<Masquerade> {
        let networks = networks.iter().map(|network| network.parse().unwrap()).collect();
        Some(Masquerade { keeps_source: Some(networks), by_programs: BTreeSet::new() })
    }

    fn native() -> NftPlan {
        let [masquerade_ipv4, masquerade_ipv6] = [keeping(&["10.0.2.0/24"]), keeping(&[])];
        NftPlan { tunnel_port: None, masquerade_ipv4, masquerade_ipv6, ..plan() }
    }

    #[test]
    fn masquerading_is_per_family() {
        let table = plan().table();
        let rules = &table.chains["postrouting"].rules;
        let masquerading = rules.iter().filter(|rule| rule.to_string().contains("masquerade")).count();
        assert_eq!((rules.len(), masquerading), (3, 1));
        assert_eq!(table.sets.len(), 2);
    }

    #[test]
    fn a_family_without_a_router_has_no_rules() {
        let table = NftPlan { routers: vec!["10.0.1.1".parse().unwrap()], ..plan() }.table();
        assert!(!table.sets.contains_key("local_pods6"));
        assert_eq!(table.chains["postrouting"].rules.len(), 2);
    }

    #[test]
    fn without_a_tunnel_packets_to_pods_of_other_nodes_keep_their_source() {
        let table = native().table();
        let [four, six] = ["native4", "native6"].map(|set| &table.sets[set].elements);
        assert_eq!(*four, BTreeSet::from(["10.0.2.0/24".parse().unwrap()]));
        assert_eq!(*six, BTreeSet::new(), "no block of the family is known");
        let rules = &table.chains["postrouting"].rules;
        assert_eq!(rules.len(), 2, "nothing has to come back by a tunnel");
        assert!(rules.iter().all(|rule| rule.to_string().contains("@native")), "{rules:?}");
        assert!(!table.chains.contains_key("raw_output"));
        assert_eq!(table.chains["raw_prerouting"].rules, plan().table().chains["raw_prerouting"].rules[..1]);
    }

    #[test]
    fn devices_with_programs_are_left_out() {
        let by_programs = ["eth0", "eth1"].map(|name| IfName::new(name).unwrap()).into();
        let masquerade = Masquerade { keeps_source: None, by_programs };
        let table = NftPlan { masquerade_ipv4: Some(masquerade), ..plan() }.table();
        let rule = table.chains["postrouting"].rules[0].to_string();
        assert!(["\"eth0\"", "\"eth1\"", "cilium_*"].iter().all(|device| rule.contains(device)), "{rule}");
        assert_eq!(rule.matches("\"!=\"").count(), 3, "{rule}");
    }

    #[test]
    fn a_listing_reads_back_as_the_table() {
        for table in [plan().table(), native().table()] {
            // The transaction has the same objects as a listing, wrapped in commands.
            let commands = table.replacing(TABLE);
            let objects: Vec<Value> =
                commands["nftables"].as_array().unwrap().iter().filter_map(|c| c.get("add")).cloned().collect();
            assert_eq!(NftTable::from_listing(&json!({"nftables": objects})), table);
        }
    }
}
