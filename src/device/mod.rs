//! Devices: where pods' frames come from and go to.

mod tap;

pub use tap::{OpenError, Tap};
