//! The directory in Cilium's custom resources: nodes from CiliumNodes, addresses from CiliumEndpoints, identities from
//! CiliumIdentities.

mod follow;
mod identities;

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use basal_crds::{
    directory::{AllocateError, Changes, Directory, IpOwner, NodeId, patience::Patience},
    identity::{IdentityId, IdentityRange},
    kvstore::{IpRecord, IpTarget, NodeRecord},
    labels::Labels,
    names::Cluster,
    resources::{CiliumEndpoint, CiliumNode},
};
use basal_runtime::{env::SharedEnv, outcome::Outcome, sync::lock};
use futures::{
    StreamExt as _,
    channel::mpsc::{UnboundedSender, unbounded},
    stream::BoxStream,
};
use tokio_util::sync::{CancellationToken, DropGuard};

pub use self::identities::{identity_labels, identity_object};
use self::{follow::follow, identities::Identities};
use crate::{
    object::{
        Object, ObjectKey,
        resources::{CILIUM_ENDPOINT, CILIUM_NODE},
    },
    port::{Objects, Preconditions, Refusal},
};

/// Who this agent is.
#[derive(Debug, Clone)]
pub struct DirectoryConfig {
    /// Its cluster.
    pub cluster: Cluster,
    /// The addresses of its node that other nodes tunnel to: `status.networking.node` of its CiliumEndpoints is one of
    /// them.
    pub node_ips: Vec<IpAddr>,
}

/// The directory in custom resources.
///
/// A record of an address is not written here: the CiliumEndpoint that shows the endpoint is the record, and its writer
/// hears from [`Self::vanished`] of those that are gone.
pub struct ObjectDirectory {
    objects: Arc<dyn Objects>,
    config: DirectoryConfig,
    published: Arc<Published>,
    /// What may be a leftover, until that was looked at.
    own: Arc<Mutex<Option<BTreeMap<ObjectKey, OwnEndpoint>>>>,
    identities: Arc<Identities>,
    _end: DropGuard,
}

/// The records that ought to be there.
#[derive(Default)]
struct Published {
    /// The CiliumEndpoint of each address.
    endpoints: Mutex<BTreeMap<IpTarget, ObjectKey>>,
    /// Those who look after them.
    keepers: Mutex<Vec<UnboundedSender<ObjectKey>>>,
}

/// A CiliumEndpoint behind this node, as it was last told of.
struct OwnEndpoint {
    targets: Vec<IpTarget>,
    only_if: Preconditions,
}

impl Published {
    fn gone(&self, target: &IpTarget) {
        let Some(endpoint) = lock(&self.endpoints).get(target).cloned() else { return };
        lock(&self.keepers).retain(|keeper| keeper.unbounded_send(endpoint.clone()).is_ok());
    }
}

impl ObjectDirectory {
    /// Starts to follow the identities.
    #[must_use]
    pub fn start(env: &SharedEnv, objects: Arc<dyn Objects>, config: DirectoryConfig) -> Self {
        let range = IdentityRange::of(config.cluster.id());
        let identities = Arc::new(Identities::new(Arc::clone(env), Arc::clone(&objects), range));
        let end = CancellationToken::new();
        let cancelled = end.clone();
        let task = Arc::clone(&identities).follow();
        env.spawn(
            "identities",
            Box::pin(async move {
                cancelled.run_until_cancelled_owned(task).await;
            }),
        );
        let own = Arc::new(Mutex::new(Some(BTreeMap::new())));
        Self { objects, config, published: Arc::default(), own, identities, _end: end.drop_guard() }
    }

    /// The CiliumEndpoints that show published addresses and were seen to be gone, as long as somebody follows
    /// [`Directory::ips`]. The stream ends with the directory.
    #[must_use]
    pub fn vanished(&self) -> BoxStream<'static, ObjectKey> {
        let (sender, receiver) = unbounded();
        lock(&self.published.keepers).push(sender);
        receiver.boxed()
    }
}

fn read_node(cluster: &Cluster, object: &Object) -> Result<Vec<(NodeId, NodeRecord)>, String> {
    let node: CiliumNode = object.parse().map_err(|error| error.to_string())?;
    let record = node.confirmed_record(cluster).map_err(|error| error.to_string())?;
    Ok(record.map(|record| ((record.cluster.clone(), record.name.clone()), record)).into_iter().collect())
}

fn read_endpoint(object: &Object) -> Result<Vec<(IpTarget, IpOwner)>, String> {
    let endpoint: CiliumEndpoint = object.parse().map_err(|error| error.to_string())?;
    let records = endpoint.ip_records().map_err(|error| error.to_string())?;
    Ok(records.iter().map(|record| (record.target, record.into())).collect())
}

/// What to keep of a CiliumEndpoint when all its addresses are behind this node.
fn own_endpoint(object: &Object, said: &[(IpTarget, IpOwner)], node_ips: &[IpAddr]) -> Option<OwnEndpoint> {
    let is_own = |owner: &IpOwner| owner.host_ip.is_some_and(|ip| node_ips.contains(&ip));
    (!said.is_empty() && said.iter().all(|(_, owner)| is_own(owner))).then(|| OwnEndpoint {
        targets: said.iter().map(|(target, _)| *target).collect(),
        only_if: Preconditions { uid: object.uid().to_owned(), resource_version: object.resource_version().to_owned() },
    })
}

#[async_trait]
impl Directory for ObjectDirectory {
    /// A CiliumNode counts once the operator confirms a block of it.
    fn nodes(&self) -> Changes<NodeId, NodeRecord> {
        let cluster = self.config.cluster.clone();
        let read = move |object: &Object| read_node(&cluster, object);
        follow(&*self.objects, CILIUM_NODE, Patience::Always, read, |_, _| {})
    }

    fn ips(&self) -> Changes<IpTarget, IpOwner> {
        let published = Arc::clone(&self.published);
        let seen = move |target: &IpTarget, found: Option<&IpOwner>| {
            if found.is_none() {
                published.gone(target);
            }
        };
        let (own, node_ips) = (Arc::clone(&self.own), self.config.node_ips.clone());
        let read = move |object: &Object| {
            let said = read_endpoint(object)?;
            if let Some(own) = &mut *lock(&own) {
                match own_endpoint(object, &said, &node_ips) {
                    Some(endpoint) => drop(own.insert(object.key(), endpoint)),
                    None => drop(own.remove(&object.key())),
                }
            }
            Ok(said)
        };
        follow(&*self.objects, CILIUM_ENDPOINT, Patience::AfterLoss, read, seen)
    }

    fn identities(&self) -> Changes<IdentityId, Labels> {
        self.identities.subscribe()
    }

    fn publish_ip(&self, record: &IpRecord) {
        let endpoint = ObjectKey::namespaced(record.namespace.clone(), record.pod_name.clone());
        lock(&self.published.endpoints).insert(record.target, endpoint);
    }

    fn withdraw_ip(&self, target: IpTarget) {
        lock(&self.published.endpoints).remove(&target);
    }

    async fn withdraw_leftover_ips(&self) -> Result<usize, String> {
        // An object that is another one by now is left alone: a write names the one that was seen.
        let own = lock(&self.own).take().unwrap_or_default();
        let leftovers: Vec<_> = {
            let published = lock(&self.published.endpoints);
            own.into_iter()
                .filter(|(_, own)| own.targets.iter().all(|target| !published.contains_key(target)))
                .collect()
        };
        let mut withdrawn = 0;
        for (key, OwnEndpoint { only_if, .. }) in leftovers {
            match self.objects.delete(CILIUM_ENDPOINT, &key, only_if).await {
                Outcome::Done(()) => withdrawn += 1,
                // Somebody else was faster, or has made another object of it.
                Outcome::Refused(Refusal::NotFound(_) | Refusal::Conflict(_)) => {}
                Outcome::Refused(refusal) => return Err(format!("CiliumEndpoint {key}: {refusal}")),
                Outcome::Unknown(why) => return Err(format!("CiliumEndpoint {key}: {why}")),
            }
        }
        Ok(withdrawn)
    }

    async fn allocate_identity(&self, labels: &Labels) -> Result<IdentityId, AllocateError> {
        self.identities.allocate(labels).await
    }

    fn release_identity(&self, labels: &Labels) {
        self.identities.release(labels);
    }
}
