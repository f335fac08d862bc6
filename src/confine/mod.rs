//! What this process takes from itself, so that others get less by it.

mod calls;
mod capabilities;
mod descriptors;
mod files;

use std::sync::OnceLock;

pub(crate) use capabilities::{Capability, hold_only, keep_only, without};
pub(crate) use descriptors::close_inherited;
pub(crate) use files::Places;
use muslin_stack::api::control::{Confinement, Measure};
use nix::sys::prctl::{get_dumpable, get_no_new_privs, set_dumpable, set_no_new_privs};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tracing::warn;

use crate::error::{Context, Result};

/// Which of the measures with a switch are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Switches {
    /// Whether system calls are filtered.
    pub seccomp: bool,
    /// Whether the files in reach are limited.
    pub landlock: bool,
}

/// The measures that [`lock`] has taken.
static LOCKED: OnceLock<(Measure, Measure)> = OnceLock::new();

/// Does what can be done of these, and says what cannot: a node with fewer rights is one all the same.
pub(crate) fn try_all(steps: &[fn() -> Result<()>]) {
    for step in steps {
        if let Err(error) = step() {
            warn!("{error}");
        }
    }
}

/// Nobody but root reads this process' memory, variables and descriptors, or takes them over
/// (ptrace(2), pidfd_getfd(2)); it leaves no core. Its children are their own masters again.
///
/// # Errors
/// If the kernel does not allow it.
pub(crate) fn keep_to_itself() -> Result<()> {
    set_dumpable(false).context("cannot protect this process")
}

/// Neither this process nor its children leave a core. Only for what starts no command of the
/// user's, which is to have its own limits.
///
/// # Errors
/// If the kernel does not allow it.
pub(crate) fn leave_no_core() -> Result<()> {
    let limit = getrlimit(Resource::RLIMIT_CORE).map(|(_, hard)| hard);
    limit
        .and_then(|hard| setrlimit(Resource::RLIMIT_CORE, 0, hard))
        .context("cannot disable core dumps")
}

/// Neither this process nor its children get rights from programs that have some.
///
/// # Errors
/// If the kernel does not allow it.
pub(crate) fn gain_nothing() -> Result<()> {
    set_no_new_privs().context("cannot give up new privileges")
}

/// Limits for good what this process can reach of the file system, and which system calls it can
/// make. To be called before it has a second thread: only threads that start later have the same
/// limits. It can start no other program then.
pub(crate) fn lock(switches: Switches, places: &Places) {
    // The filter knows no calls that set up the other.
    let files = measure(switches.landlock, || files::limit(places));
    let calls = measure(switches.seccomp, calls::limit);
    let _ = LOCKED.set((calls, files));
}

fn measure(is_wanted: bool, take: impl FnOnce() -> Result<Measure>) -> Measure {
    if !is_wanted {
        return Measure::missing("switched off");
    }
    take().unwrap_or_else(Measure::missing)
}

/// What is in force in this process.
pub(crate) fn in_force() -> Confinement {
    let unlocked = || Measure::missing("it starts other programs");
    let (seccomp, landlock) = LOCKED
        .get()
        .cloned()
        .unwrap_or_else(|| (unlocked(), unlocked()));
    Confinement {
        seccomp,
        landlock,
        no_new_privileges: get_no_new_privs().unwrap_or(false),
        not_dumpable: get_dumpable().is_ok_and(|is_dumpable| !is_dumpable),
        capabilities: capabilities::names(),
    }
}

/// What this kernel has of the measures with a switch, by name.
pub(crate) fn offered() -> [(&'static str, bool); 2] {
    [
        ("seccomp", calls::is_offered()),
        ("landlock", files::is_offered()),
    ]
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::net::{TcpListener, TcpStream, ToSocketAddrs, UdpSocket};
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    use std::path::PathBuf;
    use std::process::Command;

    use nix::libc::SIGSYS;
    use nix::sched::{CloneFlags, unshare};

    use super::*;

    /// Where a locked process may write.
    const DIRECTORY: &str = "MUSLIN_TEST_DIRECTORY";
    /// What it does in the end.
    const LAST: &str = "MUSLIN_TEST_LAST";

    /// Runs the ignored test below, and returns what it has printed and the signal that has ended it.
    fn locked(last: &str) -> (String, Option<i32>) {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("own")).unwrap();
        fs::write(directory.path().join("foreign"), "secret").unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .env(DIRECTORY, directory.path())
            .env(LAST, last)
            .args(["--ignored", "--exact", "--nocapture", "--test-threads", "1"])
            .arg("confine::tests::a_locked_process");
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let complaint = String::from_utf8_lossy(&output.stderr);
        (text + &complaint, output.status.signal())
    }

    #[test]
    fn what_a_locked_process_needs_it_has_and_the_rest_it_has_not() {
        let all = offered();
        if !all.iter().all(|(_, is_there)| *is_there) {
            return muslin_lab::skip::skip("the kernel has not both measures");
        }
        let (text, signal) = locked("nothing");
        assert!(text.contains("1 passed"), "{text}");
        assert_eq!(signal, None, "{text}");
    }

    #[test]
    fn what_takes_over_a_process_ends_it() {
        if !calls::is_offered() {
            return muslin_lab::skip::skip("the kernel has no filters");
        }
        for last in ["execute", "unshare", "mount"] {
            let (text, signal) = locked(last);
            assert_eq!(signal, Some(SIGSYS), "{last}: {text}");
        }
    }

    #[test]
    #[ignore = "the part in a process that is locked"]
    fn a_locked_process() {
        let Some(directory) = std::env::var_os(DIRECTORY).map(PathBuf::from) else {
            return;
        };
        let (own, foreign) = (directory.join("own"), directory.join("foreign"));
        gain_nothing().unwrap();
        let mut places = Places::default();
        places.write(&own, 0o700);
        let switches = Switches {
            seccomp: true,
            landlock: true,
        };
        lock(switches, &places);
        let confinement = in_force();
        assert!(confinement.seccomp.in_force, "{confinement}");
        assert!(confinement.no_new_privileges, "{confinement}");
        // Files.
        crate::replace::replace(&own.join("file"), b"text", 0o600).unwrap();
        assert_eq!(fs::read(own.join("file")).unwrap(), b"text");
        fs::remove_file(own.join("file")).unwrap();
        fs::read("/etc/hosts").unwrap();
        if confinement.landlock.in_force {
            for refused in [
                fs::read(&foreign).map(drop),
                fs::write(directory.join("new"), "x"),
                fs::write("/etc/muslin-test", "x"),
                fs::read_dir("/root").map(drop),
                fs::rename(&foreign, own.join("taken")),
                std::os::unix::fs::symlink("/etc", own.join("link")),
            ] {
                let kind = refused.map_err(|error| error.kind());
                assert_eq!(kind, Err(std::io::ErrorKind::PermissionDenied));
            }
        }
        // Sockets, names and threads.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        stream.set_nonblocking(true).unwrap();
        UdpSocket::bind("127.0.0.1:0").unwrap();
        let resolved = std::thread::spawn(|| ("localhost", 1).to_socket_addrs().unwrap().count());
        assert!(resolved.join().unwrap() > 0);
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().build().unwrap();
        runtime.block_on(async {
            tokio::task::spawn_blocking(|| 1).await.unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        });
        // Other processes.
        assert!(Command::new("true").status().is_err());
        let parent = nix::unistd::getppid();
        assert!(nix::sys::signal::kill(parent, None).is_err());
        match std::env::var(LAST).unwrap().as_str() {
            "execute" => panic!("{}", Command::new("true").exec()),
            "unshare" => unshare(CloneFlags::CLONE_NEWUSER).unwrap(),
            "mount" => {
                let none = None::<&str>;
                let flags = nix::mount::MsFlags::empty();
                nix::mount::mount(none, "/", none, flags, none).unwrap();
            }
            _ => {}
        }
    }
}
