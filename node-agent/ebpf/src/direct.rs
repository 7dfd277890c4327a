//! TCP connections that go past the host stack.
//!
//! kube-proxy translates where a connection goes once, at its beginning. So one that a pod opens to the address of another
//! pod is never translated, and one to a Service is: its first segment passes the stack, which sends it on to a pod. What
//! comes back looks alike. Therefore each end's node notes the connections whose first segment ([`Tcp::opens`]) it saw go
//! past its stack, and only their segments do. A first segment that the stack sends to a pod takes the note away: the same
//! addresses and ports are those of another connection now.
//!
//! A note is lost when there are too many, or with the map. What follows then passes the stack, which takes a connection up
//! in its midst (`net.netfilter.nf_conntrack_tcp_loose`, on by default), unless what follows is its end. So notes say when
//! a connection ended, and user space takes these away before they are too many. Not at once: the last acknowledgement would
//! be taken up by the stack.

use basal_maps::{
    conntrack::{TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN},
    flow::{END_RECEIVED, END_RESET, END_SENT},
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, big_endian::U16};

use crate::nat::Flow;

/// The start of a TCP header (RFC 9293).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct TcpHeader {
    /// Source port.
    pub source: U16,
    /// Destination port.
    pub destination: U16,
    /// Sequence number.
    pub sequence: [u8; 4],
    /// What is acknowledged.
    pub acknowledgement: [u8; 4],
    /// Length of the header in words (high four bits).
    pub offset: u8,
    /// `TCP_…`.
    pub flags: u8,
}

/// A whole segment.
#[derive(Clone, Copy, Debug)]
pub struct Tcp {
    /// Its ends, as it travels.
    pub flow: Flow,
    /// Its part in the connection.
    pub part: Part,
    /// Bytes of the largest IP packet that the kernel makes of it, with the header.
    pub length: u32,
}

/// What part a segment has in its connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// It is the first one.
    Opens,
    /// It is in the midst.
    GoesOn,
    /// It is the last one that carries data this way.
    Ends,
    /// It breaks the connection off.
    Resets,
}

/// Which TCP connection a packet is about.
#[derive(Clone, Copy, Debug)]
pub enum About {
    /// None, or it cannot be told.
    Nothing,
    /// The one that it is of.
    Own(Tcp),
    /// The one of the segment that this ICMP error quotes, as that travelled.
    Quoted(Flow),
}

/// What a pod of this node does with a flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pod {
    /// It is the source.
    Sends,
    /// It is the destination.
    Receives,
}

/// The connections of a family that go past the stack. Each is noted for a pod of this node that has an end of it: a flow
/// that the pod sends and the opposite one that it receives are the same.
pub trait Connections {
    /// Whether the connection does.
    fn is_direct(&self, flow: &Flow, pod: Pod, family: u8) -> bool;
    /// From now on it does; false when that cannot be noted.
    fn go_direct(&self, flow: &Flow, pod: Pod, family: u8) -> bool;
    /// From now on it does not.
    fn go_by_stack(&self, flow: &Flow, pod: Pod, family: u8);
    /// The flow's source ends the connection, or either side breaks it off; answers whether it goes past the stack.
    fn end(&self, flow: &Flow, pod: Pod, reset: bool, family: u8) -> bool;
}

impl Pod {
    /// The flow that the pod sends.
    #[must_use]
    #[inline(always)]
    pub const fn sent(self, flow: &Flow) -> Flow {
        match self {
            Self::Sends => *flow,
            Self::Receives => flow.turned(),
        }
    }
}

impl TcpHeader {
    /// Bytes of the header, as it says.
    #[must_use]
    #[inline(always)]
    pub const fn length(&self) -> u32 {
        (self.offset >> 4) as u32 * 4
    }

    /// What part the segment has.
    #[must_use]
    #[inline(always)]
    pub const fn part(&self) -> Part {
        if self.flags & TCP_RST != 0 {
            Part::Resets
        } else if self.flags & TCP_FIN != 0 {
            Part::Ends
        } else if self.flags & (TCP_SYN | TCP_ACK) == TCP_SYN {
            Part::Opens
        } else {
            Part::GoesOn
        }
    }
}

impl Pod {
    /// What a note says has ended when the flow's source ends it, or either side breaks it off.
    #[must_use]
    #[inline(always)]
    pub const fn ends(self, reset: bool) -> u32 {
        match self {
            _ if reset => END_RESET,
            Self::Sends => END_SENT,
            Self::Receives => END_RECEIVED,
        }
    }
}
