//! What the node serves over HTTP: its health.

pub(crate) mod health;
mod server;
