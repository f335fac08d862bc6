//! What a pod sees of the file system, but for the files that are its own.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use tracing::warn;

use crate::error::{Context, Result, errno};

/// What a file system of a pod's own does without.
const HARMLESS: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);
/// An empty directory that only its owner can use, should a node be started in the pod.
const EMPTY: &str = "mode=0700,size=64m";

/// Keeps what is mounted from now on to the pod; what is mounted on the host arrives there still.
pub(super) fn keep_to_pod() -> Result<()> {
    let slave = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    mount(None::<&str>, "/", None::<&str>, slave, None::<&str>).context("keeping mounts to the pod")
}

/// Hides what is at these paths, as far as there is something, by whatever other mount of its file
/// system it can be reached: directories are empty then, and nobody can connect to a socket.
pub(super) fn hide(paths: &[PathBuf]) -> Result<()> {
    let table =
        fs::read_to_string("/proc/self/mountinfo").context("cannot read what is mounted")?;
    let mounts: Vec<_> = table.lines().filter_map(Mount::parse).collect();
    // An alias is known by its file, which is out of sight once it is hidden.
    let all: BTreeSet<_> = paths.iter().flat_map(|it| aliases(it, &mounts)).collect();
    for path in all {
        let hidden = match path.metadata() {
            Ok(it) if it.is_dir() => mount_new("tmpfs", &path, Some(EMPTY)),
            Ok(_) => cover(&path),
            // An earlier one hides it.
            Err(error) if is_beyond(&error) => Ok(()),
            Err(error) => Err(errno(&error)),
        };
        hidden.context(format!("hiding {} from the pod", path.display()))?;
    }
    Ok(())
}

/// A line of `/proc/self/mountinfo` (proc(5)).
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    /// The file system.
    device: String,
    /// The path there that is mounted.
    root: PathBuf,
    /// Where.
    point: PathBuf,
}

impl Mount {
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split(' ').skip(2);
        let device = words.next()?.to_owned();
        let [root, point] = [words.next()?, words.next()?].map(unescape);
        Some(Self {
            device,
            root,
            point,
        })
    }
}

/// A path without the octal numbers that stand for what would end it.
fn unescape(text: &str) -> PathBuf {
    let mut path = text.to_owned();
    // The last one is the one by which the others are written.
    for (code, letter) in [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ] {
        path = path.replace(code, letter);
    }
    path.into()
}

/// All paths of what is at one, if there is something.
fn aliases(path: &Path, mounts: &[Mount]) -> Vec<PathBuf> {
    let Ok(path) = path.canonicalize() else {
        return Vec::new();
    };
    let id = |path: &Path| path.metadata().ok().map(|it| (it.dev(), it.ino()));
    let own = id(&path);
    let mut all = other_names(&path, mounts);
    // Something else may be mounted over it there.
    all.retain(|it| id(it) == own);
    all.push(path);
    all
}

/// Where the mounts of a path's file system would show it.
fn other_names(path: &Path, mounts: &[Mount]) -> Vec<PathBuf> {
    let around = mounts.iter().filter(|it| path.starts_with(&it.point));
    // Of those at one place the last is the one that is seen.
    let Some(own) = around.max_by_key(|it| it.point.as_os_str().len()) else {
        return Vec::new();
    };
    let Ok(rest) = path.strip_prefix(&own.point) else {
        return Vec::new();
    };
    let place = own.root.join(rest);
    let same = mounts.iter().filter(|it| it.device == own.device);
    same.filter_map(|it| Some(it.point.join(place.strip_prefix(&it.root).ok()?)))
        .collect()
}

fn is_beyond(error: &io::Error) -> bool {
    use io::ErrorKind::{NotADirectory, NotFound, PermissionDenied};
    matches!(error.kind(), NotFound | NotADirectory | PermissionDenied)
}

fn cover(path: &Path) -> nix::Result<()> {
    let bind = MsFlags::MS_BIND;
    mount(Some("/dev/null"), path, None::<&str>, bind, None::<&str>)
}

/// Shows the processes of this process' PID namespace alone.
pub(super) fn renew_proc() {
    match mount_new("proc", Path::new("/proc"), None) {
        Ok(()) => {}
        // What is masked must not show in another place (user_namespaces(7)).
        Err(Errno::EPERM) => warn!(
            "the pod sees all processes in /proc, with numbers that are not its own: parts of /proc \
             are masked here, as in containers ('--security-opt unmask=ALL' of Podman, \
             'systempaths=unconfined' of Docker, 'procMount: Unmasked' of Kubernetes)"
        ),
        Err(error) => warn!(
            "the pod sees all processes in /proc, with numbers that are not its own: cannot mount \
             another: {error}"
        ),
    }
}

/// Mounts a file system of the pod's own.
pub(super) fn mount_new(kind: &str, at: &Path, options: Option<&str>) -> nix::Result<()> {
    mount(Some("muslin"), at, Some(kind), HARMLESS, options)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_has_the_names_that_mounts_of_its_file_system_give_it() {
        let table = r"21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
            22 21 8:2 /@home /home rw - btrfs /dev/sda2 rw
            23 21 8:2 / /mnt/all\040of\040it rw - btrfs /dev/sda2 rw
            24 21 8:2 /@home/me/src /src rw - btrfs /dev/sda2 rw
            25 21 8:3 / /mnt/other rw - ext4 /dev/sda3 rw
            not a mount";
        let mounts: Vec<_> = table
            .lines()
            .map(str::trim)
            .filter_map(Mount::parse)
            .collect();
        let names = |path: &str| -> Vec<_> {
            let names = other_names(Path::new(path), &mounts).into_iter();
            names.map(|it| it.display().to_string()).collect()
        };
        let expected = ["/home/me/state", "/mnt/all of it/@home/me/state"];
        assert_eq!(names("/home/me/state"), expected);
        let expected = ["/home/me/src/x", "/mnt/all of it/@home/me/src/x", "/src/x"];
        assert_eq!(names("/src/x"), expected);
        assert_eq!(names("/var/state"), ["/var/state"]);
    }
}
