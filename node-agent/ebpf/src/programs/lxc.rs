//! Programs of endpoints.

use core::mem::{MaybeUninit, size_of};

use aya_ebpf::{macros::classifier, programs::TcContext};
use basal_ebpf::{
    decide::{self, Tables as _},
    neighbour::{ADVERTISEMENT_FRAME, ArpFrame, Neighbour, is_solicitation},
    parse::{ETHERTYPE_ARP, Packet, Transport},
};
use basal_maps::{
    addr::{FAMILY_IPV4, NetIp},
    endpoint::EndpointKey,
    metrics::{Direction, File},
    reason::Reason,
};

use super::{
    config,
    context::{CB_DELIVERY, CB_IFINDEX, DELIVER_TO_PEER, Frame, OK, redirect, redirect_peer},
    maps::Pinned,
};

/// Ingress of the host side of a pod's device pair: what the pod sends.
#[classifier]
pub(super) fn cil_from_container(ctx: TcContext) -> i32 {
    let mut frame = Frame { ctx, file: File::Lxc, drops: Direction::Egress };
    if frame.ethertype() == ETHERTYPE_ARP {
        return answer_arp(&frame);
    }
    let packet = match frame.packet() {
        Ok(packet) => packet,
        Err(reason) => return frame.drop(reason, line!()),
    };
    let transport = frame.transport(&packet);
    if is_solicitation(&packet, transport) {
        return match answer_solicitation(&frame, &packet) {
            Ok(action) => action,
            Err(reason) => frame.drop(reason, line!()),
        };
    }
    forward(&mut frame, &packet, transport)
}

#[inline(always)]
fn forward(frame: &mut Frame, packet: &Packet, transport: Transport) -> i32 {
    let config = config();
    let verdict = decide::from_container(&Pinned, &config, frame.ifindex(), packet, transport);
    frame.act(verdict, packet, &config, line!())
}

/// Answers for the router address; other questions, and those of senders that no row tells of, are the stack's.
#[inline(always)]
fn answer_arp(frame: &Frame) -> i32 {
    let mut memory = MaybeUninit::<ArpFrame>::uninit();
    let arp = match frame.read(0, &mut memory) {
        Ok(arp) => arp,
        Err(reason) => return frame.drop(reason, line!()),
    };
    if !arp.asks_for(config().router_ipv4) {
        return OK;
    }
    let Some(mac) = gateway_mac(frame, NetIp::v4(arp.sender_ip), FAMILY_IPV4) else { return OK };
    arp.turn_into_reply(mac);
    match frame.write(0, arp) {
        Ok(()) => redirect(frame.ifindex()),
        Err(reason) => frame.drop(reason, line!()),
    }
}

/// Answers for the router address; everything else that a pod may reach is behind it.
#[inline(always)]
fn answer_solicitation(frame: &Frame, packet: &Packet) -> Result<i32, Reason> {
    let mut memory = MaybeUninit::<Neighbour>::uninit();
    let message = frame.read(0, &mut memory)?;
    if !message.asks_for(config().router_ipv6) {
        return Err(Reason::UNKNOWN_TARGET);
    }
    // A solicitation may come from the pod's link-local address, which has no row. One that is sent to a single
    // receiver repeats an address that was given before.
    let known = gateway_mac(frame, packet.source, packet.family);
    let repeated = Some(message.ethernet.destination).filter(|mac| mac[0] & 1 == 0);
    let mac = known.or(repeated).ok_or(Reason::INVALID_SOURCE_IP)?;
    let option = message.turn_into_advertisement(mac);
    frame.resize(ADVERTISEMENT_FRAME)?;
    frame.write(0, message)?;
    frame.write(size_of::<Neighbour>(), &option)?;
    Ok(redirect(frame.ifindex()))
}

/// The MAC address of the host side of the sender's pair.
#[inline(always)]
fn gateway_mac(frame: &Frame, sender: NetIp, family: u8) -> Option<[u8; 6]> {
    let row = Pinned.endpoint(&EndpointKey::new(sender, family))?;
    (row.ifindex == frame.ifindex()).then_some(row.node_mac.octets)
}

/// Called with a packet that is addressed to a pod and rewritten for it. While policies are not enforced, everything
/// passes.
#[classifier]
pub(super) fn cil_lxc_policy(ctx: TcContext) -> i32 {
    let cb = ctx.cb();
    let (delivery, ifindex) = (cb[CB_DELIVERY], cb[CB_IFINDEX]);
    let frame = Frame { ctx, file: File::Lxc, drops: Direction::Ingress };
    frame.count(Reason::FORWARDED, Direction::Ingress, line!());
    // The identity is for this node's programs; the pod's namespace has a use of its own for marks.
    frame.ctx.set_mark(0);
    if delivery & DELIVER_TO_PEER != 0 { redirect_peer(ifindex) } else { redirect(ifindex) }
}
