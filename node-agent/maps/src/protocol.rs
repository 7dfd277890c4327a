//! Protocol numbers (IANA).

/// Hop-by-hop options of IPv6.
pub const HOP_BY_HOP: u8 = 0;
/// ICMP for IPv4.
pub const ICMP: u8 = 1;
/// TCP.
pub const TCP: u8 = 6;
/// UDP.
pub const UDP: u8 = 17;
/// DCCP.
pub const DCCP: u8 = 33;
/// Routing header of IPv6.
pub const ROUTING: u8 = 43;
/// Fragment header of IPv6.
pub const FRAGMENT: u8 = 44;
/// Authentication header.
pub const AUTHENTICATION: u8 = 51;
/// ICMP for IPv6.
pub const ICMPV6: u8 = 58;
/// Destination options of IPv6.
pub const DESTINATION_OPTIONS: u8 = 60;
/// SCTP.
pub const SCTP: u8 = 132;
/// UDP-Lite.
pub const UDP_LITE: u8 = 136;
