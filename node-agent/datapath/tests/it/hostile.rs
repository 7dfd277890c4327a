//! Pods that send what they should not, on the wire: dropped, counted, and never sent round in circles.

use std::os::fd::AsRawFd as _;

use basal_datapath::linux::maps::PinnedMaps;
use nix::{
    ifaddrs::{InterfaceAddress, getifaddrs},
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, sendto, socket},
};

use crate::{
    bench::{ECHO, ECHO_V6, EGRESS, HOST, ICMP, ICMPV6, INGRESS, LXC, OVERLAY, counters, ethernet, ipv4, ipv6},
    harness::{Netns, Node, pair, sandbox},
};

/// Packets that a node has counted.
fn counted(node: &Node, reason: u8, direction: u8, file: u8) -> u64 {
    let maps = PinnedMaps::new(node.paths.maps());
    counters(&maps).get(&(reason, direction, file)).copied().unwrap_or_default()
}

/// What is sent to addresses of a node's block that nobody has is dropped once, where the block is.
fn nobody(legacy: bool) {
    sandbox(|bpffs| {
        let (mut one, mut two) = pair(bpffs);
        (one.plan.legacy_routing, two.plan.legacy_routing) = (legacy, legacy);
        let pod = one.add_pod(7, 1111);
        one.converge();
        two.converge();
        for (sent, (here, there)) in (1..).zip([("10.1.1.99", "10.1.2.99"), ("fd00:1:1::99", "fd00:1:2::99")]) {
            assert!(pod.run(&format!("ping -n -c 1 -W 0.3 {here}")).is_err());
            assert_eq!(counted(&one, 151, EGRESS, HOST), sent, "{here}");
            assert!(pod.run(&format!("ping -n -c 1 -W 0.3 {there}")).is_err());
            assert_eq!(counted(&one, 151, EGRESS, HOST), sent, "{there} is the other node's");
            assert_eq!(counted(&two, 151, INGRESS, OVERLAY), sent, "{there}");
        }
    });
}

#[test]
fn what_is_for_nobody_is_dropped_once() {
    nobody(true);
}

#[test]
fn so_it_is_without_legacy_routing() {
    nobody(false);
}

/// Sends a frame from a pod, as it is.
fn send(pod: &Netns, frame: &[u8]) {
    pod.enter(|| {
        let is_device = |address: &InterfaceAddress| address.address.is_some_and(|it| it.as_link_addr().is_some());
        let mut devices =
            getifaddrs().unwrap().filter(|address| address.interface_name == "eth0" && is_device(address));
        let device = *devices.next().unwrap().address.unwrap().as_link_addr().unwrap();
        let raw = socket(AddressFamily::Packet, SockType::Raw, SockFlag::empty(), None).unwrap();
        assert_eq!(sendto(raw.as_raw_fd(), frame, &device, MsgFlags::empty()), Ok(frame.len()));
    });
}

/// The frame with a VLAN tag.
fn tagged(frame: &[u8]) -> Vec<u8> {
    [&frame[..12], &[0x81, 0, 0, 5], &frame[12..]].concat()
}

#[test]
fn malformed_and_tagged_frames_are_dropped_on_the_wire() {
    sandbox(|bpffs| {
        let (mut one, _two) = pair(bpffs);
        // The direct path would carry a tag to the next pod.
        one.plan.legacy_routing = false;
        let (pod, _other) = (one.add_pod(7, 1111), one.add_pod(8, 3333));
        one.converge();
        pod.ping("10.1.1.8").unwrap();
        let v4 = ipv4("10.1.1.7", "10.1.1.8", ICMP, &ECHO);
        let v6 = ipv6("fd00:1:1::7", "fd00:1:1::8", ICMPV6, 64, &ECHO_V6);
        let arp = ethernet(0x0806, &[0; 28]);
        for (frame, reason) in [
            (v4[..15].to_vec(), 134),
            (v4[..33].to_vec(), 134),
            (v6[..53].to_vec(), 134),
            (arp[..41].to_vec(), 134),
            (tagged(&v4), 182),
            (tagged(&v6), 182),
            (tagged(&arp), 182),
            (tagged(&tagged(&v4)), 182),
        ] {
            let before = counted(&one, reason, EGRESS, LXC);
            send(&pod, &frame);
            // Between namespaces of one machine a frame arrives before the sender goes on, or soon.
            let arrived = (0..1000).any(|_| {
                std::thread::yield_now();
                counted(&one, reason, EGRESS, LXC) == before + 1
            });
            assert!(arrived, "{frame:x?} was not counted as {reason}");
        }
    });
}
