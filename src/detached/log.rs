//! The output of a pod's command on disk, bounded: a file that is written, and the one before it.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Bytes after which a new file is begun; so the end of the output that is kept is at least as long,
/// and both files together have at most twice as many.
const LIMIT: u64 = 4 << 20;
const CURRENT: &str = "log";
const PREVIOUS: &str = "log.1";
/// How often a log is looked at for more.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// A log that is written.
#[derive(Debug)]
pub(super) struct Log {
    directory: PathBuf,
    limit: u64,
    /// The current file, unless the last try to make one failed.
    file: Option<File>,
    len: u64,
    /// Bytes that could not be written.
    lost: u64,
}

impl Log {
    /// An empty log in this directory, in place of an earlier one.
    ///
    /// # Errors
    /// If it cannot be made.
    pub(super) fn create(directory: &Path) -> io::Result<Self> {
        match fs::remove_file(directory.join(PREVIOUS)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        Ok(Self {
            directory: directory.to_owned(),
            limit: LIMIT,
            file: Some(begin(directory)?),
            len: 0,
            lost: 0,
        })
    }

    /// Writes output. What a full disk does not take is counted, and told once there is room.
    pub(super) fn write(&mut self, bytes: &[u8]) {
        if let Err(error) = self.try_write(bytes) {
            self.lost += bytes.len() as u64;
            tracing::debug!("{} bytes of output were lost: {error}", bytes.len());
        }
    }

    fn try_write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.len >= self.limit {
            self.file = None;
            let current = self.directory.join(CURRENT);
            match fs::rename(current, self.directory.join(PREVIOUS)) {
                // Somebody has removed it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                renamed => renamed?,
            }
            self.len = 0;
        }
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(begin(&self.directory)?),
        };
        if self.lost > 0 {
            let note = format!("\nmuslin: {} bytes of output were lost here\n", self.lost);
            file.write_all(note.as_bytes())?;
            self.len += note.len() as u64;
            self.lost = 0;
        }
        file.write_all(bytes)?;
        self.len += bytes.len() as u64;
        Ok(())
    }
}

/// Makes an empty current file that only its user can read.
fn begin(directory: &Path) -> io::Result<File> {
    let path = directory.join(CURRENT);
    // One that somebody reads stays as it is.
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut options = File::options();
    options.append(true).create_new(true).mode(0o600).open(path)
}

/// Copies the log in a directory to `output`, and what is added for as long as `may_grow` says so.
///
/// # Errors
/// If it cannot be read, or `output` takes no more.
pub(super) fn copy(
    directory: &Path,
    output: &mut impl Write,
    may_grow: impl Fn() -> bool,
) -> io::Result<()> {
    let (previous, mut current) = open(directory)?;
    if let Some(mut previous) = previous {
        io::copy(&mut previous, output)?;
    }
    loop {
        // Asked before the end is looked for, which is the last one if nothing is added any more.
        let may_grow = may_grow();
        copy_rest(&mut current, output)?;
        let next = match File::open(directory.join(CURRENT)) {
            // Between two files there is none.
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            next => Some(next?),
        };
        match next {
            Some(next) if !is_same(&next, &current)? => {
                // What came before the next file was begun.
                copy_rest(&mut current, output)?;
                current = next;
            }
            _ if may_grow => std::thread::sleep(LOOK_AGAIN),
            _ => return Ok(()),
        }
    }
}

fn copy_rest(from: &mut impl Read, output: &mut impl Write) -> io::Result<()> {
    io::copy(from, output)?;
    output.flush()
}

/// The previous file, if there is one, and the current one.
fn open(directory: &Path) -> io::Result<(Option<File>, File)> {
    loop {
        let current = match File::open(directory.join(CURRENT)) {
            // Between two files, or where no room was for another.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok((None, File::open(directory.join(PREVIOUS))?));
            }
            opened => opened?,
        };
        match File::open(directory.join(PREVIOUS)) {
            // The next one was begun meanwhile.
            Ok(previous) if is_same(&previous, &current)? => {}
            Ok(previous) => return Ok((Some(previous), current)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((None, current)),
            Err(error) => return Err(error),
        }
    }
}

fn is_same(one: &File, other: &File) -> io::Result<bool> {
    let (one, other) = (one.metadata()?, other.metadata()?);
    Ok((one.dev(), one.ino()) == (other.dev(), other.ino()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn read(directory: &Path) -> String {
        let mut text = Vec::new();
        copy(directory, &mut text, || false).unwrap();
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn the_end_of_the_output_is_kept_within_bounds() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = Log::create(directory.path()).unwrap();
        log.limit = 1000;
        let mut all = String::new();
        for number in 0..500 {
            let line = format!("line {number}\n");
            log.write(line.as_bytes());
            all += &line;
            let kept = read(directory.path());
            assert!(all.ends_with(&kept), "{number}: {kept}");
            assert!(kept.len() >= all.len().min(1000), "{number}");
            assert!(kept.len() <= 2 * (1000 + line.len()), "{number}");
        }
        for file in [CURRENT, PREVIOUS] {
            let mode = directory.path().join(file).metadata().unwrap();
            assert_eq!(mode.permissions().mode() & 0o777, 0o600, "{file}");
        }
        Log::create(directory.path()).unwrap();
        assert_eq!(read(directory.path()), "");
    }

    #[test]
    fn lost_output_is_counted_where_it_is_missing() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = Log::create(directory.path()).unwrap();
        log.write(b"first\n");
        // Takes nothing, as a file on a full disk.
        let full = File::options().write(true).open("/dev/full").unwrap();
        let file = log.file.replace(full);
        log.write(b"second\n");
        log.write(b"third\n");
        log.file = file;
        log.write(b"fourth\n");
        let expected = "first\n\nmuslin: 13 bytes of output were lost here\nfourth\n";
        assert_eq!(read(directory.path()), expected);
    }

    #[test]
    fn a_reader_follows_into_the_next_file() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = Log::create(directory.path()).unwrap();
        log.limit = 10;
        log.write(b"before\n");
        let mut output = Vec::new();
        // Each time that it is asked, more is there; a file is full after every second line.
        let rest = std::cell::RefCell::new(vec!["four\n", "three\n", "two\n", "one\n"]);
        let log = std::cell::RefCell::new(log);
        copy(directory.path(), &mut output, || {
            let line = rest.borrow_mut().pop();
            line.inspect(|line| log.borrow_mut().write(line.as_bytes()))
                .is_some()
        })
        .unwrap();
        let expected = "before\none\ntwo\nthree\nfour\n";
        assert_eq!(String::from_utf8(output).unwrap(), expected);
    }
}
