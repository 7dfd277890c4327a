//! Reading a JSON record field by field, so that an error names the field; and Go's texts for addresses and networks.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde_json::{Map, Value, json};

use crate::address::parse_ip;

/// Why a value in etcd is not the record that its key promises.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct RecordError {
    /// The field, as a path: `IPAddresses[1].IP`.
    pub field: String,
    /// What is wrong with it.
    pub problem: String,
}

impl RecordError {
    /// A problem of a field.
    pub(crate) fn new(field: impl Into<String>, problem: impl ToString) -> Self {
        Self { field: field.into(), problem: problem.to_string() }
    }
}

/// The value as text; `what` names it in the error.
pub(crate) fn text<'a>(what: &str, value: &'a [u8]) -> Result<&'a str, RecordError> {
    str::from_utf8(value).map_err(|_error| RecordError::new(what, "the value is not UTF-8"))
}

/// The fields of a JSON object. A field that is missing and one that is `null` are the same, as for Go's decoder.
pub(crate) struct Fields<'a> {
    path: String,
    map: &'a Map<String, Value>,
}

/// Reads a value as JSON; `what` names the record in the error.
pub(crate) fn parse_json(what: &str, value: &[u8]) -> Result<Value, RecordError> {
    serde_json::from_slice(value).map_err(|error| RecordError::new(what, format!("the value is not JSON: {error}")))
}

impl<'a> Fields<'a> {
    /// The fields of the record `what`.
    pub(crate) fn of(what: &str, value: &'a Value) -> Result<Self, RecordError> {
        let map = value.as_object().ok_or_else(|| RecordError::new(what, wanted("a JSON object", value)))?;
        Ok(Self { path: String::new(), map })
    }

    fn inside(path: String, value: &'a Value) -> Result<Self, RecordError> {
        let map = value.as_object().ok_or_else(|| RecordError::new(path.as_str(), wanted("a JSON object", value)))?;
        Ok(Self { path, map })
    }

    /// The path of a field.
    pub(crate) fn path(&self, field: &str) -> String {
        if self.path.is_empty() { field.to_owned() } else { format!("{}.{field}", self.path) }
    }

    /// An error of a field.
    pub(crate) fn error(&self, field: &str, problem: impl ToString) -> RecordError {
        RecordError::new(self.path(field), problem)
    }

    fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    /// A text; empty when there is none.
    pub(crate) fn string(&self, field: &str) -> Result<&'a str, RecordError> {
        let Some(value) = self.get(field) else { return Ok("") };
        value.as_str().ok_or_else(|| self.error(field, wanted("a string", value)))
    }

    /// A whole number of at most `max`; 0 when there is none.
    pub(crate) fn number(&self, field: &str, max: u32) -> Result<u32, RecordError> {
        let Some(value) = self.get(field) else { return Ok(0) };
        let number = value.as_u64().and_then(|n| u32::try_from(n).ok()).filter(|n| *n <= max);
        number.ok_or_else(|| self.error(field, wanted(&format!("a whole number from 0 to {max}"), value)))
    }

    /// A number of 8 bits; 0 when there is none.
    pub(crate) fn byte(&self, field: &str) -> Result<u8, RecordError> {
        let number = self.number(field, u8::MAX.into())?;
        u8::try_from(number).map_err(|error| self.error(field, error))
    }

    /// A boolean, if there is one.
    pub(crate) fn boolean(&self, field: &str) -> Result<Option<bool>, RecordError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.error(field, wanted("true or false", value)))
    }

    /// An address (Go's `net.IP`); none for `""`.
    pub(crate) fn ip(&self, field: &str) -> Result<Option<IpAddr>, RecordError> {
        match self.string(field)? {
            "" => Ok(None),
            text => parse_ip(text).map(Some).ok_or_else(|| self.error(field, wanted("an IP address", &json!(text)))),
        }
    }

    /// An IPv4 address; none for `""`.
    pub(crate) fn ipv4(&self, field: &str) -> Result<Option<Ipv4Addr>, RecordError> {
        match self.ip(field)? {
            None => Ok(None),
            Some(IpAddr::V4(ip)) => Ok(Some(ip)),
            Some(IpAddr::V6(ip)) => Err(self.error(field, format!("{ip} is not an IPv4 address"))),
        }
    }

    /// An IPv6 address; none for `""`.
    pub(crate) fn ipv6(&self, field: &str) -> Result<Option<Ipv6Addr>, RecordError> {
        match self.ip(field)? {
            None => Ok(None),
            Some(IpAddr::V6(ip)) => Ok(Some(ip)),
            Some(IpAddr::V4(ip)) => Err(self.error(field, format!("{ip} is not an IPv6 address"))),
        }
    }

    /// A map of texts; empty when there is none.
    pub(crate) fn texts(&self, field: &str) -> Result<BTreeMap<String, String>, RecordError> {
        let Some(value) = self.get(field) else { return Ok(BTreeMap::new()) };
        let inner = Self::inside(self.path(field), value)?;
        inner.map.keys().map(|key| Ok((key.clone(), inner.string(key)?.to_owned()))).collect()
    }

    /// The objects of a list; none when there is no list.
    pub(crate) fn objects(&self, field: &str) -> Result<Vec<Self>, RecordError> {
        self.items(field)?
            .iter()
            .enumerate()
            .map(|(i, item)| Self::inside(self.path(&format!("{field}[{i}]")), item))
            .collect()
    }

    /// An object; `None` when there is none.
    pub(crate) fn object(&self, field: &str) -> Result<Option<Self>, RecordError> {
        self.get(field).map(|value| Self::inside(self.path(field), value)).transpose()
    }

    fn items(&self, field: &str) -> Result<&'a [Value], RecordError> {
        let Some(value) = self.get(field) else { return Ok(&[]) };
        value.as_array().map(Vec::as_slice).ok_or_else(|| self.error(field, wanted("a list", value)))
    }

    /// The mask of an ip record (Go's `net.IPMask`), as prefix length for `ip`; `None` when there is none.
    pub(crate) fn mask(&self, field: &str, ip: IpAddr) -> Result<Option<u8>, RecordError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        read_mask(value, ip).map(Some).map_err(|problem| self.error(field, problem))
    }

    /// The networks of a primary field and of the list of secondary ones, of one family.
    pub(crate) fn networks<N>(
        &self,
        primary: &str,
        secondary: &str,
        family: impl Fn(IpNet) -> Result<N, String>,
    ) -> Result<Vec<N>, RecordError> {
        let read = |path: String, value: &Value| {
            read_network(value).and_then(&family).map_err(|problem| RecordError::new(path, problem))
        };
        let first = self.get(primary).map(|value| read(self.path(primary), value));
        let rest = self.items(secondary)?.iter().enumerate();
        let rest = rest.filter(|(_, v)| !v.is_null()).map(|(i, v)| read(self.path(&format!("{secondary}[{i}]")), v));
        first.into_iter().chain(rest).collect()
    }
}

/// Takes an IPv4 network only.
pub(crate) fn only_ipv4(network: IpNet) -> Result<Ipv4Net, String> {
    match network {
        IpNet::V4(network) => Ok(network),
        IpNet::V6(network) => Err(format!("{network} is not an IPv4 network")),
    }
}

/// Takes an IPv6 network only.
pub(crate) fn only_ipv6(network: IpNet) -> Result<Ipv6Net, String> {
    match network {
        IpNet::V6(network) => Ok(network),
        IpNet::V4(network) => Err(format!("{network} is not an IPv6 network")),
    }
}

/// A network as Go's `net.IPNet` is encoded: the network address, and the bytes of the mask in base64.
pub(crate) fn write_network(network: IpNet) -> Value {
    let network = network.trunc();
    json!({ "IP": network.addr().to_string(), "Mask": write_mask(network) })
}

/// The mask of a network as Go's `net.IPMask` is encoded: its 4 or 16 bytes in base64 (standard alphabet, padded).
pub(crate) fn write_mask(network: IpNet) -> Value {
    let mask = match network {
        IpNet::V4(network) => BASE64_STANDARD.encode(network.netmask().octets()),
        IpNet::V6(network) => BASE64_STANDARD.encode(network.netmask().octets()),
    };
    Value::String(mask)
}

/// Reads both forms that Cilium 1.20 reads: `{"IP", "Mask"}` and `"10.244.1.0/24"`. Host bits are cut off.
fn read_network(value: &Value) -> Result<IpNet, String> {
    if let Some(text) = value.as_str() {
        return text.parse().map(|network: IpNet| network.trunc()).map_err(|_error| wanted("a CIDR", value));
    }
    let object = value.as_object().ok_or_else(|| wanted("a CIDR or an object with IP and Mask", value))?;
    let ip = object.get("IP").and_then(Value::as_str).unwrap_or_default();
    let ip = parse_ip(ip).ok_or_else(|| format!("IP: {}", wanted("an IP address", &json!(ip))))?;
    let prefix =
        read_mask(object.get("Mask").unwrap_or(&Value::Null), ip).map_err(|problem| format!("Mask: {problem}"))?;
    IpNet::new(ip, prefix).map(|network| network.trunc()).map_err(|error| format!("Mask: {error}"))
}

/// Reads a mask into the prefix length for `ip`: as many bytes as the address has, ones before zeros.
fn read_mask(value: &Value, ip: IpAddr) -> Result<u8, String> {
    let wanted = |what: &str| wanted(what, value);
    let text = value.as_str().ok_or_else(|| wanted("a mask in base64"))?;
    let bytes = BASE64_STANDARD.decode(text).map_err(|_error| wanted("a mask in base64"))?;
    let mask = match (ip, bytes.len()) {
        (IpAddr::V4(_), 4) => {
            <[u8; 4]>::try_from(bytes.as_slice()).ok().map(|octets| IpAddr::from(Ipv4Addr::from(octets)))
        }
        (IpAddr::V6(_), 16) => {
            <[u8; 16]>::try_from(bytes.as_slice()).ok().map(|octets| IpAddr::from(Ipv6Addr::from(octets)))
        }
        _ => None,
    };
    let mask = mask.ok_or_else(|| wanted("a mask of 4 bytes for IPv4 or 16 for IPv6, in base64,"))?;
    ipnet::ip_mask_to_prefix(mask).map_err(|_error| wanted("a mask of ones before zeros"))
}

/// "X is wanted, not Y", with Y cut to a readable length.
fn wanted(what: &str, found: &Value) -> String {
    let mut found = found.to_string();
    if found.chars().count() > 64 {
        found = found.chars().take(64).chain("…".chars()).collect();
    }
    format!("{what} is wanted, not {found}")
}
