//! `muslin top` on a terminal: what it shows moves with the packets, and the terminal is as it was after it.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::fs::File;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};

use muslin::agent::Ping;
use muslin_lab::{Lab, Node, NodeConfig, SOON, poll_until};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{Termios, tcgetattr};
use nix::unistd::Pid;

/// A program on a terminal of its own.
struct Running {
    child: Child,
    keys: File,
    written: Receiver<Vec<u8>>,
    screen: vt100::Parser,
    /// Everything that was written.
    all: Vec<u8>,
    terminal: OwnedFd,
    before: Termios,
}

impl Running {
    fn start(mut command: Command, rows: u16, columns: u16) -> Self {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = openpty(&size, None).unwrap();
        let before = tcgetattr(&pty.slave).unwrap();
        let end = || Stdio::from(pty.slave.try_clone().unwrap());
        command.stdin(end()).stdout(end()).stderr(end());
        let child = command.spawn().unwrap();
        let mut output = File::from(pty.master.try_clone().unwrap());
        let (sender, written) = channel();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            // At its end a terminal is an error.
            while let Ok(len) = output.read(&mut bytes) {
                if sender.send(bytes[..len].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self {
            child,
            keys: File::from(pty.master),
            written,
            screen: vt100::Parser::new(rows, columns, 0),
            all: Vec::new(),
            terminal: pty.slave,
            before,
        }
    }

    fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    /// What is on the screen now.
    fn screen(&mut self) -> String {
        for bytes in self.written.try_iter() {
            self.screen.process(&bytes);
            self.all.extend(bytes);
        }
        self.screen.screen().contents()
    }

    /// Waits for a screen like this.
    fn expect<T>(&mut self, what: &str, is_it: impl Fn(&str) -> Option<T>) -> T {
        poll_until(SOON, what, || is_it(&self.screen()))
    }

    /// Waits for the end, after which the terminal is as it was before.
    fn ended(&mut self) -> ExitStatus {
        let status = poll_until(SOON, "the end of muslin top", || {
            self.child.try_wait().unwrap()
        });
        // Its last words may still be on their way.
        poll_until(SOON, "the screen of before", || {
            self.screen();
            let screen = self.screen.screen();
            (!screen.alternate_screen() && !screen.hide_cursor()).then_some(())
        });
        assert_eq!(tcgetattr(&self.terminal).unwrap(), self.before);
        status
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn start(lab: &Lab) -> Node {
    let store = format!("sqlite:{}", lab.directory().join("leases.db").display());
    let host = lab.host("n1", Ipv4Addr::new(10, 9, 0, 1));
    NodeConfig::on_interface("n1", "eth0", &store).start(&host)
}

/// Cells of the row that begins with this word.
fn row(screen: &str, name: &str) -> Option<Vec<String>> {
    let line = screen
        .lines()
        .find(|line| line.starts_with(&format!("{name} ")))?;
    // One space is between a number and its prefix, two at least between columns.
    let cells = line
        .split("  ")
        .map(str::trim)
        .filter(|cell| !cell.is_empty());
    Some(cells.map(str::to_owned).collect())
}

#[test]
fn rates_move_with_packets_and_keys_are_obeyed() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab);
    let (mut web, mut db) = (node.pod("web"), node.pod("db"));
    let address = db.address("eth0").unwrap();
    let mut top = Running::start(node.client(&["top", "-d", "0.2"]), 15, 80);
    let rates = |screen: &str| {
        let cells = row(screen, "web")?;
        Some([cells.get(2)?.clone(), cells.get(4)?.clone()])
    };
    top.expect("quiet pods", |screen| {
        (rates(screen)? == ["0", "0"]).then_some(())
    });
    let flood = std::thread::spawn(move || {
        let ping = Ping {
            count: 200,
            interval_ms: 10,
            ..Ping::new(address)
        };
        web.ping(&ping).unwrap();
        web
    });
    top.expect("packets of a pod", |screen| {
        let moves = |rate: &String| rate != "0" && rate != "-";
        rates(screen)?.iter().all(moves).then_some(())
    });
    let _web = flood.join().unwrap();
    top.expect("quiet pods again", |screen| {
        (rates(screen)? == ["0", "0"]).then_some(())
    });

    top.press("/db\r");
    top.expect("only one pod", |screen| {
        (row(screen, "db").is_some() && row(screen, "web").is_none()).then_some(())
    });
    top.press("\x1b");
    top.expect("both pods", |screen| {
        row(screen, "web").and(row(screen, "db"))
    });
    top.press("\t");
    top.expect("the peers", |screen| {
        screen.contains("no other node has a lease").then_some(())
    });
    top.press("?");
    top.expect("the help", |screen| {
        screen.contains("FROM and TO are").then_some(())
    });
    top.press("x");
    top.expect("no help", |screen| {
        (!screen.contains("FROM and TO are")).then_some(())
    });
    top.press("q");
    assert!(top.ended().success());
}

#[test]
fn the_terminal_is_restored_whatever_ends_it() {
    let Some(lab) = Lab::new() else { return };
    let mut node = start(&lab);
    for (end, no_color) in [("\x03", ""), ("SIGTERM", "1"), ("SIGHUP", ""), ("q", "1")] {
        let mut command = node.client(&["top", "-d", "0.2"]);
        command.env("NO_COLOR", no_color);
        let mut top = Running::start(command, 50, 200);
        top.expect("the last table", |screen| {
            screen.contains("Drops 0").then_some(())
        });
        assert!(top.screen.screen().alternate_screen());
        let pid = Pid::from_raw(top.child.id() as i32);
        match end {
            "SIGTERM" => kill(pid, Signal::SIGTERM).unwrap(),
            "SIGHUP" => kill(pid, Signal::SIGHUP).unwrap(),
            keys => top.press(keys),
        }
        assert!(top.ended().success(), "{end:?}");
        let all = String::from_utf8_lossy(&top.all);
        let has_colours = ["\x1b[38;", "\x1b[36m"].iter().any(|it| all.contains(it));
        assert_eq!(has_colours, no_color.is_empty(), "{all:?}");
    }

    // A node that goes and comes back is waited for.
    let mut top = Running::start(node.client(&["top", "-d", "0.2"]), 15, 60);
    top.expect("the node", |screen| screen.contains("Pods 0").then_some(()));
    node.kill();
    top.expect("that it is gone", |screen| {
        screen.contains("no node listens").then_some(())
    });
    node.start_again();
    top.expect("the node", |screen| {
        (!screen.contains("no node listens")).then_some(())
    });
    top.press("q");
    assert!(top.ended().success());
    // Where there is nothing to draw on, it says what to use.
    let output = node.client(&["top"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("--watch --json"), "{stderr}");
    assert_eq!(stderr.lines().count(), 1);
}
