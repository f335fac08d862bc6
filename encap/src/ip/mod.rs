//! IP packets and what is in them: headers, checksums, fragments and the MSS option of TCP.

pub mod checksum;
pub mod fragment;
pub mod mss;
pub mod transport;
pub mod v4;
pub mod v6;
