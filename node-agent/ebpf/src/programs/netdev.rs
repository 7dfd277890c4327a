//! Programs on the devices that lead out of the node: masquerading.
//!
//! Each stage is a function that is not inlined, so that it has a part of the kernel's 512 bytes of stack to itself; what
//! one hands to the next is in [`Work`]. They take nothing that is empty: the compiler would leave the register of such an
//! argument as it was, and the verifier takes no function that reads one.

use core::mem::size_of;

use aya_ebpf::{
    btf_maps::PerCpuArray,
    macros::{btf_map, classifier},
    programs::TcContext,
};
use basal_ebpf::{
    nat::{self, Flow, Flows, Kind, Leaving, Traced},
    parse::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, Packet, protocol},
};
use basal_maps::{
    addr::{FAMILY_IPV4, FAMILY_IPV6, NetIp},
    flow::End,
    mark,
    metrics::{Direction, File},
    reason::Reason,
};

use super::{
    config,
    context::Frame,
    flows::{FlowsV4, FlowsV6},
    maps::{Pinned, masquerade_address},
    rewrite::{Change, Side},
    segment::{Quoted, Segment},
};

/// What the stages know of the packet.
struct Work {
    /// The address that the device masquerades with.
    by: NetIp,
    packet: Packet,
    segment: Segment,
    kind: Kind,
    /// The flow, where it is known.
    flow: Flow,
    flow_is_known: bool,
    /// What an error quotes.
    quoted: Quoted,
    /// What an end of the flow becomes.
    to: End,
}

/// 64-bit words that hold a [`Work`].
const WORDS: usize = size_of::<Work>().div_ceil(8);

/// A [`Work`] for each CPU and direction: what a CPU receives may come between two stages for what it sends.
#[btf_map(name = "basal_work")]
static WORK: PerCpuArray<[u64; WORDS], 2> = PerCpuArray::new();
const WORK_ON_EGRESS: u32 = 0;
const WORK_ON_INGRESS: u32 = 1;

/// On to the next program on the device, which is not ours (`TCX_NEXT`, linux/bpf.h; `TC_ACT_UNSPEC`, linux/pkt_cls.h).
const NEXT_PROGRAM: i32 = -1;

/// What becomes of a packet after a stage. A number, since functions that are not inlined answer with one.
type Next = u32;
/// It goes on as it is.
const PASS: Next = 0;
/// The next stage.
const GO_ON: Next = 1;
/// The stage for ICMP errors.
const ERROR: Next = 2;
/// Reasons to drop it are larger.
const FIRST_REASON: Next = 128;

#[inline(always)]
fn next(done: Result<Next, Reason>) -> Next {
    match done {
        Ok(next) => next,
        Err(reason) => Next::from(reason.0),
    }
}

/// Egress of a device that leads out of the node: what pods send gets an address of the node.
#[classifier]
pub(super) fn cil_to_netdev(ctx: TcContext) -> i32 {
    let frame = Frame { ctx, file: File::Host, drops: Direction::Egress };
    // A tunnel packet is the node's own; its ports are no pod's.
    if mark::magic(frame.mark()) == mark::MAGIC_OVERLAY {
        return NEXT_PROGRAM;
    }
    let done = match frame.ethertype() {
        Ok(ETHERTYPE_IPV4) => leave::<FlowsV4>(&frame, FAMILY_IPV4),
        Ok(ETHERTYPE_IPV6) => leave::<FlowsV6>(&frame, FAMILY_IPV6),
        _ => PASS,
    };
    end(&frame, done)
}

/// Ingress of such a device: what comes back finds the pod.
#[classifier]
pub(super) fn cil_from_netdev(ctx: TcContext) -> i32 {
    let frame = Frame { ctx, file: File::Host, drops: Direction::Ingress };
    let done = match frame.ethertype() {
        Ok(ETHERTYPE_IPV4) => arrive::<FlowsV4>(&frame, FAMILY_IPV4),
        Ok(ETHERTYPE_IPV6) => arrive::<FlowsV6>(&frame, FAMILY_IPV6),
        _ => PASS,
    };
    end(&frame, done)
}

#[inline(always)]
fn end(frame: &Frame, done: Next) -> i32 {
    if done < FIRST_REASON { NEXT_PROGRAM } else { frame.drop(Reason(done as u8), line!()) }
}

#[inline(always)]
fn leave<F: Flows + Default>(frame: &Frame, family: u8) -> Next {
    let Some(work) = begin(frame, family, WORK_ON_EGRESS) else { return PASS };
    match read(frame, work) {
        GO_ON => match source::<F>(frame, work) {
            GO_ON => change(frame, work, Side::Source as u32),
            done => done,
        },
        ERROR => match quote(frame, work) {
            GO_ON => error_leaves::<F>(frame, work),
            done => done,
        },
        done => done,
    }
}

#[inline(always)]
fn arrive<F: Flows + Default>(frame: &Frame, family: u8) -> Next {
    let Some(work) = begin(frame, family, WORK_ON_INGRESS) else { return PASS };
    match read(frame, work) {
        GO_ON => match destination::<F>(frame, work) {
            GO_ON => change(frame, work, Side::Destination as u32),
            done => done,
        },
        ERROR => match quote(frame, work) {
            GO_ON => error_arrives::<F>(frame, work),
            done => done,
        },
        done => done,
    }
}

/// The work on a packet of a device that masquerades.
#[inline(always)]
fn begin(frame: &Frame, family: u8, slot: u32) -> Option<&'static mut Work> {
    let by = masquerade_address(frame.ifindex(), family)?;
    let work = WORK.get_ptr_mut(slot)?.cast::<Work>();
    // SAFETY: the row is large enough and aligned, all zeroes are a valid value, and nothing but this type is written to
    // it, by one program at a time.
    let work = unsafe { &mut *work };
    work.by = by;
    Some(work)
}

/// Reads the packet and its flow. What has no header that can be read is no pod's: the programs of pods drop it.
#[inline(never)]
fn read(frame: &Frame, work: &mut Work) -> Next {
    if frame.packet(&mut work.packet).is_err() {
        return PASS;
    }
    work.flow_is_known = false;
    let Some(segment) = frame.segment(&work.packet) else {
        work.kind = Kind::Other;
        work.segment = Segment::UNKNOWN;
        return GO_ON;
    };
    work.segment = segment;
    let (kind, flow) = frame.flow(&work.packet, &work.segment);
    work.kind = kind;
    if let Some(flow) = flow {
        work.flow = flow;
        work.flow_is_known = true;
    }
    if kind == Kind::Error { ERROR } else { GO_ON }
}

/// Finds the source that a packet leaves with.
#[inline(never)]
fn source<F: Flows + Default>(frame: &Frame, work: &mut Work) -> Next {
    let config = config();
    let flow = work.flow_is_known.then_some(&work.flow);
    // A tunnel packet that somebody has marked otherwise since.
    if let Some(flow) = flow
        && flow.protocol == protocol::UDP
        && u32::from(flow.destination.port.get()) == config.tunnel_port
        && work.packet.source == work.by
    {
        return PASS;
    }
    let sent = Traced { packet: &work.packet, flow, kind: work.kind, seen: frame.seen(&work.segment) };
    match nat::leaving(&F::default(), &Pinned, &config, work.by, sent) {
        Leaving::AsIs => PASS,
        Leaving::From(to) => {
            work.to = to;
            GO_ON
        }
        Leaving::Drop(reason) => Next::from(reason.0),
    }
}

/// Finds the destination that a packet comes in for.
#[inline(never)]
fn destination<F: Flows + Default>(frame: &Frame, work: &mut Work) -> Next {
    let flow = work.flow_is_known.then_some(&work.flow);
    let received = Traced { packet: &work.packet, flow, kind: work.kind, seen: frame.seen(&work.segment) };
    match nat::arriving(&F::default(), &Pinned, received) {
        Some(to) => {
            work.to = to;
            GO_ON
        }
        None => PASS,
    }
}

/// Writes what an end of the packet became.
#[inline(never)]
fn change(frame: &Frame, work: &Work, side: u32) -> Next {
    let (side, from) = if side == Side::Source as u32 {
        (Side::Source, work.flow.source)
    } else {
        (Side::Destination, work.flow.destination)
    };
    let change = Change { side, family: work.packet.family, from, to: work.to };
    next(frame.change(&change, &work.segment, work.kind).map(|()| PASS))
}

/// Reads what an ICMP error quotes.
#[inline(never)]
fn quote(frame: &Frame, work: &mut Work) -> Next {
    match frame.quoted(work.packet.family, &work.segment) {
        Some(quoted) => {
            work.quoted = quoted;
            GO_ON
        }
        None => PASS,
    }
}

#[inline(never)]
fn error_leaves<F: Flows + Default>(frame: &Frame, work: &Work) -> Next {
    let (packet, quoted) = (&work.packet, &work.quoted);
    let Some(to) = nat::leaving_error(&F::default(), &Pinned, work.by, packet, &quoted.flow) else { return PASS };
    let change = Change { side: Side::Destination, family: packet.family, from: quoted.flow.destination, to };
    next(frame.change_quoted(&change, quoted, &work.segment, packet.source).map(|()| PASS))
}

#[inline(never)]
fn error_arrives<F: Flows + Default>(frame: &Frame, work: &Work) -> Next {
    let (packet, quoted) = (&work.packet, &work.quoted);
    let Some(to) = nat::arriving_error(&F::default(), packet, &quoted.flow) else { return PASS };
    let change = Change { side: Side::Source, family: packet.family, from: quoted.flow.source, to };
    next(frame.change_quoted(&change, quoted, &work.segment, packet.destination).map(|()| PASS))
}
