//! TCP connections that go past the stack.

use basal_maps::flow::{END_RECEIVED, END_RESET, END_SENT, End};

use zerocopy::FromBytes as _;

use super::*;
use crate::{
    decide::{from_container, from_host, from_overlay},
    direct::{
        About::{Own, Quoted},
        TcpHeader,
    },
};

/// A segment from a client to a server.
fn segment(client: [u8; 4], server: [u8; 4]) -> Tcp {
    let flow = Flow {
        source: End::new(client.into(), 40000),
        destination: End::new(server.into(), 80),
        protocol: protocol::TCP,
    };
    Tcp { flow, part: Part::GoesOn, length: 84 }
}

fn answers(tcp: Tcp) -> Tcp {
    Tcp { flow: tcp.flow.turned(), ..tcp }
}

fn opens(tcp: Tcp) -> Tcp {
    Tcp { part: Part::Opens, ..tcp }
}

/// The packet around a segment.
fn around(tcp: &Tcp) -> Packet {
    packet(tcp.flow.source.ip.v4_octets(), tcp.flow.destination.ip.v4_octets(), protocol::TCP)
}

/// A node without legacy host routing.
struct Node {
    model: Model,
    config: Config,
}

impl Node {
    fn new() -> Self {
        Self { model: node(), config: config(0) }
    }

    /// Whether what pod A sends goes past the stack.
    fn a_sends(&self, tcp: Tcp) -> bool {
        self.sends(FROM_A, &around(&tcp), &Own(tcp))
    }

    fn b_sends(&self, tcp: Tcp) -> bool {
        let mac = Ethernet { source: [2, 0, 0, 0, 0, 21], ..FRAME_A };
        self.sends(Sender { ifindex: 21, ethernet: &mac }, &around(&tcp), &Own(tcp))
    }

    fn sends(&self, sender: Sender<'_>, packet: &Packet, about: &About) -> bool {
        match from_container(&self.model, &self.config, sender, packet, Transport([3, 1, 0, 0]), about) {
            Verdict::Stack { .. } => false,
            Verdict::Deliver { direct: true, .. } | Verdict::Encapsulate { .. } => true,
            other => panic!("{other:?}"),
        }
    }

    /// Whether what comes out of the tunnel goes past the stack.
    fn receives(&self, tcp: Tcp) -> bool {
        self.receives_about(&around(&tcp), &Own(tcp))
    }

    fn receives_about(&self, packet: &Packet, about: &About) -> bool {
        match from_overlay(&self.model, &self.config, 4444, packet, Transport([3, 1, 0, 0]), about) {
            Verdict::Stack { identity: 4444 } => false,
            Verdict::Deliver { identity: 4444, direct: true, .. } => true,
            other => panic!("{other:?}"),
        }
    }

    /// The stack sends a segment on.
    fn stack_sends(&self, tcp: Tcp) {
        let verdict = from_host(&self.model, &self.config, 0, &around(&tcp), &Own(tcp));
        assert!(matches!(verdict, Verdict::Deliver { direct: false, .. } | Verdict::Encapsulate { .. }));
    }

    fn noted(&self) -> usize {
        self.model.direct.borrow().len()
    }
}

#[test]
fn a_connection_between_pods_of_a_node_goes_direct_from_its_first_segment_on() {
    let (node, forth) = (Node::new(), segment(POD_A, POD_B));
    assert!(!node.a_sends(forth), "nobody saw it begin");
    assert!(!node.b_sends(answers(forth)));
    assert!(node.a_sends(opens(forth)));
    assert!(node.a_sends(forth) && node.b_sends(answers(forth)));
    let other = Tcp { flow: Flow { source: End::new(POD_A.into(), 40001), ..forth.flow }, ..forth };
    assert!(!node.a_sends(other));
}

#[test]
fn a_connection_across_nodes_goes_direct_at_both_ends() {
    let (client, forth) = (Node::new(), segment(POD_A, REMOTE_POD));
    assert!(client.a_sends(opens(forth)));
    assert!(client.a_sends(forth) && client.receives(answers(forth)));

    let (server, forth) = (Node::new(), segment(REMOTE_POD, POD_A));
    assert!(!server.receives(forth));
    assert!(server.receives(opens(forth)));
    assert!(server.receives(forth) && server.a_sends(answers(forth)));
}

#[test]
fn what_a_service_answers_passes_the_stack() {
    // In the stack the service's address became a backend's.
    let (node, forth) = (Node::new(), segment(POD_A, REMOTE_POD));
    node.stack_sends(opens(forth));
    assert!(!node.receives(answers(forth)));
    // And those were the ports of a direct connection before.
    for (node, forth) in [(Node::new(), segment(POD_A, REMOTE_POD)), (Node::new(), segment(POD_A, POD_B))] {
        assert!(node.a_sends(opens(forth)) && node.a_sends(forth));
        node.stack_sends(forth);
        assert!(node.a_sends(forth), "one in the midst takes nothing away");
        node.stack_sends(opens(forth));
        assert!(!node.a_sends(forth));
        assert_eq!(node.noted(), 0, "at neither end");
    }
}

#[test]
fn what_is_not_answered_through_the_tunnel_passes_the_stack() {
    let (node, forth) = (Node::new(), segment(REMOTE_NODE, POD_A));
    assert!(!node.receives(opens(forth)));
    assert!(!node.a_sends(answers(forth)));
    assert!(!node.a_sends(opens(segment(POD_A, WORLD))));
    assert!(!node.a_sends(opens(segment(POD_A, ROUTER))));
    assert_eq!(node.noted(), 0);
}

#[test]
fn nothing_is_noted_where_all_passes_the_stack() {
    let node = Node { config: config(FLAG_LEGACY_ROUTING), ..Node::new() };
    assert!(!node.a_sends(opens(segment(POD_A, POD_B))));
    assert!(!node.receives(opens(segment(REMOTE_POD, POD_A))));
    assert_eq!(node.noted(), 0);

    let node = Node { model: native().0, config: config(FLAG_NATIVE_ROUTING) };
    assert!(!node.a_sends(opens(segment(POD_A, REMOTE_POD))));
    assert_eq!(node.noted(), 0);
    assert!(node.a_sends(opens(segment(POD_A, POD_B))), "on one node it is as with a tunnel");
}

#[test]
fn a_first_segment_that_cannot_be_noted_passes_the_stack() {
    let node = Node { model: Model { full: true, ..super::node() }, config: config(0) };
    for server in [POD_B, REMOTE_POD] {
        assert!(!node.a_sends(opens(segment(POD_A, server))));
    }
    assert!(!node.receives(opens(segment(REMOTE_POD, POD_A))));
}

#[test]
fn what_does_not_fit_or_has_no_hops_left_is_the_stacks() {
    let (node, forth) = (Node::new(), segment(POD_A, REMOTE_POD));
    assert!(node.a_sends(opens(forth)));
    assert!(!node.a_sends(Tcp { length: 1451, ..forth }));
    assert!(!node.sends(FROM_A, &Packet { hops: 1, ..around(&forth) }, &Own(forth)));
}

#[test]
fn the_ends_of_a_connection_are_noted_on_its_way() {
    let of = |part, tcp: Tcp| Tcp { part, ..tcp };
    let (node, forth) = (Node::new(), segment(POD_A, REMOTE_POD));
    assert!(!node.a_sends(of(Part::Ends, forth)) && !node.receives(of(Part::Resets, answers(forth))));
    assert_eq!(*node.model.ended.borrow(), [], "it is the stack's");
    assert!(node.a_sends(opens(forth)));
    assert!(node.a_sends(of(Part::Ends, forth)) && node.receives(of(Part::Ends, answers(forth))));
    assert!(node.receives(of(Part::Resets, answers(forth))));
    let noted = [END_SENT, END_RECEIVED, END_RESET].map(|ends| (forth.flow, ends));
    assert_eq!(node.model.ended.take(), noted);

    let (node, forth) = (Node::new(), segment(POD_A, POD_B));
    assert!(node.a_sends(opens(forth)) && node.b_sends(of(Part::Ends, answers(forth))));
    let back = forth.flow.turned();
    assert_eq!(node.model.ended.take(), [(back, END_SENT), (forth.flow, END_RECEIVED)], "both pods' notes");
}

#[test]
fn flags_tell_a_segments_part() {
    let part = |flags| {
        let mut bytes = [0; 14];
        bytes[13] = flags;
        TcpHeader::read_from_bytes(&bytes).unwrap().part()
    };
    assert_eq!([0x02, 0xc2].map(part), [Part::Opens; 2], "with or without congestion notification");
    assert_eq!([0x12, 0x10, 0x18, 0].map(part), [Part::GoesOn; 4]);
    assert_eq!([0x11, 0x01, 0x03].map(part), [Part::Ends; 3]);
    assert_eq!([0x04, 0x14, 0x06].map(part), [Part::Resets; 3]);
}

#[test]
fn errors_take_the_way_of_what_they_quote() {
    let (node, forth) = (Node::new(), segment(POD_A, REMOTE_POD));
    let error = packet(REMOTE_POD, POD_A, protocol::ICMP);
    assert!(!node.receives_about(&error, &Quoted(forth.flow)));
    assert!(node.a_sends(opens(forth)));
    assert!(node.receives_about(&error, &Quoted(forth.flow)));
    assert!(!node.receives_about(&error, &About::Nothing));

    let (node, back) = (Node::new(), segment(REMOTE_POD, POD_A));
    let error = packet(POD_A, REMOTE_POD, protocol::ICMP);
    assert!(!node.sends(FROM_A, &error, &Quoted(back.flow)));
    assert!(node.receives(opens(back)));
    assert!(node.sends(FROM_A, &error, &Quoted(back.flow)));
}
