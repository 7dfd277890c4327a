//! Addresses to listen on, as Cilium's keys have them: `localhost:9234`, `:9963`, `127.0.0.1:9234`, `[::]:9963`.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

/// A host and a port. An empty host is every address of the machine, `localhost` its loopback addresses; other names
/// are not looked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenAddress {
    host: Host,
    port: u16,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Host {
    All,
    Loopback,
    One(IpAddr),
}

/// The text names no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no address to listen on; write HOST:PORT with an IP address, `localhost` or nothing as HOST")]
pub struct ListenAddressError(String);

/// An address to try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Candidate {
    pub(super) address: SocketAddr,
    /// The ones after it are not needed when this one could be bound.
    pub(super) suffices: bool,
}

impl ListenAddress {
    pub(super) fn candidates(&self) -> Vec<Candidate> {
        let candidate = |ip: IpAddr, suffices| Candidate { address: SocketAddr::new(ip, self.port), suffices };
        match self.host {
            // The IPv6 wildcard takes IPv4 connections as well.
            Host::All => {
                vec![candidate(Ipv6Addr::UNSPECIFIED.into(), true), candidate(Ipv4Addr::UNSPECIFIED.into(), true)]
            }
            // With port 0 two sockets would get two ports.
            Host::Loopback => {
                vec![candidate(Ipv4Addr::LOCALHOST.into(), self.port == 0), candidate(Ipv6Addr::LOCALHOST.into(), true)]
            }
            Host::One(ip) => vec![candidate(ip, true)],
        }
    }
}

impl FromStr for ListenAddress {
    type Err = ListenAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ListenAddressError(text.to_owned());
        let (host, port) = text.rsplit_once(':').ok_or_else(error)?;
        let port = port.parse().map_err(|_bad| error())?;
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let host = match (host, bare) {
            ("", _) => Host::All,
            ("localhost", _) => Host::Loopback,
            (_, Some(ip)) => Host::One(IpAddr::V6(ip.parse().map_err(|_bad| error())?)),
            (ip, None) => Host::One(IpAddr::V4(ip.parse().map_err(|_bad| error())?)),
        };
        Ok(Self { host, port })
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host {
            Host::All => write!(f, ":{}", self.port),
            Host::Loopback => write!(f, "localhost:{}", self.port),
            Host::One(ip) => SocketAddr::new(ip, self.port).fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_ciliums_keys_parse_and_print() {
        for text in ["localhost:9234", ":9963", "127.0.0.1:80", "[::1]:80", "0.0.0.0:0"] {
            assert_eq!(text.parse::<ListenAddress>().unwrap().to_string(), text);
        }
        for text in ["", "9963", "localhost", "host.example:80", "::1:80", "1.2.3.4:70000", "[1.2.3.4]:1"] {
            assert_eq!(text.parse::<ListenAddress>(), Err(ListenAddressError(text.to_owned())));
        }
    }

    #[test]
    fn an_empty_host_prefers_one_socket_for_both_families() {
        let all = ":9963".parse::<ListenAddress>().unwrap().candidates();
        assert_eq!(all[0], Candidate { address: "[::]:9963".parse().unwrap(), suffices: true });
        let loopback = "localhost:9234".parse::<ListenAddress>().unwrap().candidates();
        assert_eq!(loopback.iter().map(|c| c.suffices).collect::<Vec<_>>(), [false, true]);
    }
}
