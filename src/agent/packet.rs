//! Interfaces, and frames as they are.

use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::libc;
use nix::sys::socket::{LinkAddr, MsgFlags, bind, recvfrom, sendto};
use socket2::{Domain, Protocol, Socket, Type};

use super::client::{from_hex, to_hex};
use super::protocol::Interface;

/// What the kernel is asked to queue of what is captured, in bytes.
const QUEUE_BYTES: usize = 8 << 20;
/// Frames a capture keeps; later ones are lost.
const MAX_FRAMES: usize = 4096;
/// Every protocol, in the byte order the system asks for.
const ALL_PROTOCOLS: i32 = (libc::ETH_P_ALL as u16).to_be() as i32;

pub(super) fn interfaces() -> io::Result<Vec<Interface>> {
    let mut rows = Vec::<Interface>::new();
    let mut macs = Vec::new();
    for row in getifaddrs()? {
        let address = row.address.as_ref();
        if let Some(link) = address.and_then(|address| address.as_link_addr()) {
            let bytes = link.addr().unwrap_or_default();
            let mac = bytes.map(|byte| format!("{byte:02x}")).join(":");
            macs.push((row.interface_name, mac));
            continue;
        }
        let inet = address.and_then(|address| address.as_sockaddr_in());
        let inet6 = address.and_then(|address| address.as_sockaddr_in6());
        let ip = inet.map(|inet| IpAddr::V4(inet.ip()));
        if let Some(ip) = ip.or_else(|| inet6.map(|inet| IpAddr::V6(inet.ip()))) {
            rows.push(Interface {
                name: row.interface_name,
                address: Some(ip),
                mac: None,
            });
        }
    }
    for (name, mac) in macs {
        if !rows.iter().any(|row| row.name == name) {
            rows.push(Interface {
                name: name.clone(),
                address: None,
                mac: None,
            });
        }
        for row in rows.iter_mut().filter(|row| row.name == name) {
            row.mac = Some(mac.clone());
        }
    }
    Ok(rows)
}

/// An interface's address for a packet socket.
fn link(interface: &str) -> io::Result<LinkAddr> {
    getifaddrs()?
        .filter(|row| row.interface_name == interface)
        .find_map(|row| row.address?.as_link_addr().copied())
        .ok_or_else(|| io::Error::other(format!("there is no such interface: {interface}")))
}

fn packet_socket(protocol: i32) -> io::Result<Socket> {
    Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(protocol)))
}

/// Sends frames. Its socket stays open from call to call: to close one takes 8 to 20 ms, since the
/// kernel waits until no processor can look at it any more (`synchronize_net`).
#[derive(Default)]
pub(super) struct Injector(Option<Socket>);

impl Injector {
    pub(super) fn send(&mut self, interface: &str, frames: &[String]) -> io::Result<()> {
        let link = link(interface)?;
        let socket = match &mut self.0 {
            Some(socket) => socket,
            // With no protocol it receives nothing.
            none => none.insert(packet_socket(0)?),
        };
        for (index, frame) in frames.iter().enumerate() {
            let bytes = from_hex(frame)
                .ok_or_else(|| io::Error::other(format!("frame {index} is not hexadecimal")))?;
            sendto(socket.as_raw_fd(), &bytes, &link, MsgFlags::empty())
                .map_err(|error| io::Error::other(format!("frame {index}: {error}")))?;
        }
        Ok(())
    }
}

/// A thread that keeps the frames that arrive.
pub(super) struct Capture {
    ended: Arc<AtomicBool>,
    thread: JoinHandle<io::Result<Vec<String>>>,
}

impl Capture {
    pub(super) fn start(interface: &str) -> io::Result<Self> {
        let link = link(interface)?;
        let socket = packet_socket(ALL_PROTOCOLS)?;
        // A burst waits here until it is read; what the kernel grants may be less.
        socket.set_recv_buffer_size(QUEUE_BYTES)?;
        bind(socket.as_raw_fd(), &link)?;
        socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        let ended = Arc::new(AtomicBool::new(false));
        let end = ended.clone();
        let thread = std::thread::Builder::new().spawn(move || keep(&socket, &end))?;
        Ok(Self { ended, thread })
    }

    pub(super) fn finish(self) -> io::Result<Vec<String>> {
        self.ended.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .map_err(|_| io::Error::other("the capture has failed"))?
    }
}

/// Keeps frames until the end is signalled and none is left.
fn keep(socket: &Socket, end: &AtomicBool) -> io::Result<Vec<String>> {
    let mut frames = Vec::new();
    let mut buffer = vec![0; 65_550];
    loop {
        let last = end.load(Ordering::Relaxed);
        match recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer) {
            Ok((len, from)) => {
                let own = from.is_some_and(|from| from.pkttype() == libc::PACKET_OUTGOING);
                if !own && frames.len() < MAX_FRAMES {
                    frames.push(to_hex(&buffer[..len]));
                }
            }
            Err(Errno::EAGAIN) if last => return Ok(frames),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
