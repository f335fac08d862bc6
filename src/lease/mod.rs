//! Leases: the stores that hold them, and the task that keeps this node's own.
//!
//! The rules are in [`muslin_stack::lease`]; here are the ones who execute them.

mod runner;
pub mod store;
pub mod table;

pub use runner::{Orders, run};
