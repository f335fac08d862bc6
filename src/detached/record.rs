//! What is on disk of a detached pod: `pods/NODE/POD/` in the state directory has its log, a lock
//! that the process beside its command holds, and how it ended.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use muslin_stack::control::ipam::PodName;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::log::{self, Log};
use crate::error::{Context, Error, Result};
use crate::state;

const LOCK: &str = "lock";
const END: &str = "end.json";

/// How a pod ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct End {
    /// Exit code of its command.
    pub(crate) exit_code: u8,
    /// When, in seconds since 1970.
    pub(crate) at: u64,
}

/// The record of a pod that runs, held by the process beside its command.
#[derive(Debug)]
pub(super) struct Record {
    directory: PathBuf,
    /// Closing any descriptor of this file gives the lock up (fcntl(2)).
    _lock: File,
}

impl Record {
    /// The record of a new pod, in place of an earlier one of the same name.
    ///
    /// # Errors
    /// If that one runs still, or nothing can be written.
    pub(super) fn create(state_dir: &Path, node: &str, pod: &PodName) -> Result<Self> {
        let directory = directory(state_dir, node, pod);
        let at = directory.display();
        let made = DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory);
        made.context(format!("cannot make the directory {at}"))?;
        let mut options = File::options();
        let options = options.create(true).truncate(false).write(true).mode(0o600);
        let lock = options.open(directory.join(LOCK));
        let lock = lock.context(format!("cannot make files in {at}"))?;
        match fcntl(&lock, FcntlArg::F_SETLK(&whole_file())) {
            Ok(_) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => return Err(runs(pod)),
            Err(error) => return Err(Error::failed(format!("cannot lock {at}/{LOCK}: {error}"))),
        }
        match fs::remove_file(directory.join(END)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).context(format!("cannot remove {at}/{END}"));
            }
            _ => {}
        }
        Ok(Self {
            directory,
            _lock: lock,
        })
    }

    /// Its log, which is empty.
    ///
    /// # Errors
    /// If it cannot be made.
    pub(super) fn log(&self) -> Result<Log> {
        let log = Log::create(&self.directory);
        log.context(format!("cannot make a log in {}", self.directory.display()))
    }

    /// Notes that its command has ended.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn finish(&self, exit_code: u8) -> Result<()> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let at = since.unwrap_or_default().as_secs();
        state::write_json(&self.directory, END, &End { exit_code, at })
    }

    /// Removes it, since its command never began.
    pub(super) fn discard(self) {
        // Why the command did not begin is what its user has to know.
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// A detached pod, which may have ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Detached {
    directory: PathBuf,
    name: PodName,
}

impl Detached {
    /// The pod of this name, of this node if one is named.
    ///
    /// # Errors
    /// If there is none, or several nodes have one.
    pub(crate) fn find(state_dir: &Path, node: Option<&str>, name: &PodName) -> Result<Self> {
        let nodes = match node {
            Some(node) => vec![state::node_name(node)?],
            None => nodes(state_dir),
        };
        let is_there = |node: &&String| directory(state_dir, node, name).join(LOCK).exists();
        let found: Vec<_> = nodes.iter().filter(is_there).map(String::as_str).collect();
        match found.as_slice() {
            [node] => Ok(Self {
                directory: directory(state_dir, node, name),
                name: name.clone(),
            }),
            [] => Err(Error::failed(format!(
                "no pod named '{name}' was started by 'muslin run -d' (looked in {})",
                state_dir.display()
            ))),
            several => Err(Error::usage(format!(
                "several nodes have a pod named '{name}': choose one with --node: {}",
                several.join(", ")
            ))),
        }
    }

    /// Its name.
    pub(crate) const fn name(&self) -> &PodName {
        &self.name
    }

    /// Whether its command runs.
    ///
    /// # Errors
    /// If that cannot be found out.
    pub(crate) fn is_running(&self) -> Result<bool> {
        Ok(self.holder()?.is_some())
    }

    /// How it ended; nothing if it runs, or was killed with the process beside it.
    #[must_use]
    pub(crate) fn end(&self) -> Option<End> {
        let text = fs::read(self.directory.join(END)).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Sends a signal to the process beside its command, if that is there.
    ///
    /// # Errors
    /// If there is no right to, or no way.
    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        let Some(process) = self.holder()? else {
            return Ok(());
        };
        // The kernel does not give the number to another process before it has given all others.
        match kill(process, signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(error) => Err(Error::failed(format!(
                "cannot stop the pod '{}', process {process}: {error}",
                self.name
            ))),
        }
    }

    /// Copies its output, and what is added while it runs if `follow` says so.
    ///
    /// # Errors
    /// If it cannot be read or written. A reader that has gone is none.
    pub(crate) fn copy_log(&self, output: &mut impl Write, follow: bool) -> Result<()> {
        let may_grow = || follow && self.is_running().unwrap_or(false);
        match log::copy(&self.directory, output, may_grow) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            copied => copied.context(format!("cannot show the log of the pod '{}'", self.name)),
        }
    }

    /// Removes what is left of it.
    ///
    /// # Errors
    /// If it runs, or the files cannot be removed.
    pub(crate) fn remove(&self) -> Result<()> {
        if self.is_running()? {
            return Err(Error::failed(format!(
                "the pod '{0}' is running: stop it first with 'muslin stop {0}'",
                self.name
            )));
        }
        let at = self.directory.display();
        fs::remove_dir_all(&self.directory).context(format!("cannot remove {at}"))
    }

    /// The process that holds the lock.
    fn holder(&self) -> Result<Option<Pid>> {
        let path = self.directory.join(LOCK);
        let at = path.display();
        let lock = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.context(format!("cannot open {at}"))?,
        };
        let mut found = whole_file();
        fcntl(&lock, FcntlArg::F_GETLK(&mut found)).context(format!("cannot ask for {at}"))?;
        match found.l_pid {
            _ if found.l_type == libc::F_UNLCK as libc::c_short => Ok(None),
            process @ 1.. => Ok(Some(Pid::from_raw(process))),
            _ => Err(Error::failed(format!(
                "the pod '{}' runs in another PID namespace, on another machine, or in a container \
                 that shares {at}: run this command there",
                self.name
            ))),
        }
    }
}

fn runs(pod: &PodName) -> Error {
    Error::failed(format!(
        "a detached pod named '{pod}' is already running: stop it with 'muslin stop {pod}', or give this \
         one another --name"
    ))
}

fn directory(state_dir: &Path, node: &str, pod: &PodName) -> PathBuf {
    state_dir.join("pods").join(node).join(pod.as_str())
}

/// Names of nodes that have had detached pods.
fn nodes(state_dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(state_dir.join("pods")).into_iter().flatten();
    let mut names: Vec<_> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| state::node_name(name).is_ok())
        .collect();
    names.sort_unstable();
    names
}

/// A lock on all of a file, for one process alone.
const fn whole_file() -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_found_by_its_name_and_its_node() {
        let state = tempfile::tempdir().unwrap();
        let (web, db): (PodName, PodName) = ("web".parse().unwrap(), "db".parse().unwrap());
        let missing = Detached::find(state.path(), None, &web).unwrap_err();
        assert_eq!(missing.exit_code(), 1);
        let first = Record::create(state.path(), "n1", &web).unwrap();
        Record::create(state.path(), "n2", &web).unwrap();
        Record::create(state.path(), "n2", &db).unwrap();
        let text = Detached::find(state.path(), None, &web).unwrap_err();
        assert!(text.to_string().ends_with("--node: n1, n2"), "{text}");
        Detached::find(state.path(), Some("n1"), &db).unwrap_err();
        Detached::find(state.path(), None, &db).unwrap();
        let found = Detached::find(state.path(), Some("n1"), &web).unwrap();
        assert_eq!(found.end(), None);
        first.finish(7).unwrap();
        assert_eq!(found.end().unwrap().exit_code, 7);
        // A process does not see its own locks (fcntl(2)), so that this one does not run.
        drop(first);
        found.remove().unwrap();
        Detached::find(state.path(), Some("n1"), &web).unwrap_err();
    }

    #[test]
    fn a_new_pod_of_the_same_name_knows_nothing_of_the_end_of_the_old_one() {
        let state = tempfile::tempdir().unwrap();
        let name: PodName = "web".parse().unwrap();
        let record = Record::create(state.path(), "n1", &name).unwrap();
        record.log().unwrap().write(b"old\n");
        record.finish(0).unwrap();
        drop(record);
        let record = Record::create(state.path(), "n1", &name).unwrap();
        record.log().unwrap();
        let found = Detached::find(state.path(), None, &name).unwrap();
        assert_eq!(found.end(), None);
        let mut output = Vec::new();
        found.copy_log(&mut output, false).unwrap();
        assert_eq!(output, b"");
    }
}
