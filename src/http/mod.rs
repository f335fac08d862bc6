//! What the node serves over HTTP: its health, and its metrics.

pub(crate) mod health;
pub(crate) mod metrics;
pub(crate) mod server;
