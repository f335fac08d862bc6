//! Namespaces: a pod's network, mounts and host name, without privileges.
//!
//! A process with one thread leaves its namespaces for fresh ones, as user 0 of a user namespace of
//! its own, and all it starts live there. So `muslin run` needs no helper and no fork, and the
//! device it opens is made inside.

mod files;
mod interface;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl::set_dumpable;
use nix::unistd::{getegid, geteuid};

use crate::control::protocol::Namespace;
use crate::error::{Context, Error, Result, errno};

pub use files::{Resolution, give as give_files};
pub use interface::{Assignment, configure, set_link};

/// Moves this process into fresh namespaces, where it is user 0.
///
/// # Errors
/// If they are not to be had: what forbids it, and what to do.
pub fn enter_fresh() -> Result<()> {
    let (uid, gid) = (geteuid(), getegid());
    // The files in `/proc/self` belong to root where the program has file capabilities, or may not
    // be read (proc(5)).
    let _ = set_dumpable(true);
    // What the new user namespace says of its own limits is another thing.
    let limits = Kind::ALL.map(|kind| (kind, kind.limit()));
    for (kind, limit) in limits {
        unshare(kind.flag()).map_err(|error| Error::failed(kind.explain(error, limit)))?;
        if kind == Kind::User {
            map_ids(uid.as_raw(), gid.as_raw())
                .map_err(|error| Error::failed(kind.explain(errno(&error), limit)))?;
        }
    }
    Ok(())
}

/// A kind of namespace that a pod has of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    User,
    Network,
    Mount,
    HostName,
}

impl Kind {
    /// All of them; the user namespace gives the right to make the others.
    const ALL: [Self; 4] = [Self::User, Self::Network, Self::Mount, Self::HostName];

    const fn flag(self) -> CloneFlags {
        match self {
            Self::User => CloneFlags::CLONE_NEWUSER,
            Self::Network => CloneFlags::CLONE_NEWNET,
            Self::Mount => CloneFlags::CLONE_NEWNS,
            Self::HostName => CloneFlags::CLONE_NEWUTS,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Network => "network",
            Self::Mount => "mount",
            Self::HostName => "UTS",
        }
    }

    /// The setting that says how many of them each user may have (namespaces(7)).
    const fn setting(self) -> &'static str {
        match self {
            Self::User => "max_user_namespaces",
            Self::Network => "max_net_namespaces",
            Self::Mount => "max_mnt_namespaces",
            Self::HostName => "max_uts_namespaces",
        }
    }

    fn limit(self) -> Option<u64> {
        setting(&format!("user/{}", self.setting()))?.parse().ok()
    }

    /// Why there is none, and what to do.
    fn explain(self, error: Errno, limit: Option<u64>) -> String {
        let (name, setting) = (self.name(), self.setting());
        // Some systems let the user namespace be made, and forbid all that is to be done there.
        if matches!(error, Errno::EPERM | Errno::EACCES)
            && let Some(switch) = switched_off()
        {
            return switch.to_owned();
        }
        match (error, limit) {
            // Linux before 4.9 says that there are too many users.
            (Errno::ENOSPC | Errno::EUSERS, Some(0)) => format!(
                "this machine allows no {name} namespaces: run 'sudo sysctl -w \
                 user.{setting}=15000'"
            ),
            (Errno::ENOSPC | Errno::EUSERS, limit) => {
                let limit = limit.map_or_else(String::new, |limit| format!(", {limit} here,"));
                let depth = match self {
                    Self::User => ", or they are nested more than 32 deep",
                    Self::Network | Self::Mount | Self::HostName => "",
                };
                format!(
                    "there are too many {name} namespaces{depth}: user.{setting}{limit} or that of \
                     a user namespace around this one is reached; end what uses them, or raise it \
                     with 'sudo sysctl -w user.{setting}=NUMBER'"
                )
            }
            (Errno::EPERM, Some(0)) if self == Self::User => format!(
                "this machine allows no user namespaces: run 'sudo sysctl -w user.{setting}=15000'"
            ),
            (Errno::EPERM, _) => format!(
                "{name} namespaces are forbidden here: in a container allow the system call \
                 'unshare' (seccomp=unconfined, or a profile that has it), and do not run in a \
                 chroot"
            ),
            (Errno::ENOSYS | Errno::EINVAL, _) => {
                let option = match self {
                    Self::User => "CONFIG_USER_NS",
                    Self::Network => "CONFIG_NET_NS",
                    Self::Mount => "CONFIG_NAMESPACES",
                    Self::HostName => "CONFIG_UTS_NS",
                };
                format!("this kernel has no {name} namespaces ({option})")
            }
            (error, _) => format!("cannot make a {name} namespace: {error}"),
        }
    }
}

/// What the system has switched off for users without privileges, and how to switch it on.
fn switched_off() -> Option<&'static str> {
    if setting("kernel/apparmor_restrict_unprivileged_userns").as_deref() == Some("1") {
        return Some(
            "AppArmor forbids unprivileged user namespaces on this machine (Ubuntu 23.10 and newer \
             do so): give muslin a profile with 'userns,' in /etc/apparmor.d, or run 'sudo sysctl \
             -w kernel.apparmor_restrict_unprivileged_userns=0'",
        );
    }
    if setting("kernel/unprivileged_userns_clone").as_deref() == Some("0") {
        return Some(
            "unprivileged user namespaces are switched off on this machine: run 'sudo sysctl -w \
             kernel.unprivileged_userns_clone=1'",
        );
    }
    None
}

/// The value of a kernel setting.
fn setting(path: &str) -> Option<String> {
    let text = fs::read_to_string(Path::new("/proc/sys").join(path)).ok()?;
    Some(text.trim().to_owned())
}

fn map_ids(uid: u32, gid: u32) -> io::Result<()> {
    // Without this an unprivileged process may not map groups (user_namespaces(7)).
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    fs::write("/proc/self/gid_map", format!("0 {gid} 1"))
}

/// Whose network namespace to enter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// The one of a process, with its user namespace.
    Process(u32),
    /// A file that stands for a network namespace, like `/run/netns/x`.
    File(PathBuf),
}

/// Moves this process into an existing network namespace.
///
/// # Errors
/// If there is none, or it belongs to somebody else.
pub fn enter(target: &Target) -> Result<()> {
    let net = match target {
        Target::File(path) => path.clone(),
        Target::Process(pid) => format!("/proc/{pid}/ns/net").into(),
    };
    let name = net.display().to_string();
    let net = fs::File::open(&net).context(format!("cannot open the namespace {name}"))?;
    if let Target::Process(pid) = target {
        enter_user_namespace(*pid)?;
    }
    setns(net, CloneFlags::CLONE_NEWNET).map_err(|error| {
        Error::failed(match error {
            Errno::EPERM => format!(
                "no permission to enter the network namespace {name}: it belongs to another user \
                 or user namespace"
            ),
            Errno::EINVAL => format!("{name} is not a network namespace"),
            error => format!("cannot enter the network namespace {name}: {error}"),
        })
    })
}

/// This process' own namespaces of some kinds.
///
/// # Errors
/// If they cannot be opened.
pub fn own(kinds: &[Namespace]) -> Result<Vec<(Namespace, OwnedFd)>> {
    let open = |kind: &Namespace| {
        let path = format!("/proc/self/ns/{}", file_name(*kind));
        let file = fs::File::open(&path).context(format!("cannot open {path}"))?;
        Ok((*kind, file.into()))
    };
    kinds.iter().map(open).collect()
}

/// Moves this process into a pod's namespaces, one after the other. It stays in its working
/// directory where the pod has that, too.
///
/// # Errors
/// If they belong to somebody else.
pub fn enter_pod(namespaces: &[(Namespace, OwnedFd)]) -> Result<()> {
    let directory = std::env::current_dir();
    for (kind, namespace) in namespaces {
        // There may be no right to enter the own one once more (setns(2)).
        if is_own(*kind, namespace) {
            continue;
        }
        let flag = match kind {
            Namespace::User => CloneFlags::CLONE_NEWUSER,
            Namespace::Mount => CloneFlags::CLONE_NEWNS,
            Namespace::Net => CloneFlags::CLONE_NEWNET,
            Namespace::Uts => CloneFlags::CLONE_NEWUTS,
        };
        setns(namespace, flag).map_err(|error| {
            let name = file_name(*kind);
            Error::failed(match error {
                Errno::EPERM => format!(
                    "no permission to enter the pod's {name} namespace: it belongs to another \
                     user; run this command as the one who has attached the pod"
                ),
                error => format!("cannot enter the pod's {name} namespace: {error}"),
            })
        })?;
    }
    if let Ok(directory) = directory {
        // A mount namespace is entered at its root.
        let _ = std::env::set_current_dir(directory);
    }
    Ok(())
}

fn is_own(kind: Namespace, namespace: &OwnedFd) -> bool {
    let own = nix::sys::stat::stat(format!("/proc/self/ns/{}", file_name(kind)).as_str());
    let theirs = nix::sys::stat::fstat(namespace);
    matches!((own, theirs), (Ok(own), Ok(theirs))
        if (own.st_dev, own.st_ino) == (theirs.st_dev, theirs.st_ino))
}

/// A namespace's file in `/proc/PID/ns`.
const fn file_name(kind: Namespace) -> &'static str {
    match kind {
        Namespace::User => "user",
        Namespace::Mount => "mnt",
        Namespace::Net => "net",
        Namespace::Uts => "uts",
    }
}

/// Enters the user namespace of a process, where it is another than ours.
fn enter_user_namespace(pid: u32) -> Result<()> {
    let path = format!("/proc/{pid}/ns/user");
    let same = |a: io::Result<PathBuf>, b: io::Result<PathBuf>| a.ok() == b.ok();
    if same(fs::read_link(&path), fs::read_link("/proc/self/ns/user")) {
        return Ok(());
    }
    let user = fs::File::open(&path).context(format!("cannot open the namespace {path}"))?;
    setns(user, CloneFlags::CLONE_NEWUSER).context(format!(
        "no permission to enter the user namespace of process {pid}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_that_is_reached_is_the_one_that_is_named() {
        for kind in Kind::ALL {
            let settings = Kind::ALL.map(Kind::setting);
            for (error, limit) in [
                (Errno::ENOSPC, Some(0)),
                (Errno::ENOSPC, Some(15_000)),
                (Errno::EUSERS, None),
            ] {
                let text = kind.explain(error, limit);
                for setting in settings {
                    assert_eq!(text.contains(setting), setting == kind.setting(), "{text}");
                }
                assert!(text.contains("sysctl"), "{text}");
            }
        }
    }
}
