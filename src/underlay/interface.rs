//! Which interface of this machine has an address, and with what MTU.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};

use futures_util::TryStreamExt;
use nix::ifaddrs::getifaddrs;
use rtnetlink::new_connection;
use rtnetlink::packet_route::link::LinkAttribute;

use crate::error::{Context, Error, Result};

/// An interface of the underlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicInterface {
    /// Its name.
    pub name: String,
    /// The address on it that other nodes send to.
    pub address: Ipv4Addr,
    /// Its MTU in bytes.
    pub mtu: u32,
}

/// The interface that has `address`, or the first address of the interface `name`, or the address
/// that packets to the world leave from; the loopback address on a machine without any.
///
/// # Errors
/// A usage error if there is no such address or interface.
pub async fn interface_of(
    address: Option<Ipv4Addr>,
    name: Option<&str>,
) -> Result<PublicInterface> {
    let addresses = addresses()?;
    let found = match (address, name) {
        (Some(address), name) => addresses
            .iter()
            .find(|(other, has)| *has == address && name.is_none_or(|name| name == other))
            // All of 127.0.0.0/8 is on the loopback interface.
            .or_else(|| addresses.iter().find(|(_, has)| address.is_loopback() && has.is_loopback()))
            .map(|(name, _)| (name.clone(), address))
            .ok_or_else(|| Error::usage(match name {
                Some(name) => format!("the address {address} is not on the interface {name}"),
                None => format!(
                    "the public address {address} is not on this machine; it has {}",
                    list(&addresses)
                ),
            }))?,
        (None, Some(name)) => addresses
            .iter()
            .find(|(other, _)| other == name)
            .cloned()
            .ok_or_else(|| {
                Error::usage(format!(
                    "no interface {name} with an IPv4 address is on this machine; it has {}",
                    list(&addresses)
                ))
            })?,
        (None, None) => {
            let address = default_source().unwrap_or(Ipv4Addr::LOCALHOST);
            let found = addresses.iter().find(|(_, has)| *has == address).cloned();
            found.ok_or_else(|| Error::usage(
                "this machine has no IPv4 address that other nodes could send to: name one with \
                 --public-ip",
            ))?
        }
    };
    let (name, address) = found;
    let mtu = mtu(&name).await?;
    Ok(PublicInterface { name, address, mtu })
}

fn addresses() -> Result<Vec<(String, Ipv4Addr)>> {
    let all = getifaddrs().context("cannot read this machine's addresses")?;
    Ok(all
        .filter_map(|interface| {
            let address = interface.address?.as_sockaddr_in()?.ip();
            Some((interface.interface_name, address))
        })
        .collect())
}

fn list(addresses: &[(String, Ipv4Addr)]) -> String {
    let each = addresses
        .iter()
        .map(|(name, address)| format!("{address} ({name})"));
    each.collect::<Vec<_>>().join(", ")
}

/// The source of packets to the world. Connecting a UDP socket asks the route table and sends
/// nothing; the address is one of those set aside for documentation (RFC 5737).
fn default_source() -> Option<Ipv4Addr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
    match socket.local_addr().ok()?.ip() {
        IpAddr::V4(address) if !address.is_unspecified() => Some(address),
        IpAddr::V4(_) | IpAddr::V6(_) => None,
    }
}

async fn mtu(name: &str) -> Result<u32> {
    let (connection, handle, _) = new_connection().context("cannot speak rtnetlink")?;
    let connection = tokio::spawn(connection);
    let link = handle
        .link()
        .get()
        .match_name(name.to_owned())
        .execute()
        .try_next()
        .await;
    connection.abort();
    let link = link.context(format!("cannot read the MTU of {name}"))?;
    let attributes = link.map(|link| link.attributes).unwrap_or_default();
    let mtu = attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    });
    mtu.ok_or_else(|| Error::failed(format!("the interface {name} has no MTU")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_loopback_address_is_on_this_machine() {
        let second = Ipv4Addr::new(127, 0, 0, 2);
        let found = interface_of(Some(second), None).await.unwrap();
        assert_eq!((found.name.as_str(), found.address), ("lo", second));
        assert!(found.mtu >= 1280);
    }

    #[tokio::test]
    async fn an_address_of_others_is_refused_with_ours() {
        let error = interface_of(Some(Ipv4Addr::new(192, 0, 2, 7)), None)
            .await
            .unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("127.0.0.1 (lo)"), "{error}");
    }
}
