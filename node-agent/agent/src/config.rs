//! The agent's keys: Cilium's names and defaults (cilium-config ConfigMap of 1.20), plus the few of our own.

use std::{collections::BTreeSet, fs, path::PathBuf, time::Duration};

use basal_crds::names::Cluster;
use basal_datapath::{
    masquerade::{BpfMasquerade, FlowSizes},
    names::IfNameError,
    plan::DEFAULT_TUNNEL_PORT,
    routing::{DirectRoutes, Routing, Tunnel},
};
use basal_ipam::{
    names::{NameError, NodeName},
    prefix::Family,
};
use basal_kvstore::flags::{ClusterFlags, EtcdFlags, EtcdSettings, FlagsError};
use basal_objects::kube::KubeFlags;
use basal_runtime::{
    admin::ListenAddress,
    config::{ConfigDirFlag, GoDuration},
    logging::LogFlags,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::identity::filter::{FilterError, LabelFilter};

/// basal-agent: connects the pods of this node
#[derive(Debug, Clone, clap::Parser)]
#[command(name = "basal-agent", version)]
pub struct AgentConfig {
    /// Where the keys are.
    #[command(flatten)]
    pub config_dir: ConfigDirFlag,
    /// The log.
    #[command(flatten)]
    pub log: LogFlags,
    /// Which cluster this is.
    #[command(flatten)]
    pub cluster: ClusterFlags,
    /// Which node this is.
    #[command(flatten)]
    pub node: NodeFlags,
    /// The datapath.
    #[command(flatten)]
    pub datapath: DatapathFlags,
    /// Identities.
    #[command(flatten)]
    pub identity: IdentityFlags,
    /// etcd.
    #[command(flatten)]
    pub etcd: EtcdFlags,
    /// The API server.
    #[command(flatten)]
    pub kubernetes: KubeFlags,
    /// What is put on the node.
    #[command(flatten)]
    pub cni: CniFlags,
    /// What is served.
    #[command(flatten)]
    pub serving: ServingFlags,
}

/// Which node this is, and what its pods get.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Node")]
pub struct NodeFlags {
    /// Name of the Node object; has to be there
    #[arg(long, env = "K8S_NODE_NAME")]
    pub node_name: String,

    /// Give pods IPv4 addresses
    #[arg(long, default_value_t = true)]
    pub enable_ipv4: bool,

    /// Give pods IPv6 addresses
    #[arg(long, default_value_t = true)]
    pub enable_ipv6: bool,

    /// How long a pod's address rests before another pod gets it (Basal's own key)
    #[arg(long, default_value = "30s")]
    pub ip_release_delay: GoDuration,
}

/// The datapath.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Datapath")]
pub struct DatapathFlags {
    /// How packets get to the pods of other nodes: in a tunnel (`tunnel`), or as they are (`native`)
    #[arg(long, value_enum, default_value_t = RoutingMode::Tunnel, value_name = "MODE")]
    pub routing_mode: RoutingMode,

    /// With `routing-mode: native`, make routes to the pods of the nodes that share a link with this one
    #[arg(long, default_value_t = false)]
    pub auto_direct_node_routes: bool,

    /// With `auto-direct-node-routes`, leave out nodes that share no link with this one instead of reporting them
    #[arg(long, default_value_t = false)]
    pub direct_routing_skip_unreachable: bool,

    /// Network in which IPv4 addresses of pods are known: what pods send there keeps its source
    ///
    /// Without it, and with `routing-mode: native`, the blocks of the nodes are that network
    #[arg(long, value_name = "CIDR")]
    pub ipv4_native_routing_cidr: Option<Ipv4Net>,

    /// The same for IPv6
    #[arg(long, value_name = "CIDR")]
    pub ipv6_native_routing_cidr: Option<Ipv6Net>,

    /// MTU of the underlay, 1350 or more (1280 with `routing-mode: native`); 0 takes it from the node's device
    #[arg(long, default_value_t = 0)]
    pub mtu: u32,

    /// UDP port of the tunnel; 0 for 8472
    #[arg(long, default_value_t = 0)]
    pub tunnel_port: u16,

    /// Let pod traffic pass the host's network stack
    ///
    /// `false` takes the direct path for what kube-proxy cannot have translated: TCP that a pod opens to another pod's
    /// address, and protocols other than TCP, UDP and SCTP
    #[arg(long, default_value_t = true)]
    pub enable_host_legacy_routing: bool,

    /// Attach programs by tcx links where the kernel has them (6.6 and later), else by filters of clsact
    ///
    /// `false` starts and removes many pods at once more quickly: the kernel waits for every CPU each time that it changes
    /// a tcx link
    #[arg(long, default_value_t = true)]
    pub enable_tcx: bool,

    /// Masquerading
    #[command(flatten)]
    pub masquerade: MasqueradeFlags,

    /// Folder of the BPF file system
    #[arg(long, default_value = "/sys/fs/bpf", value_name = "FOLDER")]
    pub bpf_root: PathBuf,

    /// Where the host's /proc is: kernel parameters are written below it
    #[arg(long, default_value = "/proc", value_name = "FOLDER")]
    pub procfs: PathBuf,
}

/// Masquerading, and the maps that it needs.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Masquerading")]
pub struct MasqueradeFlags {
    /// Masquerade IPv4 from pods to outside of the cluster: packets take the node's address
    #[arg(long, default_value_t = true)]
    pub enable_ipv4_masquerade: bool,

    /// Masquerade IPv6 from pods to outside of the cluster: packets take the node's address
    #[arg(long, default_value_t = true)]
    pub enable_ipv6_masquerade: bool,

    /// Masquerade by programs on the node's devices instead of by nftables
    #[arg(long, default_value_t = false)]
    pub enable_bpf_masquerade: bool,

    /// With `enable-bpf-masquerade` and `routing-mode: native`, masquerade what pods send to other nodes, too
    #[arg(long, default_value_t = false)]
    pub enable_remote_node_masquerade: bool,

    /// With `enable-bpf-masquerade`, the devices that lead out of the node, separated by commas or spaces; `eth+` is every
    /// device whose name starts with `eth`
    ///
    /// Without it, those that have an address of the node or a default route
    #[arg(long, default_value = "", value_name = "NAMES")]
    pub devices: String,

    /// How many TCP connections are tracked, in each family; 1024 to 16777216
    #[arg(long, default_value_t = FlowSizes::default().tcp)]
    pub bpf_ct_global_tcp_max: u32,

    /// How many other connections are tracked, in each family; 1024 to 16777216
    #[arg(long, default_value_t = FlowSizes::default().any)]
    pub bpf_ct_global_any_max: u32,

    /// How many translations there may be, two for each connection, in each family; 1024 to 16777216, and no more than
    /// both other sizes together
    ///
    /// Without it, two thirds of both
    #[arg(long)]
    pub bpf_nat_global_max: Option<u32>,

    /// How often connections that ended are taken away; 0 for as often as it pays
    #[arg(long, default_value = "0s")]
    pub conntrack_gc_interval: GoDuration,
}

/// How packets get to the pods of other nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum RoutingMode {
    /// In a tunnel
    Tunnel,
    /// As they are
    Native,
}

/// Identities.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Identities")]
pub struct IdentityFlags {
    /// Where identities are allocated: `crd` or `kvstore`; empty for the one that fits `kvstore`
    #[arg(long, default_value = "")]
    pub identity_allocation_mode: String,

    /// Patterns of labels that count for identities, `[source:][!]pattern`, separated by spaces
    #[arg(long, default_value = "")]
    pub labels: String,

    /// File with patterns that replace the default ones
    #[arg(long, value_name = "FILE")]
    pub label_prefix_file: Option<PathBuf>,
}

/// What is put on the node.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "CNI")]
pub struct CniFlags {
    /// Folder of the socket, the delete queue and the journal
    #[arg(long, default_value = "/var/run/cilium", value_name = "FOLDER")]
    pub state_dir: PathBuf,

    /// The plugin's executable that is installed; by default the one beside the agent's (Basal's own key)
    #[arg(long, value_name = "FILE")]
    pub cni_plugin: Option<PathBuf>,

    /// Folder that the container runtime takes plugins from (Basal's own key)
    #[arg(long, default_value = "/opt/cni/bin", value_name = "FOLDER")]
    pub cni_bin_dir: PathBuf,

    /// Configuration that is written for the container runtime once the agent is ready
    #[arg(long, default_value = "/etc/cni/net.d/05-cilium.conflist", value_name = "FILE")]
    pub write_cni_conf_when_ready: PathBuf,

    /// Put the configurations of other plugins aside
    #[arg(long, default_value_t = true)]
    pub cni_exclusive: bool,
}

/// What the agent serves.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Serving")]
pub struct ServingFlags {
    /// Port of /healthz, /readyz, /metrics and /config, on 127.0.0.1
    #[arg(long, default_value_t = 9879)]
    pub agent_health_port: u16,

    /// Address of the metrics; none without
    #[arg(long, value_name = "HOST:PORT")]
    pub prometheus_serve_addr: Option<ListenAddress>,
}

/// Why a configuration that parses cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The node's name is none.
    #[error("node-name: {0}")]
    NodeName(#[from] NameError),
    /// The cluster, or the way to etcd.
    #[error(transparent)]
    Flags(#[from] FlagsError),
    /// No family is on.
    #[error("enable-ipv4 and enable-ipv6 are both false: pods would have no address; set one to true")]
    NoFamily,
    /// Identities are wanted elsewhere than the other records.
    #[error(
        "identity-allocation-mode: {mode:?} does not fit kvstore: {kvstore:?}, for Basal keeps all records in one \
         place; set identity-allocation-mode to {fitting:?}, or kvstore to {other:?}"
    )]
    IdentityMode {
        /// What `identity-allocation-mode` says.
        mode: String,
        /// What `kvstore` says.
        kvstore: String,
        /// The mode that fits it.
        fitting: &'static str,
        /// The other value of `kvstore`.
        other: &'static str,
    },
    /// The filter's keys.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// The filter's file.
    #[error("label-prefix-file: cannot read {path}: {source}")]
    FilterFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The MTU.
    #[error(
        "mtu: {0} is too small: IPv6 needs 1280 bytes inside of a tunnel that takes up to 70; use 1350 or more, or 0"
    )]
    Mtu(u32),
    /// The MTU without a tunnel.
    #[error("mtu: {0} is too small: IPv6 needs 1280 bytes; use 1280 or more, or 0")]
    NativeMtu(u32),
    /// Routes that would lead past the tunnel.
    #[error(
        "auto-direct-node-routes: \"true\" would send packets past the tunnel of routing-mode: \"tunnel\"; set \
         auto-direct-node-routes to \"false\", or routing-mode to \"native\""
    )]
    DirectRoutesInTunnel,
    /// A name of a device.
    #[error("devices: {0}; or \"eth+\" for each that starts with \"eth\"")]
    Devices(#[from] IfNameError),
    /// A size of a map.
    #[error("{key}: {size} is no size of a map; use 1024 to 16777216")]
    MapSize {
        /// The key.
        key: &'static str,
        /// Its value.
        size: u32,
    },
    /// More translations than connections.
    #[error(
        "bpf-nat-global-max: {nat} is more than bpf-ct-global-tcp-max and bpf-ct-global-any-max together ({connections}); \
         make it smaller, or one of those larger"
    )]
    NatSize {
        /// Translations.
        nat: u32,
        /// Connections.
        connections: u32,
    },
    /// Another way to masquerade that is off.
    #[error(
        "enable-remote-node-masquerade: \"true\" is about masquerading by programs, which enable-bpf-masquerade: \"false\" \
         leaves off; set enable-remote-node-masquerade to \"false\", or enable-bpf-masquerade to \"true\""
    )]
    RemoteNodeMasquerade,
    /// Nodes may be left out of something that is not done.
    #[error(
        "direct-routing-skip-unreachable: \"true\" is about the routes of auto-direct-node-routes, which is \"false\"; \
         set direct-routing-skip-unreachable to \"false\", or auto-direct-node-routes to \"true\""
    )]
    NoRoutesToSkip,
}

/// A configuration that can be used.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The Node's name.
    pub node: NodeName,
    /// The cluster.
    pub cluster: Cluster,
    /// The families that pods have addresses of.
    pub families: Vec<Family>,
    /// How long addresses rest.
    pub ip_release_delay: Duration,
    /// MTU of the underlay; `None`: the device's.
    pub mtu: Option<u32>,
    /// How packets get to the pods of other nodes. What a tunnel runs over follows from the node's addresses.
    pub routing: Routing,
    /// Networks in which addresses of pods are known.
    pub native_networks: BTreeSet<IpNet>,
    /// The datapath's keys.
    pub datapath: DatapathFlags,
    /// Masquerading by programs, where it is on.
    pub bpf_masquerade: Option<BpfMasquerade>,
    /// Which labels count.
    pub filter: LabelFilter,
    /// The way to etcd and the leases there; `None` where the cluster's records are custom resources.
    pub etcd: Option<EtcdSettings>,
    /// What is put on the node.
    pub cni: CniFlags,
}

impl AgentConfig {
    /// Checks what single keys cannot say.
    ///
    /// # Errors
    /// See [`SettingsError`].
    pub fn settings(&self) -> Result<Settings, SettingsError> {
        let node = NodeName::new(&self.node.node_name)?;
        let cluster = self.cluster.cluster()?;
        let mut families = Vec::new();
        families.extend(self.node.enable_ipv4.then_some(Family::V4));
        families.extend(self.node.enable_ipv6.then_some(Family::V6));
        if families.is_empty() {
            return Err(SettingsError::NoFamily);
        }
        let etcd = self.etcd.settings()?;
        self.check_identity_mode(etcd.is_some())?;
        let file = match &self.identity.label_prefix_file {
            None => None,
            Some(path) => Some(
                fs::read_to_string(path).map_err(|source| SettingsError::FilterFile { path: path.clone(), source })?,
            ),
        };
        let mtu = Some(self.datapath.mtu).filter(|mtu| *mtu != 0);
        let routing = self.datapath.routing()?;
        match (mtu, routing) {
            (Some(mtu @ ..1350), Routing::Tunnel(_)) => return Err(SettingsError::Mtu(mtu)),
            (Some(mtu @ ..1280), Routing::Native(_)) => return Err(SettingsError::NativeMtu(mtu)),
            _ => {}
        }
        let networks = [
            self.datapath.ipv4_native_routing_cidr.map(IpNet::V4),
            self.datapath.ipv6_native_routing_cidr.map(IpNet::V6),
        ];
        Ok(Settings {
            node,
            cluster,
            families,
            ip_release_delay: self.node.ip_release_delay.0,
            mtu,
            routing,
            native_networks: networks.into_iter().flatten().map(|network| network.trunc()).collect(),
            datapath: self.datapath.clone(),
            bpf_masquerade: self.datapath.masquerade.bpf()?,
            filter: LabelFilter::new(file.as_deref(), &self.identity.labels)?,
            etcd,
            cni: self.cni.clone(),
        })
    }

    fn check_identity_mode(&self, with_etcd: bool) -> Result<(), SettingsError> {
        let (fitting, other) = if with_etcd { ("kvstore", "") } else { ("crd", "etcd") };
        let mode = &self.identity.identity_allocation_mode;
        if mode.is_empty() || mode == fitting {
            return Ok(());
        }
        let (mode, kvstore) = (mode.clone(), self.etcd.kvstore.clone());
        Err(SettingsError::IdentityMode { mode, kvstore, fitting, other })
    }
}

impl DatapathFlags {
    fn routing(&self) -> Result<Routing, SettingsError> {
        let port = if self.tunnel_port == 0 { DEFAULT_TUNNEL_PORT } else { self.tunnel_port };
        match (self.routing_mode, self.auto_direct_node_routes, self.direct_routing_skip_unreachable) {
            (RoutingMode::Tunnel, true, _) => Err(SettingsError::DirectRoutesInTunnel),
            (_, false, true) => Err(SettingsError::NoRoutesToSkip),
            (RoutingMode::Tunnel, false, false) => Ok(Routing::Tunnel(Tunnel { port, ipv6: false })),
            (RoutingMode::Native, false, false) => Ok(Routing::Native(DirectRoutes::None)),
            (RoutingMode::Native, true, false) => Ok(Routing::Native(DirectRoutes::All)),
            (RoutingMode::Native, true, true) => Ok(Routing::Native(DirectRoutes::SameLink)),
        }
    }
}

impl MasqueradeFlags {
    /// Masquerading by programs; `None` where nftables masquerade, or nobody.
    fn bpf(&self) -> Result<Option<BpfMasquerade>, SettingsError> {
        if !self.enable_bpf_masquerade {
            return if self.enable_remote_node_masquerade {
                Err(SettingsError::RemoteNodeMasquerade)
            } else {
                Ok(None)
            };
        }
        let names = self.devices.split([',', ' ']).filter(|name| !name.is_empty());
        let devices = names.map(str::parse).collect::<Result<_, _>>()?;
        let tcp = map_size("bpf-ct-global-tcp-max", self.bpf_ct_global_tcp_max)?;
        let any = map_size("bpf-ct-global-any-max", self.bpf_ct_global_any_max)?;
        // Neither is near what the type takes.
        let connections = tcp + any;
        let nat = self.bpf_nat_global_max.unwrap_or_else(|| (connections / 3 * 2).clamp(1024, 1 << 24));
        let sizes = FlowSizes { tcp, any, nat: map_size("bpf-nat-global-max", nat)? };
        if nat > connections {
            return Err(SettingsError::NatSize { nat, connections });
        }
        let on = self.enable_ipv4_masquerade || self.enable_ipv6_masquerade;
        Ok(on.then_some(BpfMasquerade { devices, remote_nodes: self.enable_remote_node_masquerade, sizes }))
    }
}

/// A size that Cilium takes, too.
fn map_size(key: &'static str, size: u32) -> Result<u32, SettingsError> {
    if (1024..=1 << 24).contains(&size) { Ok(size) } else { Err(SettingsError::MapSize { key, size }) }
}

#[cfg(test)]
mod tests {
    use basal_runtime::config::{ConfigError, REFUSALS, Sources, load};

    use super::*;

    fn sources(arguments: &[&str], environment: &[(&str, &str)]) -> Sources {
        let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let always = ["basal-agent", "--node-name=n1", "--kvstore-opt=etcd.config=/x"];
        let arguments = always.iter().chain(arguments).map(Into::into).collect();
        Sources { arguments, environment }
    }

    fn settings(arguments: &[&str]) -> Result<Settings, SettingsError> {
        load::<AgentConfig>(&sources(arguments, &[]), REFUSALS).unwrap().config.settings()
    }

    #[test]
    fn defaults_are_usable() {
        let settings = settings(&[]).unwrap();
        assert_eq!((settings.mtu, settings.families.len()), (None, 2));
        assert_eq!(settings.routing, Routing::Tunnel(Tunnel { port: 8472, ipv6: false }));
        assert!(settings.datapath.enable_host_legacy_routing);
    }

    #[test]
    fn routing_is_one_of_four() {
        let native = ["--routing-mode=native", "--auto-direct-node-routes", "--direct-routing-skip-unreachable=true"];
        for (arguments, routing) in [
            (&["--tunnel-port=4789"][..], Routing::Tunnel(Tunnel { port: 4789, ipv6: false })),
            (&native[..1], Routing::Native(DirectRoutes::None)),
            (&native[..2], Routing::Native(DirectRoutes::All)),
            (&native[..3], Routing::Native(DirectRoutes::SameLink)),
        ] {
            assert_eq!(settings(arguments).unwrap().routing, routing, "{arguments:?}");
        }
        let networks = ["--ipv4-native-routing-cidr=10.0.0.7/8", "--ipv6-native-routing-cidr=fd00::/16"];
        let expected = BTreeSet::from(["10.0.0.0/8".parse().unwrap(), "fd00::/16".parse().unwrap()]);
        assert_eq!(settings(&networks).unwrap().native_networks, expected);
        assert_eq!(settings(&["--routing-mode=native", "--mtu=1280"]).unwrap().mtu, Some(1280));
    }

    #[test]
    fn programs_masquerade_where_they_are_asked_to() {
        assert_eq!(settings(&[]).unwrap().bpf_masquerade, None);
        let on = "--enable-bpf-masquerade=true";
        assert_eq!(settings(&[on]).unwrap().bpf_masquerade, Some(BpfMasquerade::default()));
        let named = [on, "--devices=eth+, ens3", "--enable-remote-node-masquerade=true", "--bpf-nat-global-max=2048"];
        let masquerade = settings(&named).unwrap().bpf_masquerade.unwrap();
        let devices: Vec<_> = masquerade.devices.iter().map(ToString::to_string).collect();
        assert_eq!(
            (devices, masquerade.remote_nodes, masquerade.sizes.nat),
            (vec!["eth+".into(), "ens3".into()], true, 2048)
        );
        let small = settings(&[on, "--bpf-ct-global-tcp-max=32768"]).unwrap().bpf_masquerade.unwrap();
        assert_eq!(small.sizes.nat, 65_536, "one size alone leaves the others usable");
        let nobody = [on, "--enable-ipv4-masquerade=false", "--enable-ipv6-masquerade=false"];
        assert_eq!(settings(&nobody).unwrap().bpf_masquerade, None);
    }

    #[test]
    fn a_value_that_is_none_is_named() {
        for (argument, key) in [
            ("--routing-mode=disabled", "routing-mode"),
            ("--ipv4-native-routing-cidr=fd00::/16", "ipv4-native-routing-cidr"),
        ] {
            let Err(error) = load::<AgentConfig>(&sources(&[argument], &[]), REFUSALS) else { panic!("it starts") };
            assert!(error.to_string().contains(key), "{error}");
        }
    }

    #[test]
    fn records_are_in_etcd_or_in_custom_resources() {
        for (arguments, with_etcd) in [
            (&[][..], false),
            (&["--identity-allocation-mode=crd"], false),
            (&["--kvstore=etcd"], true),
            (&["--kvstore=etcd", "--identity-allocation-mode=kvstore"], true),
        ] {
            assert_eq!(settings(arguments).unwrap().etcd.is_some(), with_etcd, "{arguments:?}");
        }
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (arguments, part) in [
            (&["--enable-ipv4=false", "--enable-ipv6=false"][..], "enable-ipv6"),
            (&["--cluster-id=3"], "cluster-id"),
            (&["--kvstore=etcd", "--kvstore-lease-ttl=5s"], "kvstore-lease-ttl"),
            (
                &["--identity-allocation-mode=kvstore"],
                "set identity-allocation-mode to \"crd\", or kvstore to \"etcd\"",
            ),
            (
                &["--kvstore=etcd", "--identity-allocation-mode=doublewrite-readcrd"],
                "set identity-allocation-mode to \"kvstore\", or kvstore to \"\"",
            ),
            (&["--mtu=1000"], "use 1350 or more"),
            (&["--routing-mode=native", "--mtu=1000"], "use 1280 or more"),
            (&["--auto-direct-node-routes=true"], "auto-direct-node-routes: \"true\" would send"),
            (
                &["--routing-mode=native", "--direct-routing-skip-unreachable=true"],
                "direct-routing-skip-unreachable: \"true\" is about",
            ),
            (&["--labels=k8s:("], "labels"),
            (&["--enable-remote-node-masquerade=true"], "enable-bpf-masquerade to \"true\""),
            (&["--enable-bpf-masquerade=true", "--devices=eth0/1"], "devices: \"eth0/1\" is not a device name"),
            (&["--enable-bpf-masquerade=true", "--bpf-ct-global-any-max=1000"], "bpf-ct-global-any-max: 1000"),
            (&["--enable-bpf-masquerade=true", "--bpf-nat-global-max=196609"], "together (196608)"),
        ] {
            let message = settings(arguments).unwrap_err().to_string();
            assert!(message.contains(part), "{arguments:?}: {message}");
        }
        let mut config = load::<AgentConfig>(&sources(&[], &[]), REFUSALS).unwrap().config;
        config.node.node_name = "A".to_owned();
        assert!(config.settings().unwrap_err().to_string().starts_with("node-name: \"A\""));
    }

    #[test]
    fn encryption_stops_the_start_by_its_key() {
        let refused = load::<AgentConfig>(&sources(&[], &[("CILIUM_ENABLE_WIREGUARD", "true")]), REFUSALS);
        let Err(error @ ConfigError::Refused(_)) = refused else { panic!("it starts") };
        assert!(error.to_string().contains("enable-wireguard"), "{error}");
    }
}
