//! What goes wrong around a node: readers that go, clients that misbehave, signals at any moment.

#![allow(clippy::unwrap_used, reason = "a test may")]

mod lab;

use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Command, Stdio};

use lab::{Lab, MUSLIN, Node, NodeConfig};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, send, socket,
};
use nix::unistd::Pid;

fn start(lab: &Lab) -> Node {
    let store = format!("sqlite:{}", lab.directory().join("leases.db").display());
    NodeConfig::new("n1", Ipv4Addr::LOCALHOST, &store).start(lab.root())
}

#[track_caller]
fn succeeds(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{stderr}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_node_outlives_the_reader_of_its_log() {
    let Some(lab) = Lab::new() else { return };
    let state = lab.directory().join("state");
    let mut node = lab.root().command(MUSLIN);
    node.args(["node", "--name", "n1", "--public-ip", "127.0.0.1"])
        .arg("--state-dir")
        .arg(&state)
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    let mut node = node.spawn().unwrap();
    let mut line = String::new();
    let mut log = BufReader::new(node.stderr.take().unwrap());
    log.read_line(&mut line).unwrap();
    assert!(line.contains("is ready"), "{line}");
    drop(log);
    for _ in 0..2 {
        let mut run = lab.root().command(MUSLIN);
        run.args(["run", "--node", "n1", "--state-dir"])
            .arg(&state)
            .args(["--", "true"]);
        succeeds(&mut run);
    }
    kill(Pid::from_raw(node.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(node.wait().unwrap().code(), Some(0));
}

#[test]
fn a_pod_needs_no_directory_for_its_files() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab);
    let mut run = node.client(&["run", "--name", "web", "--", "cat", "/etc/hosts"]);
    let hosts = succeeds(run.env("TMPDIR", "/nowhere"));
    assert!(hosts.contains("\tweb\n"), "{hosts}");
    let script = "mount | grep -c muslin; test -e /proc/self/status";
    assert_eq!(
        succeeds(&mut node.client(&["run", "--", "sh", "-e", "-c", script])),
        "2\n"
    );
}

#[test]
fn an_ignored_signal_stays_ignored_in_a_pod() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab);
    let mask = |traps: &str| {
        let run = node.client(&["run", "--", "grep", "SigIgn", "/proc/self/status"]);
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("{traps}\nexec \"$@\""), "sh"]);
        shell.arg(run.get_program()).args(run.get_args());
        let line = succeeds(&mut shell);
        let digits = line.trim().rsplit('\t').next().unwrap();
        u64::from_str_radix(digits, 16).unwrap() & 0b111
    };
    assert_eq!(mask(""), 0);
    assert_eq!(mask("trap '' HUP"), 0b001, "nohup");
    assert_eq!(mask("trap '' INT QUIT"), 0b110, "'&' in a script");
}
