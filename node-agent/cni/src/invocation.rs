//! What the container runtime says in environment variables (CNI specification, "Parameters").

use std::{collections::BTreeMap, ffi::OsString};

use crate::{
    api::{Attachment, PodRef},
    error::PluginError,
    version::Version,
};

/// What to do (`CNI_COMMAND`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Attach a container.
    Add,
    /// Undo an ADD.
    Del,
    /// Verify an attachment.
    Check,
    /// Tell whether an ADD would be served.
    Status,
    /// Remove what belongs to no attachment of a list.
    Gc,
    /// List the versions that are spoken.
    Version,
}

impl Command {
    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "ADD" => Self::Add,
            "DEL" => Self::Del,
            "CHECK" => Self::Check,
            "STATUS" => Self::Status,
            "GC" => Self::Gc,
            "VERSION" => Self::Version,
            _ => return None,
        })
    }

    /// The first version of the specification that has this command.
    #[must_use]
    pub fn since(self) -> Version {
        match self {
            Self::Add | Self::Del | Self::Version => Version::V0_1_0,
            Self::Check => Version::V0_4_0,
            Self::Status | Self::Gc => Version::V1_1_0,
        }
    }
}

/// Reads an environment variable.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<OsString>;

fn variable(lookup: Lookup<'_>, name: &'static str) -> Result<String, PluginError> {
    match lookup(name) {
        None => Ok(String::new()),
        Some(value) => value
            .into_string()
            .map_err(|raw| PluginError::Environment { variable: name, why: format!("{raw:?} is no UTF-8") }),
    }
}

fn required(lookup: Lookup<'_>, name: &'static str) -> Result<String, PluginError> {
    let value = variable(lookup, name)?;
    if value.is_empty() {
        return Err(PluginError::Environment { variable: name, why: "is required and missing".to_owned() });
    }
    Ok(value)
}

/// Reads `CNI_COMMAND`.
///
/// # Errors
/// `Environment` when it is missing or no command.
pub fn command(lookup: Lookup<'_>) -> Result<Command, PluginError> {
    const NAME: &str = "CNI_COMMAND";
    let text = required(lookup, NAME)?;
    Command::parse(&text).ok_or_else(|| PluginError::Environment {
        variable: NAME,
        why: format!("{text:?} is none of ADD, DEL, CHECK, STATUS, GC, VERSION"),
    })
}

/// Reads `CNI_CONTAINERID` and `CNI_IFNAME`.
///
/// # Errors
/// `Environment` when one is missing or has characters that the specification does not allow.
pub fn attachment(lookup: Lookup<'_>) -> Result<Attachment, PluginError> {
    let container_id = required(lookup, "CNI_CONTAINERID")?;
    let ifname = required(lookup, "CNI_IFNAME")?;
    check_container_id(&container_id)
        .map_err(|why| PluginError::Environment { variable: "CNI_CONTAINERID", why: why.to_owned() })?;
    check_ifname(&ifname).map_err(|why| PluginError::Environment { variable: "CNI_IFNAME", why: why.to_owned() })?;
    Ok(Attachment { container_id, ifname })
}

/// Reads `CNI_NETNS`, the path of the container's network namespace.
///
/// # Errors
/// `Environment` when it is missing or no absolute path.
pub fn netns(lookup: Lookup<'_>) -> Result<String, PluginError> {
    const NAME: &str = "CNI_NETNS";
    let path = required(lookup, NAME)?;
    if !path.starts_with('/') {
        return Err(PluginError::Environment { variable: NAME, why: format!("{path:?} is no absolute path") });
    }
    Ok(path)
}

/// Reads the pod out of `CNI_ARGS`; `None` when the caller is no kubelet. Keys that are not known are passed over, with
/// and without `IgnoreUnknown`.
///
/// # Errors
/// `Environment` when a pair has no `=`, only one of namespace and name is given, or `IP` or `MAC` asks for what the pod
/// would not get (CNI conventions, "CNI_ARGS": deprecated).
pub fn pod(lookup: Lookup<'_>) -> Result<Option<PodRef>, PluginError> {
    const NAME: &str = "CNI_ARGS";
    let wrong = |why: String| PluginError::Environment { variable: NAME, why };
    let text = variable(lookup, NAME)?;
    let mut args = BTreeMap::new();
    for pair in text.split(';').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').ok_or_else(|| wrong(format!("{pair:?} has no \"=\"")))?;
        args.insert(key, value);
    }
    for (key, why) in [
        ("IP", "IP is not supported; give the address with the capability \"ips\" (runtimeConfig.ips)"),
        ("MAC", "MAC is not supported; MAC addresses are chosen by the agent"),
    ] {
        if args.get(key).is_some_and(|value| !value.is_empty()) {
            return Err(wrong(why.to_owned()));
        }
    }
    let get = |key: &str| args.get(key).copied().unwrap_or_default().to_owned();
    let (namespace, name, uid) = (get("K8S_POD_NAMESPACE"), get("K8S_POD_NAME"), get("K8S_POD_UID"));
    match (namespace.is_empty(), name.is_empty()) {
        (true, true) => Ok(None),
        (false, false) => Ok(Some(PodRef { namespace, name, uid: Some(uid).filter(|uid| !uid.is_empty()) })),
        (true, false) => Err(wrong("K8S_POD_NAME is given without K8S_POD_NAMESPACE".to_owned())),
        (false, true) => Err(wrong("K8S_POD_NAMESPACE is given without K8S_POD_NAME".to_owned())),
    }
}

/// Whether a container id has the form that the specification demands.
///
/// # Errors
/// What is wrong with it.
pub fn check_container_id(id: &str) -> Result<(), &'static str> {
    let mut bytes = id.bytes();
    if !bytes.next().is_some_and(|first| first.is_ascii_alphanumeric()) {
        return Err("must begin with a letter or a digit");
    }
    if !bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-')) {
        return Err("may hold letters, digits, '_', '.' and '-' only");
    }
    if id.len() > 256 {
        return Err("is longer than 256 characters");
    }
    Ok(())
}

/// Whether an interface name is one that Linux takes (`dev_valid_name`, net/core/dev.c).
///
/// # Errors
/// What is wrong with it.
pub fn check_ifname(name: &str) -> Result<(), &'static str> {
    if name.is_empty() || name.len() > 15 {
        return Err("must have 1 to 15 bytes");
    }
    if name == "." || name == ".." {
        return Err("must not be \".\" or \"..\"");
    }
    if name.chars().any(|c| c == '/' || c == ':' || c.is_whitespace() || c.is_control()) {
        return Err("must not hold '/', ':' or white space");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(pairs: &'static [(&'static str, &'static str)]) -> impl Fn(&str) -> Option<OsString> {
        move |name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value))
    }

    #[test]
    fn names_the_variable_that_is_wrong() {
        let text = |error: PluginError| {
            assert_eq!(error.code(), 4);
            error.to_string()
        };
        assert!(text(command(&with(&[])).unwrap_err()).contains("CNI_COMMAND: is required"));
        assert!(text(command(&with(&[("CNI_COMMAND", "add")])).unwrap_err()).contains("\"add\" is none of"));
        let bad_id = with(&[("CNI_CONTAINERID", "../x"), ("CNI_IFNAME", "eth0")]);
        assert!(text(attachment(&bad_id).unwrap_err()).contains("CNI_CONTAINERID: must begin"));
        let long = with(&[("CNI_CONTAINERID", "x"), ("CNI_IFNAME", "sixteen-letters!")]);
        assert!(text(attachment(&long).unwrap_err()).contains("CNI_IFNAME: must have 1 to 15"));
        assert!(text(netns(&with(&[("CNI_NETNS", "run/x")])).unwrap_err()).contains("no absolute path"));
        assert!(text(pod(&with(&[("CNI_ARGS", "a;b=c")])).unwrap_err()).contains("\"a\" has no"));
        assert!(text(pod(&with(&[("CNI_ARGS", "K8S_POD_NAME=b")])).unwrap_err()).contains("without"));
        assert!(text(pod(&with(&[("CNI_ARGS", "IP=10.0.0.7")])).unwrap_err()).contains("capability \"ips\""));
        let with_mac = with(&[("CNI_ARGS", "IgnoreUnknown=1;MAC=02:00:00:00:00:01")]);
        assert!(text(pod(&with_mac).unwrap_err()).contains("MAC addresses are chosen by the agent"));
    }

    #[test]
    fn reads_the_pod_that_kubelet_names() {
        let args = with(&[(
            "CNI_ARGS",
            "IgnoreUnknown=1;IP=;MAC=;GREETING=hello;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=x;K8S_POD_UID=u-1",
        )]);
        let expected = PodRef { namespace: "ns".into(), name: "web-0".into(), uid: Some("u-1".into()) };
        assert_eq!(pod(&args).unwrap(), Some(expected));
        assert_eq!(pod(&with(&[])).unwrap(), None);
    }
}
