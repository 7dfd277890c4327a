//! The record of an address: `cilium/state/ip/v1/default/<address or CIDR>`, Cilium's `IPIdentityPair`.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Map, Value, json};

use super::{
    fields::{Fields, RecordError, parse_json, write_mask},
    keys::IpTarget,
};
use crate::identity::IdentityId;

/// Which identity an address has, and behind which node it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IpRecord {
    /// The address or network.
    pub target: IpTarget,
    /// The node's address that packets are tunnelled to.
    pub host_ip: Option<IpAddr>,
    /// The identity.
    pub identity: IdentityId,
    /// The index of the IPsec key; 0 without encryption.
    pub encryption_key: u8,
    /// Not used by Cilium 1.20; empty.
    pub metadata: String,
    /// The pod's namespace; empty for an address that is no pod's.
    pub namespace: String,
    /// The pod's name.
    pub pod_name: String,
    /// The pod's service account.
    pub service_account: String,
    /// The pod's named ports.
    pub named_ports: Vec<NamedPort>,
}

/// A port of a pod that has a name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct NamedPort {
    /// The name.
    pub name: String,
    /// The number, in host byte order.
    pub port: u16,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
}

impl IpRecord {
    /// A record with nothing beside address, node and identity.
    #[must_use]
    pub fn new(target: IpTarget, host_ip: IpAddr, identity: IdentityId) -> Self {
        Self {
            target,
            host_ip: Some(host_ip),
            identity,
            encryption_key: 0,
            metadata: String::new(),
            namespace: String::new(),
            pod_name: String::new(),
            service_account: String::new(),
            named_ports: Vec::new(),
        }
    }

    /// The record's text, in the form of 1.20: `Mask` is there even when it is `null`.
    #[must_use]
    pub fn to_json(&self) -> String {
        let mask = match self.target {
            IpTarget::Host(_) => Value::Null,
            IpTarget::Network(network) => write_mask(network),
        };
        let mut record = Map::new();
        let mut put = |field: &str, value: Value| record.insert(field.to_owned(), value);
        put("IP", json!(self.target.ip().to_string()));
        put("Mask", mask);
        put("HostIP", json!(self.host_ip.map(|ip| ip.to_string()).unwrap_or_default()));
        put("ID", json!(self.identity.get()));
        put("Key", json!(self.encryption_key));
        put("Metadata", json!(self.metadata));
        let texts = [
            ("K8sNamespace", &self.namespace),
            ("K8sPodName", &self.pod_name),
            ("K8sServiceAccount", &self.service_account),
        ];
        for (field, text) in texts.into_iter().filter(|(_, text)| !text.is_empty()) {
            put(field, json!(text));
        }
        if !self.named_ports.is_empty() {
            let port = |p: &NamedPort| json!({ "Name": p.name, "Port": p.port, "Protocol": p.protocol });
            put("NamedPorts", self.named_ports.iter().map(port).collect());
        }
        Value::Object(record).to_string()
    }

    /// Reads a record of any release.
    ///
    /// # Errors
    /// [`RecordError`] names the first field that is missing or does not parse.
    pub fn parse(value: &[u8]) -> Result<Self, RecordError> {
        let value = parse_json("ip record", value)?;
        let fields = Fields::of("ip record", &value)?;
        let ip = fields.ip("IP")?.ok_or_else(|| fields.error("IP", "an IP address is wanted, and there is none"))?;
        let target = match fields.mask("Mask", ip)? {
            None => IpTarget::Host(ip),
            Some(length) => IpTarget::Network(IpNet::new(ip, length).map_err(|error| fields.error("Mask", error))?),
        };
        let mut named_ports = Vec::new();
        for port in fields.objects("NamedPorts")? {
            let number = u16::try_from(port.number("Port", u16::MAX.into())?).map_err(|e| port.error("Port", e))?;
            let name = port.string("Name")?.to_owned();
            named_ports.push(NamedPort { name, port: number, protocol: port.string("Protocol")?.to_owned() });
        }
        Ok(Self {
            target,
            host_ip: fields.ip("HostIP")?,
            identity: IdentityId::new(fields.number("ID", u32::MAX)?),
            encryption_key: fields.byte("Key")?,
            metadata: fields.string("Metadata")?.to_owned(),
            namespace: fields.string("K8sNamespace")?.to_owned(),
            pod_name: fields.string("K8sPodName")?.to_owned(),
            service_account: fields.string("K8sServiceAccount")?.to_owned(),
            named_ports,
        })
    }

    /// Reads a record and checks that it is the one its key names.
    ///
    /// # Errors
    /// As [`IpRecord::parse`]; also when the address differs from the key's.
    pub fn parse_for(target: IpTarget, value: &[u8]) -> Result<Self, RecordError> {
        let record = Self::parse(value)?;
        if record.target != target {
            return Err(RecordError::new("IP", format!("the record is of {}, its key of {target}", record.target)));
        }
        Ok(record)
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;

    /// The form of 1.20 for a pod.
    const POD: &str = concat!(
        r#"{"IP":"10.244.1.35","Mask":null,"HostIP":"172.18.0.3","ID":196915,"Key":0,"Metadata":"","#,
        r#""K8sNamespace":"bar","K8sPodName":"baz-1","K8sServiceAccount":"default","#,
        r#""NamedPorts":[{"Name":"http","Port":80,"Protocol":"TCP"}]}"#
    );
    /// The form of 1.20 for an address that is no pod's.
    const PLAIN: &str = r#"{"IP":"fd00::1","Mask":null,"HostIP":"","ID":4,"Key":255,"Metadata":""}"#;
    const NETWORK: &str = r#"{"IP":"10.0.0.0","Mask":"////AA==","HostIP":"172.18.0.3","ID":2,"Key":0,"Metadata":""}"#;

    fn error(text: &str) -> String {
        IpRecord::parse(text.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn samples_are_read_and_written_byte_for_byte() {
        for sample in [POD, PLAIN, NETWORK] {
            assert_eq!(IpRecord::parse(sample.as_bytes()).unwrap().to_json(), sample);
        }
        let pod = IpRecord::parse(POD.as_bytes()).unwrap();
        assert_eq!(pod.identity, IdentityId::new(196_915));
        assert_eq!(pod.named_ports, [NamedPort { name: "http".to_owned(), port: 80, protocol: "TCP".to_owned() }]);
        assert_eq!(IpRecord::parse(NETWORK.as_bytes()).unwrap().target.to_string(), "10.0.0.0/24");
    }

    #[test]
    fn the_form_of_later_releases_is_read() {
        let later = r#"{"IP":"10.0.0.1","HostIP":"172.18.0.3","ID":300,"Key":0,"Metadata":"","K8sPodUID":"x","K8sNamespace":"n"}"#;
        let record = IpRecord::parse(later.as_bytes()).unwrap();
        let wanted = IpRecord {
            namespace: "n".to_owned(),
            ..IpRecord::new(IpTarget::Host([10, 0, 0, 1].into()), [172, 18, 0, 3].into(), IdentityId::new(300))
        };
        assert_eq!(record, wanted);
    }

    #[test]
    fn garbage_is_refused_with_the_field() {
        assert_eq!(error("{}"), "IP: an IP address is wanted, and there is none");
        assert_eq!(error(r#"{"IP":"x"}"#), "IP: an IP address is wanted, not \"x\"");
        assert_eq!(
            error(r#"{"IP":"::1","ID":4294967296}"#),
            "ID: a whole number from 0 to 4294967295 is wanted, not 4294967296"
        );
        assert_eq!(error(r#"{"IP":"::1","HostIP":1}"#), "HostIP: a string is wanted, not 1");
        assert_eq!(error(r#"{"IP":"::1","Mask":"?"}"#), "Mask: a mask in base64 is wanted, not \"?\"");
        assert_eq!(
            error(r#"{"IP":"::1","NamedPorts":[{"Name":"a"},{"Port":65536}]}"#),
            "NamedPorts[1].Port: a whole number from 0 to 65535 is wanted, not 65536"
        );
    }

    #[test]
    fn a_record_belongs_to_its_key() {
        let target = |text: &str| IpTarget::Host(text.parse().unwrap());
        assert!(IpRecord::parse_for(target("10.244.1.35"), POD.as_bytes()).is_ok());
        assert_eq!(
            IpRecord::parse_for(target("10.244.1.36"), POD.as_bytes()).unwrap_err().to_string(),
            "IP: the record is of 10.244.1.35, its key of 10.244.1.36"
        );
    }

    proptest! {
        #[test]
        fn records_are_read_back(
            ip in any::<Ipv4Addr>(),
            length in proptest::option::of(0u8..=32),
            host_ip in any::<Option<Ipv4Addr>>(),
            numbers in any::<(u32, u8)>(),
            texts in proptest::array::uniform3("[a-z0-9-]{0,8}"),
            ports in proptest::collection::vec(("[a-z]{1,8}", any::<u16>(), "TCP|UDP|SCTP"), 0..3),
        ) {
            let target = match length {
                None => IpTarget::Host(ip.into()),
                Some(length) => IpTarget::Network(IpNet::new(ip.into(), length).unwrap().trunc()),
            };
            let [namespace, pod_name, service_account] = texts;
            let named_ports = ports.into_iter().map(|(name, port, protocol)| NamedPort { name, port, protocol });
            let record = IpRecord {
                target,
                host_ip: host_ip.map(IpAddr::from),
                identity: IdentityId::new(numbers.0),
                encryption_key: numbers.1,
                metadata: String::new(),
                namespace,
                pod_name,
                service_account,
                named_ports: named_ports.collect(),
            };
            prop_assert_eq!(IpRecord::parse_for(target, record.to_json().as_bytes()), Ok(record));
        }

        #[test]
        fn no_bytes_panic(value in proptest::collection::vec(any::<u8>(), 0..64)) {
            prop_assert!(IpRecord::parse(&value).is_err());
        }
    }
}
