//! `muslin top` on a terminal: what it shows moves with the packets, and the terminal is as it was after it.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::fs::File;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};

use muslin::agent::Ping;
use muslin_lab::{Lab, Node, NodeConfig, SOON, poll_until, traffic};
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

/// `cargo test --test top -- --ignored picture` makes the picture of the README anew.
#[test]
#[ignore = "writes docs/images/top.svg"]
fn picture() {
    let Some(lab) = Lab::new() else { return };
    let nodes = lab.two_nodes(|_, config| config);
    let mut pods = ["api", "cache", "db", "web"].map(|name| nodes[0].pod(name));
    let mut far = nodes[1].pod("batch");
    let to = far.address("eth0").unwrap();
    let port = far.listen(0).unwrap();
    let near = pods[2].address("eth0").unwrap();
    let mut top = Running::start(nodes[0].client(&["top", "-d", "1"]), 12, 96);
    std::thread::scope(|scope| {
        for (at, pod) in pods.iter_mut().enumerate() {
            scope.spawn(move || match at {
                0 | 1 => drop(pod.ping(&Ping {
                    count: 400 * (1 + at as u16),
                    interval_ms: 10 / (1 + at as u64),
                    ..Ping::new(near)
                })),
                3 => traffic::transfer(pod, to, port, 300_000_000),
                _ => {}
            });
        }
        top.expect("packets of pods", |screen| {
            let moves = |name| row(screen, name).is_some_and(|it| it[2] != "0" && it[2] != "-");
            (moves("web") && moves("api") && moves("cache")).then_some(())
        });
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/images/top.svg");
        std::fs::write(path, svg(top.screen.screen())).unwrap();
    });
    top.press("q");
    assert!(top.ended().success());
}

/// A screen as a picture: a text for each run of cells that look alike.
fn svg(screen: &vt100::Screen) -> String {
    const CELL: (u32, u32) = (8, 17);
    let (rows, columns) = screen.size();
    let (width, height) = (
        u32::from(columns) * CELL.0 + 20,
        u32::from(rows) * CELL.1 + 20,
    );
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-size=\"13\" \
         font-family=\"DejaVu Sans Mono, Menlo, Consolas, monospace\">\n\
         <rect width=\"{width}\" height=\"{height}\" rx=\"6\" fill=\"#14171c\"/>\n"
    );
    for row in 0..rows {
        let mut column = 0;
        while column < columns {
            let look = |at| {
                let cell = screen.cell(row, at).unwrap();
                (colour(cell.fgcolor()), cell.bold(), cell.inverse())
            };
            let (first, (ink, bold, inverse)) = (column, look(column));
            let mut text = String::new();
            while column < columns && look(column) == (ink, bold, inverse) {
                let contents = screen.cell(row, column).unwrap().contents();
                text.push_str(if contents.is_empty() { " " } else { contents });
                column += 1;
            }
            let (x, y) = (10 + u32::from(first) * CELL.0, 10 + u32::from(row) * CELL.1);
            let len = u32::from(column - first) * CELL.0;
            if inverse {
                let rect = format!(
                    "<rect x=\"{x}\" y=\"{y}\" width=\"{len}\" height=\"17\" fill=\"{ink}\"/>\n"
                );
                out.push_str(&rect);
            }
            if text.trim().is_empty() {
                continue;
            }
            let text = text.replace('&', "&amp;").replace('<', "&lt;");
            let (ink, weight) = (
                if inverse { "#14171c" } else { ink },
                if bold { " font-weight=\"700\"" } else { "" },
            );
            out.push_str(&format!(
                "<text x=\"{x}\" y=\"{}\" fill=\"{ink}\"{weight} textLength=\"{len}\" \
                 xml:space=\"preserve\">{text}</text>\n",
                y + 13
            ));
        }
    }
    out + "</svg>\n"
}

fn colour(colour: vt100::Color) -> &'static str {
    match colour {
        vt100::Color::Idx(1 | 9) => "#ff9c94",
        vt100::Color::Idx(2 | 10) => "#7ddba0",
        vt100::Color::Idx(3 | 11) => "#ffb454",
        vt100::Color::Idx(4 | 6 | 12 | 14) => "#8ab8ff",
        vt100::Color::Idx(8) => "#a7b0bd",
        _ => "#e8ebf0",
    }
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
