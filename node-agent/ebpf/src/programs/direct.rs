//! The kernel's notes of connections that go past the stack.

use aya_ebpf::btf_maps::LruHashMap;
use basal_ebpf::{
    direct::{Connections, Pod},
    nat::Flow,
    parse::protocol,
};
use basal_maps::{
    addr::FAMILY_IPV6,
    flow::{DIR_OUT, DirectConnection, Tuple as _, TupleV4, TupleV6},
};

use super::{
    flows::seconds,
    maps::{DIRECT4, DIRECT6, Pinned},
};

/// What is done with a note.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Do {
    Find,
    Make,
    Remove,
    End,
    Reset,
}

/// Finds, makes, removes or ends a note; false when that cannot be done. Keys are on the stack of this function, not on that of
/// the programs.
#[inline(never)]
fn note(what: Do, flow: &Flow, pod: Pod, family: u8) -> bool {
    let (Flow { source, destination, .. }, ends) = (pod.sent(flow), pod.ends(what == Do::Reset));
    if family == FAMILY_IPV6 {
        note_in(&DIRECT6, &TupleV6::new(source, destination, protocol::TCP, DIR_OUT), what, ends)
    } else {
        note_in(&DIRECT4, &TupleV4::new(source, destination, protocol::TCP, DIR_OUT), what, ends)
    }
}

#[inline(always)]
fn note_in<K, const MAX: usize, const FLAGS: usize>(
    map: &LruHashMap<K, DirectConnection, MAX, FLAGS>,
    key: &K,
    what: Do,
    ends: u32,
) -> bool {
    match what {
        // SAFETY: the row is not read.
        Do::Find => unsafe { map.get(key) }.is_some(),
        Do::Make => map.insert(key, DirectConnection::new(seconds()), 0).is_ok(),
        Do::Remove => map.remove(key).is_ok(),
        Do::End | Do::Reset => {
            let Some(row) = map.get_ptr_mut(key) else { return false };
            // SAFETY: the row's memory stays a row's. Of two ends at the same moment one may be lost: then the note stays
            // until there are too many.
            unsafe { (*row).end(ends, seconds()) };
            true
        }
    }
}

impl Connections for Pinned {
    #[inline(always)]
    fn is_direct(&self, flow: &Flow, pod: Pod, family: u8) -> bool {
        note(Do::Find, flow, pod, family)
    }

    #[inline(always)]
    fn go_direct(&self, flow: &Flow, pod: Pod, family: u8) -> bool {
        note(Do::Make, flow, pod, family)
    }

    #[inline(always)]
    fn go_by_stack(&self, flow: &Flow, pod: Pod, family: u8) {
        // Mostly there is none.
        note(Do::Remove, flow, pod, family);
    }

    #[inline(always)]
    fn end(&self, flow: &Flow, pod: Pod, reset: bool, family: u8) -> bool {
        note(if reset { Do::Reset } else { Do::End }, flow, pod, family)
    }
}
