//! Network namespaces by their paths.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use muslin_stack::api::cni::NetworkNamespace;
use muslin_stack::api::cni::error::Error;
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::Mode;
use nix::sys::statfs::fstatfs;

use super::call::Result;

/// What the file system of namespaces says of itself (`NSFS_MAGIC` of `linux/magic.h`).
const NSFS: u64 = 0x6e73_6673;
/// The plugin's own.
const OWN: &str = "/proc/self/ns/net";

/// A namespace that is open, and so stays the same whatever becomes of its path.
pub(super) struct Namespace {
    file: File,
    /// What it is known by.
    pub(super) id: NetworkNamespace,
    /// Whether the plugin itself is in it.
    pub(super) is_own: bool,
}

impl Namespace {
    /// Opens the namespace at a path.
    ///
    /// # Errors
    /// `InvalidInput` if something else is there; else the file's.
    pub(super) fn open(path: &str) -> io::Result<Self> {
        // To open what is no namespace could have an effect, or never end.
        let there = open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
        require_namespace(&there)?;
        let file = File::open(format!("/proc/self/fd/{}", there.as_raw_fd()))?;
        let of_file = file.metadata()?;
        let own = std::fs::metadata(OWN)?;
        Ok(Self {
            id: NetworkNamespace {
                path: path.to_owned(),
                device: of_file.dev(),
                inode: of_file.ino(),
            },
            is_own: (of_file.dev(), of_file.ino()) == (own.dev(), own.ino()),
            file,
        })
    }

    /// The namespace of a container, for a command that needs it.
    ///
    /// # Errors
    /// Of code 8: it cannot be opened, or is the plugin's own and may not be.
    pub(super) fn of_container(path: &str, may_be_own: bool) -> Result<Self> {
        let opened = Self::open(path);
        let namespace = opened.map_err(|error| {
            Error::Namespace(format!(
                "the network namespace {path} cannot be opened: {error}"
            ))
        })?;
        if namespace.is_own && !may_be_own {
            let text = "plugin's netns and netns from CNI_NETNS should not be the same";
            return Err(Error::Namespace(text.to_owned()));
        }
        Ok(namespace)
    }

    /// Does something in it, on a thread of its own: the plugin, and programs that it starts, stay
    /// where they are.
    ///
    /// # Errors
    /// Of code 8, if it cannot be entered; else those of `work`.
    pub(super) fn within<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let enter_and_work = || {
            setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(|error| {
                let path = &self.id.path;
                Error::Namespace(format!(
                    "the network namespace {path} cannot be entered: {error}"
                ))
            })?;
            work()
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().spawn_scoped(scope, enter_and_work);
            let thread = thread.map_err(|error| Error::Failed(format!("no thread: {error}")))?;
            let ended = |_| Err(Error::Failed("a thread has ended".to_owned()));
            thread.join().unwrap_or_else(ended)
        })
    }
}

fn require_namespace(file: &OwnedFd) -> io::Result<()> {
    let kind = fstatfs(file)?.filesystem_type().0;
    // Of another type in another C library.
    if u64::try_from(kind).is_ok_and(|kind| kind == NSFS) {
        return Ok(());
    }
    let text = "it is no namespace";
    Err(io::Error::new(io::ErrorKind::InvalidInput, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_namespaces_are_opened() {
        let own = Namespace::open(OWN).unwrap();
        assert!(own.is_own);
        let other = Namespace::open("/proc/self/ns/uts").unwrap();
        assert!(!other.is_own);
        for (path, kind) in [
            ("/dev/null", io::ErrorKind::InvalidInput),
            ("/proc/self/ns", io::ErrorKind::InvalidInput),
            ("/nowhere", io::ErrorKind::NotFound),
        ] {
            assert_eq!(Namespace::open(path).err().unwrap().kind(), kind, "{path}");
        }
        let error = Namespace::of_container(OWN, false).err().unwrap();
        assert_eq!(error.code(), 8);
        assert!(Namespace::of_container(OWN, true).is_ok());
    }
}
