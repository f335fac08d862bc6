//! Neighbour discovery on the uplink: where next hops are that have public addresses of IPv6.

use std::net::{IpAddr, Ipv6Addr};

use smoltcp::time::Instant;
use smoltcp::wire::EthernetAddress;

use super::Node;
use super::router::Decision;
use crate::datapath::filter::Filter;
use crate::datapath::frame;
use crate::datapath::ndp::{self, Flags, Held, Message};
use crate::datapath::neighbour::Place;
use crate::datapath::observe::Observer;
use crate::datapath::uplink::Uplink;
use crate::datapath::verdict::Verdict;
use crate::drops::DropReason;

/// A frame that says to all that a host's address is at this MAC address (RFC 4861 section 7.2.6).
pub(super) fn announcement(mac: EthernetAddress, host: Ipv6Addr) -> [u8; ndp::FRAME_LEN] {
    let all = (ndp::multicast_mac(ndp::ALL_NODES), ndp::ALL_NODES);
    let flags = Flags {
        override_: true,
        ..Flags::default()
    };
    ndp::write_advertisement((mac, host), host, all, flags)
}

impl<O: Observer, F: Filter> Node<O, F> {
    /// Whether a frame of the uplink for a group is one that the node hears: a solicitation for its own
    /// address, or an announcement.
    pub(super) fn hears_group(&self, bytes: &[u8], destination: EthernetAddress) -> bool {
        let address = self.uplink_v6().map(|(_, address)| address);
        let groups = [address.map(ndp::solicited_node), Some(ndp::ALL_NODES)];
        let mut groups = groups.into_iter().flatten().map(ndp::multicast_mac);
        address.is_some()
            && frame::is_neighbour_discovery(bytes)
            && groups.any(|group| group == destination)
    }

    /// Takes a message of neighbour discovery from the uplink. Nothing but where next hops are is kept of
    /// what hosts say.
    pub(super) fn discover_host(&mut self, now: Instant, bytes: &[u8]) -> Decision {
        let view = frame::parse(bytes)?;
        let from = view.src_addr();
        match Message::parse(view.payload())? {
            Some(Message::Solicitation(asked)) => {
                let (own, address) = self.uplink_v6().ok_or(DropReason::EtherTypeUnsupported)?;
                let held = Held {
                    address,
                    router: false,
                    anycast: false,
                };
                let may = own.answers;
                let answer = ndp::answer(&asked, from, &[held], own.mac).filter(|_| may);
                if let Some(answer) = answer {
                    self.queue_frame(Verdict::Uplink { id: None }, &answer);
                }
                let is_ours = asked.target == address;
                match asked.mac {
                    Some(mac) => self.hear_next_hop(now, asked.source.into(), mac, is_ours),
                    None => Ok(Verdict::Consumed),
                }
            }
            Some(Message::Advertisement(said)) => {
                let target = IpAddr::V6(said.target);
                let mac = said.mac.unwrap_or(from);
                let link = self.uplink.as_ref();
                let known = link.and_then(|link| link.neighbours.get(target));
                // One that is not to replace what is known does not.
                if known.is_some_and(|known| known.mac != mac) && !said.flags.override_ {
                    return Ok(Verdict::Consumed);
                }
                let answers = link.is_some_and(|link| link.neighbours.is_sought(target));
                self.hear_next_hop(now, target, mac, answers)
            }
            Some(Message::RouterSolicitation { .. }) => Ok(Verdict::Consumed),
            None => Err(DropReason::EtherTypeUnsupported),
        }
    }

    /// Asks a host on the uplink's link where it is.
    pub(super) fn solicit_host(&mut self, address: Ipv6Addr, place: Option<Place>) {
        let Some((own, source)) = self.uplink_v6() else {
            return;
        };
        let to = place.map(|place| place.mac);
        let words = ndp::write_solicitation((own.mac, source), address, to);
        self.queue_frame(Verdict::Uplink { id: None }, &words);
    }

    /// The uplink and its address, if it has one of IPv6.
    fn uplink_v6(&self) -> Option<(Uplink, Ipv6Addr)> {
        let own = *self.uplink()?;
        Some((own, own.nets.ipv6()?.addr()))
    }
}
