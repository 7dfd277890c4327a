//! Counts of tests, read from what the runners print.

use std::{fmt, ops::AddAssign};

use anyhow::Context as _;

/// How many tests passed, failed and were skipped.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Totals {
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl Totals {
    /// From the root element of nextest's JUnit report.
    pub(crate) fn of_junit(xml: &str) -> anyhow::Result<Self> {
        let root = xml.split_once("<testsuites ").and_then(|(_, rest)| rest.split_once('>'));
        let (root, _) = root.context("the JUnit report has no <testsuites> element")?;
        let count = |name: &str| -> anyhow::Result<u64> {
            let value = root.split_once(&format!(" {name}=\"")).and_then(|(_, rest)| rest.split_once('"'));
            let (value, _) = value.with_context(|| format!("the JUnit report has no attribute {name}"))?;
            Ok(value.parse()?)
        };
        let failed = count("failures")? + count("errors")?;
        Ok(Self { passed: count("tests")?.saturating_sub(failed), failed, skipped: 0 })
    }

    /// From a line of libtest, `test result: ok. 3 passed; 0 failed; 1 ignored; …`; zero for any other line.
    pub(crate) fn of_libtest_line(line: &str) -> Self {
        let Some((_, counts)) = line.split_once("test result: ") else { return Self::default() };
        let mut totals = Self::default();
        let words: Vec<&str> = counts.split([' ', ';', '.']).filter(|word| !word.is_empty()).collect();
        for pair in words.windows(2) {
            let Ok(n) = pair[0].parse::<u64>() else { continue };
            match pair[1] {
                "passed" => totals.passed = n,
                "failed" => totals.failed = n,
                "ignored" => totals.skipped = n,
                _ => {}
            }
        }
        totals
    }
}

impl AddAssign for Totals {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn junit_root_is_summed() {
        let xml =
            r#"<?xml version="1.0"?><testsuites name="nextest-run" tests="7" failures="2" errors="1" uuid="x"><a/>"#;
        assert_eq!(Totals::of_junit(xml).unwrap(), Totals { passed: 4, failed: 3, skipped: 0 });
        assert!(Totals::of_junit("<other/>").is_err());
    }

    #[test]
    fn libtest_lines_are_summed() {
        let mut totals = Totals::default();
        totals += Totals::of_libtest_line("test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out");
        totals += Totals::of_libtest_line("test result: FAILED. 1 passed; 2 failed; 0 ignored; finished in 0.1s");
        totals += Totals::of_libtest_line("running 5 tests");
        assert_eq!(totals.to_string(), "4 passed, 2 failed, 1 skipped");
    }
}
