//! A process that holds copies of pods' devices while a node is not there: the kernel keeps what their
//! queues have room for, instead of losing it, and the node's successor needs nobody who can enter
//! namespaces.
//!
//! It parses nothing from the network and hardly anything else, so there is no reason for it to end
//! when the node does.

mod client;
mod messages;
mod server;

pub(crate) use client::{Keeper, Kept, is_tunnel};
pub(crate) use server::run;
