//! Programs of endpoints.

use core::mem::{MaybeUninit, size_of};

use aya_ebpf::{macros::classifier, programs::TcContext};
use basal_ebpf::{
    decide::{self, Sender},
    neighbour::{ADVERTISEMENT_FRAME, ArpFrame, Neighbour, is_solicitation},
    parse::{ETHERTYPE_ARP, Ethernet, Packet, is_link_local},
};
use basal_maps::{
    addr::{FAMILY_IPV4, NetIp},
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
    match receive(&mut frame) {
        Ok(action) => action,
        Err(reason) => frame.drop(reason, line!()),
    }
}

#[inline(always)]
fn receive(frame: &mut Frame) -> Result<i32, Reason> {
    if frame.ethertype()? == ETHERTYPE_ARP {
        return answer_arp(frame);
    }
    let config = config();
    let view = frame.view(&config)?;
    if is_solicitation(&view.packet, view.transport) {
        return answer_solicitation(frame, &view.packet);
    }
    let mut memory = MaybeUninit::<Ethernet>::uninit();
    let sender = Sender { ifindex: frame.ifindex(), ethernet: frame.read(0, &mut memory)? };
    let verdict = decide::from_container(&Pinned, &config, sender, &view.packet, view.transport, &view.about);
    Ok(frame.act(verdict, &view.packet, &config, line!()))
}

/// Answers for the router address; other questions are the stack's, and so is that of a sender who has no address yet.
#[inline(always)]
fn answer_arp(frame: &Frame) -> Result<i32, Reason> {
    let mut memory = MaybeUninit::<ArpFrame>::uninit();
    let arp = frame.read(0, &mut memory)?;
    let source = NetIp::v4(arp.sender_ip);
    if !arp.is_ipv4_over_ethernet() || source.is_unspecified() {
        return Ok(OK);
    }
    let sender = arp.sender(frame.ifindex()).ok_or(Reason::INVALID_SOURCE_MAC)?;
    let endpoint = sender.endpoint(&Pinned, source, FAMILY_IPV4)?;
    if !arp.asks_for(config().router_ipv4) {
        return Ok(OK);
    }
    arp.turn_into_reply(endpoint.node_mac.octets);
    frame.write(0, arp)?;
    Ok(redirect(frame.ifindex()))
}

/// Answers for the router address; everything else that a pod may reach is behind it.
#[inline(always)]
fn answer_solicitation(frame: &Frame, packet: &Packet) -> Result<i32, Reason> {
    let mut memory = MaybeUninit::<Neighbour>::uninit();
    let message = frame.read(0, &mut memory)?;
    if !message.asks_for(config().router_ipv6) {
        return Err(Reason::UNKNOWN_TARGET);
    }
    let sender = Sender { ifindex: frame.ifindex(), ethernet: &message.ethernet };
    let mac = match sender.endpoint(&Pinned, packet.source, packet.family) {
        Ok(endpoint) => endpoint.node_mac.octets,
        // The pod's link-local address has no row. What is sent to a single receiver repeats an address that was given
        // before.
        Err(_) if is_link_local(&packet.source, packet.family) && !message.ethernet.is_for_a_group() => {
            message.ethernet.destination
        }
        Err(reason) => return Err(reason),
    };
    let option = message.turn_into_advertisement(mac);
    frame.resize(ADVERTISEMENT_FRAME)?;
    frame.write(0, message)?;
    frame.write(size_of::<Neighbour>(), &option)?;
    Ok(redirect(frame.ifindex()))
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
