//! Objects as the API server, or whoever wrote them there, may have them.

use basal_agent::pods::{PodInfo, namespace_labels};
use basal_crds::resources::{CiliumEndpoint, CiliumIdentity, CiliumNode, Ledger, PodCidrCell};
use basal_objects::{ledger::read_cell, object::Object};
use basal_operator::node::{CiliumNodeFacts, Facts as _, NodeFacts};
use serde_json::Value;

pub(crate) fn object(input: &[u8]) {
    let Ok(value) = serde_json::from_slice::<Value>(input) else { return };
    let object = Object(value);
    said(NodeFacts::parse(&object));
    said(PodInfo::parse(&object));
    said(namespace_labels(&object));
    if let Ok(facts) = CiliumNodeFacts::parse(&object) {
        assert_eq!(facts.uid, object.uid());
        assert_eq!(facts.resource_version, object.resource_version());
    }
    if let Some(cell) = read_cell("default", &object) {
        match cell {
            Ok(cell) => assert!(cell.blocks().keys().all(|block| cell.id().prefix().contains(block))),
            Err(error) => super::explained(&error),
        }
    }
    // What a type has read, it writes so that it reads the same.
    macro_rules! again {
        ($($kind:ty),*) => {
            $(if let Ok(typed) = object.parse::<$kind>() {
                let written = serde_json::to_value(&typed).expect("what was read can be written");
                assert_eq!(Object(written).parse::<$kind>().ok(), Some(typed), stringify!($kind));
            })*
        };
    }
    again!(CiliumNode, CiliumEndpoint, CiliumIdentity, Ledger, PodCidrCell);
}

fn said<T>(parsed: Result<T, String>) {
    if let Err(error) = parsed {
        super::explained(&error);
    }
}
