//! Why a packet was counted or dropped. Numbers and texts are a contract with Hubble and with whoever reads
//! `cilium_metrics`; Cilium's table is reproduced whole, so that a reader can name what another writer counted.
//! Codes of Basal's own would start at 208.

/// A reason, as the first byte of [`crate::metrics::MetricsKey`] holds it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Reason(pub u8);

impl Reason {
    /// Passed on.
    pub const FORWARDED: Self = Self(0);
    /// Received from another node, or from outside, unencrypted.
    pub const PLAINTEXT: Self = Self(3);
    /// The source MAC address is not the sender's.
    pub const INVALID_SOURCE_MAC: Self = Self(130);
    /// A packet for one receiver in a frame for many.
    pub const INVALID_DESTINATION_MAC: Self = Self(131);
    /// The source address is not the sender's.
    pub const INVALID_SOURCE_IP: Self = Self(132);
    /// A header is cut short or contradicts itself.
    pub const INVALID_PACKET: Self = Self(134);
    /// Neither IPv4, IPv6 nor ARP.
    pub const UNSUPPORTED_L3: Self = Self(139);
    /// The packet could not be rewritten.
    pub const WRITE_ERROR: Self = Self(141);
    /// A packet on the tunnel device without tunnel information, or one that could not be given some.
    pub const NO_TUNNEL_KEY: Self = Self(147);
    /// Neighbour discovery for an address that nobody here answers for.
    pub const UNKNOWN_TARGET: Self = Self(150);
    /// An address that leads to nobody: one of the cluster's network that nobody has, or a group's.
    pub const UNROUTABLE: Self = Self(151);
    /// The destination's row has no node to tunnel to.
    pub const NO_TUNNEL_ENDPOINT: Self = Self(160);
    /// No port is free to masquerade the flow with, or the map is full.
    pub const NO_NAT_MAPPING: Self = Self(167);
    /// A packet of a protocol, or of a kind of ICMP, that cannot be masqueraded.
    pub const UNSUPPORTED_BY_NAT: Self = Self(168);
    /// Not Ethernet-framed as expected.
    pub const UNSUPPORTED_L2: Self = Self(166);
    /// An endpoint tried to send VXLAN packets to nodes itself.
    pub const ENCAPSULATION_PROHIBITED: Self = Self(170);
    /// A source identity that nobody may send with.
    pub const INVALID_IDENTITY: Self = Self(171);
    /// A fragment whose first one, which has the ports, did not come by.
    pub const NO_FIRST_FRAGMENT: Self = Self(175);
    /// A frame with a VLAN tag.
    pub const VLAN_FILTERED: Self = Self(182);
    /// The endpoint exists and its policy program is not in place.
    pub const ENDPOINT_NOT_READY: Self = Self(203);

    /// True for reasons that mean that the packet is gone.
    #[must_use]
    pub const fn is_drop(self) -> bool {
        self.0 >= 130
    }

    /// Cilium's text; `None` for a number that has none.
    #[must_use]
    pub const fn text(self) -> Option<&'static str> {
        Some(match self.0 {
            0 => "Success",
            2 => "Invalid packet",
            3 => "Interface",
            4 => "Interface Decrypted",
            9 => "Fragmented packet",
            10 => "Fragmented packet entry update failed",
            12 => "Interface Decrypting",
            13 => "Interface Encrypting",
            14 => "LB reverse entry deleted",
            15 => "MTU error message",
            130 => "Invalid source mac",
            131 => "Invalid destination mac",
            132 => "Invalid source ip",
            133 => "Policy denied",
            134 => "Invalid packet",
            135 => "CT: Truncated or invalid header",
            136 => "Fragmentation needed",
            137 => "CT: Unknown L4 protocol",
            138 => "CT: Can't create entry from packet",
            139 => "Unsupported L3 protocol",
            140 => "Missed tail call",
            141 => "Error writing to packet",
            142 => "Unknown L4 protocol",
            143 => "Unknown ICMPv4 code",
            144 => "Unknown ICMPv4 type",
            145 => "Unknown ICMPv6 code",
            146 => "Unknown ICMPv6 type",
            147 => "Error retrieving tunnel key",
            150 => "Unknown L3 target address",
            151 => "Stale or unroutable IP",
            153 => "Error while correcting L3 checksum",
            154 => "Error while correcting L4 checksum",
            155 => "CT: Map insertion failed",
            156 => "Invalid IPv6 extension header",
            157 => "IP fragmentation not supported",
            158 => "Service backend not found",
            160 => "No tunnel/encapsulation endpoint (datapath BUG!)",
            161 => "NAT 46/64 not enabled",
            162 => "Reached EDT rate-limiting drop horizon",
            163 => "Unknown connection tracking state",
            164 => "Local host is unreachable",
            165 => "No configuration available to perform policy decision",
            166 => "Unsupported L2 protocol",
            167 => "No mapping for NAT masquerade",
            168 => "Unsupported protocol for NAT masquerade",
            169 => "FIB lookup failed",
            170 => "Encapsulation traffic is prohibited",
            171 => "Invalid identity",
            172 => "Unknown sender",
            173 => "NAT not needed",
            174 => "Is a ClusterIP",
            175 => "First logical datagram fragment not found",
            176 => "Forbidden ICMPv6 message",
            177 => "Denied by LB src range check",
            178 => "Socket lookup failed",
            179 => "Socket assign failed",
            180 => "Proxy redirection not supported for protocol",
            181 => "Policy denied by denylist",
            182 => "VLAN traffic disallowed by VLAN filter",
            183 => "Incorrect VNI from VTEP",
            184 => "Failed to update or lookup TC buffer",
            185 => "No SID was found for the IP address",
            186 => "SRv6 state was removed during tail call",
            187 => "L3 translation from IPv4 to IPv6 failed (NAT46)",
            188 => "L3 translation from IPv6 to IPv4 failed (NAT64)",
            189 => "Authentication required",
            190 => "No conntrack map found",
            191 => "No nat map found",
            192 => "Invalid ClusterID",
            193 => "Unsupported packet protocol for DSR encapsulation",
            194 => "No egress gateway found",
            195 => "Traffic is unencrypted",
            196 => "TTL exceeded",
            197 => "No node ID found",
            198 => "Rate limited",
            199 => "IGMP handled",
            200 => "IGMP subscribed",
            201 => "Multicast handled",
            202 => "Host datapath not ready",
            203 => "Endpoint policy program not available",
            204 => "No Egress IP configured",
            205 => "Punt to proxy",
            206 => "No device",
            207 => "First logical datagram fragment not found from world",
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_the_contract() {
        for (reason, text) in [
            (Reason::FORWARDED, "Success"),
            (Reason::PLAINTEXT, "Interface"),
            (Reason::INVALID_SOURCE_MAC, "Invalid source mac"),
            (Reason::INVALID_DESTINATION_MAC, "Invalid destination mac"),
            (Reason::INVALID_SOURCE_IP, "Invalid source ip"),
            (Reason::UNSUPPORTED_L3, "Unsupported L3 protocol"),
            (Reason::UNROUTABLE, "Stale or unroutable IP"),
            (Reason::NO_TUNNEL_ENDPOINT, "No tunnel/encapsulation endpoint (datapath BUG!)"),
            (Reason::INVALID_IDENTITY, "Invalid identity"),
            (Reason::VLAN_FILTERED, "VLAN traffic disallowed by VLAN filter"),
            (Reason::ENDPOINT_NOT_READY, "Endpoint policy program not available"),
            (Reason(207), "First logical datagram fragment not found from world"),
        ] {
            assert_eq!(reason.text(), Some(text));
        }
        assert_eq!(Reason(148).text(), None);
        assert_eq!(Reason(208).text(), None);
        assert!(Reason::INVALID_SOURCE_IP.is_drop() && !Reason::PLAINTEXT.is_drop());
    }
}
