//! The files of the agent's journal.

use basal_agent::journal::codec;
use basal_cni::api::sha256_hex;

pub(crate) fn record(input: &[u8]) {
    read(input);
    // Nearly every change of a file breaks its checksum, so the body is tried with one that fits too.
    let body = std::str::from_utf8(input).ok().and_then(|text| text.split_once('\n'));
    if let Some((_, body)) = body {
        let body = body.strip_suffix('\n').unwrap_or(body);
        read(format!("basal-endpoint {} {}\n{body}\n", codec::VERSION, sha256_hex(body.as_bytes())).as_bytes());
    }
}

fn read(text: &[u8]) {
    match codec::decode(text) {
        Ok(record) => {
            let text = codec::encode(&record).expect("what was read can be written");
            assert_eq!(codec::decode(text.as_bytes()), Ok(record));
        }
        Err(unusable) => super::explained(&unusable),
    }
}
