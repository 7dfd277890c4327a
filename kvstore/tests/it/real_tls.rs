//! Certificates and roles against a real etcd.

use std::{sync::Arc, time::Duration};

use basal_crds::{
    directory::{Change, Directory},
    identity::IdentityRange,
    kvstore::keys,
    names::{Cluster, ClusterId},
};
use basal_e2e::servers::{CertRequest, Pki};
use basal_kvstore::{
    directory::{DirectoryConfig, EtcdDirectory},
    identity_gc::IdentityGc,
    kv::{Compare, Is, Kv, KvError, KvRefusal, Range, Txn},
    leases::LeaseRules,
    ledger::{LedgerKeys, OwnerError, look, own},
    lock::Locks,
    session::Session,
    status::{Health, QuorumTracker, gather},
};
use basal_runtime::outcome::Outcome;
use futures::StreamExt;

use crate::{
    real::{blocking, config, connect, connect_to, secured, system_env},
    support::{get, ip_record, labels, put, put_op},
};

#[tokio::test(flavor = "multi_thread")]
async fn the_user_is_the_certificates_and_may_do_what_its_role_says() {
    let etcd = secured();
    let (operator, agent) = (connect(&etcd, "basal-operator").await, connect(&etcd, "basal-agent").await);
    put(&operator, "basal/ipam/v1/default/fence", "t").await;
    assert_eq!(get(&agent, "basal/ipam/v1/default/fence").await.as_deref(), Some("t"));
    let write = agent.txn(Txn { then: vec![put_op("basal/ipam/v1/default/fence", "x")], ..Txn::default() }).await;
    assert!(matches!(write, Outcome::Refused(KvRefusal::Denied(_))), "{write:?}");
    let read = agent.range(Range::prefix("basal/")).await;
    assert!(matches!(read, Err(KvError::Denied(_))), "{read:?}");
    let mut watch = agent.watch("basal/", 1);
    let first = watch.next().await.unwrap();
    assert!(matches!(first, Err(KvError::Denied(_))), "{first:?}");
    put(&agent, "cilium/state/ip/v1/default/10.0.0.1", "{}").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_right_that_is_withdrawn_shows_in_a_look_and_counts_again_when_it_is_given_back() {
    let etcd = secured();
    let (operator, agent) = (connect(&etcd, "basal-operator").await, connect(&etcd, "basal-agent").await);
    let keys = LedgerKeys::new("default");
    own(&operator, &keys, "uid").await.unwrap();
    // The agent may read there.
    let denied = |looked: Result<(), OwnerError>| matches!(looked, Err(OwnerError::Refused(KvRefusal::Denied(_))));
    assert!(denied(look(&agent, &keys, "uid").await));
    look(&operator, &keys, "uid").await.unwrap();
    let role = |args: &[&str]| {
        let args = [&["role"], args].concat();
        blocking(|| etcd.etcdctl(&args));
    };
    role(&["revoke-permission", "basal-operator", "--prefix=true", "basal/"]);
    assert!(denied(look(&operator, &keys, "uid").await));
    role(&["grant-permission", "basal-operator", "--prefix=true", "readwrite", "basal/"]);
    look(&operator, &keys, "uid").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agents_role_is_enough_for_an_agent_and_an_operators_for_the_collection() {
    let etcd = secured();
    let user = async |name: &str| {
        let kv: Arc<dyn Kv> = Arc::new(connect(&etcd, name).await);
        Session::start(system_env(), kv, LeaseRules::default())
    };
    let agent_session = user("basal-agent").await;
    let node_ips = vec!["10.0.0.1".parse().unwrap()];
    let config = DirectoryConfig { cluster: Cluster::default(), node_ips, page_size: 256 };
    let agent = EtcdDirectory::start(agent_session.clone(), config).unwrap();
    let mut ips = agent.ips();
    assert_eq!(ips.next().await, Some(Change::InSync));
    let web = labels("k8s:app.kubernetes.io/name=web;");
    let id = agent.allocate_identity(&web).await.unwrap();
    let record = ip_record("10.1.0.1", "10.0.0.1", id.get());
    agent.publish_ip(&record);
    assert_eq!(ips.next().await, Some(Change::Upsert(record.target, (&record).into())));

    let operator = user("basal-operator").await;
    let range = IdentityRange::of(ClusterId::default());
    let guard = Compare::new("basal/ipam/v1/default/fence", Is::Absent);
    let mut gc = IdentityGc::new(Arc::clone(operator.kv()), Locks::new(operator.clone()), range, guard);
    assert_eq!(gc.round().await.unwrap().alive, 1);
    agent.release_identity(&web);
    agent_session.settled().await;
    assert_eq!(gc.round().await.unwrap().unused, 1);
    assert_eq!(gc.round().await.unwrap().deleted, 1);
    assert_eq!(get(&**operator.kv(), &keys::identity(id)).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_counts_from_the_next_connection_on() {
    let mut etcd = secured();
    let user = "basal-agent";
    let client = CertRequest::client(user);
    blocking(|| etcd.pki().issue(&client.clone().expired()));
    let path = blocking(|| etcd.client_config(user));
    let kv = connect_to(&config(&path)).await;
    let write = kv.txn(Txn { then: vec![put_op("cilium/state/ip/v1/default/10.0.0.1", "{}")], ..Txn::default() }).await;
    let Outcome::Refused(KvRefusal::Denied(why)) = &write else { panic!("{write:?}") };
    assert!(why.contains("rejected the client certificate") && why.contains("basal-agent.crt"), "{why}");
    let read = kv.range(Range::prefix("cilium/")).await;
    assert!(matches!(read, Err(KvError::Denied(_))), "{read:?}");

    blocking(|| etcd.pki().issue(&client));
    put(&kv, "cilium/state/ip/v1/default/10.0.0.1", "{}").await;

    // The open connection lives on with what it was made with; a new one needs what is on disk by then.
    blocking(|| etcd.pki().issue(&CertRequest::client(user).expired()));
    put(&kv, "cilium/state/ip/v1/default/10.0.0.2", "{}").await;
    blocking(|| etcd.restart());
    let after = loop {
        match kv.range(Range::prefix("cilium/")).await {
            Err(KvError::Unavailable(_)) => {}
            other => break other,
        }
    };
    assert!(matches!(after, Err(KvError::Denied(_))), "{after:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_of_another_authority_gets_no_request() {
    let etcd = secured();
    let other = tempfile::tempdir().unwrap();
    let stranger = blocking(|| Pki::create(other.path()));
    let mut config = config(&blocking(|| etcd.client_config("basal-agent")));
    let tls = config.tls.as_mut().unwrap();
    tls.ca = stranger.ca();
    let read = connect_to(&config).await.range(Range::one("cilium/x")).await;
    assert!(matches!(&read, Err(KvError::Unavailable(why)) if why.contains("trusted-ca-file")), "{read:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn unusable_files_are_named() {
    let etcd = secured();
    let good = config(&blocking(|| etcd.client_config("basal-agent")));
    let folder = tempfile::tempdir().unwrap();
    let (missing, empty) = (folder.path().join("missing.crt"), folder.path().join("empty.crt"));
    std::fs::write(&empty, "").unwrap();
    let operator = blocking(|| etcd.user("basal-operator"));
    let refusal = async |change: &dyn Fn(&mut basal_kvstore::config::TlsFiles)| {
        let mut config = good.clone();
        change(config.tls.as_mut().unwrap());
        match connect_to(&config).await.range(Range::one("cilium/x")).await {
            Err(KvError::Unavailable(why)) => why,
            other => panic!("{other:?}"),
        }
    };
    let why = refusal(&|tls| tls.ca = missing.clone()).await;
    assert!(why.contains("missing.crt: cannot be read") && why.contains("Secret"), "{why}");
    let why = refusal(&|tls| tls.ca = empty.clone()).await;
    assert!(why.contains("empty.crt: holds no PEM certificate"), "{why}");
    let why = refusal(&|tls| tls.client.as_mut().unwrap().1 = operator.key.clone()).await;
    assert!(why.contains("basal-agent.crt: does not go with") && why.contains("basal-operator.key"), "{why}");
    let why = refusal(&|tls| tls.client.as_mut().unwrap().1 = empty.clone()).await;
    assert!(why.contains("empty.crt: holds no PEM private key"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_insists_on_a_certificate() {
    let etcd = secured();
    let mut config = config(&blocking(|| etcd.client_config("basal-agent")));
    config.tls.as_mut().unwrap().client = None;
    let read = connect_to(&config).await.range(Range::one("cilium/x")).await;
    assert!(matches!(&read, Err(KvError::Denied(why)) if why.contains("cert-file")), "{read:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_line_is_ciliums() {
    let mut etcd = secured();
    let line = async |user: &str| {
        let kv = connect(&etcd, user).await;
        let session = Session::start(system_env(), Arc::new(kv.clone()), LeaseRules::default());
        session.put("cilium/state/ip/v1/default/10.0.0.1", b"{}");
        session.settled().await;
        gather(&kv, &session, &Locks::new(session.clone())).await.to_string()
    };
    let endpoint = etcd.endpoint();
    let connected = "etcd: 1/1 connected, leases=1, lock leases=1, has-quorum=true";
    assert_eq!(line("root").await, format!("{connected}: {endpoint} - 3.6.6 (Leader)"));
    // etcd tells nobody else who leads.
    assert_eq!(line("basal-agent").await, format!("{connected}: {endpoint} - 3.6.6"));

    let kv = connect(&etcd, "basal-agent").await;
    let session = Session::start(system_env(), Arc::new(kv.clone()), LeaseRules::default());
    blocking(|| etcd.kill());
    let locks = Locks::new(session.clone());
    let status = tokio::time::timeout(Duration::from_secs(60), gather(&kv, &session, &locks));
    let status = status.await.unwrap();
    assert!(status.quorum.is_err() && status.to_string().starts_with("etcd: 0/1 connected"), "{status}");
    assert!(matches!(QuorumTracker::new(2).judge(&status), Health::Failure(_)));
}
