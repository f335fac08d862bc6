//! What rtnetlink is told of a pod's addresses and routes.

use std::net::IpAddr;

use ipnet::IpNet;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
    RouteScope, RouteType,
};

/// An address of an interface. One of IPv6 can be used at once: nobody else has it, and to find that
/// out takes seconds (RFC 4862 section 5.4).
pub(crate) fn address(index: u32, net: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.prefix_len = net.prefix_len();
    message.header.family = family(net.addr());
    message.attributes = vec![AddressAttribute::Address(net.addr())];
    match net {
        IpNet::V4(net) => {
            let own = AddressAttribute::Local(net.addr().into());
            message.attributes.push(own);
            if net.prefix_len() < 31 {
                let all = AddressAttribute::Broadcast(net.broadcast());
                message.attributes.push(all);
            }
        }
        IpNet::V6(_) => {
            // Kernels read the attribute if it is there, sandboxes perhaps the header.
            message.header.flags = AddressHeaderFlags::Nodad;
            let flags = AddressAttribute::Flags(AddressFlags::Nodad);
            message.attributes.push(flags);
        }
    }
    message
}

/// A route by an interface, to a gateway if there is one, with an MTU in bytes if it has one of its own.
pub(crate) fn route(
    index: u32,
    dst: IpNet,
    gateway: Option<IpAddr>,
    mtu: Option<u32>,
) -> RouteMessage {
    let dst = dst.trunc();
    let mut message = RouteMessage::default();
    message.header.address_family = family(dst.addr());
    message.header.destination_prefix_length = dst.prefix_len();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Static;
    message.header.kind = RouteType::Unicast;
    message.header.scope = match gateway {
        Some(_) => RouteScope::Universe,
        None => RouteScope::Link,
    };
    let to = RouteAttribute::Destination(RouteAddress::from(dst.addr()));
    message.attributes = vec![to, RouteAttribute::Oif(index)];
    if let Some(gateway) = gateway {
        let by = RouteAttribute::Gateway(RouteAddress::from(gateway));
        message.attributes.push(by);
    }
    if let Some(mtu) = mtu {
        let metrics = RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)]);
        message.attributes.push(metrics);
    }
    message
}

const fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}
