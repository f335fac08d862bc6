//! Notifications of the service manager (sd_notify(3)); nothing where there is none.

use std::time::Duration;

use sd_notify::NotifyState;
use tracing::debug;

/// How the node does.
pub(super) fn status(text: &str) {
    notify(&[NotifyState::Status(text)]);
}

/// The node serves its pods.
pub(super) fn ready(status: &str) {
    notify(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// The service manager's watchdog interval; nothing if it has none.
#[must_use]
pub(crate) fn watchdog() -> Option<Duration> {
    sd_notify::watchdog_enabled()
}

/// The node is alive.
pub(crate) fn alive() {
    notify(&[NotifyState::Watchdog]);
}

/// The node ends.
pub(crate) fn stopping() {
    notify(&[NotifyState::Stopping, NotifyState::Status("stopping")]);
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        debug!("cannot notify the service manager: {error}");
    }
}
