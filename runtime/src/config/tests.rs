//! Layers, refusals and error texts over a small daemon's flags.

use std::{fs, path::Path, time::Duration};

use tempfile::TempDir;

use super::*;

/// A daemon
#[derive(Debug, Clone, PartialEq, Parser)]
struct Flags {
    #[command(flatten)]
    config_dir: ConfigDirFlag,
    /// Pool
    #[arg(long)]
    cluster_pool_ipv4_cidr: Vec<std::net::Ipv4Addr>,
    /// Mask
    #[arg(long, default_value_t = 24)]
    cluster_pool_ipv4_mask_size: u8,
    /// Interval
    #[arg(long, default_value = "15m")]
    identity_gc_interval: GoDuration,
    /// IPv4
    #[arg(long, default_value_t = true)]
    enable_ipv4: bool,
    /// Debug
    #[arg(long)]
    debug: bool,
    /// etcd
    #[arg(long, default_value = "")]
    kvstore_opt: StringMap,
    /// Namespace
    #[arg(long)]
    k8s_namespace: Option<String>,
}

fn sources(arguments: &[&str], environment: &[(&str, &str)]) -> Sources {
    let pairs = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let program = std::iter::once("daemon").chain(arguments.iter().copied());
    Sources { arguments: program.map(Into::into).collect(), environment: pairs.collect() }
}

fn folder(files: &[(&str, &str)]) -> TempDir {
    let folder = TempDir::new().unwrap();
    for (name, value) in files {
        fs::write(folder.path().join(name), value).unwrap();
    }
    folder
}

fn config_dir(path: &Path) -> String {
    format!("--config-dir={}", path.display())
}

fn read(sources: &Sources) -> Result<Loaded<Flags>, ConfigError> {
    load(sources, REFUSALS)
}

#[test]
fn flag_beats_variable_beats_file_beats_default() {
    let files = folder(&[
        ("cluster-pool-ipv4-mask-size", "25\n"),
        ("identity-gc-interval", "2m30s"),
        ("k8s-namespace", "from-file"),
        ("enable-ipv4", "false"),
        ("debug", ""),
    ]);
    fs::create_dir(files.path().join("..data")).unwrap();
    let environment =
        [("CILIUM_IDENTITY_GC_INTERVAL", "1h"), ("CILIUM_K8S_NAMESPACE", "from-variable"), ("HOME", "/x")];
    let loaded = read(&sources(&[&config_dir(files.path()), "--k8s-namespace=from-flag"], &environment)).unwrap();
    assert_eq!(loaded.config.cluster_pool_ipv4_mask_size, 25);
    assert_eq!(loaded.config.identity_gc_interval, GoDuration(Duration::from_secs(3600)));
    assert_eq!(loaded.config.k8s_namespace.as_deref(), Some("from-flag"));
    assert!(!loaded.config.enable_ipv4 && !loaded.config.debug);
    let from: Vec<_> = loaded.effective.from.iter().map(|(key, layer)| (key.as_str(), *layer)).collect();
    assert_eq!(
        from,
        [
            ("cluster-pool-ipv4-mask-size", Layer::ConfigDir),
            ("config-dir", Layer::Flag),
            ("enable-ipv4", Layer::ConfigDir),
            ("identity-gc-interval", Layer::Environment),
            ("k8s-namespace", Layer::Flag),
        ]
    );
    assert_eq!(loaded.unknown, [""; 0]);
}

#[test]
fn the_folder_may_be_named_by_a_variable_and_unknown_keys_are_listed() {
    let files = folder(&[("enable-hubble", "true"), ("debug", "T")]);
    let path = files.path().display().to_string();
    let loaded = read(&sources(&[], &[("CILIUM_CONFIG_DIR", &path), ("CILIUM_ODD", "1")])).unwrap();
    assert!(loaded.config.debug);
    assert_eq!(loaded.unknown, ["enable-hubble", "odd"]);
}

#[test]
fn lists_are_separated_by_commas_or_spaces_and_a_flag_replaces_the_list() {
    let files = folder(&[("cluster-pool-ipv4-cidr", "10.0.0.0 10.1.0.0,\n10.2.0.0 ")]);
    let strings = |loaded: Loaded<Flags>| -> Vec<String> {
        loaded.config.cluster_pool_ipv4_cidr.iter().map(ToString::to_string).collect()
    };
    let dir = config_dir(files.path());
    assert_eq!(strings(read(&sources(&[&dir], &[])).unwrap()), ["10.0.0.0", "10.1.0.0", "10.2.0.0"]);
    let flags = [&dir, "--cluster-pool-ipv4-cidr=10.7.0.0,10.8.0.0", "--cluster-pool-ipv4-cidr", "10.9.0.0"];
    assert_eq!(strings(read(&sources(&flags, &[])).unwrap()), ["10.7.0.0", "10.8.0.0", "10.9.0.0"]);
}

#[test]
fn booleans_are_gos_and_a_bare_flag_means_true() {
    let debug = |flag: &str| read(&sources(&[flag], &[])).map(|loaded| loaded.config.debug);
    assert!(debug("--debug").unwrap());
    assert!(debug("--debug=1").unwrap());
    assert!(!debug("--debug=F").unwrap());
    let error = debug("--debug=yes").unwrap_err().to_string();
    assert!(error.contains("\"yes\" is neither true nor false"), "{error}");
}

#[test]
fn a_wrong_value_is_named_with_its_place() {
    let files = folder(&[("cluster-pool-ipv4-mask-size", "x4")]);
    let error = read(&sources(&[&config_dir(files.path())], &[])).unwrap_err().to_string();
    let path = files.path().join("cluster-pool-ipv4-mask-size");
    let place = format!("cluster-pool-ipv4-mask-size: \"x4\" (file {}) is not valid: ", path.display());
    assert!(error.starts_with(&place), "{error}");
    let error = read(&sources(&[], &[("CILIUM_ENABLE_IPV4", "ja")])).unwrap_err().to_string();
    let text = "enable-ipv4: \"ja\" (variable CILIUM_ENABLE_IPV4) is not valid: \"ja\" is neither true nor false";
    assert_eq!(error, text);
}

#[test]
fn a_folder_that_is_not_there_stops_the_start() {
    let error = read(&sources(&["--config-dir=/nonexistent/cilium"], &[])).unwrap_err().to_string();
    assert!(error.starts_with("config-dir: cannot read /nonexistent/cilium: "), "{error}");
}

#[test]
fn what_weakens_security_is_refused_by_name_and_all_at_once() {
    let files = folder(&[("enable-wireguard", "true"), ("datapath-mode", "netkit"), ("enable-ipsec", "false")]);
    let error = read(&sources(&[&config_dir(files.path())], &[])).unwrap_err().to_string();
    let lines: Vec<&str> = error.lines().collect();
    assert_eq!(lines.len(), 2, "{error}");
    assert!(lines[0].starts_with("enable-wireguard: \"true\" (file "), "{error}");
    assert!(
        lines[0].ends_with("asks for WireGuard encryption, which Basal does not do; set it to \"false\" or remove it")
    );
    assert!(lines[1].starts_with("datapath-mode: \"netkit\""), "{error}");
    // The value in force counts: a variable may switch off what the file has on.
    let off = [("CILIUM_ENABLE_WIREGUARD", "false"), ("CILIUM_DATAPATH_MODE", "veth")];
    read(&sources(&[&config_dir(files.path())], &off)).unwrap();
}

#[test]
fn every_refusal_lets_basals_own_default_pass() {
    let harmless = ["false", "default", "vxlan", "veth", "none", "cluster-pool"];
    for refusal in REFUSALS {
        assert!(harmless.iter().any(|value| !(refusal.asks)(value)), "{}", refusal.key);
        assert!((refusal.asks)("no such value") || refusal.key == "enable-policy", "{}", refusal.key);
    }
}

#[test]
fn help_is_not_a_fault() {
    assert!(matches!(read(&sources(&["--help"], &[])), Err(ConfigError::Help(_))));
    assert!(matches!(read(&sources(&["--no-such-flag"], &[])), Err(ConfigError::Flag(_))));
}

#[test]
fn the_effective_configuration_has_every_key() {
    let loaded = read(&sources(&["--cluster-pool-ipv4-cidr=10.0.0.0"], &[])).unwrap();
    let json = serde_json::to_value(&loaded.effective).unwrap();
    assert_eq!(
        json,
        serde_json::json!({
            "values": {
                "cluster-pool-ipv4-cidr": ["10.0.0.0"],
                "cluster-pool-ipv4-mask-size": "24",
                "config-dir": null,
                "debug": "false",
                "enable-ipv4": "true",
                "identity-gc-interval": "15m",
                "k8s-namespace": null,
                "kvstore-opt": "",
            },
            "from": {"cluster-pool-ipv4-cidr": "flag"},
        })
    );
}
