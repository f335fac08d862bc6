//! The terminal while it is a screen.

use std::io;

use ratatui::crossterm::event::{Event, read};
use ratatui::{DefaultTerminal, Frame};
use tokio::sync::mpsc::{Receiver, channel};

use crate::error::{Context, Result};

/// A screen of its own, in which keys are not echoed. The terminal is as it was when this is dropped, and
/// before a panic is told.
#[derive(Debug)]
pub(super) struct Screen(DefaultTerminal);

impl Screen {
    /// # Errors
    /// If the terminal cannot be one.
    pub(super) fn open() -> Result<Self> {
        let opened = ratatui::try_init().map(Self);
        if opened.is_err() {
            // It may have got half of the way.
            restore();
        }
        opened.context("cannot use the terminal")
    }

    /// # Errors
    /// If the terminal is gone.
    pub(super) fn draw(&mut self, draw: impl FnOnce(&mut Frame<'_>)) -> Result<()> {
        let drawn: io::Result<_> = self.0.draw(draw);
        drawn.map(|_| ()).context("cannot write to the terminal")
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // The terminal may be gone.
        let _ = self.0.show_cursor();
        restore();
    }
}

fn restore() {
    let _ = ratatui::try_restore();
}

/// What is typed, and that the terminal has another size. It ends with the terminal.
pub(super) fn events() -> Receiver<Event> {
    let (sender, events) = channel(1);
    // It waits for keys until the process ends.
    std::thread::spawn(move || {
        while let Ok(event) = read() {
            if sender.blocking_send(event).is_err() {
                return;
            }
        }
    });
    events
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::process::{Command, Stdio};

    use nix::pty::openpty;
    use nix::sys::termios::tcgetattr;

    use super::*;

    /// The variable with which a process of this test panics.
    const INSIDE: &str = "MUSLIN_TEST_PANICKING_SCREEN";

    #[test]
    fn a_panic_is_told_on_the_terminal_of_before() {
        if std::env::var_os(INSIDE).is_some() {
            let _screen = Screen::open().unwrap();
            panic!("on purpose");
        }
        let pty = openpty(None, None).unwrap();
        let before = tcgetattr(&pty.slave).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "--nocapture", "--test-threads=1"]);
        command.arg("cli::top::screen::tests::a_panic_is_told_on_the_terminal_of_before");
        let end = || Stdio::from(pty.slave.try_clone().unwrap());
        command
            .env(INSIDE, "1")
            .env("RUST_BACKTRACE", "0")
            .stdin(end())
            .stdout(end())
            .stderr(end());
        let mut child = command.spawn().unwrap();
        drop(command);
        let status = child.wait().unwrap();
        assert!(!status.success(), "it has not panicked");
        assert_eq!(tcgetattr(&pty.slave).unwrap(), before);
        drop(pty.slave);
        let mut told = Vec::new();
        // At its end a terminal is an error.
        let _ = File::from(pty.master).read_to_end(&mut told);
        let told = String::from_utf8_lossy(&told);
        let (screen, after) = told.split_once("\x1b[?1049l").unwrap();
        assert!(screen.contains("\x1b[?1049h"), "{told:?}");
        assert!(after.contains("on purpose"), "{told:?}");
    }
}
