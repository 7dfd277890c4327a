//! What lets the pods' traffic pass the FORWARD chains of iptables.
//!
//! A packet that one base chain of netfilter accepts still goes through the others: where FORWARD has policy DROP (Docker
//! sets it) or ends with a REJECT (host firewalls), no rule in a table of ours helps, and rules have to stand in that very
//! chain. They do as Cilium's: a chain `CILIUM_FORWARD`, and a rule in front of FORWARD that leads there.

/// How iptables keeps its rules in the kernel. A node may have rules in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Backend {
    /// Tables of its own (`ip_tables`).
    Legacy,
    /// nftables.
    Nft,
}

/// A table `filter` of iptables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct FilterTable {
    /// Whose.
    pub backend: Backend,
    /// That of ip6tables.
    pub ipv6: bool,
}

impl FilterTable {
    /// All that a node may have.
    pub const ALL: [Self; 4] = [
        Self { backend: Backend::Legacy, ipv6: false },
        Self { backend: Backend::Legacy, ipv6: true },
        Self { backend: Backend::Nft, ipv6: false },
        Self { backend: Backend::Nft, ipv6: true },
    ];

    /// The command that reads it. The one that writes has `-restore` behind that.
    #[must_use]
    pub const fn command(self) -> &'static str {
        match (self.backend, self.ipv6) {
            (Backend::Legacy, false) => "iptables-legacy",
            (Backend::Legacy, true) => "ip6tables-legacy",
            (Backend::Nft, false) => "iptables-nft",
            (Backend::Nft, true) => "ip6tables-nft",
        }
    }
}

/// The chain that others' rules pass packets through.
pub const FORWARD: &str = "FORWARD";
/// Our chain, by Cilium's name for it.
pub const CHAIN: &str = "CILIUM_FORWARD";
/// What the rule that leads to our chain does; it stands in FORWARD.
pub const FEEDER: &str = "-m comment --comment \"cilium-feeder: CILIUM_FORWARD\" -j CILIUM_FORWARD";

/// The rules that a table `filter` should hold, in the form in which `iptables -S` prints them.
#[must_use]
pub fn rules() -> Vec<String> {
    // Comments without characters that iptables prints otherwise than they were given.
    let accepted = [
        ("-o cilium_host", "basal: to pods"),
        ("-i cilium_host", "basal: from the node"),
        ("-i cilium_net", "basal: from the node"),
        ("-i lxc+", "basal: from pods"),
    ];
    let own = accepted.map(|(what, why)| format!("-A {CHAIN} {what} -m comment --comment \"{why}\" -j ACCEPT"));
    [format!("-A {FORWARD} {FEEDER}")].into_iter().chain(own).collect()
}

/// Input of `iptables-restore --noflush` that makes a table's rules of ours what is given, whatever they were; `feeders` is
/// how many rules in FORWARD lead to our chain. Without rules our chain goes.
#[must_use]
pub fn replacing(rules: &[String], feeders: usize) -> String {
    let feeder = format!("-A {FORWARD} {FEEDER}");
    let mut lines = vec!["*filter".to_owned(), format!(":{CHAIN} - [0:0]")];
    lines.extend(std::iter::repeat_n(format!("-D {FORWARD} {FEEDER}"), feeders));
    lines.extend(rules.iter().filter(|rule| **rule != feeder).cloned());
    if rules.contains(&feeder) {
        lines.push(format!("-I {FORWARD} 1 {FEEDER}"));
    } else if rules.is_empty() {
        lines.push(format!("-X {CHAIN}"));
    }
    lines.push("COMMIT\n".to_owned());
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_made_what_it_should_be_in_one_transaction() {
        let text = replacing(&rules(), 2);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[..2], ["*filter", ":CILIUM_FORWARD - [0:0]"]);
        assert_eq!(lines.iter().filter(|line| line.starts_with("-D FORWARD")).count(), 2);
        assert_eq!(lines.iter().filter(|line| line.starts_with("-A CILIUM_FORWARD")).count(), 4);
        assert_eq!(lines[lines.len() - 2], format!("-I FORWARD 1 {FEEDER}"));
        assert!(text.ends_with("COMMIT\n"));
        assert_eq!(
            replacing(&[], 1),
            format!("*filter\n:CILIUM_FORWARD - [0:0]\n-D FORWARD {FEEDER}\n-X CILIUM_FORWARD\nCOMMIT\n")
        );
    }
}
