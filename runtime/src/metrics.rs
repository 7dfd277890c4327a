//! What the daemons share for Prometheus: one registry per process, histogram buckets, timers, process metrics.

use std::sync::{Arc, Mutex};

use prometheus_client::{
    encoding::text::encode,
    metrics::histogram::{Histogram, exponential_buckets},
    registry::Registry,
};
use tokio::time::Instant;

pub use process::ProcessCollector;

use crate::sync::lock;

mod process;

/// The content type of [`Metrics::text`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The registry of a process: filled at start, then only encoded.
#[derive(Debug, Clone)]
pub struct Metrics {
    prefix: &'static str,
    registry: Arc<Mutex<Registry>>,
}

impl Metrics {
    /// A registry with the `process_…` metrics; what is registered later begins with `prefix_`.
    #[must_use]
    pub fn new(prefix: &'static str) -> Self {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(ProcessCollector));
        Self { prefix, registry: Arc::new(Mutex::new(registry)) }
    }

    /// Adds metrics under the prefix.
    pub fn register<T>(&self, with: impl FnOnce(&mut Registry) -> T) -> T {
        with(lock(&self.registry).sub_registry_with_prefix(self.prefix))
    }

    /// All metrics in the OpenMetrics text format.
    ///
    /// # Errors
    /// A collector failed.
    pub fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &lock(&self.registry))?;
        Ok(text)
    }
}

/// A histogram for seconds: 12 buckets from 1 ms to 2 s, doubling, and three for slower ones.
#[must_use]
pub fn latency_histogram() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 12).chain([5.0, 15.0, 60.0]))
}

/// Measures a stretch of code: observes the seconds since it was made when it is dropped, early returns included.
#[derive(Debug)]
pub struct Timer {
    histogram: Histogram,
    begun: Instant,
}

impl Timer {
    /// Begins.
    #[must_use = "a timer that is dropped at once measures nothing"]
    pub fn start(histogram: Histogram) -> Self {
        Self { histogram, begun: Instant::now() }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.histogram.observe(self.begun.elapsed().as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use prometheus_client::metrics::counter::Counter;

    use super::*;

    #[test]
    fn own_metrics_carry_the_prefix_and_process_metrics_do_not() {
        let metrics = Metrics::new("basal_operator");
        let (grants, refusals) = (Counter::<u64>::default(), Counter::<u64>::default());
        metrics.register(|registry| registry.register("grants", "Blocks granted", grants.clone()));
        metrics.register(|registry| registry.register("refusals", "Grants refused", refusals.clone()));
        grants.inc();
        let text = metrics.text().unwrap();
        assert!(text.contains("\nbasal_operator_grants_total 1\n"), "{text}");
        assert!(text.contains("\nbasal_operator_refusals_total 0\n"), "{text}");
        assert!(text.contains("\nprocess_resident_memory_bytes "), "{text}");
        assert!(text.ends_with("# EOF\n"), "{text}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_timer_observes_when_it_is_dropped() {
        let (metrics, histogram) = (Metrics::new("basal"), latency_histogram());
        metrics.register(|registry| registry.register("write_seconds", "Duration of a write", histogram.clone()));
        let timer = Timer::start(histogram);
        tokio::time::advance(Duration::from_secs(3)).await;
        drop(timer);
        let text = metrics.text().unwrap();
        assert!(text.contains("\nbasal_write_seconds_sum 3.0\n"), "{text}");
        assert!(text.contains("\nbasal_write_seconds_bucket{le=\"5.0\"} 1\n"), "{text}");
    }
}
