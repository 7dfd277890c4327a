//! Takes away, from time to time, what is left of connections that ended.

use std::{sync::Arc, time::Duration};

use basal_datapath::{
    flows::{FIRST_INTERVAL, MapUse, next_interval},
    kernel::Kernel,
};

use crate::metrics::FlowMetrics;

/// The task that does so.
pub struct FlowCollector {
    /// The kernel.
    pub kernel: Arc<dyn Kernel>,
    /// What is counted.
    pub metrics: FlowMetrics,
    /// How often; `None` for as often as it pays.
    pub every: Option<Duration>,
}

impl FlowCollector {
    /// Runs until it is dropped. It begins at once: the maps may be full of what an agent before this one left.
    pub async fn run(self) {
        let mut interval = self.every.unwrap_or(FIRST_INTERVAL);
        loop {
            match self.kernel.collect_flows().await {
                Ok(maps) => {
                    self.metrics.collected(&maps);
                    let deleted: usize = maps.iter().map(|map| map.deleted).sum();
                    tracing::debug!(deleted, "connections that ended were taken away");
                    interval = self.every.unwrap_or_else(|| next_interval(interval, most_deleted(&maps)));
                }
                Err(error) => {
                    self.metrics.failed();
                    interval = interval.min(FIRST_INTERVAL);
                    let seconds = interval.as_secs();
                    tracing::warn!(%error, seconds, "connections that ended cannot be taken away; it is tried again");
                }
            }
            tokio::time::sleep(interval).await;
        }
    }
}

/// The largest share of a map that was taken away.
fn most_deleted(maps: &[MapUse]) -> f64 {
    let share = |map: &MapUse| u32::try_from(map.deleted).map_or(1.0, f64::from) / f64::from(map.max.max(1));
    maps.iter().map(share).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fullest_bin_counts() {
        let map = |deleted| MapUse { map: "m", rows: 7, max: 1000, deleted };
        assert!((most_deleted(&[map(10), map(300), map(0)]) - 0.3).abs() < 1e-9);
        assert!(most_deleted(&[]).abs() < 1e-9);
    }
}
