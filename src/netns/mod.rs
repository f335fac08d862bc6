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
use std::path::PathBuf;

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
/// If user namespaces are not to be had: what forbids it, and what to do.
pub fn enter_fresh() -> Result<()> {
    let (uid, gid) = (geteuid(), getegid());
    // The files in `/proc/self` belong to root where the program has file capabilities, or may not
    // be read (proc(5)).
    let _ = set_dumpable(true);
    unshare(CloneFlags::CLONE_NEWUSER).map_err(|error| Error::failed(explain(error)))?;
    let mapped = map_ids(uid.as_raw(), gid.as_raw()).and_then(|()| {
        let rest = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS;
        Ok(unshare(rest)?)
    });
    mapped.map_err(|error| Error::failed(explain(errno(&error))))
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

/// Why there is no user namespace, and what to do.
fn explain(error: Errno) -> String {
    let setting = |path: &str| {
        fs::read_to_string(path)
            .ok()
            .map(|text| text.trim().to_owned())
    };
    if setting("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").as_deref() == Some("1") {
        return "AppArmor forbids unprivileged user namespaces on this machine (Ubuntu 23.10 and \
                newer do so): give muslin a profile with 'userns,' in /etc/apparmor.d, or run \
                'sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0'"
            .to_owned();
    }
    if setting("/proc/sys/kernel/unprivileged_userns_clone").as_deref() == Some("0") {
        return "unprivileged user namespaces are switched off on this machine: run 'sudo sysctl \
                -w kernel.unprivileged_userns_clone=1'"
            .to_owned();
    }
    if setting("/proc/sys/user/max_user_namespaces").as_deref() == Some("0") {
        return "this machine allows no user namespaces: run 'sudo sysctl -w \
                user.max_user_namespaces=15000'"
            .to_owned();
    }
    match error {
        Errno::ENOSPC | Errno::EUSERS => "there are too many user namespaces, or they are nested \
                too deeply: see user.max_user_namespaces"
            .to_owned(),
        Errno::EPERM => "user namespaces are forbidden here: in a container allow the system call \
                'unshare' (seccomp=unconfined, or a profile that has it), and do not run in a \
                chroot"
            .to_owned(),
        Errno::ENOSYS | Errno::EINVAL => {
            "this kernel has no user namespaces (CONFIG_USER_NS)".to_owned()
        }
        error => format!("cannot make a user namespace: {error}"),
    }
}
