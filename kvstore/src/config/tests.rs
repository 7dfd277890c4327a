use basal_runtime::config::StringMap;

use super::*;

const FILE: &str = r"
endpoints:
- https://etcd-a.example:2379
- https://[fd00::2]:12379/
- https://etcd-a.example
trusted-ca-file: /var/lib/etcd-secrets/etcd-client-ca.crt
key-file: /var/lib/etcd-secrets/etcd-client.key
cert-file: /var/lib/etcd-secrets/etcd-client.crt
dial-timeout: 5s
cilium-host-aliases:
- hostname: etcd-a.example
  ips: [10.0.0.1, 'fd00::1']
";

fn parse(text: &str) -> Result<EtcdConfig, ConfigError> {
    EtcdConfig::parse(Path::new("/etc/etcd.config"), text)
}

fn refusal(text: &str) -> String {
    parse(text).expect_err("the file must be refused").to_string()
}

#[test]
fn reads_ciliums_client_file() {
    let config = parse(FILE).unwrap();
    let endpoints: Vec<String> = config.endpoints.iter().map(ToString::to_string).collect();
    assert_eq!(endpoints, ["https://etcd-a.example:2379", "https://[fd00::2]:12379"]);
    let tls = config.tls.unwrap();
    assert_eq!(tls.ca, Path::new("/var/lib/etcd-secrets/etcd-client-ca.crt"));
    assert_eq!(tls.client.unwrap().1, Path::new("/var/lib/etcd-secrets/etcd-client.key"));
    assert_eq!(config.host_aliases["etcd-a.example"].len(), 2);
}

#[test]
fn names_the_file_and_the_key_that_is_wrong() {
    for (text, parts) in [
        ("{}", ["endpoints:", "is empty"]),
        ("endpoints: [ftp://a]", ["endpoints:", "scheme \"ftp\""]),
        ("endpoints: ['https://']", ["endpoints:", "no endpoint"]),
        ("endpoints: ['https://me@a']", ["endpoints:", "carries a user"]),
        ("endpoints: ['https://a:2379']", ["trusted-ca-file:", "is missing"]),
        ("{endpoints: ['https://a'], trusted-ca-file: /ca, cert-file: /c}", ["key-file:", "set both"]),
        ("{endpoints: ['https://a'], trusted-ca-file: /ca, key-file: /c}", ["cert-file:", "set both"]),
        ("{endpoints: [a], insecure-skip-tls-verify: true}", ["insecure-skip-tls-verify:", "trusted-ca-file"]),
        ("{endpoints: [a], username: me}", ["username:", "cert-file"]),
        ("{endpoints: [a], cilium-host-aliases: [{ips: [10.0.0.1]}]}", ["cilium-host-aliases:", "no hostname"]),
        ("{endpoints: [a], cilium-host-aliases: [{hostname: a}]}", ["cilium-host-aliases:", "no ips"]),
        ("{endpoints: [a], cilium-host-aliases: [{hostname: a, ips: [b]}]}", ["cilium-host-aliases:", "\"b\""]),
        ("endpoints: {a: 1}", ["no client file", "line"]),
    ] {
        let message = refusal(text);
        assert!(message.starts_with("/etc/etcd.config: "), "{message}");
        for part in parts {
            assert!(message.contains(part), "{text}: {message}");
        }
    }
    let twice = "{endpoints: [a], cilium-host-aliases: [{hostname: b, ips: ['::1']}, {hostname: b, ips: ['::1']}]}";
    assert!(refusal(twice).contains("listed twice"));
}

/// Reads the options as the flag `kvstore-opt` does.
fn read(text: &str) -> Result<KvstoreOptions, ConfigError> {
    KvstoreOptions::from_map(&text.parse::<StringMap>().unwrap().0)
}

#[test]
fn reads_both_text_forms_of_kvstore_opt() {
    let json = read(r#"{"etcd.config": "/x", "etcd.limit": "0", "etcd.qps": "7"}"#).unwrap();
    let flag = read("etcd.config=/x, etcd.limit=0,etcd.qps=7").unwrap();
    assert_eq!(json, flag);
    assert_eq!(json.source, Source::File(PathBuf::from("/x")));
    assert_eq!((json.page_size, json.max_inflight), (0, 7));
    let more = read("etcd.address=a,etcd.maxInflight=9,etcd.qps=7,etcd.keepaliveTimeout=1m30s").unwrap();
    assert_eq!((more.max_inflight, more.keepalive_timeout), (9, Duration::from_secs(90)));
}

#[test]
fn the_defaults_are_those_that_are_documented() {
    let options = KVSTORE_OPT_KEYS.iter().map(|option| (option.name.to_owned(), option.default.to_owned()));
    let mut options: BTreeMap<String, String> = options.collect();
    options.insert("etcd.config".to_owned(), "/x".to_owned());
    let documented = KvstoreOptions::from_map(&options).unwrap();
    assert_eq!(documented, KvstoreOptions::new(Source::File(PathBuf::from("/x"))));
}

#[test]
fn refuses_unknown_options_with_the_known_ones() {
    let error = read("etcd.config=/x,etcd.confg=/y").unwrap_err();
    let message = error.to_string();
    assert!(message.contains("\"etcd.confg\"") && message.contains("etcd.config, etcd.address"), "{message}");
    assert_eq!(error.reason().as_str(), "InvalidKvstoreOption");
}

#[test]
fn refuses_values_that_mean_nothing() {
    for (text, part) in [
        ("etcd.config=/x,etcd.qps=0", "etcd.qps is \"0\""),
        ("etcd.config=/x,etcd.limit=-1", "etcd.limit is \"-1\""),
        ("etcd.config=/x,etcd.keepaliveHeartbeat=15", "etcd.keepaliveHeartbeat is \"15\""),
        ("etcd.config=/x,etcd.address=a", "exactly one"),
        ("", "exactly one"),
    ] {
        let message = read(text).unwrap_err().to_string();
        assert!(message.contains(part), "{text}: {message}");
    }
    let tls = read("etcd.address=https://a").unwrap().load().unwrap_err();
    assert!(tls.to_string().contains("https needs a client file"), "{tls}");
}

#[tokio::test(start_paused = true)]
async fn waits_for_a_missing_file_only() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("etcd.config");
    let options = KvstoreOptions::new(Source::File(path.clone()));
    assert!(options.load().unwrap_err().is_retried());
    let write = async {
        tokio::time::sleep(Duration::from_secs(12)).await;
        std::fs::write(&path, "endpoints: [a]").unwrap();
    };
    let (config, ()) = tokio::join!(options.load_waiting(), write);
    assert_eq!(config.unwrap().endpoints.len(), 1);
    std::fs::write(&path, "endpoints: 7").unwrap();
    assert!(!options.load_waiting().await.unwrap_err().is_retried());
}
