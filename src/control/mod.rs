//! The control socket: how commands speak to a node, and how pods' devices come to it.
//!
//! A Unix `SOCK_SEQPACKET` socket of mode 0600 in the node's own directory: one JSON message per
//! packet, descriptors beside it (`SCM_RIGHTS`); the first says which version of the protocol a client
//! speaks. Only the node's own user and root are answered. Beside
//! it are two that can do less, to be given to others: see [`Level`].

mod blocking;
mod client;
mod connection;
mod server;
pub(crate) mod version;

pub(crate) use blocking::BlockingConnection;
pub use client::{Client, locate, locate_only};
pub use connection::{Connection, MAX_MESSAGE};
pub use server::Level;
pub(crate) use server::listen;
pub(crate) use server::{Departing, Service, Stage, serve};
