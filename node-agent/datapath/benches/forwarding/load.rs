//! A small client and server: turns of one byte, connections, and packets as fast as one thread sends them.

use std::{
    hint::spin_loop,
    io::{self, ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    thread::{self, ScopedJoinHandle},
    time::Duration,
};

use anyhow::anyhow;
use basal_e2e::wait::Stopwatch;
use nix::sys::{
    socket::{AddressFamily, SockFlag, SockProtocol, SockType, setsockopt, socket, sockopt::ReceiveTimeout},
    time::{TimeVal, TimeValLike as _},
};

use super::worlds::Way;
use crate::bench::ECHO;

/// Where servers listen.
const PORT: u16 = 7007;
/// Nothing that goes well takes as long.
const PATIENCE: Duration = Duration::from_secs(5);
/// Payload of the packets that are counted, in bytes.
const SMALL: usize = 64;
/// Packets between two looks at the clock.
const BURST: usize = 64;
/// The byte that is sent to and fro.
const TURN: [u8; 1] = [b'.'];
/// The byte that ends a server.
const END: [u8; 1] = [b'!'];

/// A TCP server in the server's pod; waiting for a connection or for its bytes fails after a while.
fn listen(way: &Way<'_>) -> anyhow::Result<TcpListener> {
    let listener = way.server.netns.enter(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)))?;
    // Accepting heeds this, and what is accepted inherits it.
    setsockopt(&listener, ReceiveTimeout, &TimeVal::seconds(PATIENCE.as_secs().try_into()?))?;
    Ok(listener)
}

/// UDP sockets in both pods, the client's bound to the server's address.
fn datagrams(way: &Way<'_>) -> anyhow::Result<(UdpSocket, UdpSocket)> {
    let server = way.server.netns.enter(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)))?;
    let client = way.client.enter(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))?;
    client.connect((way.server.v4, PORT))?;
    client.set_read_timeout(Some(PATIENCE))?;
    server.set_read_timeout(Some(PATIENCE))?;
    Ok((client, server))
}

/// Connects as the client, whose thread this must be.
fn connect(way: &Way<'_>) -> io::Result<TcpStream> {
    TcpStream::connect_timeout(&SocketAddr::from((way.server.v4, PORT)), PATIENCE)
}

/// Takes turns until the time is over: how long each took, in microseconds, the shortest first.
fn turns(time: Duration, mut turn: impl FnMut() -> io::Result<()>) -> io::Result<Vec<f64>> {
    let whole = Stopwatch::start();
    let mut took = Vec::new();
    while whole.elapsed() < time {
        let one = Stopwatch::start();
        turn()?;
        took.push(one.elapsed().as_secs_f64() * 1e6);
    }
    took.sort_by(f64::total_cmp);
    Ok(took)
}

/// One byte to and fro over one TCP connection.
pub(crate) fn tcp_turns(way: &Way<'_>, time: Duration) -> anyhow::Result<Vec<f64>> {
    let listener = listen(way)?;
    thread::scope(|scope| {
        let server = scope.spawn(|| {
            let (mut stream, _) = listener.accept()?;
            stream.set_nodelay(true)?;
            let mut byte = TURN;
            while stream.read(&mut byte)? == 1 {
                stream.write_all(&byte)?;
            }
            Ok(())
        });
        let took = way.client.enter(|| {
            let mut stream = connect(way)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut byte = TURN;
            turns(time, || {
                stream.write_all(&byte)?;
                stream.read_exact(&mut byte)
            })
        });
        both(took, server)
    })
}

/// One byte to and fro by UDP.
pub(crate) fn udp_turns(way: &Way<'_>, time: Duration) -> anyhow::Result<Vec<f64>> {
    let (client, server) = datagrams(way)?;
    thread::scope(|scope| {
        let server = scope.spawn(|| {
            let mut byte = TURN;
            loop {
                let (_, from) = server.recv_from(&mut byte)?;
                if byte == END {
                    return Ok(());
                }
                server.send_to(&byte, from)?;
            }
        });
        let mut byte = TURN;
        let took = turns(time, || {
            client.send(&byte)?;
            client.recv(&mut byte).map(drop)
        });
        client.send(&END)?;
        both(took, server)
    })
}

/// ICMP echo requests, each after the answer to the one before; the server's kernel answers.
pub(crate) fn icmp_turns(way: &Way<'_>, time: Duration) -> anyhow::Result<Vec<f64>> {
    let (family, flags) = (AddressFamily::Inet, SockFlag::SOCK_CLOEXEC);
    let raw = way.client.enter(|| socket(family, SockType::Raw, flags, SockProtocol::Icmp))?;
    // The standard library's type serves for any socket of datagrams.
    let raw = UdpSocket::from(raw);
    raw.connect((way.server.v4, 0))?;
    raw.set_read_timeout(Some(PATIENCE))?;
    let mut answer = [0; 64];
    let took = turns(time, || {
        raw.send(&ECHO)?;
        raw.recv(&mut answer).map(drop)
    })?;
    Ok(took)
}

/// Connections with one byte each way, one after the other. The server closes first, so that the client's ports are free
/// again at once.
pub(crate) fn connections(way: &Way<'_>, time: Duration) -> anyhow::Result<Vec<f64>> {
    let listener = listen(way)?;
    thread::scope(|scope| {
        let server = scope.spawn(|| {
            let mut byte = TURN;
            loop {
                let (mut stream, _) = listener.accept()?;
                stream.read_exact(&mut byte)?;
                if byte == END {
                    return Ok(());
                }
                stream.write_all(&byte)?;
            }
        });
        let took = way.client.enter(|| {
            let took = turns(time, || {
                let mut stream = connect(way)?;
                stream.write_all(&TURN)?;
                let mut answer = Vec::with_capacity(TURN.len());
                stream.read_to_end(&mut answer)?;
                if answer == TURN { Ok(()) } else { Err(io::Error::from(ErrorKind::UnexpectedEof)) }
            });
            connect(way)?.write_all(&END)?;
            took
        });
        both(took, server)
    })
}

/// Small UDP packets from one thread to another: how many arrive in a second. The receiver never sleeps, because waking
/// it would cost the sender more than the packet's way does.
pub(crate) fn udp_packets(way: &Way<'_>, time: Duration) -> anyhow::Result<f64> {
    let (client, server) = datagrams(way)?;
    server.set_nonblocking(true)?;
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let received = scope.spawn(|| {
            let (mut count, mut packet) = (0_u32, [0; SMALL]);
            loop {
                match server.recv(&mut packet) {
                    Ok(_) => count += 1,
                    Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
                    Err(_) if over.load(Ordering::Acquire) => return Ok(count),
                    Err(_) => spin_loop(),
                }
            }
        });
        let watch = Stopwatch::start();
        let mut sent = Ok(());
        while sent.is_ok() && watch.elapsed() < time {
            sent = (0..BURST).try_for_each(|_| client.send(&[0; SMALL]).map(drop));
        }
        let seconds = watch.elapsed().as_secs_f64();
        over.store(true, Ordering::Release);
        let received = joined(received)?;
        sent?;
        Ok(f64::from(received) / seconds)
    })
}

/// What the client found, when both it and the server came to their end.
fn both<T>(client: io::Result<T>, server: ScopedJoinHandle<'_, io::Result<()>>) -> anyhow::Result<T> {
    let server = joined(server);
    let found = client?;
    server?;
    Ok(found)
}

fn joined<T>(thread: ScopedJoinHandle<'_, io::Result<T>>) -> anyhow::Result<T> {
    Ok(thread.join().map_err(|_panic| anyhow!("a thread of the bench panicked"))??)
}
