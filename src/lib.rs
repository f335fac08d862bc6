//! Muslin: a pod network that needs no root and no kernel devices.
//!
//! This crate is the shell around [`muslin_stack`], which decides, and [`muslin_encap`], which
//! knows the tunnel formats: devices, sockets, threads, stores, namespaces and the command line.
//! No rule about packets lives here.

mod attach;
pub mod cli;
mod clients;
mod confine;
pub mod control;
pub mod demo;
mod detached;
pub mod device;
pub mod dns;
pub mod doctor;
pub mod egress;
pub mod error;
pub mod flannel;
mod init;
pub mod lease;
mod lines;
mod netlink;
pub mod netns;
pub mod node;
pub mod publish;
mod quantity;
mod replace;
pub mod sidecar;
mod signals;
#[cfg(test)]
#[path = "../tests/lab/skip.rs"]
mod skip;
pub mod state;
mod terminal;
mod text;
pub mod underlay;
pub mod worker;
