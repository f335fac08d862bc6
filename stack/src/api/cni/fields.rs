//! Values that occur in several places of what runtimes say.

use std::net::IpAddr;

use ipnet::IpNet;
use muslin_encap::mac::DisplayMac;
use smoltcp::wire::EthernetAddress;

use super::error::shown;

/// Whether a text is what CNI allows as a container's identity and as a network's name:
/// `^[a-zA-Z0-9][a-zA-Z0-9_.\-]*$`.
pub(in crate::api) fn is_identifier(text: &str) -> bool {
    let first = |byte: &u8| byte.is_ascii_alphanumeric();
    let other = |byte: &u8| first(byte) || matches!(byte, b'_' | b'.' | b'-');
    text.as_bytes().first().is_some_and(first) && text.bytes().all(|byte| other(&byte))
}

/// An address, with or without the length of a prefix.
pub(super) fn address(text: &str) -> Result<IpAddr, String> {
    let read = text.parse::<IpAddr>();
    let read = read.or_else(|_| text.parse::<IpNet>().map(|net| net.addr()));
    read.map_err(|_| format!("'{}' is not an address", shown(text)))
}

/// The MAC address of one interface, as it is written with colons.
pub(in crate::api) fn mac(text: &str) -> Result<String, String> {
    let wrong = |what| format!("'{}' is not {what}", shown(text));
    let mut octets = [0; 6];
    let mut parts = text.split([':', '-']);
    for octet in &mut octets {
        let part = parts.next().filter(|part| part.len() == 2);
        let read = part.filter(|part| part.bytes().all(|byte| byte.is_ascii_hexdigit()));
        let read = read.and_then(|part| u8::from_str_radix(part, 16).ok());
        *octet = read.ok_or_else(|| wrong("a MAC address"))?;
    }
    if parts.next().is_some() {
        return Err(wrong("a MAC address"));
    }
    let address = EthernetAddress(octets);
    if !address.is_unicast() || octets == [0; 6] {
        return Err(wrong("the MAC address of one interface"));
    }
    Ok(DisplayMac(address).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers() {
        for good in ["a", "0", "a_b.c-d", "A9"] {
            assert!(is_identifier(good), "{good}");
        }
        for bad in ["", "-a", ".a", "_a", "a b", "a/b", "a\n", "é"] {
            assert!(!is_identifier(bad), "{bad}");
        }
    }

    #[test]
    fn mac_addresses() {
        assert_eq!(mac("02-00-5e-00-53-AF").unwrap(), "02:00:5e:00:53:af");
        for bad in [
            "",
            "02:00:5e:00:53",
            "02:00:5e:00:53:01:02",
            "2:0:5e:0:53:1",
            "02:00:5e:00:53:+1",
            "00:00:00:00:00:00",
            "01:00:5e:00:00:01",
            "ff:ff:ff:ff:ff:ff",
        ] {
            assert!(mac(bad).is_err(), "{bad}");
        }
    }
}
