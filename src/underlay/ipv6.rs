//! The IPv6 address by which other nodes reach this one.
//!
//! Other nodes keep it in their tables for as long as the lease says it, so that one that stays is
//! worth more than one that is new: addresses of privacy extensions change within a day, and peers of
//! a node that published one lost it (flannel #2293).

use std::cmp::Reverse;
use std::net::{IpAddr, Ipv6Addr};

use futures_util::TryStreamExt;
use ipnet::Ipv6Net;
use muslin_stack::control::lease::is_public_ipv6;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::interface::{InterfaceChoice, PublicInterface};
use crate::netlink;

/// An address outside of all local networks (RFC 3849), to ask for the default route.
const WORLD: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
/// Flags of addresses that do not last, or that the kernel does not use (yet): `linux/if_addr.h`.
const UNFIT: AddressFlags = AddressFlags::Secondary
    .union(AddressFlags::Optimistic)
    .union(AddressFlags::Dadfailed)
    .union(AddressFlags::Deprecated)
    .union(AddressFlags::Tentative);

/// Room for IPv6 packets of 1,280 bytes (RFC 8200 section 5) and the 70 bytes of VXLAN over IPv6.
const LEAST_MTU: u32 = 1280 + 70;

/// An address of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Candidate {
    address: Ipv6Addr,
    flags: AddressFlags,
    /// How long the kernel prefers it, in seconds.
    preferred: u32,
}

impl Candidate {
    fn read(message: &AddressMessage) -> Option<Self> {
        let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
        let (mut address, mut preferred) = (None, u32::MAX);
        for attribute in &message.attributes {
            match attribute {
                AddressAttribute::Address(IpAddr::V6(it)) => address = Some(*it),
                AddressAttribute::Flags(it) => flags |= *it,
                AddressAttribute::CacheInfo(it) => preferred = it.ifa_preferred,
                _ => {}
            }
        }
        Some(Self {
            address: address?,
            flags,
            preferred,
        })
    }

    fn is_fit(&self) -> bool {
        is_public_ipv6(self.address) && !self.address.is_loopback() && !self.flags.intersects(UNFIT)
    }

    /// Whether it can still be the source of packets, if it was published already.
    fn is_valid(&self) -> bool {
        let unusable = AddressFlags::Dadfailed | AddressFlags::Tentative;
        is_public_ipv6(self.address) && !self.flags.intersects(unusable)
    }
}

/// The best address of some, or the one that was published, while it is valid: global before local
/// (RFC 4193), without an end before those that end, and of these the one that lasts longest.
fn best(candidates: &[Candidate], published: Option<Ipv6Addr>) -> Option<Ipv6Addr> {
    let mut valid = candidates.iter().filter(|it| it.is_valid());
    if let Some(kept) = valid.find(|it| Some(it.address) == published) {
        return Some(kept.address);
    }
    let fit = candidates.iter().filter(|it| it.is_fit());
    let best = fit.min_by_key(|it| {
        let is_static = it.flags.contains(AddressFlags::Permanent);
        let rank = (it.address.is_unique_local(), !is_static);
        (rank, Reverse(it.preferred), it.address)
    });
    best.map(|it| it.address)
}

/// Chooses the address: the one that the user names, else one of the underlay's interface, else one of
/// the interface that the default route of IPv6 leads to. `None` if there is none, or the interface has no
/// room for what all paths of IPv6 take.
pub async fn choose(
    wanted: &InterfaceChoice,
    interface: &PublicInterface,
    published: Option<Ipv6Addr>,
) -> Option<Ipv6Addr> {
    if interface.mtu < LEAST_MTU {
        return None;
    }
    if wanted.public_ipv6.is_some() {
        return wanted.public_ipv6;
    }
    let ask = async |handle: &Handle| {
        let of_underlay = best(&candidates(handle, interface.index).await, published);
        if of_underlay.is_some() || interface.address.is_loopback() {
            return of_underlay;
        }
        let index = default_interface(handle).await?;
        best(&candidates(handle, index).await, published)
    };
    netlink::with(ask).await.ok().flatten()
}

/// The interface's IPv6 address with the length of its link's prefix; `None` if the interface does not have
/// it.
pub async fn link(interface: &PublicInterface) -> Option<Ipv6Net> {
    let wanted = interface.address_v6?;
    let ask = async |handle: &Handle| {
        let all = addresses(handle, interface.index).await;
        let mut all = all.iter().filter_map(|message| {
            let found = Candidate::read(message)?;
            (found.address == wanted).then_some(message.header.prefix_len)
        });
        Ipv6Net::new(wanted, all.next()?).ok()
    };
    netlink::with(ask).await.ok().flatten()
}

async fn candidates(handle: &Handle, index: u32) -> Vec<Candidate> {
    let all = addresses(handle, index).await;
    all.iter().filter_map(Candidate::read).collect()
}

async fn addresses(handle: &Handle, index: u32) -> Vec<AddressMessage> {
    let request = handle.address().get().set_link_index_filter(index);
    let mut addresses = request.execute();
    let mut found = Vec::new();
    // What the kernel refuses to tell is not there.
    while let Ok(Some(message)) = addresses.try_next().await {
        if message.header.family == AddressFamily::Inet6 {
            found.push(message);
        }
    }
    found
}

async fn default_interface(handle: &Handle) -> Option<u32> {
    let mut message = RouteMessageBuilder::<Ipv6Addr>::new().build();
    message.header.destination_prefix_length = 128;
    let to = RouteAttribute::Destination(RouteAddress::Inet6(WORLD));
    message.attributes.push(to);
    let mut routes = handle.route().get(message).execute();
    let route = routes.try_next().await.ok()??;
    route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => Some(*index),
            _ => None,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FOREVER: u32 = u32::MAX;

    fn candidate(address: &str, flags: AddressFlags, preferred: u32) -> Candidate {
        Candidate {
            address: address.parse().unwrap(),
            flags,
            preferred,
        }
    }

    #[test]
    fn the_address_that_lasts_longest_is_published() {
        let dynamic = AddressFlags::empty();
        let mut all = vec![
            candidate("fe80::1", AddressFlags::Permanent, FOREVER),
            candidate("::1", AddressFlags::Permanent, FOREVER),
            candidate("::ffff:192.0.2.1", AddressFlags::Permanent, FOREVER),
            candidate("2001:db8::1", AddressFlags::Secondary, 86_400),
            candidate("2001:db8::2", AddressFlags::Deprecated, 0),
            candidate("2001:db8::3", AddressFlags::Tentative, FOREVER),
            candidate(
                "2001:db8::4",
                AddressFlags::Dadfailed | AddressFlags::Permanent,
                FOREVER,
            ),
        ];
        let none = best(&all, None);
        assert_eq!(none, None);
        // From the worst to the best.
        for (address, flags, preferred) in [
            ("fd01::5", dynamic, 86_400),
            ("fd01::6", AddressFlags::Permanent, FOREVER),
            ("2001:db8::7", dynamic, 3_600),
            (
                "2001:db8::8",
                dynamic | AddressFlags::Managetempaddr,
                86_400,
            ),
            ("2001:db8::9", AddressFlags::Permanent, FOREVER),
        ] {
            all.insert(0, candidate(address, flags, preferred));
            assert_eq!(best(&all, None), address.parse().ok());
        }
    }

    #[test]
    fn what_is_published_stays_while_it_is_valid() {
        let (old, new) = ("2001:db8::2", "2001:db8::9");
        let published: Option<Ipv6Addr> = old.parse().ok();
        let new = candidate(new, AddressFlags::Permanent, FOREVER);
        for (flags, stays) in [
            (AddressFlags::empty(), true),
            (AddressFlags::Deprecated, true),
            (AddressFlags::Dadfailed, false),
        ] {
            let all = [new, candidate(old, flags, 0)];
            let expected = if stays { published } else { Some(new.address) };
            assert_eq!(best(&all, published), expected, "{flags:?}");
        }
        assert_eq!(best(&[new], published), Some(new.address));
        assert_eq!(best(&[], published), None);
    }
}
