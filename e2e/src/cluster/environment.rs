//! What points another tool at a running cluster.

use std::env;

use anyhow::Context;

use super::Cluster;
use crate::parts;

/// Shell assignments: KUBECONFIG, etcdctl's variables for Basal's etcd, PATH with the built commands, BASAL_NODES, and
/// for each node NODE_NAME_ENTER (upper case, `-` as `_`), the command that enters its namespaces.
pub(super) fn assignments(cluster: &Cluster) -> anyhow::Result<String> {
    let root = cluster.etcd_user("root")?;
    let cache = parts::cache_dir()?;
    let old = env::var_os("PATH").unwrap_or_default();
    let first = [parts::bin_dir()?, cache.join("tools/bin")];
    let path = env::join_paths(first.into_iter().chain(env::split_paths(&old))).context("a folder of PATH")?;
    let nodes = cluster.nodes()?;
    let names: Vec<&str> = nodes.iter().map(super::Node::name).collect();
    let mut lines = vec![
        assignment("KUBECONFIG", &cluster.kubeconfig().to_string_lossy()),
        assignment("ETCDCTL_ENDPOINTS", &cluster.etcd_url()),
        assignment("ETCDCTL_CACERT", &root.ca.to_string_lossy()),
        assignment("ETCDCTL_CERT", &root.cert.to_string_lossy()),
        assignment("ETCDCTL_KEY", &root.key.to_string_lossy()),
        assignment("PATH", &path.to_string_lossy()),
        assignment("BASAL_NODES", &names.join(" ")),
    ];
    for node in &nodes {
        let name = node.name().to_uppercase().replace('-', "_");
        lines.push(assignment(&format!("NODE_{name}_ENTER"), &node.enter().join(" ")));
    }
    Ok(lines.concat())
}

fn assignment(name: &str, value: &str) -> String {
    format!("export {name}='{}'\n", value.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::assignment;

    #[test]
    fn a_value_survives_the_shell() {
        let line = assignment("X", "it's $HOME; \"x\"");
        let said = crate::command::Run::new("sh").arg("-c").arg(format!("{line}printf %s \"$X\"")).text().unwrap();
        assert_eq!(said, "it's $HOME; \"x\"");
    }
}
