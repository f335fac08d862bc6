//! Leases: the stores that hold them, and the tasks that keep this node's own and
//! share names of pods.
//!
//! The rules are in [`muslin_stack::control::lease`]; here are the ones who execute them.

mod drive;
mod names;
pub mod release;
mod runner;
pub mod table;

pub use drive::Turn;
pub use names::Sharing;
pub use runner::{Controls, News, Reply, Terms, run};
