//! The value forms that Cilium's keys have and clap has not.

use std::{collections::BTreeMap, fmt, str::FromStr, time::Duration};

/// Reads a boolean as Go's `strconv.ParseBool` does.
///
/// # Errors
/// Any other text.
pub fn go_bool(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        other => Err(format!("{other:?} is neither true nor false")),
    }
}

/// A duration in Go's text form: numbers with a unit each (`ns`, `us`, `µs`, `ms`, `s`, `m`, `h`), `2m30s` or `1.5h`;
/// `0` needs no unit. Negative ones are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct GoDuration(pub Duration);

/// The text is no duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no duration; write it like 300ms, 15m or 2m30s")]
pub struct GoDurationError(String);

/// Units with their nanoseconds; those that another one ends with come before it.
const UNITS: [(&str, u128); 8] = [
    ("ns", 1),
    ("us", 1_000),
    ("µs", 1_000),
    ("μs", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

impl FromStr for GoDuration {
    type Err = GoDurationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || GoDurationError(text.to_owned());
        if text == "0" {
            return Ok(Self::default());
        }
        let mut rest = text;
        let mut nanos: u128 = 0;
        while !rest.is_empty() {
            let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(error)?;
            let (number, tail) = rest.split_at(end);
            let unit_end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
            let (unit, tail) = tail.split_at(unit_end);
            let (_, size) = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(error)?;
            nanos = part(number, *size).and_then(|part| nanos.checked_add(part)).ok_or_else(error)?;
            rest = tail;
        }
        match u64::try_from(nanos) {
            Ok(nanos) if !text.is_empty() => Ok(Self(Duration::from_nanos(nanos))),
            _ => Err(error()),
        }
    }
}

/// A decimal number of units, in nanoseconds, rounded down.
fn part(number: &str, size: u128) -> Option<u128> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let digits = |text: &str| if text.is_empty() { Some(0) } else { text.parse::<u128>().ok() };
    // Digits beyond the fifteenth are below a nanosecond for every unit.
    let fraction = fraction.get(..fraction.len().min(15))?;
    let scale = 10_u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    digits(whole)?.checked_mul(size)?.checked_add(digits(fraction)?.checked_mul(size)? / scale)
}

impl fmt::Display for GoDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut nanos = self.0.as_nanos();
        if nanos == 0 {
            return f.write_str("0s");
        }
        for (unit, size) in [("h", UNITS[7].1), ("m", UNITS[6].1), ("s", UNITS[5].1), ("ms", UNITS[4].1), ("us", 1_000)]
        {
            if nanos >= size {
                write!(f, "{}{unit}", nanos / size)?;
                nanos %= size;
            }
        }
        if nanos > 0 { write!(f, "{nanos}ns") } else { Ok(()) }
    }
}

/// A map of texts, written as a JSON object or as `key=value,key=value`, where a value may itself contain commas: a
/// piece without `=` goes on with the value before it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StringMap(pub BTreeMap<String, String>);

/// The text is no map.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StringMapError {
    /// It begins like a JSON object and is none of texts.
    #[error("not a JSON object of texts: {0}")]
    Json(String),
    /// It has no key.
    #[error("{0:?} is not written as key=value,key=value")]
    Pair(String),
}

impl StringMap {
    /// The value of a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }
}

impl FromStr for StringMap {
    type Err = StringMapError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        if text.starts_with(['{', '[']) {
            return serde_json::from_str(text).map(Self).map_err(|error| StringMapError::Json(error.to_string()));
        }
        let mut pairs: Vec<(String, String)> = Vec::new();
        for piece in text.split(',').filter(|_| !text.is_empty()) {
            match (piece.split_once('='), pairs.last_mut()) {
                (Some((key, _)), _) if key.trim().is_empty() => return Err(StringMapError::Pair(text.to_owned())),
                (Some((key, value)), _) => pairs.push((key.trim().to_owned(), value.trim().to_owned())),
                (None, Some((_, value))) => {
                    value.push(',');
                    value.push_str(piece.trim());
                }
                (None, None) => return Err(StringMapError::Pair(text.to_owned())),
            }
        }
        Ok(Self(pairs.into_iter().collect()))
    }
}

impl fmt::Display for StringMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pairs: Vec<String> = self.0.iter().map(|(key, value)| format!("{key}={value}")).collect();
        f.write_str(&pairs.join(","))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durations_of_go() {
        let millis = |text: &str| text.parse::<GoDuration>().map(|d| d.0.as_millis());
        assert_eq!(millis("15m"), Ok(900_000));
        assert_eq!(millis("2m30s"), Ok(150_000));
        assert_eq!(millis("1.5h"), Ok(5_400_000));
        assert_eq!(millis("300ms"), Ok(300));
        assert_eq!(millis(".5s"), Ok(500));
        assert_eq!(millis("0"), Ok(0));
        assert_eq!("1µs".parse(), Ok(GoDuration(Duration::from_micros(1))));
        for text in ["", "15", "m", "-5s", "5 s", "5x", ".s", "1.2.3s", "99999999999h"] {
            assert_eq!(text.parse::<GoDuration>(), Err(GoDurationError(text.to_owned())), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_duration_reads_back_as_it_is_written(nanos in 0..u64::MAX) {
            let duration = GoDuration(Duration::from_nanos(nanos));
            prop_assert_eq!(duration.to_string().parse(), Ok(duration));
        }

        #[test]
        fn no_text_makes_a_parser_panic(text in "\\PC{0,20}") {
            text.parse::<GoDuration>().map(drop).unwrap_or_default();
            text.parse::<StringMap>().map(drop).unwrap_or_default();
        }
    }

    #[test]
    fn maps_as_json_and_as_pairs() {
        let map = |text: &str| text.parse::<StringMap>().map(|map| map.0.into_iter().collect::<Vec<_>>());
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        assert_eq!(map(""), Ok(vec![]));
        assert_eq!(map(r#"{"etcd.config": "/a/b"}"#), Ok(vec![pair("etcd.config", "/a/b")]));
        assert_eq!(map("a=1, b=2"), Ok(vec![pair("a", "1"), pair("b", "2")]));
        assert_eq!(map("c6=4,15,15,m4=2"), Ok(vec![pair("c6", "4,15,15"), pair("m4", "2")]));
        assert_eq!(map("a"), Err(StringMapError::Pair("a".into())));
        assert!(matches!(map("{"), Err(StringMapError::Json(_))));
    }
}
