//! Namespaces: a pod's processes, network, mounts and host name, without privileges.
//!
//! A pod has two user namespaces, one in the other. The outer one owns its PID namespace and a mount
//! namespace in which all is mounted that the pod must not undo: who has rights in the inner one alone
//! cannot unmount what was mounted by the outer one's (mount_namespaces(7)). The inner one owns the
//! network, the host name and a copy of the mounts, so that the pod's root has those as any root has.
//! The process that keeps the pod attached is in the outer one only, where the pod cannot get at it.

mod files;
mod fork;
mod interface;
pub(crate) mod ipv6;
mod kind;
pub(crate) mod message;
mod mounts;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

pub(crate) use files::Files;
pub use files::Resolution;
pub(crate) use fork::{Child, Parent, change};
pub(crate) use interface::QUEUE_LEN;
pub(crate) use interface::configure_loopback;
pub use interface::{Assignment, configure, set_link};
use kind::Kind;
pub(crate) use kind::Limits;
use muslin_stack::api::control::Namespace;
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl::set_dumpable;
use nix::unistd::{getegid, geteuid};
use tracing::{debug, warn};

use crate::error::{Context, Error, Result, errno};

/// User 0 of a user namespace.
const ROOT: Ids = Ids { uid: 0, gid: 0 };

/// A user and a group, the only ones of a user namespace that have a number there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ids {
    uid: u32,
    gid: u32,
}

impl Ids {
    /// This process' own.
    pub(crate) fn own() -> Self {
        Self {
            uid: geteuid().as_raw(),
            gid: getegid().as_raw(),
        }
    }

    /// Those of a pod: its caller's own, or root's.
    pub(crate) fn of_pod(as_caller: bool) -> Self {
        if as_caller { Self::own() } else { ROOT }
    }
}

/// Moves this process into a pod's outer user namespace, and its next child into a fresh PID
/// namespace.
///
/// # Errors
/// If they are not to be had: what forbids it, and what to do.
pub(crate) fn enter_outer() -> Result<Limits> {
    // The files in `/proc/self` belong to root where the program has file capabilities, or may not
    // be read (proc(5)).
    let _ = set_dumpable(true);
    let limits = Limits::read();
    enter_user(&limits, ROOT, Ids::own())?;
    limits.unshare(Kind::Process)?;
    Ok(limits)
}

/// Moves this process into a network namespace of its own, where it has all rights. Its user stays the
/// same, so that programs which it starts have none that they had not before.
///
/// # Errors
/// If it is not to be had: what forbids it, and what to do.
pub(crate) fn enter_own_network() -> Result<()> {
    let _ = set_dumpable(true);
    let limits = Limits::read();
    enter_user(&limits, Ids::own(), Ids::own())?;
    limits.unshare(Kind::Network)
}

/// Moves this process, the first of a pod's PID namespace, into the pod's inner namespaces. It stays
/// in its working directory where that is not one of those that are hidden.
///
/// # Errors
/// If they are not to be had: what forbids it, and what to do.
pub(crate) fn enter_inner(limits: &Limits, ids: Ids, hidden: &[PathBuf]) -> Result<Files> {
    let directory = std::env::current_dir();
    limits.unshare(Kind::Mount)?;
    mounts::keep_to_pod()?;
    let files = Files::place()?;
    mounts::hide(hidden)?;
    mounts::renew_proc();
    enter_user(limits, ids, ROOT)?;
    for kind in [Kind::Mount, Kind::Network, Kind::HostName] {
        limits.unshare(kind)?;
    }
    open_ports_and_pings(ids.gid);
    if let Ok(directory) = directory {
        return_to(&directory)?;
    }
    Ok(files)
}

/// Moves this process into a fresh user namespace. These `outside` are its only ids there.
fn enter_user(limits: &Limits, inside: Ids, outside: Ids) -> Result<()> {
    limits.unshare(Kind::User)?;
    map_ids(inside, outside).map_err(|error| limits.explain(Kind::User, errno(&error)))
}

fn map_ids(inside: Ids, outside: Ids) -> io::Result<()> {
    // Without this an unprivileged process may not map groups (user_namespaces(7)).
    fs::write("/proc/self/setgroups", "deny")?;
    let (uids, gids) = ((inside.uid, outside.uid), (inside.gid, outside.gid));
    fs::write("/proc/self/uid_map", format!("{} {} 1", uids.0, uids.1))?;
    fs::write("/proc/self/gid_map", format!("{} {} 1", gids.0, gids.1))
}

/// Lets a pod's user have any port and send pings without being root, as in Docker.
fn open_ports_and_pings(gid: u32) {
    for (name, value) in [
        ("ip_unprivileged_port_start", "0".to_owned()),
        ("ping_group_range", format!("{gid} {gid}")),
    ] {
        if let Err(error) = fs::write(format!("/proc/sys/net/ipv4/{name}"), value) {
            debug!("the pod's {name} stays as it is: {error}");
        }
    }
}

/// Goes to a directory by its path, as what is mounted now has it. One that is open would be a way
/// around what hides it.
fn return_to(directory: &Path) -> Result<()> {
    if let Err(error) = std::env::set_current_dir(directory) {
        warn!(
            "the pod starts in /, not in {}: {error}",
            directory.display()
        );
        std::env::set_current_dir("/").context("cannot go to /")?;
    }
    Ok(())
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
/// If there is none, or it belongs to another user.
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

/// Some namespaces of a process, with `self` for this one.
///
/// # Errors
/// If they cannot be opened.
pub(crate) fn of(process: &str, kinds: &[Namespace]) -> Result<Vec<(Namespace, OwnedFd)>> {
    let open = |kind: &Namespace| {
        let path = format!("/proc/{process}/ns/{}", file_name(*kind));
        let file = fs::File::open(&path).context(format!("cannot open {path}"))?;
        Ok((*kind, file.into()))
    };
    kinds.iter().map(open).collect()
}

/// Moves this process into a pod's namespaces, one after the other; into a PID namespace only its
/// next child. It stays in its working directory where the pod has that, too.
///
/// # Errors
/// If they belong to another user.
pub(crate) fn enter_pod(namespaces: &[(Namespace, OwnedFd)]) -> Result<()> {
    let directory = std::env::current_dir();
    for (kind, namespace) in namespaces {
        // There may be no right to enter the own one once more (setns(2)).
        if is_own(*kind, namespace) {
            continue;
        }
        let flag = match kind {
            Namespace::User => CloneFlags::CLONE_NEWUSER,
            Namespace::Pid => CloneFlags::CLONE_NEWPID,
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
        Namespace::Pid => "pid",
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
