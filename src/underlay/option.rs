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

/// Has a program of classic BPF say which of the sockets that share a port a datagram is for
/// (Linux 4.5).
pub(super) fn attach_reuseport_program(
    socket: &impl AsFd,
    program: &[libc::sock_filter],
) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(io::Error::other)?,
        // The kernel copies it.
        filter: program.as_ptr().cast_mut(),
    };
    let name = libc::SO_ATTACH_REUSEPORT_CBPF;
    set_value(socket, libc::SOL_SOCKET, name, &program)
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
