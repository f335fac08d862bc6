//! Leases: the stores that hold them, and the tasks that keep this node's own and
//! share names of pods.
//!
//! The rules are in [`muslin_stack::control::lease`]; here are the ones who execute them.

mod names;
pub mod release;
mod runner;
pub mod table;

use std::sync::Arc;

pub use names::Sharing;
pub use runner::{Controls, News, Reply, run};

/// The right to write to the store: those who do share it, until somebody has it alone.
pub type Turn = Arc<tokio::sync::RwLock<()>>;
