//! The program that does nothing: what a run of any program costs.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use aya::programs::SchedClassifier;
use nix::libc;

/// `BPF_PROG_LOAD`, `BPF_OBJ_PIN`, `BPF_PROG_TYPE_SCHED_CLS` (linux/bpf.h).
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;

/// `r0 = TC_ACT_OK; exit`, as `struct bpf_insn` lies in memory.
const INSTRUCTIONS: [[u8; 8]; 2] = [[0xb7, 0, 0, 0, 0, 0, 0, 0], [0x95, 0, 0, 0, 0, 0, 0, 0]];

/// The attributes of `BPF_PROG_LOAD` up to the last one that matters.
#[repr(C)]
struct Load {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
}

/// The attributes of `BPF_OBJ_PIN`.
#[repr(C)]
struct Pin {
    pathname: u64,
    program: u32,
    flags: u32,
}

/// Loads it, by way of a pin in a bpffs: aya takes programs from an object or a pin only.
pub(crate) fn load(bpffs: &Path) -> anyhow::Result<SchedClassifier> {
    let attributes = Load {
        kind: BPF_PROG_TYPE_SCHED_CLS,
        instruction_count: INSTRUCTIONS.len().try_into()?,
        instructions: INSTRUCTIONS.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
    };
    let program = bpf(BPF_PROG_LOAD, &attributes)?;
    #[expect(unsafe_code, reason = "aya loads no bare instructions")]
    // SAFETY: the kernel has just made the descriptor, which belongs to nobody else.
    let program = unsafe { OwnedFd::from_raw_fd(program) };
    let path = bpffs.join("empty");
    let pathname = CString::new(path.as_os_str().as_bytes())?;
    let pin = Pin { pathname: pathname.as_ptr() as u64, program: program.as_raw_fd().try_into()?, flags: 0 };
    bpf(BPF_OBJ_PIN, &pin)?;
    Ok(SchedClassifier::from_pin(path)?)
}

/// The system call; the attributes' pointers must be to what lives until it returns.
fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_int> {
    #[expect(unsafe_code, reason = "aya loads no bare instructions")]
    // SAFETY: the kernel reads as many bytes as the attributes have, and what they point to, all of it alive.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *attributes, size_of::<T>()) };
    match libc::c_int::try_from(answer) {
        Ok(answer) if answer >= 0 => Ok(answer),
        _ => Err(io::Error::last_os_error()),
    }
}
