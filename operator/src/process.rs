//! The operator as a process: configuration, connections, the admin server, signals.

use std::sync::Arc;

use anyhow::Context as _;
use basal_kvstore::{
    etcd::{EtcdKv, Limits},
    flags::EtcdSettings,
    kv::Kv,
};
use basal_objects::{
    kube::KubeObjects,
    leadership::identity,
    object::Object,
    pace::{PaceOptions, Paced},
    port::Objects,
};
use basal_runtime::{
    admin::{AdminOptions, AdminServer, AdminState},
    config::{self, ConfigError, REFUSALS, Sources},
    controller::ControllerMetrics,
    env::{SharedEnv, SystemEnv},
    logging,
    metrics::Metrics,
    readiness::Readiness,
    shutdown::Shutdown,
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    config::OperatorConfig,
    measured::{Measured, RequestDurations},
    metrics::OperatorMetrics,
    ports::Ports,
    run::{Operator, Settings},
};

/// Runs until a signal ends it.
///
/// # Errors
/// The configuration, or something that cannot be begun without.
pub async fn main() -> anyhow::Result<()> {
    let loaded = match config::load::<OperatorConfig>(&Sources::of_process(), REFUSALS) {
        Err(ConfigError::Help(help)) => help.exit(),
        other => other?,
    };
    let config = loaded.config;
    logging::init(&config.log)?;
    config.check()?;
    let etcd = config.etcd.settings()?;
    let effective = serde_json::to_value(&loaded.effective).context("the configuration cannot be shown")?;
    info!(config = %effective, "effective configuration");
    if !loaded.unknown.is_empty() {
        info!(keys = loaded.unknown.join(", "), "keys that this operator does not have, ignored");
    }

    let env: SharedEnv = Arc::new(SystemEnv);
    let shutdown = Shutdown::on_signals(env.as_ref())?;
    let (metrics, readiness) = (Metrics::new("basal_operator"), Readiness::new());
    let operator_metrics = OperatorMetrics::register(&metrics);
    let controllers = metrics.register(ControllerMetrics::register);
    let durations = RequestDurations::register(&metrics);
    let admin = AdminServer::bind(&AdminOptions {
        address: Some(config.serving.operator_api_serve_addr.clone()),
        metrics_address: config.serving.enable_metrics.then(|| config.serving.operator_prometheus_serve_addr.clone()),
        unix_socket: None,
    })
    .await?;
    let state = AdminState { readiness: readiness.clone(), metrics, config: Arc::new(effective) };
    // Served until the Lease is released, so that probes and scrapes see the end as well.
    let ended = CancellationToken::new();
    let served = admin.serve(env.as_ref(), state, axum::Router::new(), &ended);

    let host = nix::unistd::gethostname().context("this host has no name")?;
    let settings = Settings {
        pool: config.pool()?,
        quarantine: config.pool.cluster_pool_quarantine.0,
        election: config.leadership(identity(&host.to_string_lossy(), env.as_ref())),
        node_gc: config.node_gc(),
        duties: config.duties(etcd.as_ref()),
        definitions: definitions(&config),
    };
    let (objects, lease) = connect(&config, &env, &durations).await?;
    let cluster = config.cluster.cluster()?;
    let ports = match &etcd {
        None => Ports::without_etcd(env, objects, cluster),
        Some(EtcdSettings { options, .. }) => {
            let etcd = EtcdKv::new(&env, &options.load_waiting().await?, Limits::from(options)).await?;
            let kv: Arc<dyn Kv> = Arc::new(etcd);
            Ports::new(env, objects, Arc::new(Measured::new(kv, &durations)), cluster)
        }
    };

    let operator = Operator::new(ports, lease, settings, operator_metrics, controllers, readiness);
    let run = operator.run(shutdown.drain.clone());
    let aborted = shutdown.abort.cancelled();
    futures::pin_mut!(run, aborted);
    if let futures::future::Either::Right(_) = futures::future::select(run, aborted).await {
        warn!("ended before the Lease was released");
    }
    ended.cancel();
    for task in served {
        task.join().await;
    }
    Ok(())
}

/// Two clients: one for all requests, and one for the Lease alone.
async fn connect(
    config: &OperatorConfig,
    env: &SharedEnv,
    durations: &RequestDurations,
) -> anyhow::Result<(Arc<dyn Objects>, Arc<dyn Objects>)> {
    let reach = &config.kubernetes.reach;
    let objects: Arc<dyn Objects> = Arc::new(KubeObjects::connect(reach, "basal-operator", Arc::clone(env)).await?);
    let measured: Arc<dyn Objects> = Arc::new(Measured::new(objects, durations));
    let lease = KubeObjects::connect(reach, "basal-operator", Arc::clone(env)).await?;
    Ok((Arc::new(Paced::new(measured, PaceOptions::default())), Arc::new(lease)))
}

fn definitions(config: &OperatorConfig) -> Vec<Object> {
    if config.kubernetes.skip_crd_creation {
        return Vec::new();
    }
    basal_crds::resources::crds().into_iter().map(|definition| Object(definition.object)).collect()
}
