//! What benchmarks of whole paths share: a load generator, rounds, and what is said of them.

#![allow(clippy::unwrap_used, reason = "a benchmark may")]
#![allow(missing_docs, reason = "only the benchmarks beside it use it")]

mod batch;
pub mod benchmark;
mod calibration;
mod chart;
pub mod figures;
pub mod flannel_udp;
pub mod floods;
mod history;
pub mod iperf3;
pub mod load;
pub mod machine;
pub mod path;
mod phases;
pub mod pods;
mod reader;
mod report;
pub mod rounds;
pub mod samples;
pub mod supervise;
mod trend;
pub mod window;
pub mod wire;
