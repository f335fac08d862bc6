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
    // SAFETY: the option's value is an `int` that lives until the call returns, and its length is
    // given; the descriptor is open.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
