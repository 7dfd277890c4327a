//! Keys, paths and names: what the chart writes has to be what the daemons read. They ignore a key that they do not have,
//! so a typing error would go unseen.

use std::{collections::BTreeMap, fs, path::Path};

use basal_agent::config::AgentConfig;
use basal_kvstore::config::{EtcdConfig, Source};
use basal_objects::leadership::LEASE_NAME;
use basal_operator::config::OperatorConfig;
use basal_runtime::config::{Layer, Loaded, REFUSALS, Sources, command, load};
use clap::Parser;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::chart::{objects, only, with_etcd};

/// A key that no daemon reads: it is mounted as a file of its own.
const FOR_OTHERS: [&str; 1] = ["etcd-config"];

/// Values that make every key that the chart can write.
fn everything() -> Value {
    let mut values = with_etcd();
    values["cluster"] = json!({ "name": "west", "id": 3 });
    values["ipv6"] = json!({ "enabled": true });
    values["MTU"] = json!(9000);
    values["labels"] = json!("k8s:app");
    values
}

/// The chart with values, and what each daemon makes of its keys.
struct Installed {
    objects: Vec<Value>,
    operator: Loaded<OperatorConfig>,
    agent: Loaded<AgentConfig>,
}

impl Installed {
    fn with(values: &Value) -> Self {
        let objects = objects(values).unwrap();
        let (operator, agent) = (read(&objects, "Deployment"), read(&objects, "DaemonSet"));
        Self { objects, operator, agent }
    }

    fn config_map(&self) -> BTreeMap<String, String> {
        serde_json::from_value(only(&self.objects, "ConfigMap")["data"].clone()).unwrap()
    }

    fn pod(&self, kind: &str) -> Value {
        only(&self.objects, kind)["spec"]["template"]["spec"].clone()
    }
}

/// Reads the configuration as the daemon does in its pod.
fn read<C: Parser>(objects: &[Value], kind: &str) -> Loaded<C> {
    let folder = TempDir::new().unwrap();
    for (key, value) in only(objects, "ConfigMap")["data"].as_object().unwrap() {
        fs::write(folder.path().join(key), value.as_str().unwrap()).unwrap();
    }
    let pod = &only(objects, kind)["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    let config_dir = mount_of(pod, "cilium-config");
    let args: Vec<String> = serde_json::from_value(container["args"].clone()).unwrap();
    assert_eq!(args[0], format!("--config-dir={config_dir}"));
    let environment = container["env"].as_array().unwrap().iter().map(|variable| {
        let field = variable.pointer("/valueFrom/fieldRef/fieldPath").and_then(Value::as_str);
        let value = field.map(|path| format!("the pod's {path}")).or(variable["value"].as_str().map(str::to_owned));
        (variable["name"].as_str().unwrap().to_owned(), value.unwrap())
    });
    let environment: BTreeMap<String, String> = environment.collect();
    let mut arguments = vec!["daemon".into(), format!("--config-dir={}", folder.path().display()).into()];
    arguments.extend(args.into_iter().skip(1).map(Into::into));
    for (flag, variable) in of_environment::<C>() {
        assert!(environment.contains_key(&variable), "{kind}: {variable} is missing");
        arguments.push(flag.into());
    }
    load(&Sources { arguments, environment }, REFUSALS).unwrap()
}

/// The flags that are given by variables of their own, with some value, and the variables.
fn of_environment<C: Parser>() -> Vec<(String, String)> {
    let command = command::<C>();
    let flag = |arg: &clap::Arg| Some((format!("--{}=any", arg.get_long()?), arg.get_env()?.to_str()?.to_owned()));
    command.get_arguments().filter_map(flag).collect()
}

/// Where a volume is mounted.
fn mount_of(pod: &Value, volume: &str) -> String {
    let mounts = pod["containers"][0]["volumeMounts"].as_array().unwrap();
    let mount =
        mounts.iter().find(|mount| mount["name"] == volume).unwrap_or_else(|| panic!("{volume} is not mounted"));
    mount["mountPath"].as_str().unwrap().to_owned()
}

/// The folder of the host that is mounted at a path.
fn host_path(pod: &Value, path: &Path) -> String {
    let mounts = pod["containers"][0]["volumeMounts"].as_array().unwrap();
    let at = |mount: &&Value| mount["mountPath"].as_str() == path.to_str();
    let mount = mounts.iter().find(at).unwrap_or_else(|| panic!("nothing is mounted at {}", path.display()));
    let volumes = pod["volumes"].as_array().unwrap();
    let volume = volumes.iter().find(|volume| volume["name"] == mount["name"]).unwrap();
    volume["hostPath"]["path"].as_str().unwrap().to_owned()
}

#[test]
fn every_key_that_the_chart_writes_is_one_that_a_daemon_has() {
    let installed = Installed::with(&everything());
    let keys = installed.config_map();
    for key in FOR_OTHERS {
        assert!(keys.contains_key(key), "{key} is not written any more");
    }
    let has_it = |key: &&String| {
        let refused = REFUSALS.iter().any(|refusal| refusal.key == **key);
        refused || FOR_OTHERS.contains(&key.as_str()) || !installed.agent.unknown.contains(key)
    };
    let nobodys: Vec<&String> = installed.operator.unknown.iter().filter(|key| !has_it(key)).collect();
    assert!(nobodys.is_empty(), "no daemon has {nobodys:?}");
}

#[test]
fn the_keys_that_the_chart_writes_pass_the_daemons_checks() {
    for values in [json!({}), with_etcd(), everything()] {
        let installed = Installed::with(&values);
        installed.operator.config.check().unwrap();
        installed.agent.config.settings().unwrap();
    }
}

#[test]
fn the_agent_finds_the_nodes_folders_where_it_looks_for_them() {
    let installed = Installed::with(&json!({}));
    let (pod, config) = (installed.pod("DaemonSet"), &installed.agent.config);
    let conf_folder = config.cni.write_cni_conf_when_ready.parent().unwrap();
    for path in [&config.datapath.bpf_root, &config.cni.state_dir, &config.cni.cni_bin_dir, conf_folder] {
        assert_eq!(Path::new(&host_path(&pod, path)), path);
    }
    assert_eq!(host_path(&pod, &config.datapath.procfs.join("sys/net")), "/proc/sys/net");
}

#[test]
fn agents_do_without_etcd_while_operators_alone_reach_it() {
    let kvstores = |agents: &str| {
        let mut values = with_etcd();
        values["etcd"]["agents"] = json!(agents);
        let installed = Installed::with(&values);
        installed.agent.config.settings().unwrap();
        [installed.agent.config.etcd.kvstore, installed.operator.config.etcd.kvstore]
    };
    assert_eq!(kvstores("none"), ["", "etcd"]);
    assert_eq!(kvstores("moving"), ["etcd", "etcd"]);
    assert_eq!(kvstores("all"), ["etcd", "etcd"]);
}

#[test]
fn both_daemons_find_etcds_files_where_they_are_mounted() {
    let installed = Installed::with(&with_etcd());
    let file = &installed.config_map()["etcd-config"];
    for (kind, flags) in [("Deployment", &installed.operator.config.etcd), ("DaemonSet", &installed.agent.config.etcd)]
    {
        let pod = installed.pod(kind);
        let Source::File(path) = flags.settings().unwrap().unwrap().options.source else {
            panic!("no client file is named")
        };
        let volumes = pod["volumes"].as_array().unwrap();
        let volume = volumes.iter().find(|volume| volume["name"] == "etcd-config").unwrap();
        let name = path.file_name().and_then(|name| name.to_str());
        assert_eq!(volume["configMap"]["items"], json!([{ "key": "etcd-config", "path": name }]));
        assert_eq!(path.parent(), Some(Path::new(&mount_of(&pod, "etcd-config"))));

        let tls = EtcdConfig::parse(&path, file).unwrap().tls.unwrap();
        let (certificate, key) = tls.client.unwrap();
        let secrets = mount_of(&pod, "etcd-secrets");
        for file in [tls.ca, certificate, key] {
            assert_eq!(file.parent(), Some(Path::new(&secrets)));
        }
    }
}

#[test]
fn probes_and_scrapes_ask_where_the_daemons_listen() {
    let installed = Installed::with(&json!({}));
    let port_of = |pod: &Value, probe: &str| pod["containers"][0][probe]["httpGet"]["port"].clone();
    let scraped = |pod: &Value| format!(":{}", pod["containers"][0]["ports"][0]["hostPort"]);

    let (pod, serving) = (installed.pod("DaemonSet"), &installed.agent.config.serving);
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
        assert_eq!(port_of(&pod, probe), serving.agent_health_port);
    }
    assert_eq!(serving.prometheus_serve_addr.as_ref().unwrap().to_string(), scraped(&pod));

    let (pod, serving) = (installed.pod("Deployment"), &installed.operator.config.serving);
    for probe in ["livenessProbe", "readinessProbe"] {
        assert_eq!(serving.operator_api_serve_addr.to_string(), format!("localhost:{}", port_of(&pod, probe)));
    }
    assert!(serving.enable_metrics);
    assert_eq!(serving.operator_prometheus_serve_addr.to_string(), scraped(&pod));
}

#[test]
fn the_operator_may_write_the_lease_and_the_definitions_by_their_names() {
    let installed = Installed::with(&json!({}));
    let names = |kind: &str, resource: &str| {
        let of_kind = installed.objects.iter().filter(|object| object["kind"] == kind);
        let rules = of_kind.flat_map(|object| object["rules"].as_array().into_iter().flatten());
        let mut named =
            rules.filter(|rule| rule["resources"] == json!([resource]) && rule.get("resourceNames").is_some());
        let rule = named.next().unwrap_or_else(|| panic!("no {kind} names {resource}"));
        assert!(named.next().is_none(), "one rule for {resource} is wanted");
        rule["resourceNames"].clone()
    };
    assert_eq!(names("Role", "leases"), json!([LEASE_NAME]));
    let definitions: Vec<Value> =
        basal_crds::crds().iter().map(|definition| definition.object["metadata"]["name"].clone()).collect();
    let mut named: Vec<Value> = serde_json::from_value(names("ClusterRole", "customresourcedefinitions")).unwrap();
    let mut wanted = definitions;
    for list in [&mut named, &mut wanted] {
        list.sort_by_key(ToString::to_string);
    }
    assert_eq!(named, wanted);
}

#[test]
fn the_reference_lists_what_the_chart_sets_otherwise() {
    // The keys of a family's pool are written where the family is on.
    let mut both_families = json!({});
    both_families["ipv6"] = json!({ "enabled": true });
    let mut differs = BTreeMap::new();
    for values in [both_families, json!({})] {
        let installed = Installed::with(&values);
        add_differing(&installed.operator, &mut differs);
        add_differing(&installed.agent, &mut differs);
    }
    let wanted: Vec<String> = differs.iter().map(|(key, value)| format!("| `{key}` | `{value}` |")).collect();

    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reference.md");
    let page = fs::read_to_string(path).unwrap();
    let (_, section) = page.split_once("### What the chart sets\n").expect("docs/reference.md has that section");
    let rows = section.lines().skip_while(|line| !line.starts_with('|')).skip(2);
    let rows: Vec<&str> = rows.take_while(|line| line.starts_with('|')).collect();
    assert_eq!(rows, wanted, "correct the table in docs/reference.md");
}

/// The keys to which the chart gives another value than the daemon's default.
fn add_differing<C: Parser>(loaded: &Loaded<C>, differs: &mut BTreeMap<String, String>) {
    let flags = of_environment::<C>().into_iter().map(|(flag, _)| flag.into());
    let arguments = std::iter::once("daemon".into()).chain(flags).collect();
    let defaults = load::<C>(&Sources { arguments, ..Sources::default() }, REFUSALS).unwrap().effective.values;
    for (key, layer) in &loaded.effective.from {
        let value = &loaded.effective.values[key];
        if *layer != Layer::Flag && *value != defaults[key] {
            let text = match value {
                Value::Array(items) => items.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" "),
                value => value.as_str().unwrap_or_default().to_owned(),
            };
            differs.insert(key.clone(), text);
        }
    }
}
