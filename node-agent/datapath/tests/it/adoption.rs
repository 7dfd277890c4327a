//! A new agent, new programs, and traffic that notices neither.

use std::{
    io::Read as _,
    path::Path,
    process::{Child, Command, Stdio},
};

use basal_datapath::{
    diff::diff,
    kernel::{Kernel as _, OpError},
    op::Op,
    plan::NodePlan,
    program::{OBJECT, Object},
    state::Hook,
};
use basal_maps::spec;
use basal_runtime::outcome::Outcome;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    harness::{Netns, node, pair, sandbox},
    traffic::two_pods,
};

/// A hundred pings a second, until it is stopped or dropped.
struct Pings(Child);

impl Pings {
    fn start(from: &Netns, to: &str) -> Self {
        Self(from.enter(|| {
            Command::new("ping")
                .args(["-n", "-q", "-i", "0.01", "-W", "5", to])
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .unwrap_or_else(|error| panic!("ping cannot be run ({error}); install it"))
        }))
    }

    /// Fails unless every ping was answered; the last one may still be under way.
    fn must_have_been_answered(mut self) {
        let pid = Pid::from_raw(self.0.id().cast_signed());
        kill(pid, Signal::SIGINT).unwrap();
        let mut output = String::new();
        self.0.stdout.take().unwrap().read_to_string(&mut output).unwrap();
        let line = output.lines().find(|line| line.contains("packets transmitted")).unwrap();
        let mut numbers = line.split(|c: char| !c.is_ascii_digit()).filter_map(|word| word.parse::<u64>().ok());
        let (sent, answered) = (numbers.next().unwrap(), numbers.next().unwrap());
        assert!(sent > 0 && sent - answered <= 1, "{line}");
    }
}

impl Drop for Pings {
    fn drop(&mut self) {
        // One that has ended cannot be killed.
        self.0.kill().unwrap_or_default();
        self.0.wait().unwrap();
    }
}

#[test]
fn a_restarted_agent_changes_nothing() {
    sandbox(|bpffs| {
        let (mut one, _two) = pair(bpffs);
        let _pod = one.add_pod(7, 1111);
        one.converge();
        let before = one.read();
        assert_eq!(one.converge(), Vec::<Vec<Op>>::new());
        assert_eq!(one.read(), before);
    });
}

#[test]
fn replacing_all_programs_loses_no_packet() {
    sandbox(|bpffs| {
        let (mut one, mut two) = pair(bpffs);
        let pod_one = one.add_pod(7, 1111);
        let pod_two = two.add_pod(7, 2222);
        let pod_three = one.add_pod(8, 3333);
        one.converge();
        two.converge();
        pod_one.ping("10.1.2.7").unwrap();
        pod_three.ping("10.1.1.7").unwrap();

        let pings = [
            Pings::start(&pod_one, "10.1.2.7"),
            Pings::start(&pod_three, "10.1.1.7"),
            Pings::start(&pod_two, "fd00:1:1::8"),
        ];
        for number in 0..5 {
            // Another MTU is another constant, so another set of programs.
            one.plan.device_mtu = 1499 - number;
            let ops = one.converge().concat();
            assert!(ops.iter().any(|op| matches!(op, Op::LoadPrograms { .. })));
            assert!(ops.iter().any(|op| matches!(op, Op::UnloadPrograms(_))));
            let replaced = ops.iter().filter(|op| matches!(op, Op::Attach(..))).count();
            assert_eq!(replaced, 9, "five hooks of devices, two of endpoints, two slots");
            let state = one.read().state;
            assert!(state.programs.len() == 1 && state.hooks.values().all(|hash| state.programs.contains(hash)));
        }
        pings.into_iter().for_each(Pings::must_have_been_answered);
    });
}

/// Another object than the one inside this binary: what is behind the last section is nobody's, so neither programs nor
/// maps differ.
pub(crate) fn another_object() -> Object {
    Object::new([OBJECT, &[0]].concat().leak())
}

#[test]
fn programs_call_those_of_their_own_set() {
    sandbox(|bpffs| {
        let (one, _two, _pod_one, _pod_two) = two_pods(bpffs, true);
        let of_set = one.programs().join(spec::CALL_POLICY.name);
        let slots = |map: &Path| one.netns.run(&format!("bpftool map dump pinned {}", map.display())).unwrap();
        let before = slots(&of_set);
        let plan = NodePlan { object: another_object(), ..one.plan.clone() };
        one.with(async |kernel| {
            let observed = kernel.read().await.unwrap();
            let ops = diff(&plan.desired(&observed), &observed.state);
            let until_hooks = ops.iter().take_while(|op| !matches!(op, Op::Attach(Hook::Device { .. }, _)));
            for op in until_hooks {
                assert!(kernel.apply(op).await.is_done(), "{op}");
            }
        });
        assert_ne!(slots(&one.paths.maps().join(spec::CALL_POLICY.name)), before, "those of the other set");
        assert_eq!(slots(&of_set), before, "what still runs calls what it called");
    });
}

#[test]
fn programs_of_another_object_take_the_place_of_those_that_run() {
    sandbox(|bpffs| {
        let (mut one, _two, pod_one, _pod_two) = two_pods(bpffs, true);
        let before = one.read().state;
        let pings = Pings::start(&pod_one, "10.1.2.7");
        one.plan.object = another_object();
        let ops = one.converge().concat();
        assert_eq!(ops.iter().filter(|op| matches!(op, Op::Attach(..))).count(), before.hooks.len());
        let after = one.read().state;
        assert!(after.programs.len() == 1 && after.programs.is_disjoint(&before.programs));
        assert!(after.hooks.values().all(|hash| after.programs.contains(hash)));
        assert_eq!(after.maps, before.maps);
        pings.must_have_been_answered();
    });
}

/// Where the object has instructions: its executable sections (`Elf64_Shdr`, elf(5)).
fn instructions(object: &[u8]) -> Vec<std::ops::Range<usize>> {
    const EXECUTABLE: u64 = 4;
    let number = |at: usize, bytes: usize| {
        object[at..at + bytes].iter().rev().fold(0, |number: u64, byte| number << 8 | u64::from(*byte))
    };
    let place = |at, bytes| usize::try_from(number(at, bytes)).unwrap();
    let (table, size, count) = (place(0x28, 8), place(0x3a, 2), place(0x3c, 2));
    let sections = (0..count).map(|section| table + section * size);
    let executable = sections.filter(|section| number(section + 8, 8) & EXECUTABLE != 0);
    executable.map(|section| place(section + 0x18, 8)..place(section + 0x18, 8) + place(section + 0x20, 8)).collect()
}

/// The object with programs that do not end.
fn refused_by_the_verifier() -> Object {
    // As linux/bpf.h codes `exit` and `r0 = 0`.
    const EXIT: [u8; 8] = [0x95, 0, 0, 0, 0, 0, 0, 0];
    const ZERO: [u8; 8] = [0xb7, 0, 0, 0, 0, 0, 0, 0];
    let mut object = OBJECT.to_vec();
    for code in instructions(OBJECT) {
        for instruction in object[code].as_chunks_mut().0.iter_mut().filter(|instruction| **instruction == EXIT) {
            *instruction = ZERO;
        }
    }
    Object::new(object.leak())
}

#[test]
fn programs_that_the_verifier_refuses_leave_those_that_run() {
    sandbox(|bpffs| {
        let (mut one, _two, pod_one, _pod_two) = two_pods(bpffs, true);
        let before = one.read().state;
        let pings = Pings::start(&pod_one, "10.1.2.7");

        one.plan.object = refused_by_the_verifier();
        let refused = one.with(async |kernel| {
            let observed = kernel.read().await.unwrap();
            let ops = diff(&one.plan.desired(&observed), &observed.state);
            let load = ops.iter().find(|op| matches!(op, Op::LoadPrograms { .. })).unwrap();
            kernel.apply(load).await
        });
        let Outcome::Refused(error @ OpError::ProgramRefused { program: "cil_from_container", .. }) = refused else {
            panic!("{refused:?}")
        };
        let said = error.to_string();
        assert!(said.contains("last insn is not an exit or jmp") && said.len() < 2000, "{said}");
        let after = one.read().state;
        assert_eq!((after.programs, after.hooks, after.maps), (before.programs, before.hooks, before.maps));
        assert!(!one.paths.bpffs.join("basal/staging").exists());

        one.plan.object = Object::built_in();
        assert_eq!(one.converge(), Vec::<Vec<Op>>::new(), "what it goes back to runs");
        pings.must_have_been_answered();
    });
}

#[test]
fn what_is_left_of_sets_is_removed() {
    sandbox(|bpffs| {
        let one = node(bpffs, 1);
        one.converge();
        let (clean, basal) = (one.pins(), one.paths.bpffs.join("basal"));
        // A set of a version whose map of endpoints was another one, and one that was never finished.
        let [earlier, unfinished] =
            ["programs/0123456789abcdef", "staging/fedcba9876543210"].map(|set| basal.join(set));
        for set in [&earlier, &unfinished] {
            std::fs::create_dir_all(set).unwrap();
            let map = set.join(spec::ENDPOINTS.name);
            let made =
                format!("bpftool map create {} type hash key 20 value 40 entries 7 name other flags 1", map.display());
            one.netns.run(&made).unwrap();
        }
        let ops = one.converge().concat();
        assert!(ops.len() == 2 && ops.iter().all(|op| matches!(op, Op::UnloadPrograms(_))), "{ops:?}");
        assert_eq!(one.pins(), clean);
    });
}

#[test]
fn a_map_that_is_made_otherwise_is_replaced_and_filled() {
    sandbox(|bpffs| {
        let (one, _two, pod_one, _pod_two) = two_pods(bpffs, true);
        let globals = one.paths.maps();
        for map in [&spec::IPCACHE, &spec::ENDPOINTS, &spec::CALL_POLICY] {
            let path = globals.join(map.name);
            std::fs::remove_file(&path).unwrap();
            let kind = if map.name == spec::IPCACHE.name { "lpm_trie" } else { "hash" };
            let made = one.netns.run(&format!(
                "bpftool map create {} type {kind} key {} value {} entries 7 name other flags 1",
                path.display(),
                map.key_size,
                map.value_size,
            ));
            made.unwrap();
        }
        let rounds = one.converge();
        assert!(rounds.concat().iter().any(|op| matches!(op, Op::LoadPrograms { .. })), "{rounds:#?}");
        assert!(rounds.concat().iter().any(|op| matches!(op, Op::Attach(Hook::Policy { id: 7 }, _))));
        pod_one.ping("10.1.2.7").unwrap();
        assert_eq!(one.converge(), Vec::<Vec<Op>>::new());
    });
}

#[test]
fn programs_move_between_tcx_and_clsact_without_losing_a_packet() {
    sandbox(|bpffs| {
        let (mut one, _two, pod_one, _pod_two) = two_pods(bpffs, true);
        let link = one.plan.endpoints[&7].link.clone();
        let pings = Pings::start(&pod_one, "10.1.2.7");
        for (tcx, filters) in [(false, 1), (true, 0), (false, 1)] {
            one.paths.tcx = tcx;
            let moved = one.converge().concat();
            assert_eq!(moved.iter().filter(|op| matches!(op, Op::Attach(..))).count(), 6, "{moved:#?}");
            assert_eq!(one.converge(), Vec::<Vec<Op>>::new());
            let listed = one.netns.run(&format!("tc filter show dev {link} ingress")).unwrap();
            assert_eq!(listed.matches("direct-action").count(), filters, "{listed}");
        }
        // New programs take the filters' places.
        one.plan.device_mtu = 1490;
        one.converge();
        let listed = one.netns.run(&format!("tc filter show dev {link} ingress")).unwrap();
        assert_eq!(listed.matches("direct-action").count(), 1, "{listed}");
        pings.must_have_been_answered();

        one.plan.endpoints.clear();
        one.converge();
        assert_eq!(one.read().state.hooks.len(), 5);
    });
}
