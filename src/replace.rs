//! Files that others read at any moment: they find the old text or the new one, whole.

use std::fs::Permissions;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tempfile::NamedTempFile;

/// What the names of files begin with that are not finished.
pub(crate) const UNFINISHED: &str = ".tmp";

/// Replaces a file, in a directory that exists, at once: also a crash and a full disk leave the old
/// text or the new one. The file has these permissions then.
///
/// # Errors
/// If it cannot be written; what was there stays.
pub(crate) fn replace(path: &Path, text: &[u8], mode: u32) -> io::Result<()> {
    let new = begin(path, text, mode)?;
    new.as_file().sync_all()?;
    new.persist(path)?;
    Ok(())
}

/// The same for a file that counts until the next boot alone: what the disk has of it does not matter.
///
/// # Errors
/// If it cannot be written; what was there stays.
pub(crate) fn place(path: &Path, text: &[u8], mode: u32) -> io::Result<()> {
    begin(path, text, mode)?.persist(path)?;
    Ok(())
}

fn begin(path: &Path, text: &[u8], mode: u32) -> io::Result<NamedTempFile> {
    let mut new = tempfile::Builder::new()
        .prefix(UNFINISHED)
        .tempfile_in(directory(path))?;
    new.write_all(text)?;
    new.as_file()
        .set_permissions(Permissions::from_mode(mode))?;
    Ok(new)
}

/// The directory that a file is in.
pub(crate) fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// What every writer of such a file must pass.
#[cfg(test)]
pub(crate) mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;
    use std::path::PathBuf;
    use std::process::Command;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    /// Checks that a file is another one after each write of the two that `write` makes, and that
    /// who reads meanwhile finds it whole.
    pub(crate) fn is_replaced(path: &Path, write: impl Fn(bool)) {
        const WRITES: usize = 200;
        let inode = || fs::metadata(path).unwrap().ino();
        let whole = [false, true].map(|which| {
            write(which);
            fs::read(path).unwrap()
        });
        assert_ne!(whole[0], whole[1]);
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    let text = fs::read(path).unwrap();
                    assert!(whole.contains(&text), "{}", String::from_utf8_lossy(&text));
                }
            });
            for which in [false, true].into_iter().cycle().take(WRITES) {
                let before = inode();
                write(which);
                assert_ne!(inode(), before, "it was written in place");
                if reader.is_finished() {
                    break;
                }
            }
            is_over.store(true, Ordering::Relaxed);
        });
    }

    /// The file that `on_a_full_disk` is about.
    const FILE: &str = "MUSLIN_TEST_FILE";

    /// Runs an ignored test of this program in a process that cannot write a byte to any file, and
    /// checks that a file is what it was, with nothing beside it.
    pub(crate) fn on_a_full_disk(test: &str, file: &Path) {
        let state = || {
            let beside = fs::read_dir(directory(file)).unwrap().count();
            (fs::read(file).unwrap(), beside)
        };
        let before = state();
        let script = "trap '' XFSZ; ulimit -f 0; exec \"$@\"";
        let mut command = Command::new("sh");
        command.args(["-c", script, "sh"]).env(FILE, file);
        command.arg(std::env::current_exe().unwrap());
        let output = command.args(["--ignored", "--exact", test]).output();
        let output = output.unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let is_well = output.status.success() && text.contains("1 passed");
        assert!(is_well, "{text}{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(state(), before);
    }

    /// The file to be written in such a process, if this is one.
    pub(crate) fn file_on_a_full_disk() -> Option<PathBuf> {
        std::env::var_os(FILE).map(PathBuf::from)
    }

    #[test]
    fn a_reader_finds_one_of_two_whole_texts() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let (short, long) = (b"short".as_slice(), vec![b'x'; 100_000]);
        is_replaced(&path, |which| {
            replace(&path, if which { short } else { &long }, 0o640).unwrap();
        });
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o640);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
