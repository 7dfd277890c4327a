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
}

/// Finds, makes or removes a note; false when that cannot be done. Keys are on the stack of this function, not on that of
/// the programs.
#[inline(never)]
fn note(what: Do, flow: &Flow, pod: Pod, family: u8) -> bool {
    let Flow { source, destination, .. } = pod.sent(flow);
    if family == FAMILY_IPV6 {
        note_in(&DIRECT6, &TupleV6::new(source, destination, protocol::TCP, DIR_OUT), what)
    } else {
        note_in(&DIRECT4, &TupleV4::new(source, destination, protocol::TCP, DIR_OUT), what)
    }
}

#[inline(always)]
fn note_in<K, const MAX: usize, const FLAGS: usize>(
    map: &LruHashMap<K, DirectConnection, MAX, FLAGS>,
    key: &K,
    what: Do,
) -> bool {
    match what {
        // SAFETY: the row is not read.
        Do::Find => unsafe { map.get(key) }.is_some(),
        Do::Make => map.insert(key, DirectConnection { since: seconds() }, 0).is_ok(),
        Do::Remove => map.remove(key).is_ok(),
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
}
