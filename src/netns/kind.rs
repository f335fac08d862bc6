//! Fresh namespaces of each kind, and why there are none.

use std::fs;
use std::path::Path;

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};

use crate::error::{Error, Result};

/// How many namespaces of each kind a user may have: settings of the user namespace in which they are
/// read, and those of a fresh one say nothing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits([Option<u64>; Kind::ALL.len()]);

impl Limits {
    pub(super) fn read() -> Self {
        let read = |kind: Kind| setting(&format!("user/{}", kind.setting()))?.parse().ok();
        Self(Kind::ALL.map(read))
    }

    /// Moves this process, and of a PID namespace its next child, into a fresh namespace.
    ///
    /// # Errors
    /// If it is not to be had: what forbids it, and what to do.
    pub(super) fn unshare(&self, kind: Kind) -> Result<()> {
        unshare(kind.flag()).map_err(|error| self.explain(kind, error))
    }

    /// Why a namespace cannot be made or set up.
    pub(super) fn explain(&self, kind: Kind, error: Errno) -> Error {
        Error::failed(kind.explain(error, self.0[kind as usize]))
    }
}

/// A kind of namespace that a pod has of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    User,
    Process,
    Mount,
    Network,
    HostName,
}

impl Kind {
    const ALL: [Self; 5] = [
        Self::User,
        Self::Process,
        Self::Mount,
        Self::Network,
        Self::HostName,
    ];

    const fn flag(self) -> CloneFlags {
        match self {
            Self::User => CloneFlags::CLONE_NEWUSER,
            Self::Process => CloneFlags::CLONE_NEWPID,
            Self::Mount => CloneFlags::CLONE_NEWNS,
            Self::Network => CloneFlags::CLONE_NEWNET,
            Self::HostName => CloneFlags::CLONE_NEWUTS,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Process => "PID",
            Self::Mount => "mount",
            Self::Network => "network",
            Self::HostName => "UTS",
        }
    }

    /// The setting that says how many of them each user may have (namespaces(7)).
    const fn setting(self) -> &'static str {
        match self {
            Self::User => "max_user_namespaces",
            Self::Process => "max_pid_namespaces",
            Self::Mount => "max_mnt_namespaces",
            Self::Network => "max_net_namespaces",
            Self::HostName => "max_uts_namespaces",
        }
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
                    _ => "",
                };
                format!(
                    "there are too many {name} namespaces{depth}: user.{setting}{limit} or that of \
                     a user namespace around this one is reached; stop the processes that use \
                     them, or raise it with 'sudo sysctl -w user.{setting}=NUMBER'"
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
                    Self::Process => "CONFIG_PID_NS",
                    Self::Mount => "CONFIG_NAMESPACES",
                    Self::Network => "CONFIG_NET_NS",
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
