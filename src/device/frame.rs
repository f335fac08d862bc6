//! What all devices have in common.

use std::io;

use muslin_encap::offload::virtio::Header;

/// What takes Ethernet frames: a pod's device, or the uplink.
pub trait FrameDevice {
    /// Whether it takes and gives superpackets and unfinished checksums.
    fn has_offloads(&self) -> bool;

    /// Hands over a frame: `head` and all of `tail`. Without offloads nothing may be left to do in
    /// `header`.
    ///
    /// # Errors
    /// `WouldBlock` if it takes no more now, EINVAL (`InvalidInput`) if it cannot take this
    /// superpacket, else what the kernel refuses it for.
    fn send(&self, header: &Header, head: &[u8], tail: &[&[u8]]) -> io::Result<()>;
}
