//! A cluster of two servers and no operator, in which the test plays everybody.

use std::{fs, path::PathBuf, process::Command, time::Duration};

use basal_crds::{
    address::{AddressType, NodeAddress},
    identity::IdentityId,
    kvstore::{IpRecord, IpTarget, NodeRecord, keys},
    names::{ClusterId, ClusterName},
    resources::crds,
};
use basal_e2e::{
    command::Run,
    process::Process,
    servers::{ApiServer, ApiServerOptions, Etcd, EtcdOptions},
    wait,
};
use basal_ipam::{
    cell::{Block, BlockState, Cell, CellId},
    names::{NodeName, NodeUid, TermId},
};
use basal_kvstore::ledger::LedgerKeys;
use basal_objects::ledger::new_cell;
use serde_json::{Map, Value, json};

/// How long anything may take before a test says what it waited for.
const LIMIT: Duration = Duration::from_secs(60);

pub(crate) struct Stage {
    pub(crate) etcd: Etcd,
    pub(crate) server: ApiServer,
}

/// What a check said.
pub(crate) struct Said {
    pub(crate) code: Option<i32>,
    pub(crate) findings: Vec<Value>,
    pub(crate) stderr: String,
}

impl Said {
    pub(crate) fn reasons(&self) -> Vec<&str> {
        self.findings.iter().map(|finding| finding["reason"].as_str().unwrap()).collect()
    }
}

impl Stage {
    pub(crate) fn new() -> Self {
        let etcd = Etcd::start(EtcdOptions::default()).unwrap();
        let server = ApiServer::start(ApiServerOptions::default()).unwrap();
        for definition in crds() {
            server.apply(&definition.object).unwrap();
        }
        let stage = Self { etcd, server };
        wait::until_ok("the kinds to be served", LIMIT, || {
            stage.server.kubectl()?.args(["get", "ciliumnodes,ciliumendpoints", "-A"]).done()
        })
        .unwrap();
        stage
    }

    /// Node n1 with a block, as everybody says.
    pub(crate) fn with_a_served_node() -> Self {
        let stage = Self::new();
        stage.node("n1");
        stage.cell(&[("10.0.0.0/24", "n1", BlockState::Granted)]);
        stage.spec("n1", &["10.0.0.0/24"]);
        stage.record("n1", "10.0.0.0/24");
        stage
    }

    pub(crate) fn put(&self, key: &str, value: &str) {
        self.etcd.etcdctl(&["put", key, value]).unwrap();
    }

    pub(crate) fn delete(&self, key: &str) {
        self.etcd.etcdctl(&["del", key]).unwrap();
    }

    pub(crate) fn node(&self, name: &str) {
        self.server.apply(&json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})).unwrap();
    }

    pub(crate) fn spec(&self, name: &str, cidrs: &[&str]) {
        let object = json!({
            "apiVersion": "cilium.io/v2", "kind": "CiliumNode", "metadata": {"name": name},
            "spec": {"ipam": {"podCIDRs": cidrs}},
        });
        self.server.apply(&object).unwrap();
    }

    pub(crate) fn kubectl(&self, args: &[&str]) -> String {
        self.server.kubectl().unwrap().args(args).text().unwrap()
    }

    /// The cell 10.0.0.0/16 with these blocks; each is that of the Node of its node's name, if there is one.
    fn cell_of(&self, blocks: &[(&str, &str, BlockState)]) -> Cell {
        let mut cell = Cell::new(cell_id(), "10.0.0.0/16".parse().unwrap(), 24).unwrap();
        for (at, node, state) in blocks {
            let uid = self.kubectl(&["get", "node", node, "--ignore-not-found", "-o", "jsonpath={.metadata.uid}"]);
            let node = NodeName::new(node).unwrap();
            let block = Block { state: *state, node, uid: NodeUid::new(&uid).ok() };
            cell.set(at.parse().unwrap(), block).unwrap();
        }
        cell
    }

    /// Puts the cell with these blocks into etcd.
    pub(crate) fn cell(&self, blocks: &[(&str, &str, BlockState)]) {
        let text = String::from_utf8(self.cell_of(blocks).to_json().unwrap()).unwrap();
        self.put(&LedgerKeys::new("default").cell(cell_id()), &text);
    }

    /// The Ledger with this store as the active one, which lists the cell.
    pub(crate) fn ledger_object(&self, store: &str) {
        let object = json!({
            "apiVersion": "basal.io/v1alpha1", "kind": "Ledger", "metadata": {"name": "default"},
            "spec": {"store": store, "term": "term", "cells": [cell_id().to_string()]},
        });
        self.server.apply(&object).unwrap();
    }

    /// Makes the cell with these blocks a PodCIDRCell.
    pub(crate) fn cell_object(&self, blocks: &[(&str, &str, BlockState)]) {
        let term = TermId::from_random(1, 1);
        self.server.apply(&new_cell("default", &term, &self.cell_of(blocks)).0).unwrap();
    }

    /// Deletes it as nobody should: without its finalizer.
    pub(crate) fn remove_cell_object(&self) {
        let name = self.kubectl(&["get", "podcidrcells", "-o", "jsonpath={.items[0].metadata.name}"]);
        let free = r#"{"metadata":{"finalizers":null}}"#;
        self.kubectl(&["patch", "podcidrcell", &name, "--type=merge", "-p", free]);
        self.kubectl(&["delete", "podcidrcell", &name]);
    }

    /// Writes which blocks the operator confirms.
    pub(crate) fn confirm(&self, name: &str, cidrs: &[&str]) {
        let uses: Map<String, Value> =
            cidrs.iter().map(|cidr| ((*cidr).to_owned(), json!({"status": "in-use"}))).collect();
        let status = json!([{"op": "add", "path": "/status", "value": {"ipam": {"pod-cidrs": uses}}}]).to_string();
        self.kubectl(&["patch", "ciliumnode", name, "--subresource=status", "--type=json", "-p", &status]);
    }

    pub(crate) fn record(&self, node: &str, cidr: &str) {
        let (cluster, name) = (ClusterName::new("default").unwrap(), NodeName::new(node).unwrap());
        let mut record = NodeRecord::new(name.clone(), cluster.clone(), ClusterId::default());
        record.ipv4_cidrs = vec![cidr.parse().unwrap()];
        record.addresses = vec![NodeAddress { kind: AddressType::InternalIp, ip: "192.0.2.1".parse().unwrap() }];
        self.put(&keys::node(&cluster, &name), &record.to_json());
    }

    pub(crate) fn ip(&self, address: &str, host: &str) {
        let target = IpTarget::Host(address.parse().unwrap());
        let record = IpRecord::new(target, host.parse().unwrap(), IdentityId::new(1000));
        self.put(&keys::ip(target), &record.to_json());
    }

    /// The arguments of a check, and these; of a key that both have, these count.
    fn arguments(&self, args: &[&str]) -> Vec<String> {
        let key = |arg: &str| arg.split('=').next().unwrap_or_default().to_owned();
        let mut all = self.own_arguments();
        all.retain(|own| !args.iter().any(|arg| key(arg) == key(own)));
        all.extend(args.iter().map(|arg| (*arg).to_owned()));
        all
    }

    fn own_arguments(&self) -> Vec<String> {
        let config = self.etcd.client_config("operator").unwrap();
        let kubeconfig = self.server.kubeconfig("admin").unwrap();
        vec![
            "ipam".into(),
            "check".into(),
            "--kvstore=etcd".to_owned(),
            format!("--kvstore-opt=etcd.config={}", config.display()),
            format!("--k8s-kubeconfig-path={}", kubeconfig.display()),
            "--cluster-pool-ipv4-cidr=10.0.0.0/16".into(),
            "--enable-ipv6=false".into(),
            "--cluster-pool-quarantine=15s".into(),
            "--pause=200ms".into(),
        ]
    }

    /// Runs `basal ipam check` with these arguments more.
    pub(crate) fn check(&self, args: &[&str]) -> Said {
        let run = Run::new(binary()).args(self.arguments(args)).arg("--output=json");
        said(run)
    }

    /// The same as text.
    pub(crate) fn table(&self) -> String {
        let output = Run::new(binary()).args(self.arguments(&[])).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    /// Starts `basal ipam check --watch`.
    pub(crate) fn watch(&self, args: &[&str]) -> Watch {
        let log = self.etcd.dir().join("watch.log");
        let mut command = Command::new(binary());
        command.args(self.arguments(args)).args(["--output=json", "--watch"]);
        let watch = Watch { process: Process::start("basal", command, &log).unwrap(), log };
        watch.until("following");
        watch
    }
}

fn cell_id() -> CellId {
    CellId::new("10.0.0.0/16".parse().unwrap())
}

pub(crate) fn binary() -> &'static str {
    env!("CARGO_BIN_EXE_basal")
}

pub(crate) fn said(run: Run) -> Said {
    let output = run.output().unwrap();
    let findings = serde_json::from_slice(&output.stdout).unwrap_or_default();
    Said { code: output.status.code(), findings, stderr: String::from_utf8(output.stderr).unwrap() }
}

/// A running watch.
pub(crate) struct Watch {
    process: Process,
    log: PathBuf,
}

impl Watch {
    pub(crate) fn text(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Waits for words in what it prints.
    pub(crate) fn until(&self, words: &str) {
        let what = format!("the watch to say {words:?}");
        wait::until_ok(&what, LIMIT, || {
            let text = self.text();
            anyhow::ensure!(text.contains(words), "it said:\n{text}");
            Ok(())
        })
        .unwrap();
    }

    /// Ends it by a signal; answers its exit code and the reasons of its findings.
    pub(crate) fn end(self) -> (Option<i32>, Vec<String>) {
        let Self { process, log } = self;
        let status = process.stop(LIMIT).unwrap();
        let text = fs::read_to_string(log).unwrap();
        let findings = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        (status.code(), findings.map(|finding| finding["reason"].as_str().unwrap().to_owned()).collect())
    }
}
