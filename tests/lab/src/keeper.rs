//! A process that keeps pods' devices for a node: `muslin keep`.

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use super::{Host, SOON, muslin_bin, poll_until};

/// A keeper; killed on drop.
pub struct Keeper {
    host: Host,
    socket: PathBuf,
    child: Option<Child>,
}

impl Keeper {
    /// Starts one on a host, at a socket.
    pub fn start(host: &Host, socket: &Path) -> Self {
        let mut keeper = Self {
            host: host.clone(),
            socket: socket.to_owned(),
            child: None,
        };
        keeper.start_again();
        keeper
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// Ends it without a warning.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Starts it, after whatever is left of it has ended, and waits until it listens.
    pub fn start_again(&mut self) {
        self.kill();
        // By which it is seen when the new one is there.
        let _ = std::fs::remove_file(&self.socket);
        let mut command = self.host.command(muslin_bin());
        command.args(["keep", "--socket"]).arg(&self.socket);
        if std::env::var_os("MUSLIN_LOG").is_none() {
            command.env("MUSLIN_LOG", "warn");
        }
        self.child = Some(command.stdin(Stdio::null()).spawn().unwrap());
        poll_until(SOON, "the keeper", || self.socket.exists().then_some(()));
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.kill();
    }
}

/// How many queues of TAP devices a process has open.
pub fn queues(pid: u32) -> usize {
    let all = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let all = all.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
    all.filter(|it| it.ends_with("net/tun")).count()
}
