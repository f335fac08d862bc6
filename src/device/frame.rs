//! What all devices have in common.

use std::io;

use muslin_encap::offload::virtio::Header;
use muslin_stack::datapath::frame;

/// What takes Ethernet frames, as a pod's device and the uplink do, or IP packets, as the host interface
/// does.
pub trait FrameDevice {
    /// Where the IP packet begins in what it takes, in bytes.
    const NETWORK: usize = frame::HEADER_LEN;

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
