//! The layouts in the built object's BTF are those that user space writes.

use std::{collections::BTreeMap, process::Command};

use basal_datapath::program::OBJECT;
use serde_json::Value;

/// The structs in the object's BTF, each as its size, then its fields with their byte offsets.
fn structs() -> BTreeMap<String, String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), OBJECT).unwrap();
    let output = Command::new("bpftool").args(["-j", "btf", "dump", "file"]).arg(file.path()).output();
    let output = output.unwrap_or_else(|error| panic!("bpftool cannot be run ({error}); install it"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let dump: Value = serde_json::from_slice(&output.stdout).unwrap();
    let types = dump["types"].as_array().unwrap().iter().filter(|item| item["kind"] == "STRUCT");
    types.map(|item| (item["name"].as_str().unwrap().to_owned(), describe(item))).collect()
}

fn describe(item: &Value) -> String {
    let field =
        |member: &Value| (member["bits_offset"].as_u64().unwrap() / 8, member["name"].as_str().unwrap().to_owned());
    let mut fields: Vec<_> = item["members"].as_array().unwrap().iter().map(field).collect();
    fields.sort_unstable();
    let fields: Vec<_> = fields.iter().map(|(offset, name)| format!("{name}@{offset}")).collect();
    format!("{}: {}", item["size"], fields.join(" "))
}

#[test]
fn the_objects_layouts_are_cilium_1_20() {
    assert!(!OBJECT.is_empty(), "built without BPF object: run `cargo xtask ebpf`");
    let structs = structs();
    for (name, layout) in [
        ("EndpointKey", "20: ip@0 family@16 key@17 cluster_id@18"),
        (
            "EndpointInfo",
            "48: ifindex@0 unused@4 lxc_id@6 flags@8 rt_info@12 mac@16 node_mac@24 sec_id@32 parent_ifindex@36 pad@40",
        ),
        ("IpPrefix", "20: cluster_id@0 pad@2 family@3 ip@4"),
        ("RemoteEndpointInfo", "24: sec_identity@0 tunnel_endpoint@4 pad@20 key@22 flags@23"),
        ("TunnelValue", "20: tunnel_endpoint@0 family@16 key@17 node_id@18"),
        ("NodeKey", "20: pad1@0 pad2@2 family@3 ip@4"),
        ("NodeValue", "4: id@0 spi@2 pad@3"),
        ("MetricsKey", "8: reason@0 dir@1 line@2 file@4 pad1@5 pad2@6"),
        ("MetricsValue", "16: count@0 bytes@8"),
        ("TupleV4", "14: daddr@0 saddr@4 dport@8 sport@10 nexthdr@12 flags@13"),
        ("TupleV6", "38: daddr@0 saddr@16 dport@32 sport@34 nexthdr@36 flags@37"),
        ("DirectConnection", "12: since@0 ended@4 ends@8"),
        (
            "CtEntry",
            "56: reserved@0 backend_id@8 packets@16 bytes@24 lifetime@32 flags@36 rev_nat_index@38 nat_port@40 \
             tx_flags_seen@42 rx_flags_seen@43 src_sec_id@44 last_tx_report@48 last_rx_report@52",
        ),
        ("NatEntryV4", "40: created@0 needs_ct@8 pad1@16 pad2@24 to_addr@32 to_port@36 pad3@38"),
        ("NatEntryV6", "56: created@0 needs_ct@8 pad1@16 pad2@24 to_addr@32 to_port@48 pad3@50"),
        ("FragmentsV4", "12: daddr@0 saddr@4 id@8 proto@10 pad@11"),
        ("FragmentsV6", "40: id@0 proto@4 pad@5 saddr@8 daddr@24"),
        ("FragmentPorts", "4: sport@0 dport@2"),
        ("MasqueradeKey", "8: ifindex@0 family@4 pad@5"),
        (
            "Config",
            "60: router_ipv4@0 router_ipv6@16 vxlan_ifindex@32 route_mtu@36 tunnel_port@40 flags@44 ct_tcp_max@48 \
             ct_any_max@52 nat_max@56",
        ),
    ] {
        assert_eq!(structs.get(name).map(String::as_str), Some(layout), "{name}");
    }
}
