//! Muslin: a pod network that needs no root and no kernel devices.
//!
//! This crate is the shell around [`muslin_stack`], which decides, and [`muslin_encap`], which
//! knows the tunnel formats: devices, sockets, threads, stores, namespaces and the command line.
//! Rules about packets belong to `muslin-stack`.

pub mod agent;
mod attach;
pub mod cli;
mod clients;
pub mod cni;
mod condition;
mod confine;
pub mod control;
pub mod daemon;
pub mod demo;
mod detached;
pub mod device;
pub mod dns;
pub mod doctor;
pub mod error;
mod features;
pub mod flannel;
pub mod host;
mod http;
mod init;
pub mod journal;
mod keeper;
pub mod lease;
mod lines;
mod metrics;
mod netlink;
pub mod netns;
mod notify;
mod page;
mod process;
mod random;
mod replace;
#[cfg(feature = "sidecar")]
pub mod sidecar;
mod signals;
pub mod state;
pub mod store;
mod takeover;
mod terminal;
pub mod underlay;
mod wireguard_key;
pub mod worker;
