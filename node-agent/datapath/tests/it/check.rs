//! Looking at single devices, and into pods.

use std::path::Path;

use basal_datapath::{check::Pair, kernel::Kernel as _, names::IfName};
use futures::future::{join, join_all};

use crate::harness::{Node, node, sandbox};

/// What of pod 7 is not as it was made.
fn differences(node: &Node) -> Vec<String> {
    let endpoint = &node.plan.endpoints[&7];
    node.with(async |kernel| {
        let host = kernel.device(&endpoint.link).await.unwrap();
        let found = kernel.pod_device(&endpoint.pod.netns, &endpoint.pod.name).await.unwrap();
        let pair = Pair { host: &endpoint.link, pod: &endpoint.pod, mtu: node.plan.device_mtu };
        pair.differences(host.as_ref(), found.as_ref())
    })
}

#[test]
fn a_device_is_read_without_everything_else() {
    sandbox(|bpffs| {
        let mut node = node(bpffs, 1);
        let _pod = node.add_pod(7, 4321);
        node.converge();
        let observed = node.read();
        assert!(observed.devices.len() > 4, "{:?}", observed.devices.keys());
        node.paths.nft = "/nonexistent".into();
        node.with(async |kernel| {
            assert!(kernel.read().await.is_err(), "everything cannot be read now");
            for (name, device) in &observed.devices {
                assert_eq!(kernel.device(name).await.unwrap().as_ref(), Some(device));
            }
            assert_eq!(kernel.device(&IfName::new("none").unwrap()).await.unwrap(), None);
        });
    });
}

/// The kernel tells one list after the other, and says that it is busy to whoever asks meanwhile.
#[test]
fn many_devices_are_read_at_once() {
    sandbox(|bpffs| {
        let mut node = node(bpffs, 1);
        let _pod = node.add_pod(7, 4321);
        node.converge();
        let name = &node.plan.endpoints[&7].link;
        let (nodes, devices) = node.with(async |kernel| {
            let devices = join_all((0..32).map(|_| kernel.device(name)));
            join(join_all((0..4).map(|_| kernel.read())), devices).await
        });
        assert!(nodes.iter().all(Result::is_ok), "{:?}", nodes.iter().find(|read| read.is_err()));
        assert!(devices.iter().all(|device| matches!(device, Ok(Some(_)))), "{devices:?}");
    });
}

#[test]
fn what_was_changed_in_a_pod_is_seen() {
    sandbox(|bpffs| {
        let mut node = node(bpffs, 1);
        let pod = node.add_pod(7, 4321);
        node.converge();
        assert_eq!(differences(&node), Vec::<String>::new());
        for (change, undo, expected) in [
            ("link set eth0 mtu 1480", "link set eth0 mtu 1500", "eth0 in the pod has MTU 1480, not 1500"),
            (
                "addr del fd00:1:1::7/128 dev eth0",
                "addr add fd00:1:1::7/128 dev eth0 nodad",
                "eth0 in the pod lacks the address fd00:1:1::7/128",
            ),
            (
                "route replace default via 10.1.1.1 dev eth0 mtu 1300",
                "route replace default via 10.1.1.1 dev eth0 mtu 1450",
                "the pod has the route default via 10.1.1.1 dev eth0 mtu 1300, not default via 10.1.1.1 dev eth0 mtu 1450",
            ),
            (
                "-6 route del default",
                "-6 route add default via fd00:1:1::1 dev eth0 mtu 1450",
                "the pod lacks the route default via fd00:1:1::1 dev eth0 mtu 1450",
            ),
            (
                "route del 10.1.1.1/32 dev eth0",
                "route add 10.1.1.1/32 dev eth0 scope link",
                "the pod lacks the route 10.1.1.1/32 dev eth0",
            ),
        ] {
            pod.ip(change);
            assert_eq!(differences(&node), [expected], "after {change}");
            pod.ip(undo);
            assert_eq!(differences(&node), Vec::<String>::new(), "after {undo}");
        }

        pod.ip("link set eth0 down");
        pod.ip("link set eth0 name other");
        assert_eq!(differences(&node), ["there is no interface eth0 in the pod"]);
        pod.ip("link add eth0 type veth peer name lookalike");
        let host = &node.plan.endpoints[&7].link;
        assert_eq!(differences(&node), [format!("eth0 in the pod is not the other end of {host}")]);
        pod.ip("link del other");
        assert_eq!(differences(&node), [format!("the interface {host} is gone")]);

        // Not the path of a descriptor that was closed: its number may be another file's by now.
        let netns = Path::new("/var/run/netns/of-a-pod-that-is-gone");
        let gone = node.with(async |kernel| kernel.pod_device(netns, &IfName::new("eth0").unwrap()).await);
        assert_eq!(gone.unwrap_err().source.kind(), std::io::ErrorKind::NotFound);
    });
}

#[test]
fn another_mtu_reaches_the_pods() {
    sandbox(|bpffs| {
        let mut node = node(bpffs, 1);
        let pod = node.add_pod(7, 4321);
        node.converge();
        node.plan.device_mtu = 1400;
        let route_mtu = node.plan.route_mtu();
        node.plan.endpoints.get_mut(&7).unwrap().pod.route_mtu = route_mtu;
        node.converge();
        assert_eq!(differences(&node), Vec::<String>::new());
        pod.ping("10.1.1.1").unwrap();

        // An endpoint whose record is lost: nobody knows the way into its pod.
        node.plan.device_mtu = 1390;
        node.plan.endpoints.get_mut(&7).unwrap().pod.netns = "".into();
        node.converge();
        pod.ping("10.1.1.1").unwrap();
    });
}
