//! No input makes the plugin panic, and every refusal is an error in the form of the specification.

use std::ffi::OsString;

use basal_cni::plugin;
use proptest::prelude::*;
use serde_json::Value;

use crate::agent::plugin as executable;

fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[a-z0-9./:-]{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        let names = prop_oneof![Just("ips"), Just("address"), Just("containerID"), Just("ifname"), Just("mac")];
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::btree_map(names, inner, 0..4)
                .prop_map(|fields| Value::from_iter(fields.into_iter().map(|(k, v)| (k.to_owned(), v)))),
        ]
    })
}

/// A configuration whose fields are of any type.
fn conf() -> impl Strategy<Value = String> {
    proptest::collection::vec(conf_field(), 0..8).prop_map(|fields| Value::from_iter(fields).to_string())
}

fn conf_field() -> impl Strategy<Value = (String, Value)> {
    let field = |name: &'static str| json_value().prop_map(move |value| (name.to_owned(), value));
    prop_oneof![
        prop_oneof![Just("1.1.0"), Just("1.0.0"), Just("0.3.1")].prop_map(|v| ("cniVersion".into(), Value::from(v))),
        Just(("name".to_owned(), Value::from("cilium"))),
        field("cniVersion"),
        field("prevResult"),
        field("runtimeConfig"),
        field("cni.dev/valid-attachments"),
        field("add-timeout"),
    ]
}

/// The commands whose parameters are checked; a well-formed call would wait for an agent, so the interface's name is
/// one that no call passes with.
fn call(command: &str, input: &[u8]) -> plugin::Reply {
    let command = OsString::from(command);
    plugin::run(
        &|name| match name {
            "CNI_COMMAND" => Some(command.clone()),
            "CNI_CONTAINERID" => Some("c1".into()),
            "CNI_IFNAME" => Some("no/name".into()),
            _ => None,
        },
        &mut &input[..],
    )
}

fn check_refusal(reply: &plugin::Reply) -> Result<(), TestCaseError> {
    prop_assert!(!reply.success);
    let body: Value = serde_json::from_str(&reply.body).unwrap();
    prop_assert!(matches!(body["code"].as_u64(), Some(1..=7)), "{}", reply.body);
    prop_assert!(!body["msg"].as_str().unwrap().is_empty());
    prop_assert!(body["cniVersion"].is_string());
    Ok(())
}

proptest! {
    #[test]
    fn any_bytes(input in proptest::collection::vec(any::<u8>(), 0..200)) {
        for command in ["ADD", "DEL", "CHECK", "STATUS", "GC"] {
            check_refusal(&call(command, &input))?;
        }
        prop_assert!(call("VERSION", &input).success);
    }

    #[test]
    fn any_fields(input in conf(), command in prop_oneof![Just("ADD"), Just("DEL"), Just("CHECK")]) {
        check_refusal(&call(command, input.as_bytes()))?;
    }
}

#[test]
fn the_executable_refuses_garbage_too() {
    let outcome = executable("ADD", "\u{0}{{");
    assert!(!outcome.success);
    assert_eq!(outcome.body["code"], 6);
}
