use std::time::Duration;

use basal_e2e::process;
use basal_e2e::servers::{ApiServer, ApiServerOptions, CertRequest, Etcd, EtcdOptions, StaticUser, basal_users};
use serde_json::json;

fn basal_etcd() -> Etcd {
    Etcd::start(EtcdOptions { tls: true, users: basal_users(), ..EtcdOptions::default() }).unwrap()
}

#[test]
fn etcd_keeps_its_data_over_a_kill_and_forgets_it_when_wiped() {
    let mut etcd = Etcd::start(EtcdOptions::default()).unwrap();
    etcd.etcdctl(&["put", "key", "old"]).unwrap();
    let saved = etcd.save_data("old").unwrap();
    etcd.etcdctl(&["put", "key", "new"]).unwrap();
    etcd.kill().unwrap();
    etcd.restart().unwrap();
    assert_eq!(etcd.etcdctl(&["get", "key", "--print-value-only"]).unwrap().trim(), "new");
    etcd.restore_data(&saved).unwrap();
    assert_eq!(etcd.etcdctl(&["get", "key", "--print-value-only"]).unwrap().trim(), "old");
    etcd.wipe().unwrap();
    assert_eq!(etcd.etcdctl(&["get", "key"]).unwrap(), "");
}

#[test]
fn each_etcd_user_may_do_what_its_role_says() {
    let etcd = basal_etcd();
    let (agent, operator) = (etcd.user("basal-agent").unwrap(), etcd.user("basal-operator").unwrap());
    etcd.etcdctl_as(&operator, &["put", "basal/ipam/v1/default/cell", "x"]).unwrap();
    etcd.etcdctl_as(&agent, &["put", "cilium/state/ip/v1/default/10.0.0.1", "x"]).unwrap();
    etcd.etcdctl_as(&agent, &["get", "basal/ipam/v1/default/cell"]).unwrap();
    for key in ["basal/ipam/v1/default/cell", "cilium/state/nodes/v1/default/n1", "elsewhere"] {
        let refused = etcd.etcdctl_as(&agent, &["put", key, "y"]).unwrap_err().to_string();
        assert!(refused.contains("permission denied"), "{refused}");
    }
}

#[test]
fn an_expired_or_foreign_certificate_is_refused() {
    let (etcd, other) = (basal_etcd(), basal_etcd());
    let expired = etcd.pki().issue(&CertRequest::client("basal-agent").expired()).unwrap();
    etcd.etcdctl_as(&expired, &["get", "cilium/", "--command-timeout=2s"]).unwrap_err();
    let renewed = etcd.pki().issue(&CertRequest::client("basal-agent").valid_for(Duration::from_secs(60))).unwrap();
    etcd.etcdctl_as(&renewed, &["get", "cilium/"]).unwrap();
    let mut foreign = other.user("basal-agent").unwrap();
    foreign.ca = etcd.pki().ca();
    etcd.etcdctl_as(&foreign, &["get", "cilium/", "--command-timeout=2s"]).unwrap_err();
}

#[test]
fn the_api_server_knows_its_users_and_keeps_objects_over_a_kill() {
    let user = StaticUser { name: "somebody".into(), groups: vec!["guests".into()] };
    let mut server = ApiServer::start(ApiServerOptions { users: vec![user], ..ApiServerOptions::default() }).unwrap();
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "m", "namespace": "default"}});
    server.apply(&map).unwrap();
    server.kill().unwrap();
    server.restart().unwrap();
    let found = server.kubectl().unwrap().args(["get", "configmap", "m", "-o", "json"]).json().unwrap();
    assert_eq!(found["metadata"]["name"], "m");
    let config = server.kubeconfig("somebody").unwrap();
    let as_user = server.kubectl().unwrap().arg("--kubeconfig").arg(config);
    let refused = as_user.args(["get", "configmaps"]).text().unwrap_err().to_string();
    assert!(refused.contains(r#"User "somebody" cannot list"#), "{refused}");
}

#[test]
fn nothing_outlives_its_owner() {
    let log = tempfile::NamedTempFile::new().unwrap();
    let mut command = std::process::Command::new("sleep");
    command.arg("600");
    // The thread that starts it ends at once; the process must not end with that thread.
    let start = move || process::Process::start("sleep", command, log.path()).unwrap();
    let mut sleeper = std::thread::spawn(start).join().unwrap();
    let pid = sleeper.pid();
    sleeper.check_running().unwrap();
    assert!(process::is_alive(pid));
    drop(sleeper);
    assert!(!process::is_alive(pid));
}

#[test]
fn the_memory_of_a_process_is_what_it_touched() {
    let pid = std::process::id();
    let before = process::usage(pid).unwrap();
    let touched = vec![1_u8; 64 << 20];
    let after = process::usage(pid).unwrap();
    assert!(after.rss >= touched.len() as u64 && after.peak_rss >= after.rss, "{after:?}");
    assert!(after.cpu_seconds >= before.cpu_seconds && after.cpu_seconds > 0.0, "{before:?} {after:?}");
}

#[test]
fn servers_tell_their_metrics() {
    let etcd = basal_etcd();
    assert!(etcd.metrics().unwrap().contains("\netcd_mvcc_txn_total "));
    let server = ApiServer::start(ApiServerOptions::default()).unwrap();
    assert!(server.metrics().unwrap().contains("apiserver_request_total{"));
}
