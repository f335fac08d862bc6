//! Why packets are lost, and what became of all others.
//!
//! Every packet that enters a node (`received`) or begins in it (`originated`) ends in exactly one
//! way, so that with an empty output queue
//! `received + originated = delivered + sent + flooded + consumed + dropped`
//! holds at any time. A packet the node keeps for a while is `consumed` when it goes to wait and
//! `originated` when it goes on.

use muslin_encap::ip::v6;

macro_rules! reasons {
    ($($(#[$attribute:meta])* $variant:ident, $name:literal, $text:literal;)*) => {
        /// Why a packet was dropped. There is no "other", and further reasons may come: go through
        /// [`Self::ALL`], and print [`Self::name`] or [`Self::describe`].
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum DropReason {
            $(#[doc = $text] $(#[$attribute])* $variant,)*
        }

        impl DropReason {
            /// Every reason, in the order of a packet's way.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// A short stable name for machines.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// One sentence for people.
            #[must_use]
            pub const fn describe(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }
    };
}

reasons! {
    UnknownPort, "unknown-port", "A frame came from a port that is not attached.";
    FrameTooShort, "frame-too-short", "A frame was shorter than an Ethernet header.";
    VirtioHeader, "virtio-header", "A frame's virtio-net header contradicted the frame.";
    SourceMacGroup, "source-mac-group", "A frame's source MAC address was a multicast or broadcast address.";
    SourceMacOwn, "source-mac-own", "A frame's source MAC address was the node's own: a loop or a forgery.";
    SourceMacSpoofed, "source-mac-spoofed", "A pod sent from a MAC address that is not its own.";
    SourceAddressSpoofed, "source-address-spoofed", "A pod sent from an IP address that is not its own.";
    SourceAddressInvalid, "source-address-invalid", "A packet's source was a multicast, broadcast, loopback or unspecified address.";
    RouterAdvertisement, "router-advertisement", "A pod sent an IPv6 router advertisement or redirect.";
    DhcpServer, "dhcp-server", "A pod sent to the port of DHCP clients, which only a server does.";
    NdpInvalid, "ndp-invalid", "A message of IPv6 neighbour discovery was not as RFC 4861 has it, or was in fragments.";
    MldInvalid, "mld-invalid", "A multicast listener report was not from a link-local address with a hop limit of 1.";
    IgmpInvalid, "igmp-invalid", "A multicast membership report was broken, or not of its own link.";
    ForeignQuerier, "foreign-querier", "A pod asked others which groups they are in, which is the gateway's to do.";
    MembershipsFull, "memberships-full", "A pod joined more groups than it can be in, or all pods did.";
    GroupMac, "group-mac", "A frame's MAC address and the packet's destination were not those of one group.";
    GroupWithoutMembers, "group-without-members", "A packet was for a group that nobody else has joined, as far as it goes.";
    GroupPeersExceeded, "group-peers-exceeded", "A packet was for a group, and there are more nodes than get copies of it.";
    LinkLocalTaken, "link-local-taken", "A pod claimed an IPv6 link-local address that another pod has.";
    ReservedGroup, "reserved-group", "A frame was for a group address that bridges keep to themselves (IEEE 802.1D).";
    AllNodesGroup, "all-nodes-group", "A pod sent to all nodes of its link (ff02::1), which is the gateway's to do.";
    Hairpin, "hairpin", "A frame's destination is behind the port it came from.";
    Storm, "storm", "A pod sent more frames to all, or to addresses that nobody is known to have, than the node copies.";
    UnknownDestination, "unknown-destination", "A frame was for a MAC address that no pod has.";
    EtherTypeUnsupported, "ether-type-unsupported", "A frame was of a type that cannot be routed, or that a guarded pod may not send.";
    UnknownPeer, "unknown-peer", "A datagram came from an address that holds no lease.";
    TunnelPort, "tunnel-port", "A datagram of flannel's UDP format came from a port that is not the tunnel's.";
    VxlanTooShort, "vxlan-too-short", "A datagram was shorter than a VXLAN header.";
    VxlanNoVni, "vxlan-no-vni", "A VXLAN header had no valid VNI.";
    IpipHeader, "ipip-header", "A datagram was not a whole IPv4 packet in IPv4.";
    UnknownVni, "unknown-vni", "A VXLAN packet belonged to another network.";
    WireguardMalformed, "wireguard-malformed", "A datagram was no message of WireGuard, or there was no IP packet in it.";
    WireguardForged, "wireguard-forged", "A message of WireGuard was not authentic.";
    WireguardReplayed, "wireguard-replayed", "A message of WireGuard came twice, or long after later ones.";
    WireguardUnknownKey, "wireguard-unknown-key", "A handshake came from a node whose key no lease has.";
    WireguardNoSession, "wireguard-no-session", "A message of WireGuard was of no session with a peer, or a packet could not be sealed in one.";
    WireguardRate, "wireguard-rate", "An address sent more handshakes than are answered.";
    WireguardNoHandshake, "wireguard-no-handshake", "A packet waited for a handshake with a peer in vain, or too many did.";
    DestinationMacForeign, "destination-mac-foreign", "A frame from another node was not addressed to this one.";
    PodAwaited, "pod-awaited", "A packet was for a pod that was here before the node was restarted and is not back yet.";
    NextHopUnknown, "next-hop-unknown", "A frame came from a peer's host before its MAC address was known.";
    NextHopConflict, "next-hop-conflict", "A frame or ARP message claimed to be a next hop's, which has another MAC address.";
    SourceNotInLease, "source-not-in-lease", "A packet's source is not in the lease of the node that sent it.";
    TunnelToTunnel, "tunnel-to-tunnel", "A packet from another node was not for a pod of this one.";
    Ipv4TooShort, "ipv4-too-short", "A packet was shorter than an IPv4 header.";
    Ipv4Version, "ipv4-version", "A packet's IP version was not 4.";
    Ipv4HeaderLen, "ipv4-header-len", "A packet's IPv4 header length was impossible.";
    Ipv4TotalLen, "ipv4-total-len", "A packet's IPv4 total length was impossible.";
    Ipv4Checksum, "ipv4-checksum", "A packet's IPv4 header checksum was wrong.";
    Ipv6TooShort, "ipv6-too-short", "A packet was shorter than an IPv6 header.";
    Ipv6Version, "ipv6-version", "A packet's IP version was not 6.";
    Ipv6PayloadLen, "ipv6-payload-len", "A packet's IPv6 payload length was impossible.";
    Ipv6ExtensionHeaders, "ipv6-extension-headers", "A packet's IPv6 extension headers were broken, forbidden or too many to find what it is about.";
    DestinationNotUnicast, "destination-not-unicast", "A packet for the router had a multicast, broadcast, loopback or unspecified destination.";
    BeyondScope, "beyond-scope", "A packet from or to an IPv6 link-local address would have left its link.";
    TtlExceeded, "ttl-exceeded", "A packet's time to live ended here.";
    HostFamily, "host-family", "A packet came by the host interface, of an IP version that it does not carry.";
    HostForwarded, "host-forwarded", "A packet came by the host interface from an address that is not the host's: the host has forwarded it.";
    HostDenied, "host-denied", "A packet was for an address or a port of the host that egress may not reach.";
    HostProtocol, "host-protocol", "A packet between the host and a pod was of a protocol that is not passed on.";
    HostFragment, "host-fragment", "A fragment was for the host, and it cannot be told for which of its addresses.";
    HostTableFull, "host-table-full", "There were too many flows of the host to pods, and none was idle.";
    NoRoute, "no-route", "There is no route to a packet's destination.";
    EgressFragmentInvalid, "egress-fragment-invalid", "A fragment to an address outside was shorter than any link makes one, or ended beyond the longest packet.";
    EgressFragmentOverlap, "egress-fragment-overlap", "Fragments to an address outside overlapped or contradicted each other.";
    EgressFragmentDuplicate, "egress-fragment-duplicate", "A fragment to an address outside came twice.";
    EgressFragmentsFull, "egress-fragments-full", "Too many packets to addresses outside were in fragments, or one in too many.";
    EgressFragmentTimeout, "egress-fragment-timeout", "Other fragments of a packet to an address outside did not come.";
    EgressFamily, "egress-family", "A packet was to or from outside, of an IP version that egress does not carry.";
    EgressProtocol, "egress-protocol", "A packet to an address outside was of a protocol that egress does not carry.";
    EgressMalformed, "egress-malformed", "A packet to an address outside had a broken transport header or checksum.";
    EgressClosed, "egress-closed", "A packet was to an address outside, and egress is off.";
    EgressDenied, "egress-denied", "A packet was to or from an address that egress may not reach.";
    EgressNoFlow, "egress-no-flow", "A TCP segment to an address outside belonged to no connection.";
    GatewayPort, "gateway-port", "A packet was to a port of the gateway where nothing listens.";
    ExchangeMalformed, "exchange-malformed", "A message of another node's gateway was no whole datagram of its port, or too long.";
    ExchangeRate, "exchange-rate", "Other nodes' gateways sent more messages than are read.";
    ExchangeRefused, "exchange-refused", "A message of another node's gateway had a wrong authentication code, answered nothing, or came while too many were answered.";
    EgressTableFull, "egress-table-full", "There were too many flows to and from addresses outside, and none was idle.";
    EgressInUse, "egress-in-use", "A flow to a pod had the addresses and ports of another.";
    EgressPodFull, "egress-pod-full", "A pod had too many flows to addresses outside, and none was idle.";
    EgressHandoverFull, "egress-handover-full", "Too many packets waited for the worker that has their flow.";
    EgressExhausted, "egress-exhausted", "The host had no port, descriptor or memory left for a flow to an address outside.";
    EgressHostFailed, "egress-host-failed", "The host had no socket for a flow to an address outside.";
    EgressHostFull, "egress-host-full", "The host's socket had no room for a datagram to an address outside.";
    EgressTooLong, "egress-too-long", "A packet was longer than the way to an address outside takes, and must not be fragmented.";
    EgressUnreachable, "egress-unreachable", "The host knows no way to an address outside.";
    EgressPing, "egress-ping", "The host permits no echo requests (net.ipv4.ping_group_range).";
    FragmentationNeeded, "fragmentation-needed", "A packet was larger than the path's MTU and must not be fragmented.";
    PolicyDenied, "policy-denied", "A policy does not permit a packet to or from a pod.";
    RateExceeded, "rate-exceeded", "A packet was for a pod that receives no faster than its limit.";
    NextHopUnreachable, "next-hop-unreachable", "A peer's host is not on this node's link, and there is no tunnel to it.";
    NoVtepMac, "no-vtep-mac", "The peer's lease has no VTEP MAC address.";
    HostUnreachable, "host-unreachable", "No pod has the destination address.";
    NeighbourQueueFull, "neighbour-queue-full", "Too many packets waited for a neighbour's MAC address.";
    NeighbourTableFull, "neighbour-table-full", "Too many neighbours were being looked for.";
    OutputQueueFull, "output-queue-full", "The node's own packets came faster than they could be sent.";
    HeadroomExceeded, "headroom-exceeded", "A packet did not fit its buffer with the header it needed.";
    SuperpacketRefused, "superpacket-refused", "A superpacket could not be taken apart, was of more packets than a kernel makes of one, or had to wait.";
    PortGone, "port-gone", "The port a packet was for is no longer attached.";
    PeerGone, "peer-gone", "The peer a packet was for is no longer there.";
    PortDown, "port-down", "A pod's interface is down, or was just removed.";
    PortQueueFull, "port-queue-full", "A pod takes its frames too slowly.";
    PortFailed, "port-failed", "The kernel refused a frame for a pod.";
    UnderlayOverflow, "underlay-overflow", "Packets from peers came faster than they were read.";
    UnderlayQueueFull, "underlay-queue-full", "The queue of packets to peers was full.";
    UnderlayFailed, "underlay-failed", "The kernel refused to send a packet to a peer.";
}

impl DropReason {
    /// Whether the drop happens outside the node, after its verdict: in egress or the shell.
    #[must_use]
    pub const fn is_io(self) -> bool {
        matches!(
            self,
            Self::EgressFragmentInvalid
                | Self::EgressFragmentOverlap
                | Self::EgressFragmentDuplicate
                | Self::EgressFragmentsFull
                | Self::EgressFragmentTimeout
                | Self::EgressFamily
                | Self::EgressProtocol
                | Self::EgressMalformed
                | Self::EgressClosed
                | Self::EgressDenied
                | Self::EgressNoFlow
                | Self::GatewayPort
                | Self::ExchangeRefused
                | Self::EgressTableFull
                | Self::EgressInUse
                | Self::EgressPodFull
                | Self::EgressHandoverFull
                | Self::EgressExhausted
                | Self::EgressHostFailed
                | Self::EgressHostFull
                | Self::EgressTooLong
                | Self::EgressUnreachable
                | Self::EgressPing
                | Self::PortDown
                | Self::PortQueueFull
                | Self::PortFailed
                | Self::UnderlayOverflow
                | Self::UnderlayQueueFull
                | Self::UnderlayFailed
                | Self::WireguardMalformed
                | Self::WireguardForged
                | Self::WireguardReplayed
                | Self::WireguardUnknownKey
                | Self::WireguardNoSession
                | Self::WireguardRate
                | Self::WireguardNoHandshake
        )
    }

    /// Whether packets are lost for it because a table, a share or a rate of the node is exhausted.
    #[must_use]
    pub const fn is_limit(self) -> bool {
        matches!(
            self,
            Self::Storm
                | Self::MembershipsFull
                | Self::GroupPeersExceeded
                | Self::HostTableFull
                | Self::ExchangeRate
                | Self::WireguardRate
                | Self::EgressFragmentsFull
                | Self::EgressTableFull
                | Self::EgressPodFull
                | Self::EgressHandoverFull
                | Self::EgressExhausted
                | Self::RateExceeded
                | Self::NeighbourQueueFull
                | Self::NeighbourTableFull
                | Self::OutputQueueFull
                | Self::PortQueueFull
                | Self::UnderlayOverflow
                | Self::UnderlayQueueFull
        )
    }
}

impl From<v6::Error> for DropReason {
    fn from(error: v6::Error) -> Self {
        match error {
            v6::Error::TooShort { .. } => Self::Ipv6TooShort,
            v6::Error::Version(_) => Self::Ipv6Version,
            v6::Error::PayloadLen { .. } | v6::Error::Jumbo => Self::Ipv6PayloadLen,
        }
    }
}

impl From<v6::ChainError> for DropReason {
    fn from(error: v6::ChainError) -> Self {
        match error {
            v6::ChainError::NoHeader { .. } => Self::Ipv6TooShort,
            v6::ChainError::Jumbo => Self::Ipv6PayloadLen,
            v6::ChainError::Truncated
            | v6::ChainError::TooMany
            | v6::ChainError::Misplaced(_)
            | v6::ChainError::SourceRoute
            | v6::ChainError::Unknown(_) => Self::Ipv6ExtensionHeaders,
        }
    }
}

/// What became of all packets since the node started; in packets, of which a superpacket is one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counters {
    /// Frames from ports, datagrams from the underlay and packets from the host.
    pub received: u64,
    /// Packets that begin in the node or go on after they waited in it.
    pub originated: u64,
    /// Frames for one port, and packets for the host.
    pub delivered: u64,
    /// Datagrams for a peer.
    pub sent: u64,
    /// Frames for all ports but one, counted once however many ports there are.
    pub flooded: u64,
    /// Packets for the node itself, or that wait in it, or were cut into fragments.
    pub consumed: u64,
    /// TCP acknowledgements that were not carried, since a newer one made them useless
    /// ([`muslin_encap::offload::acknowledgement`]). Those for peers count as sent, too; those from
    /// peers do not count as received.
    pub superseded: u64,
    drops: [u64; DropReason::ALL.len()],
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            received: 0,
            originated: 0,
            delivered: 0,
            sent: 0,
            flooded: 0,
            consumed: 0,
            superseded: 0,
            drops: [0; DropReason::ALL.len()],
        }
    }
}

impl Counters {
    /// Counts one packet lost for `reason`.
    pub fn drop(&mut self, reason: DropReason) {
        self.drop_many(reason, 1);
    }

    /// Counts packets lost for `reason`.
    pub fn drop_many(&mut self, reason: DropReason, packets: u64) {
        self.drops[reason as usize] += packets;
    }

    /// Packets lost for `reason`.
    #[must_use]
    pub fn dropped_for(&self, reason: DropReason) -> u64 {
        self.drops[reason as usize]
    }

    /// Every reason with its count.
    pub fn drops(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL
            .iter()
            .map(|reason| (*reason, self.dropped_for(*reason)))
    }

    /// Packets the node itself dropped, without those lost after its verdict.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.drops()
            .filter(|(reason, _)| !reason.is_io())
            .map(|(_, count)| count)
            .sum()
    }

    /// Packets that came into the node or began in it.
    #[must_use]
    pub fn came(&self) -> u64 {
        self.received + self.originated
    }

    /// Packets of which it is known what became of them: all that [`Self::came`], once the output
    /// queue is empty.
    #[must_use]
    pub fn went(&self) -> u64 {
        self.delivered + self.sent + self.flooded + self.consumed + self.dropped()
    }

    /// Adds another worker's counters.
    pub fn add(&mut self, other: &Self) {
        self.received += other.received;
        self.originated += other.originated;
        self.delivered += other.delivered;
        self.sent += other.sent;
        self.flooded += other.flooded;
        self.consumed += other.consumed;
        self.superseded += other.superseded;
        for (mine, theirs) in self.drops.iter_mut().zip(other.drops) {
            *mine += theirs;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn reasons_have_distinct_names_and_their_own_counter() {
        let names: HashSet<_> = DropReason::ALL.iter().map(|reason| reason.name()).collect();
        assert_eq!(names.len(), DropReason::ALL.len());
        let mut counters = Counters::default();
        for (i, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, i);
            counters.drop(*reason);
            assert!(reason.describe().ends_with('.'));
        }
        assert!(counters.drops().all(|(_, count)| count == 1));
        let after = DropReason::ALL.iter().filter(|reason| reason.is_io());
        let inside = DropReason::ALL.len() - after.count();
        assert_eq!(counters.dropped(), inside as u64);
        assert!(DropReason::PortFailed.is_io() && !DropReason::PortGone.is_io());
    }

    #[test]
    fn counters_of_workers_add_up() {
        let counters = |first: u64, step: u64| {
            let mut counters = Counters {
                received: first,
                originated: first + step,
                delivered: first + 2 * step,
                sent: first + 3 * step,
                flooded: first + 4 * step,
                consumed: first + 5 * step,
                ..Counters::default()
            };
            counters.drop_many(DropReason::NoRoute, first + 6 * step);
            counters.drop_many(DropReason::PortGone, first + 7 * step);
            counters
        };
        let mut sum = counters(100, 1);
        sum.add(&counters(1000, 1));
        let expected = counters(1100, 2);
        assert_eq!(sum, expected);
        assert_eq!(sum.came(), 1100 + 1102);
        assert_eq!(sum.went(), 1104 + 1106 + 1108 + 1110 + 1112 + 1114);
    }
}
