//! What servers and processes count themselves.

use std::collections::BTreeMap;

use basal_e2e::{process, servers::Etcd, wait::Stopwatch};

use super::servers::Servers;

/// Counters of the servers at a moment.
#[derive(Debug, Clone, Default)]
pub(crate) struct Counts {
    /// `apiserver_request_total` by verb and resource (with its subresource), watches left out.
    api: BTreeMap<(String, String), f64>,
    /// Requests to Basal's etcd by method, watches and leases left out (`grpc_server_handled_total`).
    etcd: BTreeMap<&'static str, f64>,
}

const WRITES: [&str; 5] = ["POST", "PUT", "PATCH", "APPLY", "DELETE"];
const ETCD: [&str; 3] = ["Txn", "Put", "Range"];

impl Counts {
    /// Reads them.
    pub(crate) fn read(servers: &Servers) -> anyhow::Result<Self> {
        let mut counts = Self::default();
        for line in servers.api.metrics()?.lines() {
            let Some(sample) = line.strip_prefix("apiserver_request_total{") else { continue };
            let Some((labels, value)) = sample.rsplit_once("} ") else { continue };
            let label = |name: &str| {
                let quoted = labels.split("\",").find_map(|label| label.strip_prefix(name)?.strip_prefix("=\""));
                quoted.unwrap_or_default().trim_end_matches('"').to_owned()
            };
            let (verb, resource, subresource) = (label("verb"), label("resource"), label("subresource"));
            // Without a resource: /metrics and /readyz, which the bench itself asks for.
            if verb == "WATCH" || resource.is_empty() {
                continue;
            }
            let slash = if subresource.is_empty() { "" } else { "/" };
            let resource = format!("{resource}{slash}{subresource}");
            *counts.api.entry((verb, resource)).or_default() += value.parse::<f64>()?;
        }
        let etcd = servers.etcd.as_ref().map(Etcd::metrics).transpose()?.unwrap_or_default();
        for line in etcd.lines() {
            let Some(sample) = line.strip_prefix("grpc_server_handled_total{") else { continue };
            let Some((labels, value)) = sample.rsplit_once("} ") else { continue };
            if let Some(known) = ETCD.iter().find(|known| labels.contains(&format!("grpc_method=\"{known}\""))) {
                *counts.etcd.entry(known).or_default() += value.parse::<f64>()?;
            }
        }
        Ok(counts)
    }

    /// What was counted since.
    pub(crate) fn since(&self, earlier: &Self) -> Self {
        let api = self
            .api
            .iter()
            .map(|(key, value)| (key.clone(), value - earlier.api.get(key).copied().unwrap_or_default()));
        let etcd =
            self.etcd.iter().map(|(key, value)| (*key, value - earlier.etcd.get(key).copied().unwrap_or_default()));
        Self { api: api.collect(), etcd: etcd.collect() }
    }

    /// Requests to the API server, of all kinds.
    pub(crate) fn requests(&self) -> f64 {
        self.api.values().sum()
    }

    /// Writes of one resource, by its plural.
    pub(crate) fn writes_of(&self, resource: &str) -> f64 {
        let writes = self.api.iter().filter(|((verb, written), _)| {
            WRITES.contains(&verb.as_str()) && written.split('/').next() == Some(resource)
        });
        writes.map(|(_, count)| count).sum()
    }

    /// Transactions and puts in etcd.
    pub(crate) fn etcd_writes(&self) -> f64 {
        self.etcd.iter().filter(|(method, _)| **method != "Range").map(|(_, count)| count).sum()
    }

    /// Reads from etcd.
    pub(crate) fn etcd_reads(&self) -> f64 {
        self.etcd.get("Range").copied().unwrap_or_default()
    }

    /// Every counter that moved, for people.
    fn text(&self) -> String {
        let api = self.api.iter().filter(|(_, count)| **count > 0.0);
        let api = api.map(|((verb, resource), count)| format!("{verb} {resource} {count}"));
        let etcd = self.etcd.iter().map(|(method, count)| format!("etcd {method} {count}"));
        api.chain(etcd).collect::<Vec<_>>().join(", ")
    }
}

/// What one case cost.
#[derive(Debug, Clone)]
pub(crate) struct Cost {
    /// From the first create until the last node was served, in seconds.
    pub(crate) wall: f64,
    /// What the servers counted meanwhile.
    pub(crate) counts: Counts,
    /// CPU seconds of the process that was measured; 0 where that is the bench itself.
    pub(crate) cpu: f64,
    /// Its peak of resident memory in MB (10⁶ bytes).
    pub(crate) rss: f64,
}

impl Cost {
    /// All of it, for people.
    pub(crate) fn text(&self) -> String {
        let Self { wall, counts, cpu, rss } = self;
        format!("  {wall:.1} s, {cpu:.1} s on the CPU, {rss:.1} MB; {}", counts.text())
    }
}

/// Begins to measure.
pub(crate) struct Meter<'a> {
    servers: &'a Servers,
    process: Option<u32>,
    counts: Counts,
    cpu: f64,
    watch: Stopwatch,
}

impl<'a> Meter<'a> {
    /// Now. `process` is whose CPU time and memory count.
    pub(crate) fn start(servers: &'a Servers, process: Option<u32>) -> anyhow::Result<Self> {
        let counts = Counts::read(servers)?;
        let cpu = process.map(process::usage).transpose()?.map_or(0.0, |usage| usage.cpu_seconds);
        Ok(Self { servers, process, counts, cpu, watch: Stopwatch::start() })
    }

    /// What it cost since the start.
    pub(crate) fn stop(self) -> anyhow::Result<Cost> {
        let wall = self.watch.elapsed().as_secs_f64();
        let usage = self.process.map(process::usage).transpose()?;
        let (cpu, rss) = usage.map_or((0.0, 0.0), |used| (used.cpu_seconds - self.cpu, used.peak_megabytes()));
        Ok(Cost { wall, counts: Counts::read(self.servers)?.since(&self.counts), cpu, rss })
    }
}
