//! Configuration: the daemons' keys as variables of the environment, and etcd's client file.

use std::{collections::BTreeMap, path::Path};

use basal_agent::config::AgentConfig;
use basal_kvstore::config::{EndpointUrl, EtcdConfig};
use basal_operator::config::OperatorConfig;
use basal_runtime::config::{ConfigError, REFUSALS, Sources, load};

/// Lines of `key=value`, as in the ConfigMap.
pub(crate) fn keys(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    // A folder would be read.
    let pairs = pairs.filter(|(key, _)| *key != "config-dir");
    let environment: BTreeMap<String, String> = pairs
        .map(|(key, value)| (format!("CILIUM_{}", key.to_uppercase().replace('-', "_")), value.to_owned()))
        .collect();
    let sources = |program: &str| Sources { arguments: vec![program.into()], environment: environment.clone() };
    match load::<OperatorConfig>(&sources("basal-operator"), REFUSALS) {
        Ok(loaded) => {
            if let Err(error) = loaded.config.check() {
                super::explained(&error);
            }
            if let Ok(pool) = loaded.config.pool() {
                for (family, pool) in pool.families() {
                    assert!(
                        pool.cidrs().iter().all(|cidr| cidr.family() == family && cidr.prefix_len() <= pool.mask())
                    );
                }
            }
        }
        Err(error) => named(&error),
    }
    if let Err(error) = load::<AgentConfig>(&sources("basal-agent"), REFUSALS) {
        named(&error);
    }
}

/// An error about a value names the key.
fn named(error: &ConfigError) {
    if let ConfigError::Value { key, .. } = error {
        assert!(error.to_string().starts_with(key.as_str()));
    }
    super::explained(error);
}

pub(crate) fn client_file(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    match EtcdConfig::parse(Path::new("etcd.config"), text) {
        Ok(config) => {
            assert!(!config.endpoints.is_empty());
            for endpoint in &config.endpoints {
                assert_eq!(EndpointUrl::parse(&endpoint.to_string()).as_ref(), Ok(endpoint));
            }
        }
        Err(error) => assert!(error.to_string().contains("etcd.config"), "{error}"),
    }
}
