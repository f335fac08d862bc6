//! Signals that a process waits for.

use nix::sys::signal::Signal;
use tokio::signal::unix::SignalKind;

use crate::error::{Context, Result};

/// Waits for a signal.
pub(crate) struct Listener(Option<tokio::signal::unix::Signal>);

impl Listener {
    /// Listens for a signal, unless it is ignored on behalf of whoever started this process, like
    /// `nohup` or a script for what it starts with `&`. It stays ignored then, and is for what is
    /// started from here.
    pub(crate) fn new(signal: Signal) -> Result<Self> {
        if is_ignored(signal) {
            return Ok(Self(None));
        }
        let listening = tokio::signal::unix::signal(SignalKind::from_raw(signal as i32));
        listening
            .map(Some)
            .map(Self)
            .context("cannot listen for signals")
    }

    /// Returns when the signal comes.
    pub(crate) async fn heard(&mut self) {
        match &mut self.0 {
            Some(listening) => listening.recv().await,
            None => std::future::pending().await,
        };
    }
}

/// What would end this process and leave the command behind.
pub(crate) struct Signals {
    terminate: Listener,
    hangup: Listener,
    interrupt: Listener,
    quit: Listener,
}

impl Signals {
    /// Listens. To be called before the command starts: from then on somebody may ask it to end.
    ///
    /// # Errors
    /// If the kernel does not allow it.
    pub(crate) fn listen() -> Result<Self> {
        Ok(Self {
            terminate: Listener::new(Signal::SIGTERM)?,
            hangup: Listener::new(Signal::SIGHUP)?,
            interrupt: Listener::new(Signal::SIGINT)?,
            quit: Listener::new(Signal::SIGQUIT)?,
        })
    }

    /// The next that asks this process to end.
    pub(crate) async fn next(&mut self) -> Signal {
        tokio::select! {
            () = self.terminate.heard() => Signal::SIGTERM,
            () = self.hangup.heard() => Signal::SIGHUP,
            () = self.interrupt.heard() => Signal::SIGINT,
            () = self.quit.heard() => Signal::SIGQUIT,
        }
    }
}

fn is_ignored(signal: Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal as i32 - 1) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ignored_signal_is_told_from_others() {
        // Rust programs ignore it from the start.
        assert!(is_ignored(Signal::SIGPIPE));
        assert!(!is_ignored(Signal::SIGSEGV));
    }
}
