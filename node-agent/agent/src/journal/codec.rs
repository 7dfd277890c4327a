//! A record as text: a first line with name, version and checksum of what follows; then JSON.

use basal_cni::api::sha256_hex;

use super::{Entry, Unusable};
use crate::endpoint::record::EndpointRecord;

/// The version that is written. It is raised when an older agent could misunderstand a record.
pub const VERSION: u32 = 1;

const NAME: &str = "basal-endpoint";

/// Writes a record.
///
/// # Errors
/// It cannot be put into JSON.
pub fn encode(record: &EndpointRecord) -> Result<String, serde_json::Error> {
    let body = serde_json::to_string(record)?;
    Ok(format!("{NAME} {VERSION} {}\n{body}\n", sha256_hex(body.as_bytes())))
}

/// Reads a record.
///
/// # Errors
/// See [`Unusable`].
pub fn decode(text: &[u8]) -> Entry {
    let unreadable = |why: &str| Unusable::Unreadable(why.to_owned());
    let text = std::str::from_utf8(text).map_err(|error| Unusable::Unreadable(error.to_string()))?;
    let (head, body) = text.split_once('\n').ok_or_else(|| unreadable("it has no first line"))?;
    let mut words = head.split(' ');
    if words.next() != Some(NAME) {
        return Err(unreadable("its first line does not name the record of an endpoint"));
    }
    let version =
        words.next().and_then(|word| word.parse::<u32>().ok()).ok_or_else(|| unreadable("it has no version"))?;
    if version > VERSION {
        return Err(Unusable::Newer { found: version, known: VERSION });
    }
    let body = body.strip_suffix('\n').ok_or(Unusable::Checksum)?;
    if words.next() != Some(sha256_hex(body.as_bytes()).as_str()) {
        return Err(Unusable::Checksum);
    }
    serde_json::from_str(body).map_err(|error| Unusable::Unreadable(error.to_string()))
}

#[cfg(test)]
mod tests {
    use basal_cni::api::{Attachment, PodRef};
    use basal_crds::identity::IdentityId;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        endpoint::record::{Addresses, EndpointId, Phase},
        mac::MacAddr,
    };

    fn record() -> EndpointRecord {
        EndpointRecord {
            id: EndpointId::new(7).unwrap(),
            attachment: Attachment { container_id: "c1".into(), ifname: "eth0".into() },
            pod: Some(PodRef { namespace: "ns".into(), name: "p".into(), uid: Some("u".into()) }),
            netns: "/run/netns/c1".into(),
            addresses: Addresses { v4: "10.0.1.5".parse().ok(), v6: None },
            mac: MacAddr([2, 0, 0, 0, 0, 1]),
            host_mac: MacAddr([2, 0, 0, 0, 0, 2]),
            identity: IdentityId::INIT,
            labels: "reserved:init=;".into(),
            phase: Phase::Adding,
            boot_id: "b".into(),
        }
    }

    #[test]
    fn a_newer_version_is_named_before_anything_else_is_read() {
        assert_eq!(decode(b"basal-endpoint 2 x\n{}\n"), Err(Unusable::Newer { found: 2, known: 1 }));
    }

    #[test]
    fn an_endpoint_id_out_of_range_does_not_pass() {
        let text = encode(&record()).unwrap();
        let body = text.lines().nth(1).unwrap().replace("\"id\":7", "\"id\":4096");
        let forged = format!("basal-endpoint 1 {}\n{body}\n", sha256_hex(body.as_bytes()));
        let error = decode(forged.as_bytes()).unwrap_err().to_string();
        assert!(error.contains("4096 is no endpoint id"), "{error}");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_and_nothing_shorter(cut in 0_usize..10_000) {
            let text = encode(&record()).unwrap();
            prop_assert_eq!(decode(text.as_bytes()), Ok(record()));
            let cut = cut % text.len();
            prop_assert!(decode(&text.as_bytes()[..cut]).is_err());
        }

        #[test]
        fn a_changed_byte_is_noticed(at in 0_usize..10_000, to: u8) {
            let mut text = encode(&record()).unwrap().into_bytes();
            let at = at % text.len();
            prop_assume!(text[at] != to);
            text[at] = to;
            prop_assert!(decode(&text).is_err());
        }

        #[test]
        fn garbage_is_an_entry(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            prop_assert!(decode(&bytes).is_err());
        }
    }
}
