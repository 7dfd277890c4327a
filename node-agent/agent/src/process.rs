//! The agent as a process: configuration, probes of what the kernel can do, connections, the admin server, signals.

use std::{fs, sync::Arc};

use anyhow::{Context as _, bail};
use basal_datapath::linux::{LinuxKernel, Paths, probe};
use basal_kvstore::etcd::{EtcdKv, Limits};
use basal_objects::kube::KubeObjects;
use basal_runtime::{
    admin::{AdminOptions, AdminServer, AdminState, ListenAddress},
    config::{self, ConfigError, REFUSALS, Sources},
    env::{SharedEnv, SystemEnv},
    logging,
    metrics::Metrics,
    readiness::Readiness,
    shutdown::Shutdown,
};
use tracing::{info, warn};

use crate::{
    agent::{Agent, Ports, store::Store},
    config::AgentConfig,
    journal::file::FileJournal,
    metrics::{AgentMetrics, PREFIX},
};

/// The kernel's name for the present boot.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Runs until a signal ends it.
///
/// # Errors
/// The configuration, a missing capability or kernel feature, or something that cannot be begun without.
pub async fn main() -> anyhow::Result<()> {
    let loaded = match config::load::<AgentConfig>(&Sources::of_process(), REFUSALS) {
        Err(ConfigError::Help(help)) => help.exit(),
        other => other?,
    };
    let config = loaded.config;
    logging::init(&config.log)?;
    let settings = config.settings()?;
    let effective = serde_json::to_value(&loaded.effective).context("the configuration cannot be shown")?;
    info!(config = %effective, "effective configuration");
    if !loaded.unknown.is_empty() {
        info!(keys = loaded.unknown.join(", "), "keys that this agent does not have, ignored");
    }

    let env: SharedEnv = Arc::new(SystemEnv);
    let shutdown = Shutdown::on_signals(env.as_ref())?;
    let (metrics, readiness) = (Metrics::new(PREFIX), Readiness::new());
    let connections = readiness.guard("connections");
    connections.not_ready("the configuration of the connections has not been read");
    let agent_metrics = metrics.register(AgentMetrics::register);
    let health: ListenAddress = format!("127.0.0.1:{}", config.serving.agent_health_port).parse()?;
    let admin = AdminServer::bind(&AdminOptions {
        address: Some(health),
        metrics_address: config.serving.prometheus_serve_addr.clone(),
        unix_socket: None,
    })
    .await?;
    let state = AdminState { readiness: readiness.clone(), metrics, config: Arc::new(effective) };
    let served = admin.serve(env.as_ref(), state, axum::Router::new(), &shutdown.drain);

    let paths = Paths {
        bpffs: config.datapath.bpf_root.clone(),
        sysctl: config.datapath.procfs.join("sys"),
        tcx: config.datapath.enable_tcx,
        ..Paths::default()
    };
    let missing: Vec<String> = probe::probe(&paths).iter().map(ToString::to_string).collect();
    if !missing.is_empty() {
        bail!("this node lacks what the agent needs: {}", missing.join("; "));
    }
    let boot_id = fs::read_to_string(BOOT_ID).with_context(|| format!("cannot read {BOOT_ID}"))?;
    let journal = FileJournal::open(&config.cni.state_dir.join("state/endpoints"))?;
    let kernel = LinuxKernel::new(&env, paths).context("cannot open netlink")?;
    let objects = KubeObjects::connect(&config.kubernetes, "basal-agent", Arc::clone(&env)).await?;
    let store = match &settings.etcd {
        Some(keys) => {
            let etcd = EtcdKv::new(&env, &keys.options.load_waiting().await?, Limits::from(&keys.options)).await?;
            Store::Etcd { kv: Arc::new(etcd.clone()), keys: keys.clone(), status: Some(etcd) }
        }
        None => Store::CustomResources,
    };
    let ports = Ports { env, objects: Arc::new(objects), store, kernel: Arc::new(kernel), journal: Arc::new(journal) };

    let agent =
        Agent::new(ports, settings, boot_id.trim().to_owned(), readiness, agent_metrics, shutdown.drain.clone());
    connections.ready();
    let run = agent.run();
    let aborted = shutdown.abort.cancelled();
    futures::pin_mut!(run, aborted);
    match futures::future::select(run, aborted).await {
        futures::future::Either::Left((ended, _)) => ended?,
        futures::future::Either::Right(_) => warn!("ended at once"),
    }
    for task in served {
        task.join().await;
    }
    Ok(())
}
