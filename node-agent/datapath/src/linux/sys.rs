//! The one system call that aya does not offer: opening a pinned link to look at it.

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use nix::libc;

/// `BPF_OBJ_GET` (linux/bpf.h).
const BPF_OBJ_GET: libc::c_int = 7;

/// The attributes of `BPF_OBJ_GET`.
#[repr(C)]
struct ObjGet {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// What the kernel tells of a tcx link in `/proc/self/fdinfo`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TcxLink {
    /// Program that it runs.
    pub(super) program_id: u32,
    /// Device that it is on; `None` when that is gone.
    pub(super) ifindex: Option<u32>,
}

/// Looks at a pinned link; `None` for a link that is not tcx.
pub(super) fn tcx_link(path: &Path) -> io::Result<Option<TcxLink>> {
    let link = open(path)?;
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", link.as_raw_fd()))?;
    Ok(parse(&info))
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let attributes = ObjGet { pathname: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
    #[expect(unsafe_code, reason = "aya keeps the descriptor of a pinned link to itself")]
    // SAFETY: the kernel reads the attributes, and the path in them, which both live until the call returns; a
    // descriptor that it gives belongs to nobody else.
    unsafe {
        let fd = libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, &raw const attributes, size_of::<ObjGet>());
        match i32::try_from(fd) {
            Ok(fd) if fd >= 0 => Ok(OwnedFd::from_raw_fd(fd)),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn parse(info: &str) -> Option<TcxLink> {
    let field = |name: &str| info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim));
    if field("link_type") != Some("tcx") {
        return None;
    }
    let number = |name| field(name)?.parse::<u32>().ok();
    Some(TcxLink { program_id: number("prog_id")?, ifindex: number("ifindex").filter(|index| *index != 0) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_prints_is_read() {
        let info = "pos:\t0\nflags:\t02000002\nlink_type:\ttcx\nlink_id:\t7\nprog_tag:\t8707e23c86067d09\nprog_id:\t120\nifindex:\t9\nattach_type:\ttcx_ingress (46)\n";
        assert_eq!(parse(info), Some(TcxLink { program_id: 120, ifindex: Some(9) }));
        assert_eq!(parse(&info.replace("\t9\n", "\t0\n")).unwrap().ifindex, None);
        assert_eq!(parse(&info.replace("tcx", "xdp")), None);
    }
}
