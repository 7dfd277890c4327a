//! What is measured between two pods, in turn with what it is held against.

use std::time::Duration;

use basal_e2e::{
    bench::{Row, median},
    say::say,
};

use super::{iperf, load, worlds::Way};

/// How often each way is measured.
pub(crate) const ROUNDS: usize = 5;

/// What a measure gives.
#[derive(Debug, Clone)]
struct Figure {
    what: String,
    value: f64,
    unit: &'static str,
    method: &'static str,
}

impl Figure {
    /// For people.
    fn text(&self) -> String {
        format!("{:.1} {}", self.value, self.unit)
    }
}

/// A load, and what is found out by it.
#[derive(Debug, Clone, Copy)]
enum Measure {
    /// Throughput of so many streams.
    Tcp { streams: u32, ipv6: bool },
    /// Packets that arrive.
    UdpPackets,
    /// A byte to and fro.
    TcpTurns,
    /// A byte to and fro.
    UdpTurns,
    /// Pings.
    IcmpTurns,
    /// Connections one after the other.
    Connections,
}

const ALL: [Measure; 8] = [
    Measure::Tcp { streams: 1, ipv6: false },
    Measure::Tcp { streams: 4, ipv6: false },
    Measure::Tcp { streams: 1, ipv6: true },
    Measure::TcpTurns,
    Measure::UdpTurns,
    Measure::IcmpTurns,
    Measure::Connections,
    Measure::UdpPackets,
];

/// Ways to be measured, and what each of them is held against.
pub(crate) struct Case<'a> {
    /// What the ways have in common.
    pub(crate) name: &'static str,
    /// Basal's.
    pub(crate) subjects: Vec<Way<'a>>,
    /// Those without Basal.
    pub(crate) baselines: Vec<Way<'a>>,
}

impl Case<'_> {
    /// Takes every measure, each way `time` long in each round.
    pub(crate) fn run(&self, time: Duration) -> anyhow::Result<Vec<Row>> {
        let mut rows = Vec::new();
        for measure in ALL {
            say(format!("{}: {}", self.name, measure.name()));
            // In turn: a machine that becomes slower does so for all.
            let mut rounds = vec![Vec::new(); self.subjects.len() + self.baselines.len()];
            for _ in 0..ROUNDS {
                for (way, found) in self.subjects.iter().chain(&self.baselines).zip(&mut rounds) {
                    found.push(measure.take(way, time)?);
                }
            }
            let medians: Vec<Vec<Figure>> = rounds.into_iter().map(medians).collect();
            for (way, figures) in self.subjects.iter().chain(&self.baselines).zip(&medians) {
                let figures: Vec<String> = figures.iter().map(Figure::text).collect();
                say(format!("  {}: {}", way.name, figures.join(", ")));
            }
            let (subjects, baselines) = medians.split_at(self.subjects.len());
            for (way, figures) in self.subjects.iter().zip(subjects) {
                for (baseline, others) in self.baselines.iter().zip(baselines) {
                    for (figure, other) in figures.iter().zip(others) {
                        let metric = format!("{}, {}: {}", self.name, way.name, figure.what);
                        let method = format!(
                            "{}; both pods on the same two cores; median of {ROUNDS} rounds of {} s in turn",
                            figure.method,
                            time.as_secs()
                        );
                        let row = Row::new(metric, figure.value, figure.unit, method);
                        rows.push(row.against(baseline.name, other.value));
                    }
                }
            }
        }
        Ok(rows)
    }
}

impl Measure {
    fn name(self) -> String {
        match self {
            Self::Tcp { streams, ipv6 } => {
                let (plural, family) = (if streams == 1 { "" } else { "s" }, if ipv6 { ", IPv6" } else { "" });
                format!("TCP, {streams} stream{plural}{family}")
            }
            Self::UdpPackets => "UDP, 64 bytes".to_owned(),
            Self::TcpTurns => "TCP, request and response".to_owned(),
            Self::UdpTurns => "UDP, request and response".to_owned(),
            Self::IcmpTurns => "ICMP echo".to_owned(),
            Self::Connections => "TCP connections".to_owned(),
        }
    }

    fn take(self, way: &Way<'_>, time: Duration) -> anyhow::Result<Vec<Figure>> {
        let figure = |value, unit, method| vec![Figure { what: self.name(), value, unit, method }];
        let latencies = |took: &[f64], method| {
            let percentile = |percent: usize| {
                let value = took.get((took.len() * percent / 100).min(took.len().saturating_sub(1)));
                let what = format!("{}, p{percent}", self.name());
                Figure { what, value: value.copied().unwrap_or(f64::NAN), unit: "µs", method }
            };
            vec![percentile(50), percentile(99)]
        };
        Ok(match self {
            Self::Tcp { streams, ipv6 } => figure(
                iperf::throughput(way, streams, ipv6, time)?,
                "Gbit/s",
                "iperf3, what the receiver got, all streams in one thread at either end",
            ),
            Self::UdpPackets => figure(
                load::udp_packets(way, time)? / 1e3,
                "1000/s",
                "one thread sends packets of 64 bytes one by one, another receives without ever sleeping; what arrives counts",
            ),
            Self::TcpTurns => latencies(
                &load::tcp_turns(way, time)?,
                "one byte to and fro over one connection, client and server block in read(2)",
            ),
            Self::UdpTurns => {
                latencies(&load::udp_turns(way, time)?, "one byte to and fro, client and server block in recvfrom(2)")
            }
            Self::IcmpTurns => latencies(&load::icmp_turns(way, time)?, "echo requests, each after the answer before"),
            Self::Connections => figure(
                per_second(load::connections(way, time)?.len(), time),
                "1/s",
                "connect, one byte each way, close, one connection after the other",
            ),
        })
    }
}

#[expect(clippy::cast_precision_loss, reason = "a count within a few seconds")]
fn per_second(count: usize, time: Duration) -> f64 {
    count as f64 / time.as_secs_f64()
}

/// Of each figure the median of its rounds.
fn medians(rounds: Vec<Vec<Figure>>) -> Vec<Figure> {
    let first = rounds.first().cloned().unwrap_or_default();
    let of = |(at, figure): (usize, Figure)| {
        let value = median(rounds.iter().filter_map(|round| Some(round.get(at)?.value)).collect());
        Figure { value, ..figure }
    };
    first.into_iter().enumerate().map(of).collect()
}
