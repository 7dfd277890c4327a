//! An API server that knows our kinds, and objects for it.

use std::time::Duration;

use basal_e2e::{
    servers::{ApiServer, ApiServerOptions},
    wait::until_ok,
};
use serde_json::{Value, json};

/// Starts an API server and creates the definitions; answers when all of them are served.
pub(crate) fn server() -> ApiServer {
    let server = ApiServer::start(ApiServerOptions::default()).expect("a real API server starts");
    for definition in basal_crds::crds() {
        server.apply(&definition.object).expect("the API server takes the definition");
    }
    for definition in basal_crds::crds() {
        let name = format!("crd/{}", definition.name());
        let wait = ["wait", "--for=condition=Established", "--timeout=60s", name.as_str()];
        server.kubectl().and_then(|run| run.args(wait).done()).expect("the definition is established");
        // Established comes a moment before the path is served.
        let list = || server.kubectl()?.args(["get", definition.plural]).done();
        let what = format!("the API server to serve {}", definition.plural);
        until_ok(&what, Duration::from_secs(60), list).expect("the kind is served");
    }
    server
}

/// Creates or replaces an object without kubectl's own validation; answers it as stored, or what the server said.
pub(crate) fn send(server: &ApiServer, verb: &str, object: &Value) -> Result<Value, String> {
    let run = server.kubectl().map(|run| run.args([verb, "--validate=false", "-o", "json", "-f", "-"]));
    run.and_then(|run| run.stdin(object.to_string()).json()).map_err(|error| error.to_string())
}

/// A CiliumNode.
pub(crate) fn node(name: &str, spec: Value) -> Value {
    json!({ "apiVersion": "cilium.io/v2", "kind": "CiliumNode", "metadata": { "name": name }, "spec": spec })
}

/// A CiliumEndpoint in the default namespace.
pub(crate) fn endpoint(name: &str, status: Value) -> Value {
    let metadata = json!({ "name": name, "namespace": "default" });
    json!({ "apiVersion": "cilium.io/v2", "kind": "CiliumEndpoint", "metadata": metadata, "status": status })
}

/// A CiliumPodIPPool.
pub(crate) fn pool(name: &str, spec: Value) -> Value {
    json!({ "apiVersion": "cilium.io/v2alpha1", "kind": "CiliumPodIPPool", "metadata": { "name": name }, "spec": spec })
}

/// A CiliumIdentity.
pub(crate) fn identity(name: &str) -> Value {
    json!({
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumIdentity",
        "metadata": { "name": name, "labels": { "io.kubernetes.pod.namespace": "bar" } },
        "security-labels": { "k8s:app": "baz" },
    })
}

/// A PodCIDRCell.
pub(crate) fn cell(name: &str, spec: Value) -> Value {
    let metadata = json!({ "name": name, "finalizers": ["basal.io/ledger"] });
    json!({ "apiVersion": "basal.io/v1alpha1", "kind": "PodCIDRCell", "metadata": metadata, "spec": spec })
}

/// A Ledger.
pub(crate) fn ledger(name: &str, spec: Value) -> Value {
    json!({ "apiVersion": "basal.io/v1alpha1", "kind": "Ledger", "metadata": { "name": name }, "spec": spec })
}
