//! Where the cluster's records are: in etcd, or in custom resources. Nothing beside this module asks which.

use std::{net::IpAddr, sync::Arc};

use basal_cni::api::{Component, ComponentState};
use basal_crds::{directory::Directory, resources::LedgerStore};
use basal_kvstore::{
    directory::{DirectoryConfig, EtcdDirectory, NoNodeAddress},
    etcd::EtcdKv,
    flags::EtcdSettings,
    kv::Kv,
    ledger::LedgerKeys,
    lock::Locks,
    session::Session,
    status::{Health, QuorumTracker, gather},
};
use basal_objects::{
    cache::Cache,
    directory::{DirectoryConfig as ObjectDirectoryConfig, ObjectDirectory},
    object::ObjectKey,
    port::Objects,
};
use basal_runtime::{env::SharedEnv, sync::lock};
use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};

use super::report::AgentReports;
use crate::{
    config::Settings,
    node::{
        confirm::{Confirm, EtcdConfirm, StatusConfirm},
        facts::NodeFacts,
        watch::CiliumNodeFacts,
    },
};

/// Failed quorum probes in a row that are no failure yet (`kvstore-max-consecutive-quorum-errors`).
const TOLERATED: u32 = 2;

/// Where the cluster's records are.
#[derive(Clone)]
pub enum Store {
    /// In etcd.
    Etcd {
        /// etcd.
        kv: Arc<dyn Kv>,
        /// What the keys about it say.
        keys: EtcdSettings,
        /// The same etcd for its status line; `None` where there is only a model of it.
        status: Option<EtcdKv>,
    },
    /// In custom resources.
    CustomResources,
}

/// The directory, and what belongs to it.
pub(super) struct Opened {
    pub(super) directory: Arc<dyn Directory>,
    /// CiliumEndpoints of this node that ought to be there and are gone.
    pub(super) vanished: BoxStream<'static, ObjectKey>,
    pub(super) status: StoreStatus,
}

/// How the store is, for its line in the status.
pub(super) struct StoreStatus(Watched);

enum Watched {
    Etcd { status: Option<EtcdKv>, session: Session },
    Nothing,
}

impl Store {
    /// Which one it is.
    pub(super) fn kind(&self) -> LedgerStore {
        match self {
            Self::Etcd { .. } => LedgerStore::Etcd,
            Self::CustomResources => LedgerStore::CustomResources,
        }
    }

    /// What confirms this node's blocks.
    pub(super) fn confirm(
        &self,
        env: &SharedEnv,
        settings: &Settings,
        node: &Cache<NodeFacts>,
        cilium_node: &Cache<CiliumNodeFacts>,
    ) -> Box<dyn Confirm> {
        match self {
            Self::Etcd { kv, .. } => {
                let keys = LedgerKeys::new(settings.cluster.name().as_str());
                Box::new(EtcdConfirm::new(Arc::clone(env), Arc::clone(kv), keys))
            }
            Self::CustomResources => Box::new(StatusConfirm { node: node.clone(), cilium_node: cilium_node.clone() }),
        }
    }

    /// Begins to follow the identities.
    pub(super) fn open(
        &self,
        env: &SharedEnv,
        objects: &Arc<dyn Objects>,
        settings: &Settings,
        node_ips: Vec<IpAddr>,
    ) -> Result<Opened, NoNodeAddress> {
        let cluster = settings.cluster.clone();
        match self {
            Self::Etcd { kv, keys, status } => {
                let session = Session::start(Arc::clone(env), Arc::clone(kv), keys.leases);
                let config = DirectoryConfig { cluster, node_ips, page_size: keys.options.page_size };
                let directory = Arc::new(EtcdDirectory::start(session.clone(), config)?);
                let status = StoreStatus(Watched::Etcd { status: status.clone(), session });
                Ok(Opened { directory, vanished: stream::pending().boxed(), status })
            }
            Self::CustomResources => {
                let config = ObjectDirectoryConfig { cluster, node_ips };
                let directory = Arc::new(ObjectDirectory::start(env, Arc::clone(objects), config));
                let vanished = directory.vanished();
                Ok(Opened { directory, vanished, status: StoreStatus(Watched::Nothing) })
            }
        }
    }
}

impl StoreStatus {
    /// Keeps the line written, for ever.
    pub(super) async fn run(self, reports: Arc<AgentReports>) {
        let Watched::Etcd { status, session } = self.0 else {
            *lock(&reports.kvstore) = Component::new(ComponentState::Disabled, "");
            return std::future::pending().await;
        };
        let locks = Locks::new(session.clone());
        let mut tracker = QuorumTracker::new(TOLERATED);
        loop {
            let component = match &status {
                Some(etcd) => match tracker.judge(&gather(etcd, &session, &locks).await) {
                    Health::Ok(line) => Component::new(ComponentState::Ok, line),
                    Health::Failure(line) => Component::new(ComponentState::Failure, line),
                },
                None => match session.report().last_error {
                    None => Component::new(ComponentState::Ok, "connected"),
                    Some(error) => Component::new(ComponentState::Failure, error),
                },
            };
            *lock(&reports.kvstore) = component;
            let nodes = reports.datapath.look(|view| view.nodes().len() + 1).await.unwrap_or(1);
            tokio::time::sleep(tracker.interval(nodes)).await;
        }
    }
}
