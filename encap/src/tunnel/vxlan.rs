//! VXLAN: an inner Ethernet frame behind eight bytes of header in a UDP datagram (RFC 7348
//! section 5).
//!
//! ```text
//!  0                   1                   2                   3
//! |R|R|R|R|I|R|R|R|            Reserved                           |
//! |          VXLAN Network Identifier (VNI)       |   Reserved    |
//! ```
//! The group-policy extension (draft-smith-vxlan-group-policy) sets the G flag and has an id in the
//! second half of the first word. It is accepted and never sent.

use std::fmt;
use std::str::FromStr;

use smoltcp::wire::EthernetAddress;
use thiserror::Error;

use crate::buffer::{NoRoom, PacketBuf};
use crate::mac::DisplayMac;

/// The default UDP port of VXLAN in Linux and flannel (IANA assigned 4789).
pub const PORT: u16 = 8472;

/// Length of a VXLAN header in bytes.
pub const HEADER_LEN: usize = 8;

mod field {
    use std::ops::Range;

    pub(super) const FLAGS: usize = 0;
    pub(super) const GROUP_POLICY: Range<usize> = 2..4;
    pub(super) const VNI: Range<usize> = 4..7;
}

/// The I flag: the header carries a valid VNI.
const FLAG_VNI: u8 = 0x08;
/// The G flag: the header carries a group policy id.
const FLAG_GROUP_POLICY: u8 = 0x80;

/// A VXLAN network identifier: 24 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vni(u32);

/// The number does not fit the 24 bits of a VNI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{0} is not a VXLAN network identifier: it must be 0 to 16777215")]
pub struct InvalidVni(pub u32);

impl Vni {
    /// The VNI `value`.
    ///
    /// # Errors
    /// `InvalidVni` if it has more than 24 bits.
    pub const fn new(value: u32) -> Result<Self, InvalidVni> {
        if value < 1 << 24 {
            Ok(Self(value))
        } else {
            Err(InvalidVni(value))
        }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }

    fn to_bytes(self) -> [u8; 3] {
        let [_, a, b, c] = self.0.to_be_bytes();
        [a, b, c]
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The MAC address of a VXLAN tunnel endpoint (VTEP): unicast and not zero. It is displayed in
/// lower-case hex with colons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct VtepMac(EthernetAddress);

/// Why an address or a text is not the MAC address of a VTEP.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum InvalidVtepMac {
    /// A multicast, broadcast or all-zero address.
    #[error("{} cannot be a VTEP's MAC address: it is not unicast", DisplayMac(*.0))]
    NotUnicast(EthernetAddress),
    /// Text that is not a 48-bit MAC address.
    #[error("'{0}' is not a MAC address like 0e:1f:20:a1:b2:c3")]
    Syntax(String),
}

impl VtepMac {
    /// A locally administered unicast address from six random bytes, as flannel generates them.
    ///
    /// # Panics
    /// Never: the address has the local bit, so it is not zero.
    #[must_use]
    pub const fn from_random(mut bytes: [u8; 6]) -> Self {
        bytes[0] = bytes[0] & 0xfe | 0x02;
        Self(EthernetAddress(bytes))
    }

    /// The address.
    #[must_use]
    pub const fn get(self) -> EthernetAddress {
        self.0
    }
}

impl TryFrom<EthernetAddress> for VtepMac {
    type Error = InvalidVtepMac;

    fn try_from(address: EthernetAddress) -> Result<Self, InvalidVtepMac> {
        if address.is_unicast() && address.0 != [0; 6] {
            Ok(Self(address))
        } else {
            Err(InvalidVtepMac::NotUnicast(address))
        }
    }
}

impl FromStr for VtepMac {
    type Err = InvalidVtepMac;

    /// Accepts the 48-bit forms of Go's `net.ParseMAC`: `0e:1f:..`, `0E-1F-..`, `0e1f.20a1.b2c3`.
    fn from_str(text: &str) -> Result<Self, InvalidVtepMac> {
        let syntax = || InvalidVtepMac::Syntax(text.to_owned());
        let (separator, group) = match text.as_bytes() {
            [_, _, separator @ (b':' | b'-'), ..] => (char::from(*separator), 2),
            [_, _, _, _, b'.', ..] => ('.', 4),
            _ => return Err(syntax()),
        };
        let mut bytes = [0; 6];
        let mut at = 0;
        for part in text.split(separator) {
            if part.len() != group || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(syntax());
            }
            for pair in part.as_bytes().chunks(2) {
                let value = std::str::from_utf8(pair)
                    .ok()
                    .and_then(|pair| u8::from_str_radix(pair, 16).ok())
                    .ok_or_else(syntax)?;
                *bytes.get_mut(at).ok_or_else(syntax)? = value;
                at += 1;
            }
        }
        if at != bytes.len() {
            return Err(syntax());
        }
        EthernetAddress(bytes).try_into()
    }
}

impl fmt::Display for VtepMac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        DisplayMac(self.0).fmt(f)
    }
}

/// Why a datagram is not a VXLAN packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Error {
    /// Fewer bytes than a VXLAN header has.
    #[error("{len} bytes are too few for a VXLAN header")]
    TooShort {
        /// The number of bytes.
        len: usize,
    },
    /// The I flag is not set, so there is no VNI (RFC 7348 section 5 demands it).
    #[error("the VXLAN header has no VNI")]
    NoVni,
}

/// A view of a VXLAN packet in a buffer, in smoltcp's style.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet<T: AsRef<[u8]>> {
    buffer: T,
}

impl<T: AsRef<[u8]>> Packet<T> {
    /// A checked view: its accessors cannot panic.
    ///
    /// # Errors
    /// `Error` if the buffer is too short or has no valid VNI. Reserved bits are ignored, as RFC
    /// 7348 section 5 demands of receivers.
    pub fn new_checked(buffer: T) -> Result<Self, Error> {
        let bytes = buffer.as_ref();
        if bytes.len() < HEADER_LEN {
            return Err(Error::TooShort { len: bytes.len() });
        }
        if bytes[field::FLAGS] & FLAG_VNI == 0 {
            return Err(Error::NoVni);
        }
        Ok(Self { buffer })
    }

    /// The network that the inner frame belongs to.
    pub fn vni(&self) -> Vni {
        let bytes = &self.buffer.as_ref()[field::VNI];
        Vni(u32::from_be_bytes([0, bytes[0], bytes[1], bytes[2]]))
    }

    /// The group policy id, if the header has that extension.
    pub fn group_policy(&self) -> Option<u16> {
        let bytes = self.buffer.as_ref();
        let id = &bytes[field::GROUP_POLICY];
        (bytes[field::FLAGS] & FLAG_GROUP_POLICY != 0).then(|| u16::from_be_bytes([id[0], id[1]]))
    }

    /// The inner Ethernet frame.
    pub fn payload(&self) -> &[u8] {
        &self.buffer.as_ref()[HEADER_LEN..]
    }
}

/// Puts a VXLAN header in front of the Ethernet frame in `packet`: the I flag and the VNI, with all
/// other bits zero. (A Linux VXLAN device drops packets that have any other bit set.)
///
/// # Errors
/// `NoRoom` if there are less than eight bytes of headroom; the frame is unchanged then.
pub fn encapsulate(packet: &mut PacketBuf<'_>, vni: Vni) -> Result<(), NoRoom> {
    let header = packet.prepend(HEADER_LEN)?;
    header.fill(0);
    header[field::FLAGS] = FLAG_VNI;
    header[field::VNI].copy_from_slice(&vni.to_bytes());
    Ok(())
}

/// Removes the VXLAN header, so that `packet` is the inner Ethernet frame, and returns its VNI.
///
/// # Errors
/// `Error` if it is not a VXLAN packet; it is unchanged then.
pub fn decapsulate(packet: &mut PacketBuf<'_>) -> Result<Vni, Error> {
    let vni = Packet::new_checked(packet.as_slice())?.vni();
    packet.trim_front(HEADER_LEN);
    Ok(vni)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::buffer::HEADROOM;

    #[test]
    fn the_header_is_what_linux_expects() {
        let mut storage = *b"........frame";
        let mut packet = PacketBuf::new(&mut storage, 8, 5).unwrap();
        encapsulate(&mut packet, Vni::new(0x01_02_03).unwrap()).unwrap();
        assert_eq!(packet.as_slice(), b"\x08\0\0\0\x01\x02\x03\0frame");
        assert_eq!(
            encapsulate(&mut packet, Vni(1)),
            Err(NoRoom { needed: 8, room: 0 })
        );
    }

    #[test]
    fn malformed_headers_have_their_own_errors() {
        assert_eq!(Packet::new_checked([]), Err(Error::TooShort { len: 0 }));
        assert_eq!(
            Packet::new_checked(&[8, 0, 0, 0, 0, 0, 1][..]),
            Err(Error::TooShort { len: 7 })
        );
        assert_eq!(
            Packet::new_checked([0xf7, 0, 0, 0, 0, 0, 1, 0]),
            Err(Error::NoVni)
        );
    }

    #[test]
    fn reserved_bits_and_group_policy_are_read_leniently() {
        let packet = Packet::new_checked([0x88, 0x40, 0x12, 0x34, 0, 0, 7, 0xff]).unwrap();
        assert_eq!(packet.vni(), Vni(7));
        assert_eq!(packet.group_policy(), Some(0x1234));
        assert!(packet.payload().is_empty());
        let plain = Packet::new_checked([0x08, 0, 0x12, 0x34, 0, 0, 7, 0]).unwrap();
        assert_eq!(plain.group_policy(), None);
    }

    #[test]
    fn a_vni_has_24_bits() {
        assert_eq!(Vni::new(0xff_ffff).map(Vni::get), Ok(0xff_ffff));
        assert_eq!(Vni::new(0x100_0000), Err(InvalidVni(0x100_0000)));
    }

    #[test]
    fn mac_addresses_are_read_as_go_reads_them() {
        let mac = VtepMac(EthernetAddress([0x0e, 0x1f, 0x20, 0xa1, 0xb2, 0xc3]));
        for text in ["0e:1f:20:a1:b2:c3", "0E-1F-20-A1-B2-C3", "0e1f.20a1.b2c3"] {
            assert_eq!(text.parse(), Ok(mac), "{text}");
        }
        assert_eq!(mac.to_string(), "0e:1f:20:a1:b2:c3");
        for text in [
            "",
            "0e",
            "0e:1f:20:a1:b2",
            "0e:1f:20:a1:b2:c3:d4",
            "0e:1f-20:a1:b2:c3",
            "0e1f20a1b2c3",
            "0e:1f:20:a1:b2:g3",
            "0e:1f:20:a1:b2:+3",
            "0e1f.20a1",
            "é:1f:20:a1:b2:c",
        ] {
            assert!(
                matches!(text.parse::<VtepMac>(), Err(InvalidVtepMac::Syntax(_))),
                "{text}"
            );
        }
        for text in [
            "00:00:00:00:00:00",
            "ff:ff:ff:ff:ff:ff",
            "01:00:5e:00:00:01",
        ] {
            assert!(matches!(
                text.parse::<VtepMac>(),
                Err(InvalidVtepMac::NotUnicast(_))
            ));
        }
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out(
            frame in proptest::collection::vec(any::<u8>(), 0..200),
            vni in 0u32..1 << 24,
        ) {
            let vni = Vni::new(vni).unwrap();
            let mut storage = vec![0xaa; HEADROOM + frame.len()];
            let mut packet = PacketBuf::new(&mut storage, HEADROOM, frame.len()).unwrap();
            packet.as_mut_slice().copy_from_slice(&frame);
            encapsulate(&mut packet, vni).unwrap();
            prop_assert_eq!(packet.len(), frame.len() + HEADER_LEN);
            prop_assert_eq!(decapsulate(&mut packet), Ok(vni));
            prop_assert_eq!(packet.as_slice(), &frame[..]);
        }

        #[test]
        fn decoding_any_bytes_answers(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..32),
        ) {
            let before = bytes.clone();
            let len = bytes.len();
            let mut packet = PacketBuf::new(&mut bytes, 0, len).unwrap();
            match decapsulate(&mut packet) {
                Ok(vni) => {
                    prop_assert_eq!(&vni.to_bytes()[..], &before[4..7]);
                    prop_assert_eq!(packet.as_slice(), &before[8..]);
                }
                Err(Error::TooShort { len }) => prop_assert!(len == before.len() && len < 8),
                Err(Error::NoVni) => prop_assert_eq!(before[0] & 8, 0),
            }
        }

        #[test]
        fn random_macs_are_unicast_and_survive_their_text(bytes: [u8; 6]) {
            let mac = VtepMac::from_random(bytes);
            prop_assert_eq!(VtepMac::try_from(mac.get()), Ok(mac));
            prop_assert_eq!(mac.to_string().parse(), Ok(mac));
        }
    }
}
