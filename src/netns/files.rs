//! A pod's host name, `/etc/resolv.conf` and `/etc/hosts`.
//!
//! The files are bind mounts in the pod's own mount namespace, from a file system in memory that has no
//! other name, so nothing is left when the pod ends, however it ends.

use std::fmt::Write as _;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tracing::warn;

use crate::dns::DOMAIN;
use crate::error::{Context, Result};

/// Where the file system in memory is mounted for a moment, in the pod's mount namespace alone. No
/// directory has to be made for it, which would be left behind by a process that is killed.
const SCRATCH: &str = "/proc";

/// Gives this process' own namespaces the host name and files of the pod `name` at `address`.
///
/// # Errors
/// If the file system in memory cannot be mounted. A file that is missing in the root directory
/// cannot be replaced; that is only told.
pub fn give(name: &str, address: Ipv4Addr, resolvers: &[Ipv4Addr]) -> Result<()> {
    nix::unistd::sethostname(name).context("setting the host name")?;
    // Mounts must not travel to other namespaces, nor theirs to ours.
    let private = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
        .context("keeping mounts to the pod")?;
    let scratch = Path::new(SCRATCH);
    let options = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(
        Some("muslin"),
        scratch,
        Some("tmpfs"),
        options,
        Some("mode=0755,size=256k"),
    )
    .context("mounting a file system in memory for the pod's files")?;
    let put = replace(scratch, "resolv.conf", &resolv_conf(resolvers))
        .and_then(|()| replace(scratch, "hosts", &hosts(name, address)));
    let released = umount2(scratch, MntFlags::MNT_DETACH);
    put.and(released.context("releasing the pod's files"))
}

fn replace(scratch: &Path, file: &str, text: &str) -> Result<()> {
    let source = scratch.join(file);
    fs::write(&source, text).context(format!("writing the pod's {file}"))?;
    let target = PathBuf::from("/etc").join(file);
    let bind = MsFlags::MS_BIND;
    if let Err(error) = mount(Some(&source), &target, None::<&str>, bind, None::<&str>) {
        warn!("the pod sees this machine's {}: {error}", target.display());
    }
    Ok(())
}

fn resolv_conf(resolvers: &[Ipv4Addr]) -> String {
    // Writing to a string cannot fail.
    let mut text = "# Written by muslin for this pod.\n".to_owned();
    if !resolvers.is_empty() {
        let _ = writeln!(text, "search {DOMAIN}");
    }
    for resolver in resolvers {
        let _ = writeln!(text, "nameserver {resolver}");
    }
    text
}

fn hosts(name: &str, address: Ipv4Addr) -> String {
    format!(
        "# Written by muslin for this pod.\n\
         127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         {address}\t{name}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_knows_itself_and_its_resolvers() {
        let address = Ipv4Addr::new(10, 244, 1, 2);
        assert!(hosts("web", address).contains("\n10.244.1.2\tweb\n"));
        let text = resolv_conf(&[address]);
        assert!(text.ends_with("\nsearch muslin\nnameserver 10.244.1.2\n"));
        assert_eq!(resolv_conf(&[]).lines().count(), 1);
    }
}
