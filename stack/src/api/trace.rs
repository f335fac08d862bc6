//! What is said over the control socket about packets that are traced.
//!
//! Each node tells its own part of a packet's way. Where its part ends with a packet on the way to
//! another node, whoever asked gives that packet to that node ([`Question::Arrival`]).

use std::fmt::{self, Write};
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::drops::DropReason;

/// What is asked about a packet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Question {
    /// What becomes of a packet that begins at this node.
    Beginning(Beginning),
    /// What becomes of one that another node has sent here.
    Arrival(Arrival),
    /// The same, of another node, which this one asks over the pod network.
    Elsewhere {
        /// The public address of that node.
        public_ip: IpAddr,
        /// What this one has sent there.
        arrival: Arrival,
    },
}

/// A packet that begins at a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Beginning {
    /// Who sends it: a pod of the node by its name or address, `host`, or `outside`, which is a client
    /// of a published port.
    pub from: String,
    /// Who is to get it: a pod by its name, also `POD.NODE`, a node by its name, an address, `gateway`,
    /// `host`, or `outside`.
    pub to: String,
    /// What it carries.
    pub protocol: Protocol,
    /// Its source port, or the identifier of an echo request.
    pub source_port: u16,
    /// Its destination port.
    pub destination_port: u16,
    /// Its length in bytes with the IP header; as short as can be if that is 0.
    pub size: usize,
    /// Its time to live.
    pub ttl: u8,
    /// Whether it must not be cut into fragments.
    pub dont_fragment: bool,
    /// Its IP version: by default that of the addresses that are named, or else IPv4 if both ends have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<Version>,
    /// Whether the shortest one has room for a mark, by which it is known again once it is sent.
    #[serde(default)]
    pub has_mark: bool,
}

/// An IP version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Version {
    /// Version 4.
    Ipv4,
    /// Version 6.
    Ipv6,
}

impl Version {
    /// That of an address.
    #[must_use]
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::Ipv4,
            IpAddr::V6(_) => Self::Ipv6,
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ipv4 => "IPv4",
            Self::Ipv6 => "IPv6",
        })
    }
}

/// What a traced packet carries.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// The beginning of a connection.
    #[default]
    Tcp,
    /// A datagram.
    Udp,
    /// An echo request.
    Icmp,
}

/// A packet that came from another node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arrival {
    /// By what it came.
    pub by: Medium,
    /// From where: the outer source address and port.
    pub source: SocketAddr,
    /// What the datagram carries, or the frame.
    pub packet: Packet,
}

/// By what packets get to other nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Medium {
    /// The tunnel.
    Tunnel,
    /// The uplink.
    Uplink,
}

/// Zeros at the end of a packet that are written as a number, at most.
const MAX_ZEROS: usize = 1 << 16;

/// The bytes of a packet. In JSON they are hexadecimal digits, with `+` and a number for zeros at the end:
/// the longest packet with an empty payload has to fit into a message.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Packet(pub Vec<u8>);

impl Serialize for Packet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let end = self.0.iter().rposition(|byte| *byte != 0);
        let (bytes, zeros) = self.0.split_at(end.map_or(0, |last| last + 1));
        let mut digits = String::with_capacity(2 * bytes.len());
        for byte in bytes {
            let _ = write!(digits, "{byte:02x}");
        }
        if !zeros.is_empty() {
            let _ = write!(digits, "+{}", zeros.len());
        }
        serializer.serialize_str(&digits)
    }
}

impl<'de> Deserialize<'de> for Packet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digit = |byte: u8| {
            let digit = char::from(byte)
                .to_digit(16)
                .and_then(|it| u8::try_from(it).ok());
            digit.ok_or_else(|| de::Error::custom("packets are hexadecimal digits"))
        };
        let (digits, zeros) = text.split_once('+').unwrap_or((&text, "0"));
        let zeros = zeros
            .parse::<usize>()
            .ok()
            .filter(|zeros| *zeros <= MAX_ZEROS);
        let zeros = zeros.ok_or_else(|| de::Error::custom("a packet has no so many zeros"))?;
        let (pairs, rest) = digits.as_bytes().as_chunks::<2>();
        if !rest.is_empty() {
            return Err(de::Error::custom("a packet has an odd number of digits"));
        }
        let bytes = pairs
            .iter()
            .map(|[high, low]| Ok(digit(*high)? << 4 | digit(*low)?));
        let mut bytes: Vec<_> = bytes.collect::<Result<_, _>>()?;
        bytes.resize(bytes.len() + zeros, 0);
        Ok(Self(bytes))
    }
}

/// A node's part of a packet's way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Part {
    /// The node's name.
    pub node: String,
    /// The packet as it came in.
    pub packet: Summary,
    /// What the node decided, one decision after another.
    pub steps: Vec<Step>,
    /// What became of the packet.
    pub outcome: Outcome,
    /// Packets that the node would send because of this one, in words.
    pub own: Vec<String>,
    /// How many more there would be.
    #[serde(default)]
    pub more_own: usize,
    /// The packet on its way to another node, if it is. It is `null` where that node's part is told.
    #[cfg_attr(feature = "schema", schemars(with = "Option<()>"))]
    pub next: Option<Next>,
}

/// A packet in short.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Summary {
    /// Its source address.
    pub source: IpAddr,
    /// Its destination address.
    pub destination: IpAddr,
    /// Protocol, ports, length and time to live, in words.
    pub text: String,
}

/// One decision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Step {
    /// What was decided, in one stable word: `guard`, `route`, `mtu` and others.
    pub kind: String,
    /// The decision and the entry of the table that made it, in words.
    pub text: String,
}

/// What became of a packet at a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Outcome {
    /// The verdict.
    pub verdict: Verdict,
    /// Why it was lost, as in `muslin drops`, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The same in words.
    pub text: String,
}

/// What becomes of packets at a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Verdict {
    /// A pod or the host gets it.
    Delivered,
    /// Several pods get a copy.
    Flooded,
    /// It goes to another node.
    Sent,
    /// It leaves the overlay by a socket of the host.
    Egress,
    /// The node keeps it: it was for the node itself, waits, or went on in pieces.
    Consumed,
    /// It is lost.
    Dropped,
}

impl Verdict {
    /// Whether the packet gets to where it was to go, as far as this node can say.
    #[must_use]
    pub const fn is_good(self) -> bool {
        !matches!(self, Self::Dropped)
    }
}

impl Outcome {
    /// A packet that was lost for this reason.
    #[must_use]
    pub fn dropped(reason: DropReason) -> Self {
        Self {
            verdict: Verdict::Dropped,
            reason: Some(reason.name().to_owned()),
            text: reason.describe().to_owned(),
        }
    }
}

/// A packet on its way to another node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Next {
    /// The public address of the other node.
    pub public_ip: IpAddr,
    /// Its name, if it is known.
    pub node: Option<String>,
    /// The packet as it arrives there.
    pub arrival: Arrival,
}

/// A packet's journey through nodes, as each of them tells its part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Journey {
    /// Each node's part, in the order of the way.
    pub parts: Vec<Part>,
    /// The node that would have the next part, if that cannot be asked.
    pub unknown: Option<Elsewhere>,
}

/// A node that has a part of a packet's way and does not tell it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Elsewhere {
    /// Its public address.
    pub public_ip: IpAddr,
    /// Its name, if it is known.
    pub node: Option<String>,
    /// Why its part is not told, in one line.
    pub why: String,
}

impl Journey {
    /// Whether the packet gets to where it was to go, as far as is known.
    #[must_use]
    pub fn arrives(&self) -> bool {
        let last = self.parts.last();
        last.is_some_and(|part| part.outcome.verdict.is_good())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_hexadecimal_digits() {
        let packet = Packet(vec![0x00, 0x1f, 0xff]);
        let text = serde_json::to_string(&packet).unwrap();
        assert_eq!(text, r#""001fff""#);
        assert_eq!(serde_json::from_str::<Packet>(&text).unwrap(), packet);
        let mut long = vec![0; usize::from(u16::MAX)];
        long[19] = 7;
        let text = serde_json::to_string(&Packet(long.clone())).unwrap();
        assert!(text.ends_with(r#"07+65515""#) && text.len() < 100, "{text}");
        assert_eq!(serde_json::from_str::<Packet>(&text).unwrap().0, long);
        for wrong in [
            r#""001""#,
            r#""0x""#,
            r#""é1""#,
            r#""00+""#,
            r#""00+65537""#,
            "7",
        ] {
            assert!(serde_json::from_str::<Packet>(wrong).is_err(), "{wrong}");
        }
    }
}
