//! How far the demo is, for who waits.

use std::io::{IsTerminal, Write};

/// One line that changes, on a terminal; nothing in a pipe.
pub(super) struct Progress {
    on_terminal: bool,
}

impl Progress {
    pub(super) fn new() -> Self {
        Self {
            on_terminal: std::io::stderr().is_terminal(),
        }
    }

    pub(super) fn say(&self, what: &str) {
        if self.on_terminal {
            // Erases the line (ECMA-48 EL); a terminal that is gone is no reason to stop.
            let _ = write!(std::io::stderr(), "\r\x1b[K{what} ...");
        }
    }

    pub(super) fn clear(&self) {
        if self.on_terminal {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}
