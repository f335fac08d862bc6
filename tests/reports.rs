//! What a node reports: reports that are repeated, and what is said of empty ones.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::net::Ipv4Addr;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};

use muslin_lab::watch::stretched;
use muslin_lab::{Lab, Node, NodeConfig, SOON, muslin_bin, poll_until};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

fn store(lab: &Lab) -> String {
    format!("sqlite:{}", lab.directory().join("leases.db").display())
}

/// A node on a host of its own that follows its interface.
fn start(lab: &Lab, number: u8) -> Node {
    let name = format!("n{number}");
    let host = lab.host(&name, Ipv4Addr::new(10, 9, 0, number));
    NodeConfig::on_interface(&name, "eth0", &store(lab)).start(&host)
}

fn run(mut command: Command) -> (String, String, Option<i32>) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (text(stdout), text(stderr), status.code())
}

/// A command that goes on, and its lines.
struct Running {
    child: Child,
    lines: Receiver<String>,
}

impl Running {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                // Nobody may listen any more.
                let _ = sender.send(line);
            }
        });
        Self { child, lines }
    }

    fn line(&self) -> String {
        self.lines.recv_timeout(stretched(SOON)).unwrap()
    }

    /// Its first line with these words.
    fn expect(&self, words: &str) -> String {
        loop {
            let line = self.line();
            if line.contains(words) {
                return line;
            }
        }
    }

    /// Ends it as Ctrl-C does, which must be its end in order.
    fn interrupt(mut self) {
        let pid = Pid::from_raw(self.child.id() as i32);
        kill(pid, Signal::SIGINT).unwrap();
        let status = poll_until(SOON, "the end of a command", || {
            self.child.try_wait().unwrap()
        });
        assert!(status.success(), "{status}");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn reports_are_repeated_in_a_pipe_and_on_a_terminal() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab, 1);
    let plain = Running::start(node.client(&["status", "--watch", "0.1"]));
    for _ in 0..3 {
        assert!(plain.expect("node  ").contains("n1"));
    }
    plain.interrupt();
    let json = Running::start(node.client(&["pods", "--watch=0.1", "--json"]));
    assert_eq!([json.line(), json.line()], ["[]", "[]"]);
    let _pod = node.pod("web");
    let row = json.expect("web");
    let row: Value = serde_json::from_str(&row).unwrap();
    assert_eq!(row[0]["pod"], "web");
    json.interrupt();
    // A reader that goes ends it.
    let quoted = format!(
        "{} drops --all --watch 0.1 --socket {} | head -n 3",
        muslin_bin(),
        node.socket().display()
    );
    assert_eq!(node.host().sh(&quoted).lines().count(), 3);

    for (no_color, dim) in [("", true), ("1", false)] {
        let size = Winsize {
            ws_row: 6,
            ws_col: 30,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let terminal = openpty(&size, None).unwrap();
        let mut command = node.client(&["drops", "--all", "--watch", "0.1"]);
        command.env("NO_COLOR", no_color).env_remove("COLUMNS");
        command.stdout(terminal.slave);
        let mut child = command.spawn().unwrap();
        drop(command);
        let mut screen = File::from(terminal.master);
        let mut seen = String::new();
        let mut read = || {
            let mut bytes = [0; 4096];
            // At its end a terminal is an error.
            let len = screen.read(&mut bytes).unwrap_or_default();
            seen += &String::from_utf8_lossy(&bytes[..len]);
            (seen.clone(), len)
        };
        // Two screens.
        while read().0.matches("\x1b[H").count() < 3 {}
        kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
        while read().1 > 0 {}
        let (seen, _) = read();
        assert!(child.wait().unwrap().success());
        assert!(seen.starts_with("\x1b[2J\x1b[?25l"), "{seen:?}");
        assert!(seen.ends_with("\x1b[?25h\r\n"), "the cursor: {seen:?}");
        let one = seen.split("\x1b[H").nth(1).unwrap();
        assert_eq!(one.lines().count(), 6, "{one:?}");
        assert!(one.contains("more lines"), "{one:?}");
        assert_eq!(seen.contains("\x1b[2m"), dim, "{one:?}");
    }
}

#[test]
fn an_empty_report_says_why_and_a_wrong_name_what_is_meant() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab, 1);
    for report in ["pods", "peers", "flows", "drops"] {
        let (stdout, stderr, code) = run(node.client(&[report]));
        assert_eq!((stdout.as_str(), code), ("", Some(0)), "{report}");
        assert!(stderr.starts_with(&format!("no {report}: ")), "{stderr}");
        let (stdout, stderr, _) = run(node.client(&[report, "--json"]));
        assert!(serde_json::from_str::<Value>(&stdout).unwrap().is_array());
        assert_eq!(stderr, "", "{report}");
    }
    let _pod = node.pod("database");
    for (words, code, meant) in [
        (&["flows", "--pod", "databse"][..], 1, "'database'"),
        (&["detach", "datbase"], 1, "'database'"),
        (&["exec", "databasee", "true"], 1, "'database'"),
        (&["drops", "--reason", "strom"], 2, "'storm'"),
    ] {
        let (_, stderr, status) = run(node.client(words));
        assert_eq!(status, Some(code), "{words:?}: {stderr}");
        assert!(stderr.contains(meant), "{words:?}: {stderr}");
    }
    let mut wrong = node.host().command(muslin_bin());
    wrong.args(["pods", "--state-dir"]).arg(node.state_dir());
    wrong.args(["--node", "n"]);
    let (_, stderr, code) = run(wrong);
    assert!(stderr.contains("(did you mean 'n1'?)"), "{stderr}");
    assert_eq!(code, Some(1));
    let mut wrong = node.host().command(muslin_bin());
    wrong.arg("pears");
    let (_, stderr, code) = run(wrong);
    assert!(stderr.contains("'peers'"), "{stderr}");
    assert_eq!(code, Some(2));
}
