//! Whether a wire carries anything larger than its MTU, as no cable does and a veth pair does unless
//! it is told not to.

use std::io::{self, Read as _};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use clap::ValueEnum;
use nix::ifaddrs::getifaddrs;
use nix::libc;
use nix::sys::socket::{MsgFlags, bind, recv};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

/// Which way a frame goes that an interface has.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Way {
    /// As it is handed to the device: after the kernel has cut what the device cannot.
    Out,
    /// As the kernel takes it from the device: after GRO, where the device has that.
    In,
}

impl Way {
    /// As a word of a command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Out => "out",
            Self::In => "in",
        }
    }
}

/// Counts frames above this length that go this way on an interface until standard input ends.
pub(crate) fn count_giants(interface: &str, way: Way, above: u32) -> io::Result<u64> {
    let protocol = Protocol::from(i32::from((libc::ETH_P_ALL as u16).to_be()));
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol))?;
    socket.attach_filter(&longer_than(way, above))?;
    let link = getifaddrs()?
        .filter(|row| row.interface_name == interface)
        .find_map(|row| row.address?.as_link_addr().copied())
        .ok_or(io::ErrorKind::NotFound)?;
    bind(socket.as_raw_fd(), &link)?;
    let giants = Arc::new(AtomicU64::new(0));
    let count = giants.clone();
    std::thread::spawn(move || {
        // One byte of each is enough.
        while recv(socket.as_raw_fd(), &mut [0], MsgFlags::empty()).is_ok() {
            count.fetch_add(1, Ordering::Relaxed);
        }
    });
    println!("true");
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(giants.load(Ordering::Relaxed))
}

/// A filter for longer frames that go this way.
fn longer_than(way: Way, len: u32) -> [SockFilter; 6] {
    let code = |code: u32| code as u16;
    let load_type = code(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS);
    let equal = code(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K);
    let packet_type = (libc::SKF_AD_OFF + libc::SKF_AD_PKTTYPE) as u32;
    let outgoing = u32::from(libc::PACKET_OUTGOING);
    let (on_outgoing, on_others) = match way {
        Way::Out => (0, 3),
        Way::In => (3, 0),
    };
    [
        SockFilter::new(load_type, 0, 0, packet_type),
        SockFilter::new(equal, on_outgoing, on_others, outgoing),
        SockFilter::new(code(libc::BPF_LD | libc::BPF_W | libc::BPF_LEN), 0, 0, 0),
        SockFilter::new(code(libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K), 0, 1, len),
        SockFilter::new(code(libc::BPF_RET | libc::BPF_K), 0, 0, 1),
        SockFilter::new(code(libc::BPF_RET | libc::BPF_K), 0, 0, 0),
    ]
}
