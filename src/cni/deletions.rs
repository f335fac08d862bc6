//! Word of attachments that ended while no node was there.

use std::ffi::CString;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use muslin_stack::api::cni::Key;
use muslin_stack::api::cni::deletion::{DIRECTORY, file_name, print};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, renameat};
use nix::sys::stat::{Mode, fstat, mkdirat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, unlinkat};

use crate::replace::{UNFINISHED, directory};

/// Leaves word that an attachment has ended, for the node whose socket this is.
///
/// The directory belongs to the node, which has no rights of root's and must not gain any by what
/// it puts there: names are opened by descriptors, and no link is followed.
///
/// # Errors
/// If it cannot be written.
pub(super) fn leave(socket: &str, key: &Key) -> io::Result<()> {
    let (folder, owner) = folder(socket, true)?;
    let name = file_name(key);
    let unfinished = format!("{UNFINISHED}-{}-{name}", std::process::id());
    let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_WRONLY;
    let mode = Mode::from_bits_truncate(0o600);
    let file = openat(&folder, &*unfinished, flags | OFlag::O_CLOEXEC, mode)?;
    let write = || {
        let mut file = std::fs::File::from(file);
        file.write_all(print(key).as_bytes())?;
        give(&file, owner)?;
        renameat(&folder, &*unfinished, &folder, &*name).map_err(io::Error::from)
    };
    write().inspect_err(|_| {
        let _ = unlinkat(&folder, &*unfinished, UnlinkatFlags::NoRemoveDir);
    })
}

/// Takes it back: the node knows by now.
pub(super) fn take_back(socket: &str, key: &Key) {
    if let Ok((folder, _)) = folder(socket, false) {
        let _ = unlinkat(&folder, &*file_name(key), UnlinkatFlags::NoRemoveDir);
    }
}

/// The directory of such files, and to whom it is to belong: to whom that of the socket belongs.
/// Where there is none of the socket there is no record of any attachment either.
fn folder(socket: &str, make: bool) -> io::Result<(OwnedFd, (Uid, Gid))> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let path = CString::new(directory(Path::new(socket)).as_os_str().as_encoded_bytes())?;
    let parent = nix::fcntl::open(&*path, flags, Mode::empty())?;
    let of_parent = fstat(&parent)?;
    let owner = (
        Uid::from_raw(of_parent.st_uid),
        Gid::from_raw(of_parent.st_gid),
    );
    let open = || openat(&parent, DIRECTORY, flags | OFlag::O_NOFOLLOW, Mode::empty());
    match open() {
        Err(Errno::ENOENT) if make => {
            match mkdirat(&parent, DIRECTORY, Mode::from_bits_truncate(0o700)) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(error) => return Err(error.into()),
            }
            let made = open()?;
            give(&made, owner)?;
            Ok((made, owner))
        }
        opened => Ok((opened?, owner)),
    }
}

/// Lets a file belong to somebody, unless it does.
fn give(file: impl std::os::fd::AsFd, (user, group): (Uid, Gid)) -> io::Result<()> {
    let has = fstat(&file)?;
    if (has.st_uid, has.st_gid) == (user.as_raw(), group.as_raw()) {
        return Ok(());
    }
    fchown(&file, Some(user), Some(group)).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use muslin_stack::api::cni::deletion::read;

    use super::*;

    fn key() -> Key {
        Key::new("muslin", "c1", "eth0")
    }

    #[test]
    fn word_is_left_and_taken_back() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("control.sock");
        let socket = socket.to_str().unwrap();
        for _ in 0..2 {
            leave(socket, &key()).unwrap();
        }
        let folder = directory.path().join(DIRECTORY);
        let names: Vec<_> = std::fs::read_dir(&folder).unwrap().collect();
        assert_eq!(names.len(), 1);
        let path = folder.join(file_name(&key()));
        assert_eq!(read(&std::fs::read(&path).unwrap()), Some(key()));
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        take_back(socket, &key());
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
        assert!(leave("/nowhere/control.sock", &key()).is_err());
    }

    #[test]
    fn nothing_is_written_where_a_link_leads() {
        let directory = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let link = directory.path().join(DIRECTORY);
        std::os::unix::fs::symlink(elsewhere.path(), link).unwrap();
        let socket = directory.path().join("control.sock");
        assert!(leave(socket.to_str().unwrap(), &key()).is_err());
        assert_eq!(std::fs::read_dir(elsewhere.path()).unwrap().count(), 0);
    }
}
