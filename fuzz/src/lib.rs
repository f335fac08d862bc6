//! What the fuzz targets check, as functions of their input, so that seeds and crashes replay as
//! ordinary tests without libFuzzer.
#![forbid(unsafe_code)]

pub mod codecs;
pub mod event;
pub mod node;
pub mod seeds;
pub mod segments;

#[path = "../../encap/tests/reference/mod.rs"]
mod reference;
