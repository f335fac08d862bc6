//! `muslin demo`, and the agent it runs in its pods.

pub mod agent;
