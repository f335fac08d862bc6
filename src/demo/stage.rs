//! The demo's processes: nodes, and pods with agents in them.

use std::fs::File;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use muslin_stack::addresses::Addresses;
use muslin_stack::api::control::{Status, Table};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use parking_lot::Mutex;
use serde::de::DeserializeOwned;

use crate::agent::Agent;
use crate::control::Client;
use crate::error::{Context, Error, Result};
use crate::process::block_on;
use crate::state;

const START: Duration = Duration::from_secs(15);
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// Pods' network of IPv6, where there is one.
const NETWORK_V6: &str = "fd00:244::/48";

/// All processes that were started, so that an interrupt can end them.
#[derive(Debug, Default)]
pub(super) struct Children(Mutex<ChildPids>);

#[derive(Debug, Default)]
struct ChildPids {
    pids: Vec<Pid>,
    /// What the others were ended with; one that is started meanwhile is ended, too.
    ended: Option<Signal>,
}

impl Children {
    fn add(&self, id: u32) {
        let mut running = self.0.lock();
        if let Ok(pid) = i32::try_from(id).map(Pid::from_raw) {
            running.pids.push(pid);
            if let Some(signal) = running.ended {
                // It may have ended by itself.
                let _ = kill(pid, signal);
            }
        }
    }

    fn remove(&self, id: u32) {
        let pids = &mut self.0.lock().pids;
        pids.retain(|pid| u32::try_from(pid.as_raw()) != Ok(id));
    }

    pub(super) fn end(&self, signal: Signal) {
        let mut running = self.0.lock();
        running.ended = Some(signal);
        for pid in &running.pids {
            // It may have ended by itself.
            let _ = kill(*pid, signal);
        }
    }
}

/// A directory where nodes and pods of one scene live.
pub(super) struct Stage<'a> {
    directory: PathBuf,
    children: &'a Children,
    program: PathBuf,
}

/// A node's process; it is ended on drop.
pub(super) struct Node<'a> {
    name: String,
    child: Child,
    children: &'a Children,
    socket: PathBuf,
}

/// A pod with an agent in it; it is ended on drop.
pub(super) struct Pod<'a> {
    pub(super) name: String,
    pub(super) address: Addresses,
    pub(super) agent: Agent,
    id: u32,
    children: &'a Children,
}

impl<'a> Stage<'a> {
    pub(super) fn new(directory: PathBuf, children: &'a Children) -> Result<Self> {
        std::fs::create_dir_all(&directory).context("cannot make a temporary directory")?;
        let program = std::env::current_exe().context("cannot find this program")?;
        Ok(Self {
            directory,
            children,
            program,
        })
    }

    /// Starts a node at these addresses and waits until it answers.
    pub(super) fn node(
        &self,
        name: &str,
        backend: &str,
        public_ip: Ipv4Addr,
        public_ipv6: Option<Ipv6Addr>,
    ) -> Result<(Node<'a>, Status)> {
        let log = self.directory.join(format!("{name}.log"));
        let mut command = self.command("node", &log)?;
        command
            .args(["--name", name, "--backend", backend, "--mtu", "1500"])
            // Nothing leaves this machine.
            .args(["--egress", "off", "--die-with-parent"])
            .args(["--public-ip", &public_ip.to_string()]);
        if let Some(address) = public_ipv6 {
            command
                .args(["--ipv6-network", NETWORK_V6])
                .args(["--public-ipv6", &address.to_string()]);
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start a node")?;
        self.children.add(child.id());
        let mut node = Node {
            name: name.to_owned(),
            child,
            children: self.children,
            socket: state::socket_path(&self.directory, name),
        };
        let deadline = Instant::now() + START;
        loop {
            if let Ok(status) = node.status() {
                return Ok((node, status));
            }
            let ended = node.child.try_wait().context("cannot watch a node")?;
            if ended.is_some() || Instant::now() > deadline {
                return Err(Error::failed(format!("node {name}: {}", last_line(&log))));
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Starts a pod, with IPv6 or without, and waits until its agent answers.
    pub(super) fn pod(&self, name: &str, node: &str, has_ipv6: bool) -> Result<Pod<'a>> {
        let log = self.directory.join(format!("{name}.log"));
        let mut command = self.command("run", &log)?;
        command.args(["--node", node, "--name", name, "--die-with-parent", "--"]);
        let mut agent = Agent::start(command.arg(&self.program).arg("agent"))?;
        let id = agent.child().id();
        self.children.add(id);
        let ready = agent.wait_ready(START).and_then(|()| {
            let ipv6 = has_ipv6.then(|| agent.address_v6("eth0")).transpose()?;
            Ok(Addresses::with_ipv4(agent.address("eth0")?, ipv6))
        });
        match ready {
            Ok(address) => Ok(Pod {
                name: name.to_owned(),
                address,
                agent,
                id,
                children: self.children,
            }),
            Err(error) => {
                drop(agent);
                self.children.remove(id);
                let said = last_line(&log);
                Err(if said.is_empty() {
                    error
                } else {
                    Error::failed(format!("pod {name}: {said}"))
                })
            }
        }
    }

    fn command(&self, subcommand: &str, log: &Path) -> Result<Command> {
        let log = File::create(log).context("cannot write a log")?;
        let mut command = Command::new(&self.program);
        // The demo's nodes are to be as it says, whatever the environment says of others.
        for (variable, _) in std::env::vars_os() {
            let name = variable.to_string_lossy();
            if name.starts_with("MUSLIN_") || name.starts_with("FLANNELD_") {
                command.env_remove(&variable);
            }
        }
        command
            .arg(subcommand)
            .arg("--state-dir")
            .arg(&self.directory)
            .stderr(log);
        Ok(command)
    }
}

impl Node<'_> {
    pub(super) fn status(&self) -> Result<Status> {
        let row = self.report::<Status>(Table::Status)?.pop();
        row.ok_or_else(|| Error::failed(format!("node {} sent no status", self.name)))
    }

    pub(super) fn report<T: DeserializeOwned>(&self, table: Table) -> Result<Vec<T>> {
        block_on(async { Client::connect(&self.socket).await?.report(table).await })
    }
}

impl Drop for Node<'_> {
    fn drop(&mut self) {
        self.children.remove(self.child.id());
        let runs = matches!(self.child.try_wait(), Ok(None));
        if let Some(id) = i32::try_from(self.child.id()).ok().filter(|_| runs) {
            // Asked to end it removes its socket; it may have ended this moment.
            let _ = kill(Pid::from_raw(id), Signal::SIGTERM);
        }
        let deadline = Instant::now() + START;
        while Instant::now() < deadline && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(LOOK_AGAIN);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        self.children.remove(self.id);
    }
}

/// What a process said last, without the program's name.
fn last_line(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let line = text
        .lines()
        .rfind(|line| !line.trim().is_empty())
        .unwrap_or_default();
    line.strip_prefix("muslin: ").unwrap_or(line).to_owned()
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn a_process_that_starts_during_an_interrupt_ends_with_the_others() {
        let children = Children::default();
        let start = || Command::new("sleep").arg("60").spawn().unwrap();
        let (mut early, mut late) = (start(), start());
        children.add(early.id());
        children.end(Signal::SIGTERM);
        children.add(late.id());
        for child in [&mut early, &mut late] {
            assert_eq!(child.wait().unwrap().signal(), Some(15));
        }
    }
}
