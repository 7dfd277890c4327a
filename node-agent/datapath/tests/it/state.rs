//! Desired state becomes observed state, and stays it.

use std::net::IpAddr;

use basal_datapath::{
    diff::diff,
    kernel::{Kernel as _, KernelEvent, OpError},
    linux::maps::PinnedMaps,
    names::{IfName, REMOVAL_GROUP},
    op::Op,
    plan::{NodePlan, Peer},
    rows::{self, MapId},
    state::{Hook, LinkKind, NodeState, RouteKey},
};
use basal_runtime::outcome::Outcome;
use futures::StreamExt as _;

use crate::harness::{masquerading, node, remote, sandbox};

#[test]
fn a_map_reads_alike_in_batches_and_row_by_row() {
    sandbox(|bpffs| {
        let mut node = node(bpffs, 1);
        // More than one batch, and one of the largest keys.
        for number in 0..5000_u32 {
            let [_, a, b, c] = number.to_be_bytes();
            let identity = 256 + number;
            let peer = Peer { identity, tunnel_endpoint: Some([192, 168, 77, 2].into()) };
            node.plan.peers.insert(IpAddr::from([10, 1 + a, b, c]).into(), peer);
            node.plan.peers.insert(IpAddr::from([0xfd00, 9, 0, 0, 0, 0, u16::from(b), u16::from(c)]).into(), peer);
        }
        node.plan.bpf_masquerade = masquerading(&[]);
        node.converge();
        let maps = PinnedMaps::new(node.paths.maps());
        for map in MapId::ALL {
            let rows = maps.rows(map).unwrap().unwrap();
            assert_eq!(Some(&rows), maps.rows_one_by_one(map).unwrap().as_ref(), "{map:?}");
            assert!(map != MapId::Ipcache || rows.len() > 10_000);
        }
    });
}

/// As when its removal failed: nothing else is left that would lead to it.
#[test]
fn the_slot_of_a_pod_that_is_gone_is_seen_until_it_is_empty() {
    sandbox(|bpffs| {
        let mut node = node(bpffs, 1);
        let _pod = node.add_pod(7, 4321);
        let with_pod = node.plan.clone();
        node.plan.endpoints.clear();
        node.converge();
        node.with(async |kernel| {
            let slot = Hook::Policy { id: 7 };
            let differences = async |plan: &NodePlan| {
                let observed = kernel.read().await.unwrap();
                diff(&plan.desired(&observed), &observed.state)
            };
            // The first reading looks into every slot.
            assert_eq!(differences(&node.plan).await, []);
            for plan in [&with_pod, &with_pod, &node.plan] {
                for op in differences(plan).await {
                    if op != Op::Detach(slot.clone()) {
                        assert!(kernel.apply(&op).await.is_done(), "{op}");
                    }
                }
            }
            for _ in 0..2 {
                assert_eq!(differences(&node.plan).await, [Op::Detach(slot.clone())]);
            }
            assert!(kernel.apply(&Op::Detach(slot)).await.is_done());
            assert_eq!(differences(&node.plan).await, []);
        });
    });
}

#[test]
fn a_node_converges_in_two_rounds_and_every_op_is_idempotent() {
    sandbox(|bpffs| {
        let mut node = node(bpffs, 1);
        node.plan.remote_nodes.insert("two".to_owned(), remote(2));
        let _pod = node.add_pod(7, 4321);
        let rounds = node.converge();
        assert_eq!(rounds.len(), 2, "{rounds:#?}");
        node.with(async |kernel| {
            for op in rounds.iter().flatten() {
                let again = kernel.apply(op).await;
                assert!(matches!(again, Outcome::Done(())), "{again:?}");
            }
        });
        assert_eq!(node.converge(), Vec::<Vec<Op>>::new());
    });
}

#[test]
fn what_others_changed_is_put_right() {
    sandbox(|bpffs| {
        let mut node = node(bpffs, 1);
        node.plan.remote_nodes.insert("two".to_owned(), remote(2));
        let _pod = node.add_pod(7, 4321);
        node.converge();
        let host = node.plan.endpoints[&7].link.clone();
        for (command, kinds) in [
            ("ip route del 10.1.2.0/24", vec!["set-route"]),
            (
                "ip route replace 10.1.2.0/24 via 10.1.1.1 dev cilium_host proto kernel src 10.1.1.1 mtu 1400",
                vec!["set-route"],
            ),
            ("ip route add 10.1.9.0/24 dev cilium_host proto kernel", vec!["delete-route"]),
            ("ip -6 route del fd00:1:2::/64", vec!["set-route"]),
            ("ip addr add 10.1.1.99/32 dev cilium_host", vec!["delete-address"]),
            ("ip link set cilium_vxlan mtu 1400", vec!["set-link"]),
            ("ip link set cilium_net arp on", vec!["set-link"]),
            ("sysctl -qw net.ipv4.conf.cilium_host.rp_filter=1", vec!["set-sysctl"]),
            ("sysctl -qw net.ipv4.ip_forward=0", vec!["set-sysctl", "set-sysctl", "set-sysctl", "set-sysctl"]),
            ("nft flush chain inet basal postrouting", vec!["set-nft"]),
            ("nft delete table inet basal", vec!["set-nft"]),
            ("nft add element inet basal local_pods4 { 10.9.0.0/16 }", vec!["set-nft"]),
        ] {
            node.netns.run(command).unwrap();
            let rounds = node.converge();
            let found: Vec<&str> = rounds.concat().iter().map(Op::kind).collect();
            assert_eq!(found, kinds, "after {command}: {rounds:#?}");
        }
        node.netns.ip(&format!("link set {host} down"));
        assert_eq!(node.converge().concat().iter().map(Op::kind).collect::<Vec<_>>(), ["set-link"]);
    });
}

#[test]
fn a_device_of_the_wrong_kind_is_made_again_with_its_programs() {
    sandbox(|bpffs| {
        let node = node(bpffs, 1);
        node.netns.ip("link add cilium_vxlan type vxlan id 5 dstport 8472");
        node.netns.ip("link add cilium_host type bridge");
        node.converge();
        let observed = node.read();
        assert_eq!(observed.state.links[&IfName::vxlan()].kind, LinkKind::Vxlan { port: 8472 });
        assert_eq!(observed.state.hooks.len(), 5);

        node.netns.ip("link del cilium_vxlan");
        node.converge();
        assert_eq!(node.read().state.hooks.len(), 5);
    });
}

#[test]
fn a_node_is_taken_down_without_trace() {
    sandbox(|bpffs| {
        let mut node = node(bpffs, 1);
        node.plan.remote_nodes.insert("two".to_owned(), remote(2));
        let _pod = node.add_pod(7, 4321);
        node.converge();
        node.with(async |kernel| {
            let observed = kernel.read().await.unwrap();
            for op in basal_datapath::diff::diff(&NodeState::default(), &observed.state) {
                let outcome = kernel.apply(&op).await;
                assert!(matches!(outcome, Outcome::Done(())), "{outcome:?}");
            }
            let left = kernel.read().await.unwrap().state;
            assert!(left.links.is_empty() && left.hooks.is_empty() && left.nft.is_empty() && left.programs.is_empty());
            assert!(left.maps.values().all(std::collections::BTreeMap::is_empty), "{:?}", left.maps);
        });
    });
}

#[test]
fn a_device_that_a_pod_has_already_is_left_alone() {
    sandbox(|bpffs| {
        let mut node = node(bpffs, 1);
        let pod = node.add_pod(7, 4321);
        pod.ip("link add eth0 type bridge");
        let link = node.plan.endpoints[&7].link.clone();
        let refused = node.with(async |kernel| {
            let desired = node.plan.desired(&kernel.read().await.unwrap());
            kernel.apply(&Op::SetLink(link.clone(), desired.links[&link].clone())).await
        });
        let Outcome::Refused(error) = refused else { panic!("{refused:?}") };
        assert!(error.to_string().contains("is there already"), "{error}");
        assert!(!node.read().devices.contains_key(&link));
        let details = pod.run("ip -d link show eth0").unwrap();
        assert!(details.contains("bridge") && !details.contains("UP"), "{details}");
    });
}

#[test]
fn an_endpoint_whose_device_went_is_cleaned_up() {
    sandbox(|bpffs| {
        let mut node = node(bpffs, 1);
        let pod = node.add_pod(7, 4321);
        node.converge();
        pod.ip("link del eth0");
        node.plan.endpoints.clear();
        let kinds: Vec<_> = node.converge().concat().iter().map(Op::kind).collect();
        assert_eq!(
            kinds,
            ["detach", "detach", "delete-row", "delete-row", "delete-row", "delete-row"],
            "the program's pin, its slot, and two rows per family"
        );
    });
}

/// More than one request takes, with programs on each.
#[test]
fn endpoints_that_go_together_leave_nothing() {
    sandbox(|bpffs| {
        let mut node = node(bpffs, 1);
        let pods: Vec<_> = (10..30).map(|id| node.add_pod(id, 4321)).collect();
        node.converge();
        let before = node.read().state;
        node.plan.endpoints.clear();
        let ops = node.converge().concat();
        let removals = ops.iter().filter(|op| matches!(op, Op::DeleteLinks(names) if names.len() == pods.len()));
        assert_eq!((removals.count(), pods.len()), (1, 20), "{ops:#?}");
        let after = node.read().state;
        assert_eq!((before.links.len(), after.links.len()), (23, 3));
        for pod in pods {
            assert!(pod.run("ip link show eth0").is_err(), "the other end is gone too");
        }
    });
}

#[test]
fn what_else_is_in_the_group_of_removed_devices_stays() {
    sandbox(|bpffs| {
        let mut node = node(bpffs, 1);
        let _pods: Vec<_> = (10..17).map(|id| node.add_pod(id, 4321)).collect();
        node.converge();
        node.netns.ip("link add foreign type bridge");
        let link = |id| IfName::new(format!("lxc000001{id:06x}")).unwrap();
        assert_eq!(node.plan.endpoints[&10].link, link(10));
        // What a crash left there: one that goes with another, later one that is wanted; and in between another's.
        for (member, left) in [(link(16), 5), (IfName::new("foreign").unwrap(), 3), (link(10), 1)] {
            node.netns.ip(&format!("link set {member} group {REMOVAL_GROUP}"));
            node.plan.endpoints.retain(|id, _| *id < 10 + left);
            let kinds: Vec<_> = node.converge().concat().iter().map(Op::kind).collect();
            assert!(kinds.contains(&"delete-links"), "{kinds:?}");
            let devices = node.read().devices;
            assert_eq!(devices.keys().filter(|name| name.is_endpoint()).count(), usize::from(left));
            assert!(devices.contains_key(&IfName::new("foreign").unwrap()));
            node.netns.ip("link set foreign group default");
        }
    });
}

#[test]
fn refusals_say_what_is_missing() {
    sandbox(|bpffs| {
        let mut node = node(bpffs, 1);
        drop(node.add_pod(7, 4321));
        node.with(async |kernel| {
            let refused = async |op: Op| match kernel.apply(&op).await {
                Outcome::Refused(error) => error,
                other => panic!("{other:?}"),
            };
            let link = node.plan.endpoints[&7].link.clone();
            let desired = node.plan.desired(&kernel.read().await.unwrap());
            let gone = refused(Op::SetLink(link.clone(), desired.links[&link].clone())).await;
            assert!(matches!(gone, OpError::NoNetns { .. }), "{gone}");
            let key = RouteKey { destination: "10.9.0.0/16".parse().unwrap(), link: IfName::host() };
            let route = refused(Op::SetRoute(key, Default::default())).await;
            assert!(matches!(route, OpError::NoLink { .. }), "{route}");
            let row = refused(Op::PutRow(rows::host([10, 0, 0, 1].into()))).await;
            assert!(row.to_string().contains("load programs first"), "{row}");
        });
    });
}

#[test]
fn changes_by_others_are_told() {
    sandbox(|bpffs| {
        let node = node(bpffs, 1);
        node.with(async |kernel| {
            let mut events = kernel.events();
            for (command, event) in [
                ("link add d0 type veth peer name d1", KernelEvent::Link),
                ("addr add 10.9.0.1/24 dev d0", KernelEvent::Address),
                ("link set d0 up", KernelEvent::Link),
                ("route add 10.8.0.0/16 dev d0", KernelEvent::Route),
            ] {
                node.netns.ip(command);
                while events.next().await.unwrap() != event {}
            }
        });
    });
}
