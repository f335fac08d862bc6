//! A pod's host name, `/etc/resolv.conf` and `/etc/hosts`.
//!
//! The files are bind mounts in the pod's own mount namespace, from a file system in memory that has no
//! other name, so nothing is left when the pod ends, however it ends.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use muslin_stack::addresses::Addresses;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tracing::warn;

use super::mounts::mount_new;
use crate::error::{Context, Result};

/// Where the file system in memory is mounted for a moment, in the pod's mount namespace alone. No
/// directory has to be made for it, which would be left behind by a process that is killed.
const SCRATCH: &str = "/proc";

/// How a pod looks for names.
#[derive(Debug, Clone, Copy)]
pub struct Resolution<'a> {
    /// Whom it asks.
    pub resolvers: &'a [IpAddr],
    /// In which domains it looks for short names.
    pub search: &'a [String],
    /// How, as in resolv.conf(5).
    pub options: &'a [String],
}

/// A pod's files, which are in place before it is known what is in them: later its user could not be
/// kept from unmounting them.
#[derive(Debug)]
pub(crate) struct Files {
    resolv_conf: File,
    hosts: File,
}

impl Files {
    /// Puts empty files into this process' own mount namespace. One that is missing in the root
    /// directory cannot be replaced; that is only told.
    ///
    /// # Errors
    /// If the file system in memory cannot be mounted.
    pub(super) fn place() -> Result<Self> {
        let scratch = Path::new(SCRATCH);
        mount_new("tmpfs", scratch, Some("mode=0755,size=256k"))
            .context("mounting a file system in memory for the pod's files")?;
        let placed = replace(scratch, "resolv.conf").and_then(|resolv_conf| {
            let hosts = replace(scratch, "hosts")?;
            Ok(Self { resolv_conf, hosts })
        });
        let released = umount2(scratch, MntFlags::MNT_DETACH);
        released.context("releasing the pod's files")?;
        placed
    }

    /// Gives this process' own namespaces the host name and files of the pod `name` at `address`.
    ///
    /// # Errors
    /// If they cannot be written.
    pub(crate) fn fill(
        mut self,
        name: &str,
        addresses: Addresses,
        resolution: &Resolution<'_>,
    ) -> Result<()> {
        nix::unistd::sethostname(name).context("setting the host name")?;
        let resolv_conf = resolv_conf(resolution);
        let written = self.resolv_conf.write_all(resolv_conf.as_bytes());
        written.context("writing the pod's resolv.conf")?;
        let written = self.hosts.write_all(hosts(name, addresses).as_bytes());
        written.context("writing the pod's hosts")
    }
}

fn replace(scratch: &Path, name: &str) -> Result<File> {
    let source = scratch.join(name);
    let file = File::create(&source).context(format!("making the pod's {name}"))?;
    let target = PathBuf::from("/etc").join(name);
    let bind = MsFlags::MS_BIND;
    if let Err(error) = mount(Some(&source), &target, None::<&str>, bind, None::<&str>) {
        warn!("the pod sees this machine's {}: {error}", target.display());
    }
    Ok(file)
}

fn resolv_conf(resolution: &Resolution<'_>) -> String {
    // Writing to a string cannot fail.
    let mut text = "# Written by muslin for this pod.\n".to_owned();
    for (keyword, words) in [
        ("search", resolution.search),
        ("options", resolution.options),
    ] {
        if !words.is_empty() {
            let _ = writeln!(text, "{keyword} {}", words.join(" "));
        }
    }
    for resolver in resolution.resolvers {
        let _ = writeln!(text, "nameserver {resolver}");
    }
    text
}

fn hosts(name: &str, addresses: Addresses) -> String {
    let own = addresses.iter::<IpAddr>();
    let own: String = own.map(|address| format!("{address}\t{name}\n")).collect();
    format!(
        "# Written by muslin for this pod.\n\
         127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         {own}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_knows_itself_and_its_resolvers() {
        let address = IpAddr::from([10, 244, 1, 2]);
        assert!(hosts("web", address.into()).contains("\n10.244.1.2\tweb\n"));
        let text = resolv_conf(&Resolution {
            resolvers: &[address],
            search: &["muslin".to_owned(), "corp.example".to_owned()],
            options: &["ndots:2".to_owned(), "edns0".to_owned()],
        });
        let expected =
            "\nsearch muslin corp.example\noptions ndots:2 edns0\nnameserver 10.244.1.2\n";
        assert!(text.ends_with(expected), "{text}");
        let nothing = Resolution {
            resolvers: &[],
            search: &[],
            options: &[],
        };
        assert_eq!(resolv_conf(&nothing).lines().count(), 1);
    }
}
