//! Superpackets: TCP or UDP segments that a kernel hands over or takes as one packet.
//!
//! [`virtio`] is the header that describes one, [`split`] cuts it into its segments, [`merge`]
//! joins segments, and [`batch`] groups datagrams into the fewest system calls. [`acknowledgement`]
//! finds what need not be carried.

pub mod acknowledgement;
pub mod batch;
pub mod merge;
pub mod split;
pub mod virtio;
