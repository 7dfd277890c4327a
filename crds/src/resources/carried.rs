//! Fields that Basal carries and does not act on: those of Cilium's cloud modes in CiliumNode, and the agent's log and
//! tasks in CiliumEndpoint.
//!
//! The schema must hold them, since the API server drops what a schema does not know, and the objects of a cluster that
//! migrates have them. So there are schemas here and nothing else; the values stay JSON.
#![expect(dead_code, reason = "only the schemas of these types are used")]

use std::collections::BTreeMap;

use schemars::JsonSchema;

/// What the agent found out about its instance at AWS, and which interfaces it asks for.
#[derive(JsonSchema)]
#[schemars(rename_all = "kebab-case")]
pub(super) struct EniSpec {
    /// The availability zone of the instance.
    availability_zone: Option<String>,
    /// Whether interfaces go with the instance.
    delete_on_termination: Option<bool>,
    /// Whether addresses are asked for one by one instead of by prefix.
    disable_prefix_delegation: Option<bool>,
    /// Interfaces with these tags are left alone.
    exclude_interface_tags: Option<BTreeMap<String, String>>,
    /// The first interface that pods may use.
    #[schemars(range(min = 0))]
    first_interface_index: Option<i32>,
    /// The type of the instance.
    instance_type: Option<String>,
    /// The subnet of the instance's primary interface.
    node_subnet_id: Option<String>,
    /// Tags of the security groups for new interfaces.
    security_group_tags: Option<BTreeMap<String, String>>,
    /// Security groups for new interfaces.
    security_groups: Option<Vec<String>>,
    /// Subnets for new interfaces.
    subnet_ids: Option<Vec<String>>,
    /// Tags of the subnets for new interfaces.
    subnet_tags: Option<BTreeMap<String, String>>,
    /// Whether pods may have the primary address of an interface.
    use_primary_address: Option<bool>,
    /// The virtual private cloud of the instance.
    vpc_id: Option<String>,
}

/// Which interface the agent asks for at Azure.
#[derive(JsonSchema)]
#[schemars(rename_all = "kebab-case")]
pub(super) struct AzureSpec {
    /// The interface that pods may use.
    interface_name: Option<String>,
}

/// What the agent found out about its instance at Alibaba Cloud, and which interfaces it asks for.
#[derive(JsonSchema)]
#[schemars(rename_all = "kebab-case")]
pub(super) struct AlibabaCloudSpec {
    /// The availability zone of the instance.
    availability_zone: Option<String>,
    /// The CIDR of its virtual private cloud.
    cidr_block: Option<String>,
    /// The type of the instance.
    instance_type: Option<String>,
    /// Tags of the security groups for new interfaces.
    security_group_tags: Option<BTreeMap<String, String>>,
    /// Security groups for new interfaces.
    security_groups: Option<Vec<String>>,
    /// The virtual private cloud of the instance.
    vpc_id: Option<String>,
    /// Tags of the virtual switches for new interfaces.
    vswitch_tags: Option<BTreeMap<String, String>>,
    /// Virtual switches for new interfaces.
    vswitches: Option<Vec<String>>,
}

/// The interfaces that the operator attached at AWS.
#[derive(JsonSchema)]
pub(super) struct EniStatus {
    /// The interfaces, by id.
    enis: Option<BTreeMap<String, Eni>>,
}

/// An interface at AWS.
#[derive(JsonSchema)]
#[schemars(rename_all = "kebab-case")]
struct Eni {
    /// Its secondary addresses.
    addresses: Option<Vec<String>>,
    /// Its availability zone.
    availability_zone: Option<String>,
    /// Its description.
    description: Option<String>,
    /// Its id.
    id: Option<String>,
    /// Its primary address.
    ip: Option<String>,
    /// Its IPv6 prefixes.
    ipv6_prefixes: Option<Vec<String>>,
    /// Its MAC address.
    mac: Option<String>,
    /// Its index at the instance.
    number: Option<i32>,
    /// Its IPv4 prefixes.
    prefixes: Option<Vec<String>>,
    /// Its public address.
    public_ip: Option<String>,
    /// Its security groups.
    security_groups: Option<Vec<String>>,
    /// Its subnet.
    subnet: Option<EniSubnet>,
    /// Its tags.
    tags: Option<BTreeMap<String, String>>,
    /// Its virtual private cloud.
    vpc: Option<EniVpc>,
}

/// A subnet at AWS.
#[derive(JsonSchema)]
struct EniSubnet {
    /// Its CIDR.
    cidr: Option<String>,
    /// Its id.
    id: Option<String>,
}

/// A virtual private cloud at AWS.
#[derive(JsonSchema)]
#[schemars(rename_all = "kebab-case")]
struct EniVpc {
    /// Its secondary CIDRs.
    cidrs: Option<Vec<String>>,
    /// Its id.
    id: Option<String>,
    /// Its primary CIDR.
    primary_cidr: Option<String>,
}

/// The interfaces that the operator found at Azure.
#[derive(JsonSchema)]
pub(super) struct AzureStatus {
    /// The interfaces.
    interfaces: Option<Vec<AzureInterface>>,
}

/// An interface at Azure.
#[derive(JsonSchema)]
#[schemars(rename_all = "kebab-case")]
struct AzureInterface {
    /// Its addresses.
    addresses: Option<Vec<AzureAddress>>,
    /// The gateway of its subnet.
    gateway: Option<String>,
    /// Its id.
    id: Option<String>,
    /// Its primary address.
    ip: Option<String>,
    /// Its MAC address.
    mac: Option<String>,
    /// Its name.
    name: Option<String>,
    /// Its security group.
    security_group: Option<String>,
    /// Its state.
    state: Option<String>,
    /// Its subnet.
    subnet: Option<AzureSubnet>,
}

/// An address at Azure.
#[derive(JsonSchema)]
struct AzureAddress {
    /// The address.
    ip: Option<String>,
    /// Its state.
    state: Option<String>,
}

/// A subnet at Azure.
#[derive(JsonSchema)]
struct AzureSubnet {
    /// Its CIDR.
    cidr: Option<String>,
    /// Its id.
    id: Option<String>,
}

/// The interfaces that the operator attached at Alibaba Cloud.
#[derive(JsonSchema)]
pub(super) struct AlibabaCloudStatus {
    /// The interfaces, by id.
    enis: Option<BTreeMap<String, AlibabaEni>>,
}

/// An interface at Alibaba Cloud.
#[derive(JsonSchema)]
#[schemars(rename_all = "kebab-case")]
struct AlibabaEni {
    /// Its instance.
    instance_id: Option<String>,
    /// Its MAC address.
    mac_address: Option<String>,
    /// Its id.
    network_interface_id: Option<String>,
    /// Its primary address.
    primary_ip_address: Option<String>,
    /// All its addresses.
    private_ipsets: Option<Vec<AlibabaAddress>>,
    /// Its security groups.
    security_groupids: Option<Vec<String>>,
    /// Its tags.
    tags: Option<BTreeMap<String, String>>,
    /// Primary or Secondary.
    #[schemars(rename = "type")]
    kind: Option<String>,
    /// Its virtual private cloud.
    vpc: Option<AlibabaVpc>,
    /// Its virtual switch.
    vswitch: Option<AlibabaVswitch>,
    /// Its availability zone.
    zone_id: Option<String>,
}

/// An address at Alibaba Cloud.
#[derive(JsonSchema)]
#[schemars(rename_all = "kebab-case")]
struct AlibabaAddress {
    /// Whether it is the primary one.
    primary: Option<bool>,
    /// The address.
    private_ip_address: Option<String>,
}

/// A virtual private cloud at Alibaba Cloud.
#[derive(JsonSchema)]
#[schemars(rename_all = "kebab-case")]
struct AlibabaVpc {
    /// Its IPv4 CIDR.
    cidr: Option<String>,
    /// Its IPv6 CIDR.
    ipv6_cidr: Option<String>,
    /// Its secondary CIDRs.
    secondary_cidrs: Option<Vec<String>>,
    /// Its id.
    vpc_id: Option<String>,
}

/// A virtual switch at Alibaba Cloud.
#[derive(JsonSchema)]
#[schemars(rename_all = "kebab-case")]
struct AlibabaVswitch {
    /// Its IPv4 CIDR.
    cidr: Option<String>,
    /// Its IPv6 CIDR.
    ipv6_cidr: Option<String>,
    /// Its id.
    vswitch_id: Option<String>,
}

/// A task of the agent for one endpoint.
#[derive(JsonSchema)]
pub(super) struct ControllerStatus {
    /// How it is run.
    configuration: Option<ControllerConfiguration>,
    /// Its name.
    name: Option<String>,
    /// How it went.
    status: Option<ControllerRuns>,
    /// Its id.
    uuid: Option<String>,
}

/// How a task is run.
#[derive(JsonSchema)]
#[schemars(rename_all = "kebab-case")]
struct ControllerConfiguration {
    /// Whether it is run again after an error.
    error_retry: Option<bool>,
    /// The pause after an error, in nanoseconds.
    error_retry_base: Option<i64>,
    /// The pause between runs, in nanoseconds.
    interval: Option<i64>,
}

/// How a task went.
#[derive(JsonSchema)]
#[schemars(rename_all = "kebab-case")]
struct ControllerRuns {
    /// Failures since the last success.
    consecutive_failure_count: Option<i64>,
    /// All failures.
    failure_count: Option<i64>,
    /// The last error.
    last_failure_msg: Option<String>,
    /// When the last failure was.
    last_failure_timestamp: Option<String>,
    /// When the last success was.
    last_success_timestamp: Option<String>,
    /// All successes.
    success_count: Option<i64>,
}

/// A change of an endpoint's state.
#[derive(JsonSchema)]
pub(super) struct LogEntry {
    /// Its code.
    code: Option<String>,
    /// What happened.
    message: Option<String>,
    /// The state after it.
    state: Option<String>,
    /// When it happened.
    timestamp: Option<String>,
}
