//! Nodes whose iptables lets nothing through.

use basal_datapath::{diff::diff, forward::FilterTable, kernel::Kernel as _, op::Op, state::NodeState};
use basal_runtime::outcome::Outcome;

use crate::harness::{pair, sandbox};

/// Pods reach each other on a node whose FORWARD chains, made by these commands, drop; and it is left as it was.
fn pods_pass(commands: [&'static str; 2], tables: [FilterTable; 2]) {
    sandbox(|bpffs| {
        let (mut one, mut two) = pair(bpffs);
        let (pod_one, _pod_two, pod_three) = (one.add_pod(7, 1111), two.add_pod(7, 2222), one.add_pod(8, 3333));
        one.converge();
        two.converge();
        let ping = || ["10.1.2.7", "10.1.1.8", "fd00:1:2::7", "fd00:1:1::8"].map(|ip| pod_one.ping(ip).is_ok());
        assert_eq!(ping(), [true; 4]);
        for command in commands {
            one.netns.run(&format!("{command} -P FORWARD DROP")).unwrap();
        }
        assert!(pod_one.run("ping -n -c 1 -W 1 10.1.2.7").is_err(), "it has to matter");
        let kinds: Vec<_> = one.converge().concat().iter().map(Op::kind).collect();
        assert_eq!(kinds, ["set-forward"; 2]);
        assert_eq!(ping(), [true; 4]);
        pod_three.ping("10.1.1.7").unwrap();
        assert_eq!(one.converge(), Vec::<Vec<Op>>::new());
        assert_eq!(one.read().state.forward.into_keys().collect::<Vec<_>>(), tables);
        let rules = one.netns.run(&format!("{} -S FORWARD", commands[0])).unwrap();
        assert!(rules.contains("cilium-feeder: CILIUM_FORWARD"), "{rules}");

        // Somebody puts other rules there, doubles ours, and empties our chain.
        for arguments in [
            "-I FORWARD -i docker0 -j DROP",
            "-A FORWARD -m comment --comment cilium -j CILIUM_FORWARD",
            "-F CILIUM_FORWARD",
        ] {
            one.netns.run(&format!("{} {arguments}", commands[0])).unwrap();
        }
        one.netns.run(&format!("{} -D FORWARD -m comment --comment cilium -j CILIUM_FORWARD", commands[0])).unwrap();
        assert_eq!(one.converge().concat().iter().map(Op::kind).collect::<Vec<_>>(), ["set-forward"]);
        assert_eq!(ping(), [true; 4]);

        one.with(async |kernel| {
            for op in diff(&NodeState::default(), &kernel.read().await.unwrap().state) {
                assert!(matches!(kernel.apply(&op).await, Outcome::Done(())), "{op}");
            }
        });
        let rules = one.netns.run(&format!("{} -S", commands[0])).unwrap();
        assert!(rules.contains("-A FORWARD -i docker0 -j DROP") && !rules.contains("CILIUM"), "{rules}");
    });
}

#[test]
fn a_drop_in_nftables_is_passed() {
    pods_pass(["iptables-nft", "ip6tables-nft"], [FilterTable::ALL[2], FilterTable::ALL[3]]);
}

#[test]
fn a_drop_in_legacy_tables_is_passed() {
    pods_pass(["iptables-legacy", "ip6tables-legacy"], [FilterTable::ALL[0], FilterTable::ALL[1]]);
}

#[test]
fn a_table_that_nobody_uses_is_not_made() {
    sandbox(|bpffs| {
        let (one, _two) = pair(bpffs);
        one.converge();
        assert_eq!(one.read().state.forward.len(), 0);
        assert_eq!(one.netns.run("cat /proc/self/net/ip_tables_names").unwrap(), "");
        let tables = one.netns.run("nft list tables").unwrap();
        assert_eq!(tables, "table inet basal\n");
    });
}
