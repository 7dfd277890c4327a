//! How schedules are written down.

/// A time as `60s` or `700ms`.
pub(crate) mod time {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(crate) fn serialize<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        let whole = time.subsec_nanos() == 0;
        let text = if whole { format!("{}s", time.as_secs()) } else { format!("{}ms", time.as_millis()) };
        serializer.serialize_str(&text)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bad = || D::Error::custom(format!("{text:?} is no time like 60s or 700ms"));
        let number = |digits: &str| digits.parse::<u64>().ok();
        let millis = text.strip_suffix("ms").and_then(number).map(Duration::from_millis);
        let seconds = || text.strip_suffix('s').and_then(number).map(Duration::from_secs);
        millis.or_else(seconds).ok_or_else(bad)
    }
}
