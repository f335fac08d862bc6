//! How the kernel does IPv6 at a pod's interface (Linux, Documentation/networking/ip-sysctl.rst).

use std::fs;
use std::io;
use std::path::PathBuf;

use tracing::debug;

/// Where the kernel has no IPv6 at all there is nothing here.
const SETTINGS: &str = "/proc/sys/net/ipv6/conf";
const OFF: &str = "disable_ipv6";

/// What an interface of a pod does not do: all that it is to have it is given.
const NOT_DONE: [&str; 5] = [
    // Routers and prefixes that others announce.
    "accept_ra",
    "autoconf",
    // Better ways that others know.
    "accept_redirects",
    // The search for others with the same address, which makes the link-local one wait, too.
    "accept_dad",
    "dad_transmits",
];

/// Why an interface cannot have IPv6.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoIpv6 {
    /// The kernel has none.
    #[error("this machine's kernel has no IPv6 (ipv6.disable=1, or no such module)")]
    Kernel,
    /// It is off, and cannot be switched on.
    #[error("IPv6 is off at the interface (disable_ipv6), and cannot be switched on: {0}")]
    Off(io::Error),
}

/// Makes an interface of this thread's network namespace ready for IPv6, before it is set up.
///
/// # Errors
/// Why it cannot have IPv6.
pub(crate) fn prepare(interface: &str) -> Result<(), NoIpv6> {
    let off = setting(interface, OFF);
    match fs::read_to_string(&off) {
        Err(_) => return Err(NoIpv6::Kernel),
        Ok(text) if text.trim() == "0" => {}
        Ok(_) => fs::write(&off, "0").map_err(NoIpv6::Off)?,
    }
    for name in NOT_DONE {
        if let Err(error) = fs::write(setting(interface, name), "0") {
            debug!("{interface}: {name} stays as it is: {error}");
        }
    }
    Ok(())
}

/// Whether an interface of this thread's network namespace has IPv6.
pub(crate) fn is_on(interface: &str) -> bool {
    let off = fs::read_to_string(setting(interface, OFF));
    off.is_ok_and(|text| text.trim() == "0")
}

fn setting(interface: &str, name: &str) -> PathBuf {
    [SETTINGS, interface, name].iter().collect()
}
