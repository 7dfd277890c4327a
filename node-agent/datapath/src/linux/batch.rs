//! Reading a whole map with a few system calls (`BPF_MAP_LOOKUP_BATCH`, Linux 5.6; tries since 5.13).

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
};

use aya::maps::MapData;
use nix::libc;

/// Rows that are asked for at once; a bucket of a hash map that has more makes it twice as many.
const ROWS: u32 = 4096;
/// A cursor is a bucket's number for hash maps and a key for tries: no key is longer.
const CURSOR: usize = 64;

/// A system call of `bpf` for many rows (`union bpf_attr`, linux/bpf.h).
#[repr(C)]
struct LookupBatch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// `BPF_MAP_LOOKUP_BATCH` (linux/bpf.h).
const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;

/// True for the error of a kernel that does not read such a map in this way.
pub(super) fn is_unsupported(error: &io::Error) -> bool {
    /// `ENOTSUPP` (linux/errno.h), which the kernel should keep to itself.
    const ENOTSUPP: i32 = 524;
    matches!(error.raw_os_error(), Some(ENOTSUPP | libc::EINVAL))
}

/// Hands each row to `visit`, until that fails. One that is there from beginning to end is seen once; one that comes or goes
/// meanwhile may or may not be.
pub(super) fn each(
    map: &MapData,
    key_size: usize,
    value_size: usize,
    mut visit: impl FnMut(&[u8], &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut rows = ROWS;
    let mut cursor: Option<[u8; CURSOR]> = None;
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    loop {
        keys.resize(key_size * rows as usize, 0);
        values.resize(value_size * rows as usize, 0);
        let mut next = [0_u8; CURSOR];
        let mut attributes = LookupBatch {
            in_batch: cursor.as_ref().map_or(0, |cursor| cursor.as_ptr() as u64),
            out_batch: next.as_mut_ptr() as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: rows,
            map_fd: map.fd().as_fd().as_raw_fd().cast_unsigned(),
            elem_flags: 0,
            flags: 0,
        };
        #[expect(unsafe_code, reason = "aya reads maps row by row only")]
        // SAFETY: the kernel writes at most `count` keys and values, of the map's sizes, and a cursor of at most a key; all
        // of it outlives the call.
        let result = unsafe {
            libc::syscall(libc::SYS_bpf, BPF_MAP_LOOKUP_BATCH, &raw mut attributes, size_of::<LookupBatch>())
        };
        let error = (result < 0).then(io::Error::last_os_error);
        let ended = match error.as_ref().and_then(io::Error::raw_os_error) {
            Some(libc::ENOSPC) => {
                rows = rows.saturating_mul(2);
                continue;
            }
            Some(libc::ENOENT) => true,
            _ => error.map_or(Ok(false), Err)?,
        };
        let found = attributes.count as usize;
        for (key, value) in keys.chunks_exact(key_size).zip(values.chunks_exact(value_size)).take(found) {
            visit(key, value)?;
        }
        if ended {
            return Ok(());
        }
        cursor = Some(next);
    }
}
