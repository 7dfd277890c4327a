//! What the forwarding programs see of their packet.
//!
//! It is in memory of the CPU's, and written by functions that are not inlined: the kernel's 512 bytes of stack have no room
//! for it beside what is done with it.

use core::mem::{MaybeUninit, size_of};

use aya_ebpf::{btf_maps::PerCpuArray, macros::btf_map};
use basal_ebpf::{
    direct::{About, Tcp, TcpHeader},
    nat::{Flow, Kind},
    parse::{ETHERNET, Packet, Transport, protocol},
};
use basal_maps::{config::Config, flow::End, reason::Reason};
use zerocopy::big_endian::U16;

use super::{context::Frame, segment::QUOTE};

/// A packet, as far as it matters where it goes.
pub(super) struct View {
    /// Its IP header.
    pub(super) packet: Packet,
    /// The start of its transport header.
    pub(super) transport: Transport,
    /// Which TCP connection it is about.
    pub(super) about: About,
    /// The packet that it quotes.
    quoted: Packet,
}

/// 64-bit words that hold a [`View`].
const WORDS: usize = size_of::<View>().div_ceil(8);

/// A [`View`] for each CPU: no program of ours runs while another one does on the same.
#[btf_map(name = "basal_view")]
static VIEWS: PerCpuArray<[u64; WORDS], 1> = PerCpuArray::new();

/// In answers of functions that are not inlined, which are numbers: it went well. Reasons are larger.
const SEEN: u32 = 0;

impl Frame {
    /// Looks at the packet. Which connection it is about nobody asks with legacy host routing.
    #[inline(always)]
    pub(super) fn view(&self, config: &Config) -> Result<&'static View, Reason> {
        // There is one for each CPU; the verifier wants it asked.
        let view = VIEWS.get_ptr_mut(0).ok_or(Reason::INVALID_PACKET)?.cast::<View>();
        // SAFETY: the row is large enough and aligned, all zeroes are a valid value, and nothing but this type is written to
        // it, by one program at a time.
        let view = unsafe { &mut *view };
        match look(self, view) {
            SEEN => {}
            reason => return Err(Reason(reason as u8)),
        }
        if !config.legacy_routing() && !view.packet.fragment {
            look_for_connection(self, view);
        }
        Ok(view)
    }
}

#[inline(never)]
fn look(frame: &Frame, view: &mut View) -> u32 {
    if let Err(reason) = frame.packet(&mut view.packet) {
        return u32::from(reason.0);
    }
    view.transport = frame.transport(&view.packet);
    view.about = About::Nothing;
    SEEN
}

/// Looks which connection a packet is about; false when it is about none. That nobody asks: a function without an answer
/// would leave a pointer in the answer's register, which the verifier refuses.
#[inline(never)]
fn look_for_connection(frame: &Frame, view: &mut View) -> bool {
    let Packet { family, protocol: number, .. } = view.packet;
    let at = ETHERNET + view.packet.header as usize;
    if number == protocol::TCP {
        let mut memory = MaybeUninit::<TcpHeader>::uninit();
        let Ok(header) = frame.read(at, &mut memory) else { return false };
        let flow = flow(&view.packet, [header.source, header.destination]);
        // SAFETY: the context pointer is valid for the program's run.
        let segment_size = unsafe { (*frame.ctx.skb.skb).gso_size };
        let length =
            if segment_size == 0 { view.packet.length } else { view.packet.header + header.length() + segment_size };
        view.about = About::Own(Tcp { flow, part: header.part(), length });
        return true;
    }
    if !matches!(Kind::of(family, number, view.transport.icmp_type()), Kind::Error) {
        return false;
    }
    let quoted = &mut view.quoted;
    if frame.packet_at(at + QUOTE, family, quoted).is_err() || quoted.protocol != protocol::TCP || quoted.later_fragment
    {
        return false;
    }
    let Some(ports) = frame.bytes(at + QUOTE + quoted.header as usize) else { return false };
    view.about = About::Quoted(flow(&view.quoted, ports));
    true
}

#[inline(always)]
fn flow(packet: &Packet, [from, to]: [U16; 2]) -> Flow {
    Flow {
        source: End { ip: packet.source, port: from },
        destination: End { ip: packet.destination, port: to },
        protocol: protocol::TCP,
    }
}
