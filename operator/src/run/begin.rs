//! How a term begins: what the Ledger asks for is done, until the active store is served.

use std::time::Duration;

use basal_crds::resources::LedgerStore;
use basal_objects::{crd_install, events::EventRecorder, leadership::Elector, ledger};
use basal_runtime::{backoff::Failures, failure::chain, sync::lock};
use futures::{FutureExt as _, pin_mut, select_biased};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{Ended, Operator, PAUSES, Settings};
use crate::{
    ledger_state::{self, Work},
    moving::{self, Course, Mover, course},
    node::{Dangling, Views},
    ports::Ports,
    store::Publication,
    term::{self, BeginError, Begun},
};

/// How long a CustomResourceDefinition may take to be served.
const CRD_LIMIT: Duration = Duration::from_secs(60);

/// How long an operator that may not work with the claims holds the Lease all the same, to say so.
const TELL: Duration = Duration::from_secs(1);

impl Operator {
    /// Begins the term, with growing pauses until it succeeds or the term is over.
    pub(super) async fn begin(
        &self,
        ports: &Ports,
        views: &Views,
        elector: &Elector,
        events: &EventRecorder,
        over: &CancellationToken,
    ) -> Result<(Ports, Work, Begun), Ended> {
        let mut failures = Failures::none(PAUSES);
        loop {
            let tried = self.try_begin(ports, views, elector, events).fuse();
            let stopped = over.cancelled().fuse();
            pin_mut!(tried, stopped);
            let error = select_biased! {
                () = stopped => return Err(Ended::Over),
                begun = tried => match begun {
                    Ok(begun) => return Ok(begun),
                    Err(error) => error,
                },
            };
            warn!(error = %chain(error.as_ref()), "the term does not begin yet");
            let mut pause = failures.next(ports.env.as_ref());
            let mut refused = false;
            if let Some(error) = error.downcast_ref::<BeginError>().filter(|error| error.needs_somebody()) {
                ledger_state::tell_refused(ports, events, error).await;
                refused = !matches!(error, BeginError::Move(_));
            }
            if refused {
                // The event is written while the Lease is held.
                pause = pause.max(TELL);
            }
            let (pause, stopped) = (tokio::time::sleep(pause).fuse(), over.cancelled().fuse());
            pin_mut!(pause, stopped);
            select_biased! { () = stopped => return Err(Ended::Over), () = pause => {} }
            if refused {
                return Err(Ended::Refused);
            }
        }
    }

    /// Does what the Ledger asks for, until a term of the active store has begun.
    async fn try_begin(
        &self,
        ports: &Ports,
        views: &Views,
        elector: &Elector,
        events: &EventRecorder,
    ) -> Result<(Ports, Work, Begun), anyhow::Error> {
        let Settings { pool, quarantine, node_gc, definitions, .. } = &self.settings;
        crd_install::install(ports.objects.as_ref(), ports.env.as_ref(), definitions, CRD_LIMIT).await?;
        let home = ports.store.kind();
        loop {
            let asked = ledger::asked(ports.objects.as_ref(), ports.cluster.name().as_str()).await;
            let asked = asked.map_err(BeginError::from)?;
            match (course(home, asked.as_ref().map(|asked| &asked.standing)), &ports.kv) {
                (Course::Move { from, to }, Some(kv)) => {
                    Mover::new(ports, kv, elector, events, (from, to)).run().await.map_err(BeginError::from)?;
                }
                (Course::Serve { store, bridged }, _) => {
                    let serving = ports.serving(store);
                    let publication = if bridged && store == LedgerStore::Etcd {
                        Publication::Both
                    } else {
                        serving.store.publication()
                    };
                    let begun = term::begin(&serving, views, elector, pool, *quarantine, publication).await?;
                    lock(&begun.core).dangling = Dangling::new(*node_gc);
                    if asked.is_some_and(|asked| asked.standing.leaving.is_some() && !bridged) {
                        forget_left(ports).await;
                    }
                    return Ok((serving, Work { home, store, bridged }, begun));
                }
                (Course::Refuse { active } | Course::Move { from: active, .. }, _) => {
                    return Err(BeginError::from(moving::not_active(active, home)).into());
                }
            }
        }
    }
}

/// An operator without etcd does without it for good.
async fn forget_left(ports: &Ports) {
    let (objects, cluster) = (ports.objects.as_ref(), ports.cluster.name().as_str());
    let forgotten = match ledger::asked(objects, cluster).await {
        Ok(Some(asked)) => ledger::forget_left(objects, cluster, &asked).await,
        other => other.map(drop),
    };
    if let Err(error) = forgotten {
        warn!(%error, "spec.leaving of the Ledger was not taken away; the next term tries again");
    }
}
