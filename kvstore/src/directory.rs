//! The directory in etcd, in Cilium's key layout.

mod follow;

use std::{
    net::IpAddr,
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use basal_crds::{
    directory::{AllocateError, Changes, Directory, IpOwner, NodeId, identities::IdentityFeed, patience::Patience},
    identity::{IdentityId, IdentityRange},
    kvstore::{IpRecord, IpTarget, NodeRecord, keys, parse_identity_labels},
    labels::Labels,
    names::Cluster,
};
use basal_runtime::sync::lock;
use tokio_util::sync::{CancellationToken, DropGuard};

use self::follow::follow;
use crate::{
    identity::IdentityStore,
    kv::KeyValue,
    list_watch::ListWatch,
    lock::Locks,
    pages::{PAGE_SIZE, list},
    session::Session,
};

/// Who this agent is.
#[derive(Debug, Clone)]
pub struct DirectoryConfig {
    /// Its cluster.
    pub cluster: Cluster,
    /// The addresses of its node that other nodes tunnel to: the `HostIP` of its records. The first one names its
    /// references to identities: IPv4 where there is one.
    pub node_ips: Vec<IpAddr>,
    /// Keys in one page of a list (`etcd.limit`).
    pub page_size: i64,
}

/// The directory in etcd.
pub struct EtcdDirectory {
    session: Session,
    page_size: i64,
    /// See [`DirectoryConfig::node_ips`].
    node_ips: Mutex<Vec<IpAddr>>,
    identities: Arc<Identities>,
    _end: DropGuard,
}

/// Why the directory could not be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the node has no address; its CiliumNode must carry an InternalIP")]
pub struct NoNodeAddress;

/// The one watch on identities, and everybody behind it.
struct Identities {
    store: IdentityStore,
    feed: IdentityFeed,
}

impl EtcdDirectory {
    /// Starts to follow the identities.
    ///
    /// # Errors
    /// [`NoNodeAddress`].
    pub fn start(session: Session, config: DirectoryConfig) -> Result<Self, NoNodeAddress> {
        let node_ip = naming(&config.node_ips).ok_or(NoNodeAddress)?;
        let range = IdentityRange::of(config.cluster.id());
        let store = IdentityStore::new(session.clone(), Locks::new(session.clone()), range, node_ip);
        let identities = Arc::new(Identities { store, feed: IdentityFeed::default() });
        let end = CancellationToken::new();
        let cancelled = end.clone();
        let task = Arc::clone(&identities).follow(session.clone(), config.page_size);
        session.env().spawn(
            "identities",
            Box::pin(async move {
                cancelled.run_until_cancelled_owned(task).await;
            }),
        );
        let (page_size, node_ips) = (config.page_size, Mutex::new(config.node_ips));
        Ok(Self { session, page_size, node_ips, identities, _end: end.drop_guard() })
    }

    /// The identities as this agent knows and uses them.
    #[must_use]
    pub fn identity_store(&self) -> &IdentityStore {
        &self.identities.store
    }

    fn list_watch(&self, prefix: &str) -> ListWatch {
        ListWatch { prefix: prefix.to_owned(), page_size: self.page_size }
    }
}

/// The address that references to identities are named after.
fn naming(node_ips: &[IpAddr]) -> Option<IpAddr> {
    node_ips.iter().find(|ip| ip.is_ipv4()).or(node_ips.first()).copied()
}

fn read_node(kv: &KeyValue) -> Result<(NodeId, NodeRecord), String> {
    let (cluster, node) = keys::parse_node(&kv.key).map_err(|error| error.to_string())?;
    let record = NodeRecord::parse_for(&cluster, &node, &kv.value).map_err(|error| error.to_string())?;
    Ok(((cluster, node), record))
}

fn read_ip(kv: &KeyValue) -> Result<(IpTarget, IpOwner), String> {
    let target = keys::parse_ip_target(&kv.key).map_err(|error| error.to_string())?;
    let record = IpRecord::parse_for(target, &kv.value).map_err(|error| error.to_string())?;
    Ok((target, IpOwner::from(&record)))
}

fn read_identity(kv: &KeyValue) -> Result<(IdentityId, Labels), String> {
    let id = keys::parse_identity(&kv.key).map_err(|error| error.to_string())?;
    let labels = parse_identity_labels(&kv.value).map_err(|error| error.to_string())?;
    Ok((id, labels))
}

#[async_trait]
impl Directory for EtcdDirectory {
    fn nodes(&self) -> Changes<NodeId, NodeRecord> {
        let key_of = |key: &str| keys::parse_node(key).ok();
        follow(&self.session, self.list_watch(keys::NODES_PREFIX), Patience::Always, read_node, key_of, |_, _| {})
    }

    fn ips(&self) -> Changes<IpTarget, IpOwner> {
        let session = self.session.clone();
        let key_of = |key: &str| keys::parse_ip_target(key).ok();
        // A record of ours that somebody else deleted comes back.
        let seen = move |key: &str, found: Option<(&IpTarget, &IpOwner)>| {
            if found.is_none() {
                session.rewrite(key);
            }
        };
        follow(&self.session, self.list_watch(keys::IPS_PREFIX), Patience::AfterLoss, read_ip, key_of, seen)
    }

    fn identities(&self) -> Changes<IdentityId, Labels> {
        let known = || {
            let known = self.identities.store.known();
            known.iter().map(|(id, labels)| (id, labels.clone())).collect()
        };
        self.identities.feed.follow(known)
    }

    fn publish_ip(&self, record: &IpRecord) {
        self.session.put(&keys::ip(record.target), record.to_json().as_bytes());
    }

    fn withdraw_ip(&self, target: IpTarget) {
        self.session.delete(&keys::ip(target));
    }

    fn moved(&self, node_ips: &[IpAddr]) {
        if let Some(node_ip) = naming(node_ips) {
            node_ips.clone_into(&mut lock(&self.node_ips));
            self.identities.store.moved(node_ip);
        }
    }

    async fn withdraw_leftover_ips(&self) -> Result<usize, String> {
        let node_ips = lock(&self.node_ips).clone();
        let listed = list(&**self.session.kv(), keys::IPS_PREFIX, PAGE_SIZE, false).await;
        let mut withdrawn = 0;
        for kv in listed.map_err(|error| error.to_string())?.kvs {
            let Ok((_, owner)) = read_ip(&kv) else { continue };
            let is_ours = owner.host_ip.is_some_and(|ip| node_ips.contains(&ip));
            if is_ours && self.session.wanted(&kv.key).is_none() {
                self.session.delete(&kv.key);
                withdrawn += 1;
            }
        }
        Ok(withdrawn)
    }

    async fn allocate_identity(&self, labels: &Labels) -> Result<IdentityId, AllocateError> {
        let listed = self.identities.feed.listed().await;
        listed.map_err(|why| AllocateError::Unavailable { labels: labels.clone(), why })?;
        self.identities.store.allocate(labels).await
    }

    fn release_identity(&self, labels: &Labels) {
        self.identities.store.release(labels);
    }
}

impl Identities {
    /// Keeps the store up to date, restores what is in use here, and tells everybody who follows.
    async fn follow(self: Arc<Self>, session: Session, page_size: i64) {
        let what = ListWatch { prefix: keys::IDENTITY_IDS_PREFIX.to_owned(), page_size };
        let key_of = |key: &str| keys::parse_identity(key).ok();
        let this = Arc::clone(&self);
        let seen = move |key: &str, found: Option<(&IdentityId, &Labels)>| match (found, keys::parse_identity(key)) {
            (Some((id, labels)), _) => this.store.learn(*id, labels.clone()),
            (None, Ok(id)) => {
                this.store.forget(id);
                this.feed.lost();
            }
            (None, Err(_)) => {}
        };
        let changes = follow(&session, what, Patience::AfterLoss, read_identity, key_of, seen);
        self.feed.run(changes, || self.store.restore()).await;
    }
}
