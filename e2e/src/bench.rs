//! What benches are told and find out: settings by the environment, a table for people, and `target/bench/<name>.json`
//! for everything else.

use std::env;
use std::fs;
use std::io::{Write as _, stdout};
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;

use crate::say::say;

/// One figure, beside the figure that it is to be held against. Both come from the same run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// What was measured.
    pub metric: String,
    /// The figure.
    pub value: f64,
    /// Its unit.
    pub unit: &'static str,
    /// What it is held against; empty where there is nothing.
    pub baseline: String,
    /// The figure of the baseline, in the same unit.
    pub baseline_value: Option<f64>,
    /// The figure over the baseline's.
    pub ratio: Option<f64>,
    /// How both were measured.
    pub method: String,
}

impl Row {
    /// A figure that stands alone.
    pub fn new(metric: impl Into<String>, value: f64, unit: &'static str, method: impl Into<String>) -> Self {
        let (metric, method) = (metric.into(), method.into());
        Self { metric, value, unit, baseline: String::new(), baseline_value: None, ratio: None, method }
    }

    /// Holds the figure against another one.
    #[must_use]
    pub fn against(mut self, baseline: impl Into<String>, value: f64) -> Self {
        self.baseline = baseline.into();
        self.baseline_value = Some(value);
        self.ratio = (value != 0.0).then_some(self.value / value);
        self
    }
}

/// A setting that is given by the environment; make hands over empty ones, which count as not given.
#[must_use]
pub fn setting(name: &str) -> Option<String> {
    env::var(name).ok().filter(|text| !text.is_empty())
}

/// The middle one of some figures, or the mean of the two in the middle; of none, no number.
#[must_use]
pub fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    let low = figures.get(figures.len().saturating_sub(1) / 2);
    low.zip(figures.get(figures.len() / 2)).map_or(f64::NAN, |(low, high)| f64::midpoint(*low, *high))
}

/// Prints the table, writes the JSON, and says where that is.
pub fn publish(name: &str, rows: &[Row]) -> anyhow::Result<()> {
    stdout().write_all(table(rows).as_bytes())?;
    say(format!("written to {}", write(name, rows)?.display()));
    Ok(())
}

/// The folder of the results: `target/bench` of this checkout, wherever Cargo builds.
#[must_use]
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench")
}

/// Writes `target/bench/<name>.json` and answers its path.
pub fn write(name: &str, rows: &[Row]) -> anyhow::Result<PathBuf> {
    let path = folder().join(format!("{name}.json"));
    fs::create_dir_all(folder()).with_context(|| format!("creating {}", folder().display()))?;
    let text = serde_json::to_string_pretty(rows).context("figures that are no JSON")?;
    fs::write(&path, format!("{text}\n")).with_context(|| format!("writing {}", path.display()))?;
    Ok(path)
}

/// The rows as a table; methods stand in the JSON only.
#[must_use]
pub fn table(rows: &[Row]) -> String {
    let figure = |value: f64| if value.abs() < 10.0 { format!("{value:.3}") } else { format!("{value:.1}") };
    let optional = |value: Option<f64>| value.map(figure).unwrap_or_default();
    let head = ["metric", "value", "unit", "baseline", "baseline's value", "ratio"].map(String::from);
    let cells = rows.iter().map(|row| {
        let (value, baseline) = (figure(row.value), optional(row.baseline_value));
        [row.metric.clone(), value, row.unit.to_owned(), row.baseline.clone(), baseline, optional(row.ratio)]
    });
    let lines: Vec<[String; 6]> = std::iter::once(head).chain(cells).collect();
    let mut text = String::new();
    for line in &lines {
        let padded = line.iter().enumerate().map(|(column, cell)| {
            let width = lines.iter().map(|line| line[column].chars().count()).max().unwrap_or_default();
            format!("{cell:width$}")
        });
        text.push_str(padded.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{Row, median, table};

    #[test]
    fn a_median_lies_in_the_middle() {
        assert_eq!(median(vec![5.0, 1.0, 3.0]), 3.0);
        assert_eq!(median(vec![4.0, 1.0, 3.0, 9.0]), 3.5);
        assert!(median(Vec::new()).is_nan());
    }

    #[test]
    fn a_row_has_a_ratio_only_to_a_baseline_that_is_not_nothing() {
        let row = Row::new("wall time", 3.0, "s", "a stopwatch");
        assert_eq!(row.ratio, None);
        assert_eq!(row.clone().against("ceiling", 2.0).ratio, Some(1.5));
        assert_eq!(row.clone().against("ceiling", 0.0).ratio, None);
        let json = serde_json::to_value(&row).unwrap();
        let keys: Vec<&str> = json.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["metric", "value", "unit", "baseline", "baseline_value", "ratio", "method"]);
    }

    #[test]
    fn a_table_has_straight_columns() {
        let rows = [Row::new("wall time", 12.34, "s", ""), Row::new("w", 1.0, "s", "").against("c", 0.5)];
        let text = table(&rows);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[1], "wall time  12.3   s");
        assert_eq!(lines[2], "w          1.000  s     c         0.500             2.000");
    }
}
