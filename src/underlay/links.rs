//! The kernel's interfaces with their addresses, as rtnetlink reports them.

use std::net::{IpAddr, Ipv4Addr};

use futures_util::TryStreamExt;
use ipnet::Ipv4Net;
use rtnetlink::Handle;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage,
};
use rtnetlink::packet_route::link::{
    InfoData, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use smoltcp::wire::EthernetAddress;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) index: u32,
    pub(super) name: String,
    /// In bytes; 0 if the kernel does not report it.
    pub(super) mtu: u32,
    pub(super) is_up: bool,
    pub(super) mac: Option<EthernetAddress>,
    /// Its UDP port, if it is a VXLAN interface; it has that while it is up.
    pub(super) vxlan: Option<u16>,
    /// Those of IPv4.
    pub(super) addresses: Vec<Address>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) ip: Ipv4Addr,
    /// The network on its link.
    pub(super) prefix: Ipv4Net,
    /// It is about to go.
    pub(super) deprecated: bool,
    /// It is configured, not leased by DHCP.
    pub(super) permanent: bool,
    /// Another address of the same prefix was there first.
    pub(super) secondary: bool,
}

#[cfg(test)]
impl Address {
    /// One that is configured.
    pub(super) fn configured(address: Ipv4Net) -> Self {
        Self {
            ip: address.addr(),
            prefix: address.trunc(),
            deprecated: false,
            permanent: true,
            secondary: false,
        }
    }
}

/// All interfaces of the network namespace.
///
/// # Errors
/// If the kernel does not answer.
pub(super) async fn interfaces(handle: &Handle) -> Result<Vec<Interface>, rtnetlink::Error> {
    let mut interfaces = Vec::new();
    let mut links = handle.link().get().execute();
    while let Some(link) = links.try_next().await? {
        interfaces.extend(interface(&link));
    }
    let mut addresses = handle.address().get().execute();
    while let Some(message) = addresses.try_next().await? {
        let index = message.header.index;
        let owner = interfaces.iter_mut().find(|it| it.index == index);
        let Some(owner) = owner else {
            continue;
        };
        owner.addresses.extend(address(&message));
    }
    Ok(interfaces)
}

/// Without its addresses; nothing if it has no name.
fn interface(link: &LinkMessage) -> Option<Interface> {
    let mut interface = Interface {
        index: link.header.index,
        is_up: link.header.flags.contains(LinkFlags::Up),
        ..Interface::default()
    };
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => interface.mtu = *mtu,
            LinkAttribute::Address(bytes) => {
                interface.mac = bytes.first_chunk().copied().map(EthernetAddress);
            }
            LinkAttribute::LinkInfo(infos) => interface.vxlan = vxlan_port(infos),
            _ => {}
        }
    }
    (!interface.name.is_empty()).then_some(interface)
}

fn vxlan_port(infos: &[LinkInfo]) -> Option<u16> {
    let options = infos.iter().find_map(|info| match info {
        LinkInfo::Data(InfoData::Vxlan(options)) => Some(options),
        _ => None,
    })?;
    options.iter().find_map(|option| match option {
        InfoVxlan::Port(port) => Some(*port),
        _ => None,
    })
}

fn address(message: &AddressMessage) -> Option<Address> {
    if message.header.family != AddressFamily::Inet {
        return None;
    }
    // On a point-to-point link `Address` is the other end.
    let local = message.attributes.iter().find_map(|it| match it {
        AddressAttribute::Local(IpAddr::V4(ip)) => Some(*ip),
        _ => None,
    });
    let far = message.attributes.iter().find_map(|it| match it {
        AddressAttribute::Address(IpAddr::V4(ip)) => Some(*ip),
        _ => None,
    });
    let ip = local.or(far)?;
    let prefix = Ipv4Net::new(far.unwrap_or(ip), message.header.prefix_len);
    let flags = flags(message);
    let short = message.header.flags;
    let has = |long: AddressFlags, header: AddressHeaderFlags| match flags {
        Some(flags) => flags.contains(long),
        None => short.contains(header),
    };
    Some(Address {
        ip,
        prefix: prefix.ok()?.trunc(),
        deprecated: has(AddressFlags::Deprecated, AddressHeaderFlags::Deprecated),
        permanent: has(AddressFlags::Permanent, AddressHeaderFlags::Permanent),
        secondary: has(AddressFlags::Secondary, AddressHeaderFlags::Secondary),
    })
}

fn flags(message: &AddressMessage) -> Option<AddressFlags> {
    message.attributes.iter().find_map(|it| match it {
        AddressAttribute::Flags(flags) => Some(*flags),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_link_of_a_point_to_point_address_is_the_other_end() {
        let (own, far) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2));
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.prefix_len = 32;
        message.attributes = vec![
            AddressAttribute::Address(far.into()),
            AddressAttribute::Local(own.into()),
        ];
        let address = address(&message).unwrap();
        assert_eq!(address.ip, own);
        assert_eq!(address.prefix, Ipv4Net::from(far));
    }
}
