//! A new agent, new programs, and traffic that notices neither.

use std::process::{Child, Command, Stdio};

use basal_datapath::{op::Op, state::Hook};
use basal_maps::spec;

use crate::harness::{Netns, pair, sandbox};

/// A hundred pings a second until the child is told to stop.
fn ping(from: &Netns, to: &str) -> Child {
    from.enter(|| {
        Command::new("ping")
            .args(["-n", "-q", "-i", "0.01", "-W", "5", to])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("ping cannot be run ({error}); install it"))
    })
}

/// Stops it; gives how many pings it sent and how many were answered.
fn stop(child: Child) -> (u64, u64) {
    let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let output = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
    let line = output.lines().find(|line| line.contains("packets transmitted")).unwrap();
    let mut numbers = line.split(|c: char| !c.is_ascii_digit()).filter_map(|word| word.parse().ok());
    (numbers.next().unwrap(), numbers.next().unwrap())
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

        let pings = [ping(&pod_one, "10.1.2.7"), ping(&pod_three, "10.1.1.7"), ping(&pod_two, "fd00:1:1::8")];
        for number in 0..5 {
            let first = one.plan.clone();
            // Another MTU is another constant, so another set of programs.
            one.plan.device_mtu = 1499 - number;
            let ops = one.converge().concat();
            assert!(ops.iter().any(|op| matches!(op, Op::LoadPrograms { .. })));
            assert!(ops.iter().any(|op| matches!(op, Op::UnloadPrograms(_))));
            let replaced = ops.iter().filter(|op| matches!(op, Op::Attach(..))).count();
            assert_eq!(replaced, 9, "five hooks of devices, two of endpoints, two slots");
            assert!(one.read().state.hooks.values().all(|hash| one.read().state.programs.contains(hash)));
            assert_ne!(one.plan, first);
        }
        for child in pings {
            let (sent, answered) = stop(child);
            assert!(sent > 0);
            // The last one may still be under way.
            assert!(sent - answered <= 1, "{sent} sent, {answered} answered");
        }
    });
}

#[test]
fn a_map_that_is_made_otherwise_is_replaced_and_filled() {
    sandbox(|bpffs| {
        let (mut one, mut two) = pair(bpffs);
        let pod_one = one.add_pod(7, 1111);
        let _pod_two = two.add_pod(7, 2222);
        one.converge();
        two.converge();
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
