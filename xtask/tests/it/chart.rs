//! The chart, rendered.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use basal_e2e::{command::Run, parts};
use serde_json::{Value, json};

/// The chart of this checkout.
pub(crate) fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/basal")
}

/// The least that a user has to set to keep records in etcd. Without etcd it is nothing.
pub(crate) fn with_etcd() -> Value {
    json!({ "etcd": { "enabled": true, "endpoints": ["https://etcd.example:2379"] } })
}

/// What a command of helm prints for the chart with values.
pub(crate) fn helm(arguments: &[&str], values: &Value) -> anyhow::Result<String> {
    let run = Run::new(parts::binary("helm")?).args(arguments).arg(folder());
    run.args(["--kube-version=1.35.4", "--values=-"]).stdin(values.to_string()).text()
}

/// The objects that the chart makes with values, without its CustomResourceDefinitions.
pub(crate) fn objects(values: &Value) -> anyhow::Result<Vec<Value>> {
    let text = helm(&["template", "basal", "--namespace=kube-system"], values)?;
    let documents = serde_saphyr::from_multiple::<Value>(&text).context("the chart's YAML does not parse")?;
    Ok(documents.into_iter().filter(|document| !document.is_null()).collect())
}

/// The object of a kind, which the chart makes one of.
pub(crate) fn only(objects: &[Value], kind: &str) -> Value {
    let mut of_kind = objects.iter().filter(|object| object["kind"] == kind);
    let object = of_kind.next().cloned().unwrap_or_default();
    assert!(object.is_object() && of_kind.next().is_none(), "one {kind} is wanted");
    object
}
