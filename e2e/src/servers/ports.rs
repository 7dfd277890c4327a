//! Free ports.

use std::net::{IpAddr, SocketAddr, TcpListener};

use anyhow::Context;

/// A TCP port that nobody listened on a moment ago. Somebody else may take it before its user does, so a server that
/// ends while it starts is started again on other ports.
pub fn free_port(address: IpAddr) -> anyhow::Result<u16> {
    let listener = TcpListener::bind(SocketAddr::new(address, 0)).with_context(|| format!("binding on {address}"))?;
    Ok(listener.local_addr()?.port())
}

/// How often a server that ends while it starts is tried on fresh ports.
pub(super) const ATTEMPTS: u32 = 3;
