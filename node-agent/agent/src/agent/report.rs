//! What the agent tells the command line about itself.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use basal_cni::api::{
    AddressUse, AgentError, Answer, BlockReport, Component, ComponentState, EndpointReport, IdentityReport, IpamReport,
    NodeReport, Request, StatusReport,
};
use basal_crds::{
    address::{AddressType, NodeAddress},
    labels::Labels,
};
use basal_runtime::{readiness::Readiness, sync::lock};
use tokio::sync::watch;

use super::pump::KnownIdentities;
use crate::{
    config::Settings,
    endpoint::Endpoints,
    node::{facts::Underlay, watch::ClaimReport},
    policy::Policies,
    server::Reports,
    sync::{Datapath, SyncReport},
};

/// What reports are made of.
pub struct AgentReports {
    /// The configuration.
    pub settings: Settings,
    /// What readiness waits for.
    pub readiness: Readiness,
    /// The endpoints.
    pub endpoints: Endpoints,
    /// The datapath.
    pub datapath: Datapath,
    /// Its report.
    pub sync: watch::Receiver<SyncReport>,
    /// The claim.
    pub claim: watch::Receiver<ClaimReport>,
    /// The last look at etcd.
    pub kvstore: Arc<Mutex<Component>>,
    /// The last answer of the API server.
    pub kubernetes: Arc<Mutex<Component>>,
    /// The identities.
    pub identities: KnownIdentities,
    /// The policies.
    pub policies: Policies,
    /// This node, without its addresses.
    pub node: NodeReport,
    /// Its addresses.
    pub underlay: watch::Receiver<Underlay>,
}

#[async_trait]
impl Reports for AgentReports {
    async fn report(&self, request: &Request) -> Answer {
        match request {
            Request::Status => Answer::Status(Box::new(self.status().await)),
            Request::Nodes => Answer::Nodes(self.nodes().await),
            Request::Endpoints => Answer::Endpoints(self.endpoints()),
            Request::Identities => Answer::Identities(self.identities()),
            Request::Ipam => Answer::Ipam(self.ipam()),
            other => Answer::Error(AgentError::Failed { message: format!("{other:?} is no question for a report") }),
        }
    }

    fn not_ready(&self) -> Option<String> {
        let pending = self.readiness.pending();
        let texts: Vec<_> = pending.iter().map(|pending| format!("{}: {}", pending.name, pending.reason)).collect();
        (!texts.is_empty()).then(|| texts.join("; "))
    }
}

fn texts(labels: &Labels) -> Vec<String> {
    labels.iter().map(ToString::to_string).collect()
}

fn of_kind(addresses: &[NodeAddress], wanted: &AddressType) -> Vec<std::net::IpAddr> {
    addresses.iter().filter(|address| address.kind == *wanted).map(|address| address.ip).collect()
}

impl AgentReports {
    async fn status(&self) -> StatusReport {
        let looked = self.datapath.look(|view| (view.nodes().len(), view.local().mtu_problem())).await;
        let (remote_nodes, mtu_problem) = looked.unwrap_or_default();
        let (endpoints, endpoints_ready) = self.endpoints.read(|state| {
            let ready = state.iter().filter(|(_, slot)| slot.state_text() == "ready").count();
            (state.iter().count(), ready)
        });
        let sync = self.sync.borrow().clone();
        let cilium = match self.not_ready() {
            None => Component::new(ComponentState::Ok, concat!("basal ", env!("CARGO_PKG_VERSION"))),
            Some(pending) => Component::new(ComponentState::Failure, pending),
        };
        let policy = match self.policies.status() {
            Some(status) => Component::new(ComponentState::Warning, status),
            None => Component::new(ComponentState::Disabled, "no policies"),
        };
        let conflist = &self.settings.cni.write_cni_conf_when_ready;
        let cni_file = if conflist.exists() {
            Component::new(
                ComponentState::Ok,
                format!("successfully wrote CNI configuration file to {}", conflist.display()),
            )
        } else {
            Component::new(ComponentState::Failure, format!("{} is not written", conflist.display()))
        };
        let on = |enabled: bool| if enabled { "Enabled" } else { "Disabled" };
        let keys = &self.settings.datapath;
        StatusReport {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: self.settings.node.to_string(),
            cluster: self.settings.cluster.name().to_string(),
            kvstore: lock(&self.kvstore).clone(),
            kubernetes: lock(&self.kubernetes).clone(),
            cilium,
            cni_file,
            datapath: datapath(&sync, self.settings.bpf_masquerade.is_some(), mtu_problem),
            policy,
            routing: if self.settings.routing.tunnel().is_some() { "Tunnel [vxlan]" } else { "Native" }.to_owned(),
            masquerading: format!(
                "{} [IPv4: {}, IPv6: {}]",
                if self.settings.bpf_masquerade.is_some() { sync.masquerading() } else { "nftables".to_owned() },
                on(keys.masquerade.enable_ipv4_masquerade),
                on(keys.masquerade.enable_ipv6_masquerade)
            ),
            host_routing: if keys.enable_host_legacy_routing { "Legacy" } else { "BPF" }.to_owned(),
            ipam: self.ipam(),
            remote_nodes,
            endpoints,
            endpoints_ready,
            identities: self.identities.read(|known| known.len()),
            drift: sync.drift,
        }
    }

    async fn nodes(&self) -> Vec<NodeReport> {
        let others = self.datapath.look(|view| {
            let report = |record: &basal_crds::kvstore::NodeRecord| NodeReport {
                cluster: record.cluster.to_string(),
                name: record.name.to_string(),
                local: false,
                internal_ips: of_kind(&record.addresses, &AddressType::InternalIp),
                router_ips: of_kind(&record.addresses, &AddressType::CiliumInternalIp),
                pod_cidrs: record.cidrs().collect(),
                tunnel_endpoint: view.tunnel_endpoint(record),
            };
            view.nodes().values().map(report).collect::<Vec<_>>()
        });
        let underlay = self.underlay.borrow().clone();
        let mut nodes = vec![NodeReport {
            internal_ips: of_kind(&underlay.addresses, &AddressType::InternalIp),
            tunnel_endpoint: self.settings.routing.tunnel().map(|_| underlay.tunnel_ip),
            ..self.node.clone()
        }];
        nodes.extend(others.await.unwrap_or_default());
        nodes
    }

    fn endpoints(&self) -> Vec<EndpointReport> {
        self.endpoints.read(|state| {
            let mut reports: Vec<_> = state
                .iter()
                .map(|(key, slot)| {
                    let record = slot.record.as_ref();
                    EndpointReport {
                        id: slot.id.get(),
                        state: slot.state_text().to_owned(),
                        identity: record.map_or(0, |record| record.identity.get()),
                        labels: record
                            .and_then(|record| Labels::parse_canonical(&record.labels).ok())
                            .map(|labels| texts(&labels))
                            .unwrap_or_default(),
                        pod: record.and_then(|r| r.pod.as_ref()).map(ToString::to_string).unwrap_or_default(),
                        container_id: record.map(|record| record.attachment.container_id.clone()).unwrap_or_default(),
                        host_interface: key.to_string(),
                        ipv4: slot.addresses.v4.map(Into::into),
                        ipv6: slot.addresses.v6.map(Into::into),
                    }
                })
                .collect();
            reports.sort_by_key(|report| report.id);
            reports
        })
    }

    fn identities(&self) -> Vec<IdentityReport> {
        self.identities.read(|known| {
            known.iter().map(|(id, labels)| IdentityReport { id: id.get(), labels: texts(labels) }).collect()
        })
    }

    fn ipam(&self) -> IpamReport {
        let claim = self.claim.borrow().clone();
        let now = self.endpoints.now();
        self.endpoints.read(|state| {
            let confirmed = state.pool().counts(now).into_iter().map(|count| BlockReport {
                cidr: ipnet_of(&count.block),
                confirmed: true,
                used: count.used as u64,
                cooling: count.cooling as u64,
                capacity: u64::try_from(count.capacity).unwrap_or(u64::MAX),
            });
            let lost = claim.lost.iter().map(|block| BlockReport {
                cidr: ipnet_of(block),
                confirmed: false,
                used: state.pool().all().filter(|(ip, _)| block.contains_address(*ip)).count() as u64,
                cooling: 0,
                capacity: 0,
            });
            let blocks = confirmed.chain(lost).collect();
            let addresses =
                state.pool().all().map(|(ip, owner)| AddressUse { ip, owner: state.owner_text(owner) }).collect();
            IpamReport { blocks, addresses, problem: claim.problem.clone().unwrap_or_default() }
        })
    }
}

/// How the datapath is. A problem of the node's network is a warning: what can work does.
fn datapath(sync: &SyncReport, masquerades: bool, mtu_problem: Option<String>) -> Component {
    if !sync.problem.is_empty() {
        return Component::new(ComponentState::Failure, sync.problem.clone());
    }
    if !sync.complete {
        return Component::new(ComponentState::Failure, "not compared yet");
    }
    let without_route = sync.without_route.iter().map(|(node, why)| format!("no route to the pods of {node}: {why}"));
    let nowhere = masquerades && sync.masquerade_devices.is_empty();
    let no_device = nowhere.then(|| {
        "no device has programs that masquerade, so nftables do: name one with the key devices, or set \
         enable-bpf-masquerade to \"false\""
            .to_owned()
    });
    let problems: Vec<String> = mtu_problem.into_iter().chain(no_device).chain(without_route).collect();
    match (!problems.is_empty()).then(|| problems.join("; ")) {
        Some(problem) => Component::new(ComponentState::Warning, problem),
        None => Component::new(ComponentState::Ok, format!("as desired; {} changes from outside mended", sync.drift)),
    }
}

/// A block as a network.
#[must_use]
pub fn ipnet_of(block: &basal_ipam::prefix::PodCidr) -> ipnet::IpNet {
    ipnet::IpNet::new_assert(block.address(), block.prefix_len())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use basal_datapath::routing::NoRoute;

    use super::*;

    #[test]
    fn a_small_mtu_is_a_warning_and_hides_no_failure() {
        let small = || Some("MTU 1300 is too small".to_owned());
        let complete = SyncReport { complete: true, ..SyncReport::default() };
        assert_eq!(datapath(&complete, false, None).state, ComponentState::Ok);
        let mtu = datapath(&complete, false, small());
        assert_eq!(mtu, Component::new(ComponentState::Warning, "MTU 1300 is too small"));
        let without_route = BTreeMap::from([("n3".to_owned(), NoRoute::NotOnLink([192, 0, 2, 3].into()))]);
        let partly = datapath(&SyncReport { without_route, ..complete.clone() }, false, None);
        let text = "no route to the pods of n3: 192.0.2.3 is on no network of this node's devices";
        assert_eq!(partly, Component::new(ComponentState::Warning, text));
        let failed = SyncReport { problem: "set-link: EPERM".to_owned(), ..complete };
        assert_eq!(datapath(&failed, false, small()).state, ComponentState::Failure);
    }

    #[test]
    fn masquerading_needs_a_device() {
        let complete = SyncReport { complete: true, ..SyncReport::default() };
        let nowhere = datapath(&complete, true, None);
        assert!(nowhere.state == ComponentState::Warning && nowhere.message.contains("the key devices"), "{nowhere:?}");
        let masquerade_devices = ["eth0", "eth1"].map(str::to_owned).into();
        let report = SyncReport { masquerade_devices, ..complete };
        assert_eq!(datapath(&report, true, None).state, ComponentState::Ok);
        assert_eq!(report.masquerading(), "BPF [eth0, eth1]");
    }
}
