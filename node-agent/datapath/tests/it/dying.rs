//! Processes that die in the middle of a change to the kernel.

use std::{
    collections::BTreeSet,
    panic::{AssertUnwindSafe, catch_unwind},
};

use nix::{
    libc,
    sys::{
        ptrace::{self, Options},
        signal::{Signal, kill, raise},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, fork},
};

/// The system calls that leave something behind when the process ends: pins, links and rows, folders of pins, and whatever
/// netlink is asked for.
const CALLS: [libc::c_long; 13] = [
    libc::SYS_bpf,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_rmdir,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_link,
    libc::SYS_linkat,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
];

/// Those of `bpf` that do (linux/bpf.h): rows are written and deleted, things are pinned, links made and moved.
const BPF_COMMANDS: [u32; 5] = [2, 3, 6, 28, 29];

/// Does the work in a process of its own, which is killed just before the system call of this number, counted from 0, of
/// those that leave something behind; false when it came to its end first.
pub(crate) fn dies_before(call: usize, work: impl FnOnce()) -> bool {
    #[expect(unsafe_code, reason = "only a process can be killed")]
    // SAFETY: no other thread of a test is at work now, so none holds a lock that the new process would wait for.
    let forked = unsafe { fork() }.unwrap();
    match forked {
        ForkResult::Child => {
            ptrace::traceme().unwrap();
            raise(Signal::SIGSTOP).unwrap();
            stop_at_calls();
            let done = catch_unwind(AssertUnwindSafe(work));
            #[expect(unsafe_code, reason = "the rest of the test is its parent's")]
            // SAFETY: it ends the process and touches nothing of it.
            unsafe {
                libc::_exit(i32::from(done.is_err()))
            }
        }
        ForkResult::Parent { child } => watch(child, call),
    }
}

/// From now on a tracer is asked before each of the system calls.
fn stop_at_calls() {
    // `struct seccomp_data` (linux/seccomp.h): the number of the call, and the low half of its first argument.
    const NUMBER: u32 = 0;
    const FIRST_ARGUMENT: u32 = 16;
    let [load, equals, answer] =
        [libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, libc::BPF_RET];
    let instruction = |code: u32, jt: usize, jf: usize, k: u32| libc::sock_filter {
        code: u16::try_from(code).unwrap(),
        jt: u8::try_from(jt).unwrap(),
        jf: u8::try_from(jf).unwrap(),
        k,
    };
    // Each comparison jumps over those that follow it and over the answer to what none of them knows.
    let among = |numbers: &[u32]| {
        let jumps = (0..numbers.len()).rev().zip(numbers);
        jumps.map(|(after, number)| instruction(equals, after + 1, 0, *number)).collect::<Vec<_>>()
    };
    let (trace, allow) =
        (instruction(answer, 0, 0, libc::SECCOMP_RET_TRACE), instruction(answer, 0, 0, libc::SECCOMP_RET_ALLOW));
    let [bpf, calls @ ..] = CALLS.map(|call| u32::try_from(call).unwrap());
    let of_bpf = [vec![instruction(load, 0, 0, FIRST_ARGUMENT)], among(&BPF_COMMANDS), vec![allow, trace]].concat();
    let is_bpf = vec![instruction(load, 0, 0, NUMBER), instruction(equals, 0, of_bpf.len(), bpf)];
    let mut filter = [is_bpf, of_bpf, among(&calls), vec![allow, trace]].concat();
    let program = libc::sock_fprog { len: u16::try_from(filter.len()).unwrap(), filter: filter.as_mut_ptr() };
    #[expect(unsafe_code, reason = "nobody wraps it")]
    // SAFETY: the kernel copies the filter, which lives until the call returns.
    let installed = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    assert_eq!(installed, 0, "{}", std::io::Error::last_os_error());
}

/// Counts what a process and those that it starts are about to do; true when it was killed.
fn watch(child: Pid, call: usize) -> bool {
    waitpid(child, None).unwrap();
    let options = [
        Options::PTRACE_O_EXITKILL,
        Options::PTRACE_O_TRACECLONE,
        Options::PTRACE_O_TRACEFORK,
        Options::PTRACE_O_TRACEVFORK,
        Options::PTRACE_O_TRACESECCOMP,
    ];
    ptrace::setoptions(child, options.into_iter().collect()).unwrap();
    ptrace::cont(child, None).unwrap();
    let (mut calls, mut died) = (0, false);
    let mut alive = BTreeSet::from([child]);
    while !alive.is_empty() {
        let status = waitpid(None, Some(WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD)).unwrap();
        let pid = status.pid().unwrap();
        alive.insert(pid);
        match status {
            WaitStatus::Exited(pid, code) => {
                alive.remove(&pid);
                assert!(pid != child || code == 0, "the work failed");
            }
            WaitStatus::Signaled(pid, ..) => drop(alive.remove(&pid)),
            WaitStatus::PtraceEvent(_, _, libc::PTRACE_EVENT_SECCOMP) if !died && !only_asks(pid) => {
                died = calls == call;
                calls += 1;
                if died {
                    // One that has ended meanwhile cannot be killed.
                    alive.iter().for_each(|pid| kill(*pid, Signal::SIGKILL).unwrap_or_default());
                } else {
                    go_on(pid, None);
                }
            }
            WaitStatus::PtraceEvent(..) => go_on(pid, None),
            WaitStatus::Stopped(pid, Signal::SIGSTOP | Signal::SIGTRAP) => go_on(pid, None),
            WaitStatus::Stopped(pid, signal) => go_on(pid, Some(signal)),
            other => panic!("{other:?}"),
        }
    }
    died
}

/// True when a process stands before a request to netlink for a list.
fn only_asks(pid: Pid) -> bool {
    const DUMP: i64 = 0x300;
    let Ok(info) = ptrace::syscall_info(pid) else { return false };
    #[expect(unsafe_code, reason = "the kernel's union")]
    // SAFETY: where a filter stopped a process the kernel tells of that.
    let stop = unsafe { info.u.seccomp };
    let word = |at: i64| ptrace::read(pid, at as ptrace::AddressType).unwrap();
    let request = match i64::try_from(stop.nr).unwrap() {
        libc::SYS_sendto => stop.args[1].cast_signed(),
        // `msg_iov` of a `struct msghdr`, and the first buffer there.
        libc::SYS_sendmsg => word(word(stop.args[1].cast_signed() + 16)),
        _ => return false,
    };
    // `nlmsg_flags` behind length and type (linux/netlink.h).
    (word(request) >> 48) & DUMP == DUMP
}

/// Lets a process go on that may have been killed meanwhile.
fn go_on(pid: Pid, signal: Option<Signal>) {
    match ptrace::cont(pid, signal) {
        Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
        Err(error) => panic!("{pid} cannot go on: {error}"),
    }
}
