//! What tests, benchmarks and fuzz targets of the pure crates share.

#[cfg(feature = "packets")]
pub mod packets;
pub mod reference;
pub mod rounds;
#[cfg(feature = "scenes")]
pub mod scenes;
#[cfg(feature = "scenes")]
pub mod scenes_v6;
