//! What clients say to the sidecar's SOCKS5 proxy, as it comes in pieces: a message is read when it
//! is whole and not before, what is wrong stays wrong, and what is read is written as the same
//! bytes.
#![cfg_attr(fuzzing, no_main)]

use std::fmt::Debug;
use std::net::IpAddr;

use muslin_fuzz::Seed;
use muslin_stack::api::socks5::{self as wire, Command, Fault, Host, Parsed, Target};

muslin_fuzz::target! {
    check: run,
    seeds: seeds,
    words: &[
        &[5, 1, 0],
        &[5, 2, 0, 2],
        &[5, 1, 0, 1],
        &[5, 3, 0, 3],
        &[5, 2, 0, 4],
        &[0, 0, 0, 1],
        b"\x01\x02me\x03owl",
        b"\x0aweb.muslin\x00\x50",
        b"\x0a10.244.1.2\x00\x50",
        b"GET http://web.muslin/ HTTP/1.1\r\n",
        b"\x04\x01\x00\x50",
    ],
    inputs: 1_000_000,
    max_len: 800,
}

/// What the first byte chooses.
const GREETING: u8 = 0;
const CREDENTIALS: u8 = 1;
const REQUEST: u8 = 2;
const DATAGRAM: u8 = 3;
const NAME: u8 = 4;
const KINDS: u8 = 5;

/// The first byte chooses what the rest is.
fn run(data: &[u8]) {
    let Some((choice, bytes)) = data.split_first() else {
        return;
    };
    match choice % KINDS {
        GREETING => {
            if let Some(methods) = in_pieces(bytes, |bytes| owned(wire::greeting(bytes))) {
                let len = methods.len() as u8;
                assert!(bytes.starts_with(&[&[5, len][..], &methods].concat()));
            }
        }
        CREDENTIALS => {
            let parse = |bytes: &[u8]| {
                let parsed = wire::credentials(bytes)?;
                Ok(parsed.map(|((user, password), len)| ((user.to_vec(), password.to_vec()), len)))
            };
            if let Some((user, password)) = in_pieces(bytes, parse) {
                let part = |part: &[u8]| [&[part.len() as u8][..], part].concat();
                assert!(!user.is_empty() && !password.is_empty());
                assert!(bytes.starts_with(&[vec![1], part(&user), part(&password)].concat()));
            }
        }
        REQUEST => {
            if let Some((command, target)) = in_pieces(bytes, wire::request) {
                let number = match command {
                    Command::Connect => 1,
                    Command::Bind => 2,
                    Command::UdpAssociate => 3,
                };
                check_target(bytes, &[5, number, 0], &target);
            }
        }
        DATAGRAM => {
            if let Some(target) = in_pieces(bytes, wire::datagram) {
                check_target(bytes, &[0, 0, 0], &target);
            }
        }
        _ => {
            if let Ok(host) = wire::host_name(bytes) {
                check_name(&host, bytes);
            }
        }
    }
}

fn owned(parsed: Parsed<&[u8]>) -> Parsed<Vec<u8>> {
    parsed.map(|parsed| parsed.map(|(message, len)| (message.to_vec(), len)))
}

/// The message at the beginning of what comes one byte after the other, if there is one.
fn in_pieces<T: PartialEq + Debug>(
    bytes: &[u8],
    parse: impl Fn(&[u8]) -> Result<Option<(T, usize)>, Fault>,
) -> Option<T> {
    let last = parse(bytes);
    for len in 0..bytes.len() {
        match (parse(&bytes[..len]), &last) {
            (Ok(None), Ok(Some((_, whole)))) => assert!(len < *whole, "late by {len} bytes"),
            (Ok(None), _) => {}
            (some, last) => assert_eq!(&some, last, "after {len} bytes"),
        }
    }
    let (message, len) = last.ok()??;
    assert!(len <= bytes.len() && len <= wire::MAX_LEN);
    Some(message)
}

/// Whether a target is what comes after `start`.
fn check_target(bytes: &[u8], start: &[u8], (host, port): &Target) {
    assert!(bytes.starts_with(start));
    let rest = &bytes[start.len()..];
    let address = match (rest[0], host) {
        (1, Host::Ip(IpAddr::V4(address))) => address.octets().to_vec(),
        (4, Host::Ip(IpAddr::V6(address))) => address.octets().to_vec(),
        (3, host) => {
            let name = &rest[2..][..rest[1].into()];
            check_name(host, name);
            [&[rest[1]], name].concat()
        }
        other => panic!("{other:?}"),
    };
    let end = [address, port.to_be_bytes().to_vec()].concat();
    assert!(rest[1..].starts_with(&end), "{host:?} {port}: {rest:x?}");
}

/// Whether nothing but a host name or an address gets through.
fn check_name(host: &Host, name: &[u8]) {
    let text = std::str::from_utf8(name).expect("it is text");
    match host {
        Host::Ip(address) => assert_eq!(text.parse(), Ok(*address)),
        Host::Name(read) => {
            assert!(text.eq_ignore_ascii_case(read));
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            assert!(text.chars().all(plain) && text.len() <= 254, "{text}");
            assert!(!text.starts_with('.') && !text.contains(".."), "{text}");
        }
    }
}

fn seeds() -> Vec<Seed> {
    let with = |choice: u8, bytes: &[u8]| [&[choice], bytes].concat();
    let name = b"\x05\x03\x00\x03\x0aWeb.muslin\x12\x34";
    let six = [&[5, 2, 0, 4][..], &[0; 15], &[1, 0, 9]].concat();
    vec![
        ("greeting", with(GREETING, &[5, 2, 0, 2])),
        ("greeting-socks4", with(GREETING, &[4, 1, 0, 80])),
        ("credentials", with(CREDENTIALS, b"\x01\x02me\x03owl")),
        (
            "request-ipv4",
            with(REQUEST, &[5, 1, 0, 1, 10, 244, 1, 2, 0, 80]),
        ),
        ("request-ipv6", with(REQUEST, &six)),
        ("request-name", with(REQUEST, name)),
        (
            "request-more",
            with(REQUEST, &[5, 1, 0, 1, 10, 244, 1, 2, 0, 80, 1, 2]),
        ),
        (
            "datagram",
            with(DATAGRAM, &[0, 0, 0, 1, 10, 244, 1, 2, 0, 53, 7]),
        ),
        (
            "fragment",
            with(DATAGRAM, &[0, 0, 1, 1, 10, 244, 1, 2, 0, 53]),
        ),
        ("name", with(NAME, b"web.muslin")),
        ("name-address", with(NAME, b"10.244.1.2")),
    ]
}
