//! Hardware addresses.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A 48-bit hardware address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr(pub [u8; 6]);

/// A text that is no hardware address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no hardware address; six pairs of hexadecimal digits with colons are wanted")]
pub struct MacError(String);

impl MacAddr {
    /// A locally administered unicast address from random bits (IEEE 802: bit 1 of the first octet set, bit 0 clear).
    #[must_use]
    pub fn from_random(random: u64) -> Self {
        let [a, b, c, d, e, f, ..] = random.to_le_bytes();
        Self([(a | 0x02) & 0xfe, b, c, d, e, f])
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(out, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

impl FromStr for MacAddr {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let wrong = || MacError(text.to_owned());
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().filter(|part| part.len() == 2 && !part.starts_with('+')).ok_or_else(wrong)?;
            *octet = u8::from_str_radix(part, 16).map_err(|_not_hexadecimal| wrong())?;
        }
        if parts.next().is_some() { Err(wrong()) } else { Ok(Self(octets)) }
    }
}

impl TryFrom<String> for MacAddr {
    type Error = MacError;

    fn try_from(text: String) -> Result<Self, MacError> {
        text.parse()
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn texts_are_read_back(random: u64) {
            let mac = MacAddr::from_random(random);
            prop_assert_eq!(mac.0[0] & 3, 2);
            prop_assert_eq!(mac.to_string().parse(), Ok(mac));
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for bad in ["", "02:00", "02:00:00:00:00:0g", "02:00:00:00:00:00:00", "2:0:0:0:0:0", "+2:00:00:00:00:00"] {
            assert_eq!(bad.parse::<MacAddr>(), Err(MacError(bad.to_owned())));
        }
    }
}
