//! Where the ledger lies in etcd.

use basal_ipam::{cell::CellId, ledger::Guard, prefix::PodCidr};

use crate::kv::{Compare, Is};

/// What a key below [`LedgerKeys::prefix`] names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LedgerKey {
    /// The fence.
    Fence,
    /// The owner.
    Owner,
    /// A cell.
    Cell(CellId),
}

/// The keys of one cluster's ledger, below `basal/ipam/v1/<cluster>/`: `fence`, `owner` and
/// `cells/<ipv4|ipv6>/<address>/<prefix length>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LedgerKeys {
    prefix: String,
}

impl LedgerKeys {
    /// The keys of a cluster, by its name.
    #[must_use]
    pub fn new(cluster: &str) -> Self {
        Self { prefix: format!("basal/ipam/v1/{cluster}/") }
    }

    /// What all of them start with.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The fence.
    #[must_use]
    pub fn fence(&self) -> String {
        format!("{}fence", self.prefix)
    }

    /// The Kubernetes cluster whose ledger it is: the uid of its namespace kube-system, as text.
    #[must_use]
    pub fn owner(&self) -> String {
        format!("{}owner", self.prefix)
    }

    /// A cell.
    #[must_use]
    pub fn cell(&self, cell: CellId) -> String {
        let prefix = cell.prefix();
        format!("{}cells/{}/{prefix}", self.prefix, prefix.family().as_str())
    }

    /// What a key names; `None` for one that Basal never writes.
    #[must_use]
    pub fn parse(&self, key: &str) -> Option<LedgerKey> {
        let rest = key.strip_prefix(&self.prefix)?;
        match rest {
            "fence" => return Some(LedgerKey::Fence),
            "owner" => return Some(LedgerKey::Owner),
            _ => {}
        }
        let (family, text) = rest.strip_prefix("cells/")?.split_once('/')?;
        let prefix: PodCidr = text.parse().ok()?;
        // One cell has one key: `fd00:0::/104` would be a second one for fd00::/104.
        let canonical = family == prefix.family().as_str() && text == prefix.to_string();
        canonical.then_some(LedgerKey::Cell(CellId::new(prefix)))
    }

    /// That the fence holds the id of a term, or of a seal, as a condition of a transaction.
    #[must_use]
    pub fn fence_holds(&self, id: &str) -> Compare {
        Compare::new(self.fence(), Is::Value(id.into()))
    }

    /// A guard as conditions of a transaction.
    #[must_use]
    pub fn conditions(&self, guard: &Guard) -> Vec<Compare> {
        let fence = self.fence_holds(guard.term.as_str());
        let cells =
            guard.cells.iter().map(|(cell, version)| Compare::new(self.cell(*cell), Is::ModRevision(version.0)));
        std::iter::once(fence).chain(cells).collect()
    }
}

#[cfg(test)]
mod tests {
    use basal_ipam::{cell::Version, names::TermId};

    use super::*;

    fn cell(text: &str) -> CellId {
        CellId::new(text.parse().unwrap())
    }

    #[test]
    fn keys_are_what_the_design_says_and_can_be_read_back() {
        let keys = LedgerKeys::new("default");
        for (key, parsed) in [
            ("basal/ipam/v1/default/fence", LedgerKey::Fence),
            ("basal/ipam/v1/default/owner", LedgerKey::Owner),
            ("basal/ipam/v1/default/cells/ipv4/10.0.0.0/16", LedgerKey::Cell(cell("10.0.0.0/16"))),
            ("basal/ipam/v1/default/cells/ipv6/fd00::/112", LedgerKey::Cell(cell("fd00::/112"))),
        ] {
            assert_eq!(keys.parse(key), Some(parsed.clone()));
            match parsed {
                LedgerKey::Fence => assert_eq!(keys.fence(), key),
                LedgerKey::Owner => assert_eq!(keys.owner(), key),
                LedgerKey::Cell(cell) => assert_eq!(keys.cell(cell), key),
            }
        }
    }

    #[test]
    fn other_keys_are_nobodys() {
        let keys = LedgerKeys::new("default");
        for key in [
            "basal/ipam/v1/default/",
            "basal/ipam/v1/default/fence/",
            "basal/ipam/v1/default/cells/ipv4/10.0.0.0",
            "basal/ipam/v1/default/cells/ipv4/10.0.0.1/16",
            "basal/ipam/v1/default/cells/ipv6/10.0.0.0/16",
            "basal/ipam/v1/default/cells/ipv6/fd00:0::/112",
            "basal/ipam/v1/other/fence",
        ] {
            assert_eq!(keys.parse(key), None, "{key}");
        }
    }

    #[test]
    fn a_guard_compares_the_fence_and_every_cell() {
        let guard = Guard {
            term: TermId::from_random(1, 2),
            cells: [(cell("10.0.0.0/16"), Version(7)), (cell("fd00::/112"), Version(9))].into(),
        };
        assert_eq!(
            LedgerKeys::new("c").conditions(&guard),
            [
                Compare::new("basal/ipam/v1/c/fence", Is::Value(b"00000000000000010000000000000002".to_vec())),
                Compare::new("basal/ipam/v1/c/cells/ipv4/10.0.0.0/16", Is::ModRevision(7)),
                Compare::new("basal/ipam/v1/c/cells/ipv6/fd00::/112", Is::ModRevision(9)),
            ]
        );
    }
}
