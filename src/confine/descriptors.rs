//! Descriptors that this process was started with.

#![allow(unsafe_code)] // one call; its block says why it is sound

use std::io;

use nix::libc;

use crate::error::{Context, Result};

/// The first after stdin, stdout and stderr.
const FIRST: libc::c_uint = 3;

/// Closes all but stdin, stdout and stderr: what a shell, a service manager or a runtime has left open
/// is nobody's here, and whoever gets control of the process would have it. To be called before
/// anything of the process' own is open.
///
/// # Errors
/// If the kernel cannot: Linux before 5.9.
pub(crate) fn close_inherited() -> Result<()> {
    // SAFETY: nothing in this process owns one of these yet, by what is said above; the call itself
    // touches no memory.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, FIRST, libc::c_uint::MAX, 0) };
    match closed {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()).context("cannot close inherited descriptors"),
    }
}
