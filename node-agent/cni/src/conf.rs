//! The network configuration that the runtime writes to standard input (CNI specification, "Network configuration").

use std::{collections::BTreeSet, net::IpAddr, path::PathBuf, time::Duration};

use ipnet::IpNet;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::{api::Attachment, error::PluginError, invocation::Command, version::Version};

/// Where the agent listens.
pub const DEFAULT_SOCKET: &str = "/var/run/cilium/basal.sock";
/// Where a DEL is kept while the agent is away.
pub const DEFAULT_DELETE_QUEUE: &str = "/var/run/cilium/deleteQueue";
/// How long an ADD waits: well below kubelet's patience, so that our error with its reason is the one that is shown.
pub const DEFAULT_ADD_TIMEOUT: Duration = Duration::from_secs(90);

/// A network configuration, as far as this plugin reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetConf {
    /// `cniVersion`.
    pub version: Version,
    /// `name`; may be empty for VERSION.
    pub name: String,
    /// `agent-socket`.
    pub socket: PathBuf,
    /// `delete-queue`.
    pub delete_queue: PathBuf,
    /// `add-timeout`, in seconds on the wire.
    pub add_timeout: Duration,
    /// `runtimeConfig.ips`: the addresses that the pod asks for. Only ADD reads them.
    pub ips: Vec<IpAddr>,
    /// The addresses in `prevResult.ips`; CHECK verifies them, and DEL does not read them.
    pub previous: Option<Vec<IpNet>>,
    /// `cni.dev/valid-attachments`; `None` when the field is missing.
    pub valid_attachments: Option<BTreeSet<Attachment>>,
}

/// Reads `cniVersion` alone, for an answer to a configuration that is otherwise wrong.
#[must_use]
pub fn version_of(input: &[u8]) -> Version {
    let parsed: Option<Value> = serde_json::from_slice(input).ok();
    let text = parsed.as_ref().and_then(|conf| conf.get("cniVersion")).and_then(Value::as_str);
    text.and_then(|text| Version::parse(text).ok()).unwrap_or(Version::NEWEST)
}

/// A field, by name; `None` when it is missing or null.
fn field<T: DeserializeOwned>(object: &Map<String, Value>, path: &str, name: &str) -> Result<Option<T>, PluginError> {
    match object.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => T::deserialize(value)
            .map(Some)
            .map_err(|error| PluginError::Config { field: format!("{path}{name}"), why: error.to_string() }),
    }
}

impl NetConf {
    /// Reads a configuration for a command.
    ///
    /// # Errors
    /// `Decode` when it is no JSON object, `IncompatibleVersion`, `UnsupportedField`, or `Config` with the field.
    pub fn parse(input: &[u8], command: Command) -> Result<Self, PluginError> {
        let value: Value = serde_json::from_slice(input).map_err(|error| PluginError::Decode(error.to_string()))?;
        let Value::Object(conf) = value else {
            return Err(PluginError::Decode("is no JSON object".to_owned()));
        };
        let version = Version::parse(&field::<String>(&conf, "", "cniVersion")?.unwrap_or_default())?;
        if version < command.since() {
            return Err(PluginError::IncompatibleVersion(format!(
                "network configuration, field cniVersion: {} does not have {command:?}; it needs {} or later",
                version.as_str(),
                command.since().as_str()
            )));
        }
        let name = field::<String>(&conf, "", "name")?.unwrap_or_default();
        if name.is_empty() && command != Command::Version {
            return Err(PluginError::Config { field: "name".into(), why: "is required and missing".into() });
        }
        // A DEL must not fail on what it does not need: the runtime would repeat it for ever.
        let previous = if command == Command::Del { None } else { previous_addresses(&conf)? };
        if command == Command::Add && previous.is_some() {
            return Err(PluginError::UnsupportedField {
                field: "prevResult".into(),
                why: "basal-cni makes the interface itself: put it first in the list of plugins".into(),
            });
        }
        if command == Command::Check && previous.is_none() {
            return Err(PluginError::Config {
                field: "prevResult".into(),
                why: "CHECK needs the result of ADD".into(),
            });
        }
        let add_timeout = match field::<u64>(&conf, "", "add-timeout")? {
            None => DEFAULT_ADD_TIMEOUT,
            Some(seconds @ 1..=600) => Duration::from_secs(seconds),
            Some(seconds) => {
                let why = format!("{seconds} is not within 1 to 600 seconds");
                return Err(PluginError::Config { field: "add-timeout".into(), why });
            }
        };
        let path = |name, default: &str| -> Result<PathBuf, PluginError> {
            Ok(field::<PathBuf>(&conf, "", name)?.unwrap_or_else(|| PathBuf::from(default)))
        };
        Ok(Self {
            version,
            name,
            socket: path("agent-socket", DEFAULT_SOCKET)?,
            delete_queue: path("delete-queue", DEFAULT_DELETE_QUEUE)?,
            add_timeout,
            ips: if command == Command::Add { runtime_ips(&conf)? } else { Vec::new() },
            previous,
            valid_attachments: valid_attachments(&conf)?,
        })
    }
}

/// Reads `runtimeConfig` and refuses the capabilities that would change a pod's network and that Basal does not have. The
/// others are passed over: a runtime gives what the configuration declares, and writes the pod's `resolv.conf` itself.
fn runtime_ips(conf: &Map<String, Value>) -> Result<Vec<IpAddr>, PluginError> {
    let Some(runtime) = field::<Map<String, Value>>(conf, "", "runtimeConfig")? else { return Ok(Vec::new()) };
    for (name, why) in [
        ("mac", "MAC addresses are chosen by the agent; remove the capability \"mac\""),
        ("bandwidth", "bandwidth limits are not supported; remove the capability \"bandwidth\""),
        ("ipRanges", "addresses come from the node's blocks; remove the capability \"ipRanges\""),
        ("aliases", "names for pods are not supported; remove the capability \"aliases\""),
        ("deviceID", "a pod gets a veth pair and no device of the node; remove the capability \"deviceID\""),
        ("infinibandGUID", "a pod gets an Ethernet interface; remove the capability \"infinibandGUID\""),
        ("portMappings", "add the plugin \"portmap\" behind basal-cni and give the capability to that one"),
    ] {
        if runtime.get(name).is_some_and(|value| !is_empty(value)) {
            return Err(PluginError::UnsupportedField { field: format!("runtimeConfig.{name}"), why: why.into() });
        }
    }
    let texts = field::<Vec<String>>(&runtime, "runtimeConfig.", "ips")?.unwrap_or_default();
    let mut ips = Vec::new();
    for (i, text) in texts.iter().enumerate() {
        // The capability allows an address with and without a prefix length; pods always get /32 and /128.
        let ip = text.parse::<IpNet>().map(|net| net.addr()).or_else(|_| text.parse::<IpAddr>());
        ips.push(ip.map_err(|error| PluginError::Config {
            field: format!("runtimeConfig.ips[{i}]"),
            why: format!("{text:?}: {error}"),
        })?);
    }
    Ok(ips)
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

fn previous_addresses(conf: &Map<String, Value>) -> Result<Option<Vec<IpNet>>, PluginError> {
    let Some(previous) = field::<Map<String, Value>>(conf, "", "prevResult")? else { return Ok(None) };
    let ips = field::<Vec<Map<String, Value>>>(&previous, "prevResult.", "ips")?.unwrap_or_default();
    let mut addresses = Vec::new();
    for (i, ip) in ips.iter().enumerate() {
        let path = format!("prevResult.ips[{i}].");
        let address = field::<IpNet>(ip, &path, "address")?;
        addresses.push(address.ok_or_else(|| PluginError::Config {
            field: format!("{path}address"),
            why: "is required and missing".to_owned(),
        })?);
    }
    Ok(Some(addresses))
}

fn valid_attachments(conf: &Map<String, Value>) -> Result<Option<BTreeSet<Attachment>>, PluginError> {
    const NAME: &str = "cni.dev/valid-attachments";
    let Some(items) = field::<Vec<Map<String, Value>>>(conf, "", NAME)? else { return Ok(None) };
    let mut valid = BTreeSet::new();
    for (i, item) in items.iter().enumerate() {
        let path = format!("{NAME}[{i}].");
        let text = |name: &str| -> Result<String, PluginError> {
            field::<String>(item, &path, name)?.ok_or_else(|| PluginError::Config {
                field: format!("{path}{name}"),
                why: "is required and missing".to_owned(),
            })
        };
        valid.insert(Attachment { container_id: text("containerID")?, ifname: text("ifname")? });
    }
    Ok(Some(valid))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str, command: Command) -> (u32, String) {
        let error = NetConf::parse(text.as_bytes(), command).unwrap_err();
        (error.code(), error.to_string())
    }

    #[test]
    fn names_the_field_that_is_wrong() {
        for (text, command, code, part) in [
            ("", Command::Add, 6, "stdin"),
            ("[]", Command::Add, 6, "no JSON object"),
            (r#"{"cniVersion":5}"#, Command::Add, 7, "field cniVersion"),
            (r#"{"cniVersion":"2.0.0"}"#, Command::Add, 1, "use one of 0.1.0"),
            (r#"{"cniVersion":"0.3.1","name":"x"}"#, Command::Check, 1, "needs 0.4.0"),
            (r#"{"cniVersion":"1.0.0","name":"x"}"#, Command::Status, 1, "needs 1.1.0"),
            (r#"{"cniVersion":"1.0.0"}"#, Command::Add, 7, "field name: is required"),
            (r#"{"name":"x","prevResult":{}}"#, Command::Add, 2, "prevResult"),
            (r#"{"cniVersion":"1.0.0","name":"x"}"#, Command::Check, 7, "prevResult"),
            (r#"{"name":"x","runtimeConfig":{"mac":"02:00:00:00:00:01"}}"#, Command::Add, 2, "runtimeConfig.mac"),
            (
                r#"{"name":"x","runtimeConfig":{"bandwidth":{"ingressRate":1}}}"#,
                Command::Add,
                2,
                "runtimeConfig.bandwidth",
            ),
            (r#"{"name":"x","runtimeConfig":{"portMappings":[{}]}}"#, Command::Add, 2, "plugin \"portmap\""),
            (r#"{"name":"x","runtimeConfig":{"ipRanges":[[{}]]}}"#, Command::Add, 2, "runtimeConfig.ipRanges"),
            (r#"{"name":"x","runtimeConfig":{"aliases":["db"]}}"#, Command::Add, 2, "runtimeConfig.aliases"),
            (r#"{"name":"x","runtimeConfig":{"deviceID":"0000:04:00.5"}}"#, Command::Add, 2, "runtimeConfig.deviceID"),
            (
                r#"{"name":"x","runtimeConfig":{"infinibandGUID":"c2"}}"#,
                Command::Add,
                2,
                "runtimeConfig.infinibandGUID",
            ),
            (r#"{"name":"x","runtimeConfig":{"ips":["10.0.0.1","x"]}}"#, Command::Add, 7, "runtimeConfig.ips[1]"),
            (r#"{"name":"x","add-timeout":0}"#, Command::Add, 7, "add-timeout"),
            (
                r#"{"cniVersion":"1.1.0","name":"x","cni.dev/valid-attachments":[{"ifname":"eth0"}]}"#,
                Command::Gc,
                7,
                "cni.dev/valid-attachments[0].containerID",
            ),
            (
                r#"{"cniVersion":"1.1.0","name":"x","prevResult":{"ips":[{"address":"10.0.0.1"}]}}"#,
                Command::Check,
                7,
                "prevResult.ips[0].address",
            ),
        ] {
            let (got_code, message) = refused(text, command);
            assert_eq!(got_code, code, "{text}: {message}");
            assert!(message.contains(part), "{text}: {message}");
        }
    }

    /// A runtime repeats a DEL until it succeeds, with the configuration of the ADD that was refused.
    #[test]
    fn a_del_does_not_stumble_over_what_only_other_commands_need() {
        for text in [
            r#"{"name":"x","runtimeConfig":{"ips":["10.0.0.300"]}}"#,
            r#"{"name":"x","runtimeConfig":{"ips":"10.0.0.1","mac":"02:00:00:00:00:01"}}"#,
            r#"{"name":"x","runtimeConfig":[]}"#,
            r#"{"name":"x","prevResult":{"ips":[{"address":"10.0.0.1"}]}}"#,
            r#"{"name":"x","prevResult":[]}"#,
        ] {
            let conf = NetConf::parse(text.as_bytes(), Command::Del).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!((conf.ips, conf.previous), (Vec::new(), None), "{text}");
        }
    }

    #[test]
    fn reads_what_the_runtime_gives() {
        let text = r#"{"cniVersion":"1.1.0","name":"cilium","type":"basal-cni","agent-socket":"/x",
            "runtimeConfig":{"ips":["10.0.0.7/24","fd00::7"],"mac":"","bandwidth":{},"portMappings":[],"ipRanges":null,
                "dns":{"servers":["10.0.0.10"]},"cgroupPath":"/kubepods","another":1},
            "cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}]}"#;
        let conf = NetConf::parse(text.as_bytes(), Command::Add).unwrap();
        assert_eq!(conf.socket, PathBuf::from("/x"));
        assert_eq!(conf.delete_queue, PathBuf::from(DEFAULT_DELETE_QUEUE));
        assert_eq!(conf.ips, ["10.0.0.7".parse::<IpAddr>().unwrap(), "fd00::7".parse().unwrap()]);
        assert_eq!(conf.valid_attachments.unwrap().len(), 1);
    }
}
