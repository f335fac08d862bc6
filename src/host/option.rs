//! Socket options that no library sets.

#![allow(unsafe_code)] // one call; its block says why it is sound

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::libc;

/// Sets an option whose value is an `int`.
pub(crate) fn set(
    socket: &impl AsFd,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    set_value(socket, level, name, &value)
}

/// How much `SO_MEMINFO` tells (Linux 4.12).
const MEMINFO_LEN: usize = 9;

fn meminfo(socket: &impl AsFd) -> io::Result<[u32; MEMINFO_LEN]> {
    get(socket, libc::SOL_SOCKET, libc::SO_MEMINFO)
}

/// How many messages the kernel has dropped since a socket is open, modulo 2^32.
pub(crate) fn drops(socket: &impl AsFd) -> io::Result<u32> {
    /// Where that is (`SK_MEMINFO_DROPS`).
    const DROPS: usize = 8;
    Ok(meminfo(socket)?[DROPS])
}

/// How much memory the messages take that wait to be received, and how much they may take, in bytes.
pub(crate) fn backlog(socket: &impl AsFd) -> io::Result<(u32, u32)> {
    /// Where that is (`SK_MEMINFO_RMEM_ALLOC`, `SK_MEMINFO_RCVBUF`).
    const ALLOC: usize = 0;
    const LIMIT: usize = 1;
    let memory = meminfo(socket)?;
    Ok((memory[ALLOC], memory[LIMIT]))
}

/// The value of an option that is so many 32-bit numbers; what the kernel does not write is zero.
pub(crate) fn get<const N: usize>(
    socket: &impl AsFd,
    level: libc::c_int,
    name: libc::c_int,
) -> io::Result<[u32; N]> {
    let mut value = [0; N];
    let mut len = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the kernel writes at most as many bytes as there is room for, which lives until the call
    // returns; the descriptor is open.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            value.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if result == 0 {
        Ok(value)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Has a program of classic BPF say which of the sockets that share a port a datagram is for
/// (Linux 4.5).
pub(crate) fn attach_reuseport_program(
    socket: &impl AsFd,
    program: &[libc::sock_filter],
) -> io::Result<()> {
    set_program(
        socket,
        libc::SOL_SOCKET,
        libc::SO_ATTACH_REUSEPORT_CBPF,
        program,
    )
}

/// Has one say which of the packet sockets of a group a frame is for (Linux 4.3).
pub(crate) fn attach_fanout_program(
    socket: &impl AsFd,
    program: &[libc::sock_filter],
) -> io::Result<()> {
    set_program(socket, libc::SOL_PACKET, libc::PACKET_FANOUT_DATA, program)
}

fn set_program(
    socket: &impl AsFd,
    level: libc::c_int,
    name: libc::c_int,
    program: &[libc::sock_filter],
) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(io::Error::other)?,
        // The kernel copies it.
        filter: program.as_ptr().cast_mut(),
    };
    set_value(socket, level, name, &program)
}

fn set_value<T>(
    socket: &impl AsFd,
    level: libc::c_int,
    name: libc::c_int,
    value: &T,
) -> io::Result<()> {
    // SAFETY: the option's value lives until the call returns, with what it points to, and its length
    // is given; the descriptor is open.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            std::ptr::from_ref(value).cast(),
            size_of_val(value) as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
