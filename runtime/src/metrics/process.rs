//! Processor time, memory and file descriptors of this process, read at scrape time (proc(5)).

use std::{fmt, fs};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};

/// Ticks per second in /proc. The kernel shows user space 100 (USER_HZ) on every architecture that we build for,
/// whatever its own timer frequency is.
const TICKS_PER_SECOND: f64 = 100.0;

/// Shows `process_cpu_seconds_total`, `process_resident_memory_bytes`, `process_threads`, `process_open_fds` and
/// `process_start_time_seconds`, by the names of the Prometheus client guidelines. What cannot be read is left out.
#[derive(Debug, Clone, Copy)]
pub struct ProcessCollector;

/// What /proc says.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Sample {
    cpu_seconds: f64,
    start_seconds_after_boot: f64,
    threads: u64,
    resident_bytes: u64,
}

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        if let Some(sample) = parse(&stat, &status) {
            let cpu = ConstCounter::new(sample.cpu_seconds);
            let help = "User and system processor time";
            cpu.encode(encoder.encode_descriptor("process_cpu", help, Some(&Unit::Seconds), cpu.metric_type())?)?;
            gauge(&mut encoder, "process_resident_memory_bytes", "Resident memory", sample.resident_bytes)?;
            gauge(&mut encoder, "process_threads", "Threads", sample.threads)?;
            let boot = fs::read_to_string("/proc/stat").unwrap_or_default();
            if let Some(boot) = boot_time(&boot) {
                let start = ConstGauge::new(boot + sample.start_seconds_after_boot);
                let help = "Start of the process since the Unix epoch";
                let name = "process_start_time_seconds";
                start.encode(encoder.encode_descriptor(name, help, None, start.metric_type())?)?;
            }
        }
        if let Ok(entries) = fs::read_dir("/proc/self/fd") {
            let open = u64::try_from(entries.count()).unwrap_or(u64::MAX);
            gauge(&mut encoder, "process_open_fds", "Open file descriptors", open)?;
        }
        Ok(())
    }
}

fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> Result<(), fmt::Error> {
    let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
    gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)
}

/// Reads /proc/self/stat and /proc/self/status.
fn parse(stat: &str, status: &str) -> Option<Sample> {
    // The second field is the name in parentheses and may itself contain any of both.
    let (_, fields) = stat.rsplit_once(") ")?;
    let field = |number: usize| fields.split(' ').nth(number - 3)?.parse::<f64>().ok();
    let line = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next());
    Some(Sample {
        cpu_seconds: (field(14)? + field(15)?) / TICKS_PER_SECOND,
        start_seconds_after_boot: field(22)? / TICKS_PER_SECOND,
        threads: line("Threads:")?.parse().ok()?,
        resident_bytes: line("VmRSS:")?.parse::<u64>().ok()?.checked_mul(1024)?,
    })
}

/// The `btime` line of /proc/stat: the boot in seconds since the Unix epoch.
fn boot_time(stat: &str) -> Option<f64> {
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_and_spaces_does_not_shift_the_fields() {
        let stat = "7 (a) R (b)) S 1 7 7 0 -1 4194304 1 0 0 0 250 150 0 0 20 0 9 0 4200 1000 100 18446744073709551615";
        let status = "Name:\tx\nVmRSS:\t   2048 kB\nThreads:\t9\n";
        let expected =
            Sample { cpu_seconds: 4.0, start_seconds_after_boot: 42.0, threads: 9, resident_bytes: 2 * 1024 * 1024 };
        assert_eq!(parse(stat, status), Some(expected));
        assert_eq!(parse("", status), None);
        assert_eq!(boot_time("cpu 1 2\nbtime 1700000000\n"), Some(1_700_000_000.0));
    }
}
