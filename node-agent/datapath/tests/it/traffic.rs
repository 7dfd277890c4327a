//! Who talks to whom.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use crate::harness::{Netns, Node};

/// Long enough to never decide a test that passes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// What a TCP server at `address` in `server` sends to a client of `to`: the address that the client came from.
pub(crate) fn tcp_source(server: &Netns, address: &str, client: &Netns, to: &str) -> SocketAddr {
    let listener = server.enter(|| TcpListener::bind(address).unwrap());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, from) = listener.accept().unwrap();
            stream.write_all(from.to_string().as_bytes()).unwrap();
            // More than one segment, both ways.
            stream.write_all(&[b' '; 100_000]).unwrap();
        });
        let mut stream = client.enter(|| TcpStream::connect_timeout(&to.parse().unwrap(), PATIENCE).unwrap());
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text.trim_end().parse().unwrap()
    })
}

/// A machine that knows node one by 172.16.0.1 and fd16::1, and no pods.
pub(crate) fn outside(node: &Node) -> Netns {
    let outside = Netns::new();
    node.netns.ip(&format!("link add w0 type veth peer name w0 netns {}", outside.path().display()));
    for (netns, last) in [(&node.netns, 1), (&outside, 2)] {
        netns.ip(&format!("addr add 172.16.0.{last}/24 dev w0"));
        netns.ip(&format!("addr add fd16::{last}/64 dev w0 nodad"));
        netns.ip("link set w0 up");
    }
    outside
}
