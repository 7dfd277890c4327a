//! A packet in the kernel, and carrying out verdicts on it.

use core::mem::{MaybeUninit, size_of};

use aya_ebpf::{
    bindings::{BPF_F_INGRESS, BPF_F_RECOMPUTE_CSUM, TC_ACT_OK, TC_ACT_REDIRECT, TC_ACT_SHOT},
    helpers::{
        bpf_redirect, bpf_redirect_peer, bpf_skb_change_tail, bpf_skb_get_tunnel_key, bpf_skb_load_bytes,
        bpf_skb_set_tunnel_key,
    },
    programs::TcContext,
};
use basal_ebpf::{
    decide::{TunnelEndpoint, Verdict},
    parse::{
        ETHERNET, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_SERVICE_VLAN, ETHERTYPE_VLAN, Ipv4Header, Ipv6Header,
        Packet, Transport, protocol,
    },
};
use basal_maps::{
    addr::{FAMILY_IPV4, FAMILY_IPV6},
    config::Config,
    endpoint::EndpointInfo,
    identity, mark,
    metrics::{Direction, File},
    reason::Reason,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::maps::{CALL_POLICY, count};

/// Pass on, past later programs.
pub(super) const OK: i32 = TC_ACT_OK as i32;
/// Drop.
pub(super) const SHOT: i32 = TC_ACT_SHOT as i32;

/// Tunnel addresses are IPv6 (`BPF_F_TUNINFO_IPV6`, linux/bpf.h).
const TUNNEL_IPV6: u64 = 1;
/// No UDP checksum on the outer IPv4 packet (`BPF_F_ZERO_CSUM_TX`): the inner one has its own.
const TUNNEL_ZERO_CHECKSUM: u64 = 2;
/// Bytes of a [`TunnelKey`].
const TUNNEL_KEY_SIZE: u32 = size_of::<TunnelKey>() as u32;
/// Hop count of tunnel packets.
const TUNNEL_TTL: u8 = 64;
/// `PACKET_HOST` (linux/if_packet.h): the packet is for this machine.
const PACKET_HOST: u32 = 0;

/// The VLAN's number in a tag; the other bits are priority and what to drop first.
const VLAN_ID: u32 = 0xfff;

/// Slots of the control buffer that a tail call hands over: the source's identity (Cilium's slot 0 too), what follows,
/// and the device to deliver to.
pub(super) const CB_IDENTITY: usize = 0;
pub(super) const CB_DELIVERY: usize = 1;
pub(super) const CB_IFINDEX: usize = 2;
/// In [`CB_DELIVERY`]: deliver into the pod's namespace at once (Cilium's number).
pub(super) const DELIVER_TO_PEER: u32 = 8;

/// Offset of the time to live and of the checksum in a frame with an IPv4 header, and of the hop limit with an IPv6 one.
const IPV4_TTL: usize = ETHERNET + 8;
const IPV4_CHECKSUM: usize = ETHERNET + 10;
const IPV6_HOP_LIMIT: usize = ETHERNET + 7;

/// `bpf_tunnel_key` (linux/bpf.h) up to its local address, which kernels before 5.19 do not have.
#[repr(C)]
struct TunnelKey {
    /// Network identifier, 24 bits.
    vni: u32,
    /// Address of the other end: an IPv4 one in host order in the first word, or an IPv6 one in network order.
    remote: [u32; 4],
    tos: u8,
    ttl: u8,
    ext: u16,
    label: u32,
}

/// A packet, and what its programs count it as.
pub(super) struct Frame {
    pub(super) ctx: TcContext,
    /// The object that the program stands for.
    pub(super) file: File,
    /// Direction of its drops.
    pub(super) drops: Direction,
}

impl Frame {
    /// EtherType, as the kernel knows it; of a frame with a VLAN tag, why it is dropped. The kernel takes the outermost
    /// tag out of the frame before programs see it. A tag without a VLAN's number gives a priority only.
    #[inline(always)]
    pub(super) fn ethertype(&self) -> Result<u16, Reason> {
        // SAFETY: the context pointer is valid for the program's run; so in the functions below.
        let skb = unsafe { &*self.ctx.skb.skb };
        match u16::from_be(skb.protocol as u16) {
            ETHERTYPE_VLAN | ETHERTYPE_SERVICE_VLAN => Err(Reason::VLAN_FILTERED),
            _ if skb.vlan_present != 0 && skb.vlan_tci & VLAN_ID != 0 => Err(Reason::VLAN_FILTERED),
            ethertype => Ok(ethertype),
        }
    }

    /// Interface index of the device that the program is attached to.
    #[inline(always)]
    pub(super) fn ifindex(&self) -> u32 {
        // SAFETY: see above.
        unsafe { (*self.ctx.skb.skb).ifindex }
    }

    /// The packet's mark.
    #[inline(always)]
    pub(super) fn mark(&self) -> u32 {
        // SAFETY: see above.
        unsafe { (*self.ctx.skb.skb).mark }
    }

    /// Reads the IP header of an IPv4 or IPv6 packet.
    #[inline(always)]
    pub(super) fn packet(&self, into: &mut Packet) -> Result<(), Reason> {
        match self.ethertype()? {
            ETHERTYPE_IPV4 => self.packet_at(ETHERNET, FAMILY_IPV4, into),
            ETHERTYPE_IPV6 => self.packet_at(ETHERNET, FAMILY_IPV6, into),
            _ => Err(Reason::UNSUPPORTED_L3),
        }
    }

    /// Reads the IP header at an offset.
    #[inline(always)]
    pub(super) fn packet_at(&self, offset: usize, family: u8, into: &mut Packet) -> Result<(), Reason> {
        if family == FAMILY_IPV6 {
            let mut header = MaybeUninit::<Ipv6Header>::uninit();
            self.read(offset, &mut header)?.tell(into)
        } else {
            let mut header = MaybeUninit::<Ipv4Header>::uninit();
            self.read(offset, &mut header)?.tell(into)
        }
    }

    /// Reads into memory of the caller's: returning headers by value would copy them on a stack that has no room for it.
    #[inline(always)]
    pub(super) fn read<'a, T: FromBytes>(
        &self,
        offset: usize,
        into: &'a mut MaybeUninit<T>,
    ) -> Result<&'a mut T, Reason> {
        let (skb, size) = (self.ctx.skb.skb.cast(), size_of::<T>() as u32);
        // SAFETY: the helper writes the size of the value.
        if unsafe { bpf_skb_load_bytes(skb, offset as u32, into.as_mut_ptr().cast(), size) } < 0 {
            return Err(Reason::INVALID_PACKET);
        }
        // SAFETY: it was written, and every byte pattern is valid for it.
        Ok(unsafe { into.assume_init_mut() })
    }

    /// The start of the transport header; zeroes where the packet has none or ends before it.
    #[inline(always)]
    pub(super) fn transport(&self, packet: &Packet) -> Transport {
        let has_one = matches!(packet.protocol, protocol::UDP | protocol::ICMP | protocol::ICMPV6);
        if packet.later_fragment || !has_one {
            return Transport::default();
        }
        let mut transport = MaybeUninit::uninit();
        match self.read(ETHERNET + packet.header as usize, &mut transport) {
            Ok(transport) => *transport,
            Err(_) => Transport::default(),
        }
    }

    /// Counts the packet.
    #[inline(always)]
    pub(super) fn count(&self, reason: Reason, direction: Direction, line: u32) {
        count(reason, direction, self.file, line as u16, self.ctx.len());
    }

    /// Counts the packet and drops it.
    #[inline(always)]
    pub(super) fn drop(&self, reason: Reason, line: u32) -> i32 {
        self.count(reason, self.drops, line);
        SHOT
    }

    /// Carries out a verdict.
    #[inline(always)]
    pub(super) fn act(&mut self, verdict: Verdict<'_>, packet: &Packet, config: &Config, line: u32) -> i32 {
        let result = match verdict {
            Verdict::Ignore => Ok(OK),
            Verdict::Drop(reason) => Err(reason),
            Verdict::Stack { identity } => {
                self.ctx.set_mark(mark::encode(mark::MAGIC_IDENTITY, identity));
                self.count(Reason::FORWARDED, Direction::Egress, line);
                Ok(OK)
            }
            Verdict::Unreachable => {
                self.ctx.set_mark(mark::MAGIC_UNREACHABLE);
                self.count(Reason::UNROUTABLE, self.drops, line);
                // On its way out of the stack it is turned round.
                Ok(if self.drops == Direction::Egress { receive(self.ifindex()) } else { OK })
            }
            Verdict::Encapsulate { to, identity } => self.encapsulate(&to, identity, config, line),
            Verdict::Deliver { endpoint, identity, direct } => self.deliver(endpoint, identity, direct, packet),
        };
        match result {
            Ok(action) => action,
            Err(reason) => self.drop(reason, line),
        }
    }

    /// Takes a packet that the tunnel carried for this machine, whatever MAC address the sender wrote into it: no stack takes
    /// one for another, and that of a pod learns of new addresses only since Linux 6.15.
    #[inline(always)]
    pub(super) fn claim(&self) -> Result<(), Reason> {
        self.ctx.change_type(PACKET_HOST).map_err(|_| Reason::WRITE_ERROR)
    }

    /// Sends the packet through the tunnel.
    #[inline(always)]
    fn encapsulate(&self, to: &TunnelEndpoint, identity: u32, config: &Config, line: u32) -> Result<i32, Reason> {
        let (remote, flags) = if to.ipv6 {
            (words(&to.ip.0), TUNNEL_IPV6)
        } else {
            // The helper takes IPv4 addresses in host order, IPv6 ones in network order.
            ([u32::from_be_bytes(to.ip.v4_octets()), 0, 0, 0], TUNNEL_ZERO_CHECKSUM)
        };
        let vni = identity::to_vni(identity);
        let mut key = TunnelKey { vni, remote, tos: 0, ttl: TUNNEL_TTL, ext: 0, label: 0 };
        // SAFETY: the kernel reads as many bytes as the key has.
        let set = unsafe { bpf_skb_set_tunnel_key(self.ctx.skb.skb, (&raw mut key).cast(), TUNNEL_KEY_SIZE, flags) };
        if set < 0 {
            return Err(Reason::NO_TUNNEL_KEY);
        }
        self.count(Reason::FORWARDED, Direction::Egress, line);
        // SAFETY: plain helper call.
        Ok(unsafe { bpf_redirect(config.vxlan_ifindex, 0) } as i32)
    }

    /// Rewrites the packet for a pod and calls the pod's policy program.
    #[inline(always)]
    fn deliver(
        &mut self,
        endpoint: &EndpointInfo,
        identity: u32,
        direct: bool,
        packet: &Packet,
    ) -> Result<i32, Reason> {
        let (ifindex, slot) = (endpoint.ifindex, endpoint.lxc_id);
        let macs = [endpoint.mac.octets, endpoint.node_mac.octets];
        self.write(0, &macs)?;
        if direct {
            self.count_hop(packet)?;
        }
        let cb = self.ctx.cb_mut();
        cb[CB_IDENTITY] = identity;
        cb[CB_DELIVERY] = if direct { DELIVER_TO_PEER } else { 0 };
        cb[CB_IFINDEX] = ifindex;
        // SAFETY: the map holds programs of this type only. The call returns only when the slot is empty.
        unsafe { CALL_POLICY.tail_call(&self.ctx, u32::from(slot)) };
        Err(Reason::ENDPOINT_NOT_READY)
    }

    /// Takes one from the hop count, which is at least two.
    #[inline(always)]
    fn count_hop(&self, packet: &Packet) -> Result<(), Reason> {
        let hops = packet.hops - 1;
        if packet.family == FAMILY_IPV6 {
            // A device may have summed up the frame as it came. With IPv4 the header's own checksum makes up for it.
            let flags = u64::from(BPF_F_RECOMPUTE_CSUM);
            return self.ctx.store(IPV6_HOP_LIMIT, &hops, flags).map_err(|_| Reason::WRITE_ERROR);
        }
        // The checksum's word is time to live and protocol, as they lie in the packet.
        let word = |hops: u8| u64::from(u16::from_ne_bytes([hops, packet.protocol]));
        self.ctx.l3_csum_replace(IPV4_CHECKSUM, word(packet.hops), word(hops), 2).map_err(|_| Reason::WRITE_ERROR)?;
        self.write(IPV4_TTL, &hops)
    }

    /// Makes the frame `length` bytes long.
    #[inline(always)]
    pub(super) fn resize(&self, length: usize) -> Result<(), Reason> {
        // SAFETY: plain helper call.
        let resized = unsafe { bpf_skb_change_tail(self.ctx.skb.skb, length as u32, 0) };
        if resized < 0 { Err(Reason::WRITE_ERROR) } else { Ok(()) }
    }

    /// Writes a part of the frame.
    #[inline(always)]
    pub(super) fn write<T: IntoBytes + Immutable>(&self, offset: usize, part: &T) -> Result<(), Reason> {
        self.ctx.store(offset, part, 0).map_err(|_| Reason::WRITE_ERROR)
    }

    /// The tunnel's network identifier; `None` for a packet without tunnel information.
    #[inline(always)]
    pub(super) fn vni(&self) -> Option<u32> {
        let mut key = MaybeUninit::<TunnelKey>::uninit();
        for flags in [0, TUNNEL_IPV6] {
            // SAFETY: the kernel writes as many bytes as the key has. It refuses the other family.
            let got =
                unsafe { bpf_skb_get_tunnel_key(self.ctx.skb.skb, key.as_mut_ptr().cast(), TUNNEL_KEY_SIZE, flags) };
            if got == 0 {
                // SAFETY: it was written, and every byte pattern is valid for it.
                return Some(unsafe { key.assume_init_ref() }.vni);
            }
        }
        None
    }
}

/// Sends the packet out of a device.
#[inline(always)]
pub(super) fn redirect(ifindex: u32) -> i32 {
    // SAFETY: plain helper call.
    unsafe { bpf_redirect(ifindex, 0) as i32 }
}

/// Lets a device receive the packet.
#[inline(always)]
fn receive(ifindex: u32) -> i32 {
    // SAFETY: plain helper call.
    unsafe { bpf_redirect(ifindex, u64::from(BPF_F_INGRESS)) as i32 }
}

/// Puts the packet into the namespace of a pair's other end. From ingress hooks only.
#[inline(always)]
pub(super) fn redirect_peer(ifindex: u32) -> i32 {
    // SAFETY: plain helper call.
    unsafe { bpf_redirect_peer(ifindex, 0) as i32 }
}

/// The four words of an address, as they lie in memory.
#[inline(always)]
fn words(ip: &[u8; 16]) -> [u32; 4] {
    // SAFETY: both are 16 bytes of plain data.
    unsafe { core::mem::transmute(*ip) }
}

const _: () = assert!(TC_ACT_REDIRECT == 7, "helpers that redirect return the action themselves");
