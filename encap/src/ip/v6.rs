//! IPv6 headers (RFC 8200 section 3).

/// Bytes of the header, without extension headers.
pub const HEADER_LEN: usize = 40;

/// Offsets in the header.
pub(crate) mod field {
    pub(crate) const PAYLOAD_LEN: usize = 4;
    pub(crate) const NEXT_HEADER: usize = 6;
    pub(crate) const HOP_LIMIT: usize = 7;
    pub(crate) const ADDRESSES: usize = 8;
}

/// Hop-by-hop options.
pub(crate) const HOP_BY_HOP: u8 = 0;
/// Routing: the pseudo header would have another destination.
pub(crate) const ROUTING: u8 = 43;
/// A fragment.
pub(crate) const FRAGMENT: u8 = 44;
/// Destination options.
pub(crate) const OPTIONS: u8 = 60;
