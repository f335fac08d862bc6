//! What benchmarks of whole paths share: a load generator, rounds, and what is said of them.

#![allow(dead_code, reason = "each benchmark uses a part")]

mod batch;
mod chart;
pub(crate) mod figures;
pub(crate) mod floods;
pub(crate) mod load;
pub(crate) mod machine;
pub(crate) mod path;
pub(crate) mod pods;
mod report;
pub(crate) mod rounds;
pub(crate) mod samples;
pub(crate) mod supervise;
pub(crate) mod window;
mod wire;
