//! A wire that carries nothing larger than its MTU, and how to see that.
//!
//! A veth pair hands superpackets over whole, as no cable does. With every kind of segmentation by
//! the device switched off, the kernel cuts them before they cross, as for a plain network card.

#![allow(unsafe_code, reason = "ethtool's system call has no safe form")]

use std::io::{self, Read as _};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::ifaddrs::getifaddrs;
use nix::libc;
use nix::sys::socket::{MsgFlags, bind, recv};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

/// Room for all features' names, twice as much as kernels have now.
const MAX_FEATURES: usize = 128;
/// Bytes of a name.
const NAME_LEN: usize = 32;
/// Of `linux/ethtool.h`.
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_SFEATURES: u32 = 0x3b;
const ETH_SS_FEATURES: u32 = 4;

/// `struct ethtool_gstrings` with room for names.
#[repr(C)]
struct Names {
    command: u32,
    set: u32,
    len: u32,
    names: [[u8; NAME_LEN]; MAX_FEATURES],
}

/// `struct ethtool_set_features_block`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Change {
    valid: u32,
    requested: u32,
}

/// `struct ethtool_sfeatures` with room for blocks.
#[repr(C)]
struct Changes {
    command: u32,
    len: u32,
    blocks: [Change; MAX_FEATURES / 32],
}

/// Has the kernel cut everything to the MTU before it leaves by this interface, and put nothing
/// together that arrives there.
pub(crate) fn make_dumb(interface: &str) -> io::Result<()> {
    let mut names = Names {
        command: ETHTOOL_GSTRINGS,
        set: ETH_SS_FEATURES,
        // The kernel says how many there are; newer ones refuse any other number.
        len: 0,
        names: [[0; NAME_LEN]; MAX_FEATURES],
    };
    ethtool(interface, &mut names)?;
    let count = (names.len as usize).min(MAX_FEATURES);
    let mut changes = Changes {
        command: ETHTOOL_SFEATURES,
        len: count.div_ceil(32) as u32,
        blocks: Default::default(),
    };
    for (index, name) in names.names[..count].iter().enumerate() {
        let name = String::from_utf8_lossy(name);
        if makes_superpackets(name.trim_end_matches('\0')) {
            changes.blocks[index / 32].valid |= 1 << (index % 32);
        }
    }
    ethtool(interface, &mut changes)
}

/// Whether a feature of this name lets packets above the MTU pass.
fn makes_superpackets(name: &str) -> bool {
    let cuts = name.starts_with("tx-") && name.ends_with("-segmentation");
    cuts || name.starts_with("tx-gso") || name.starts_with("rx-gro")
}

/// One ethtool command. The kernel refuses to change what a device has for good, and does the rest.
fn ethtool<T>(interface: &str, command: &mut T) -> io::Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    // SAFETY: all zeroes are a valid request.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let name = interface.as_bytes();
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name) {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = std::ptr::from_mut(command).cast();
    // SAFETY: the command is one of the two above, whose lengths say how much room follows.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &mut request) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Counts frames above this length on an interface until standard input ends.
pub(crate) fn count_giants(interface: &str, above: u32) -> io::Result<u64> {
    let protocol = Protocol::from(i32::from((libc::ETH_P_ALL as u16).to_be()));
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol))?;
    socket.attach_filter(&longer_than(above))?;
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

/// A filter for longer frames.
fn longer_than(len: u32) -> [SockFilter; 4] {
    let code = |code: u32| code as u16;
    [
        SockFilter::new(code(libc::BPF_LD | libc::BPF_W | libc::BPF_LEN), 0, 0, 0),
        SockFilter::new(code(libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K), 0, 1, len),
        SockFilter::new(code(libc::BPF_RET | libc::BPF_K), 0, 0, 1),
        SockFilter::new(code(libc::BPF_RET | libc::BPF_K), 0, 0, 0),
    ]
}
