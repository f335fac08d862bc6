//! Names that are answered here: those of pods, and those that the world outside must not be asked
//! for.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, PTR, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use muslin_stack::addresses::Nets;
use muslin_stack::control::names::{Found, Names};
use muslin_stack::datapath::egress::Nat64Prefix;

use super::message::Request;

/// The zone of all pods.
pub(crate) const DOMAIN: &str = "muslin";

/// How long an answer holds, in seconds, also one that there is no such name.
const TTL: u32 = 5;
/// Labels of a whole address of IPv6.
const NIBBLES: usize = 32;
/// More addresses than any client takes: an answer has no more.
const MAX_ADDRESSES: usize = 1000;
/// Names that are nobody's: RFC 6761 section 6.4, and RFC 7686, by which a resolver must not look
/// for them.
const NOBODYS: [&[u8]; 2] = [b"invalid", b"onion"];

/// The zones of a pod network.
#[derive(Debug)]
pub(super) struct Zones {
    network: Nets,
    nat64: Option<Nat64Prefix>,
}

/// What a name of these zones stands for.
enum Meaning {
    /// These records' data, of types of which each query wants some.
    Data(Vec<RData>),
    /// Nothing, but there are names below it.
    Parent,
    /// Nothing.
    Nothing,
}

impl Zones {
    pub(super) const fn new(network: Nets, nat64: Option<Nat64Prefix>) -> Self {
        Self { network, nat64 }
    }

    /// The answer to a query for one of these names; nothing for all others.
    pub(super) fn answer(&self, request: &Request, names: &Names) -> Option<Message> {
        let name = request.question.name();
        let mut labels: Vec<_> = name.iter().map(<[u8]>::to_ascii_lowercase).collect();
        labels.reverse();
        let known = self.look_up(&labels, names);
        let (depth, meaning) = known.or_else(|| short(request, &labels, names))?;
        if !matches!(request.question.query_class(), DNSClass::IN | DNSClass::ANY) {
            return Some(request.answer(ResponseCode::Refused));
        }
        let apex = name.trim_to(depth);
        let start = Record::from_rdata(apex.clone(), TTL, RData::SOA(start(&apex)));
        let mut answer = request.answer(match meaning {
            Meaning::Nothing => ResponseCode::NXDomain,
            Meaning::Data(_) | Meaning::Parent => ResponseCode::NoError,
        });
        answer.metadata.authoritative = true;
        let wanted = request.question.query_type();
        let is_wanted = |kind| wanted == kind || wanted == RecordType::ANY;
        if labels.len() == depth && is_wanted(RecordType::SOA) {
            answer.add_answer(start.clone());
        }
        if let Meaning::Data(mut all) = meaning {
            all.retain(|data| is_wanted(data.record_type()));
            // Each asker begins with another one.
            let first = usize::from(answer.metadata.id) % all.len().max(1);
            all.rotate_left(first);
            all.truncate(MAX_ADDRESSES);
            let records = all.into_iter();
            answer.add_answers(records.map(|data| Record::from_rdata(name.clone(), TTL, data)));
        }
        if answer.answers.is_empty() {
            answer.add_authority(start);
        }
        Some(answer)
    }

    /// How many labels the name of the zone has to which a name belongs, and what it stands for.
    /// The labels begin with the last.
    fn look_up(&self, labels: &[Vec<u8>], names: &Names) -> Option<(usize, Meaning)> {
        match labels {
            [last, rest @ ..] if last == DOMAIN.as_bytes() => Some((1, pods(rest, names))),
            [last, ..] if last == b"localhost" => Some((1, localhost())),
            [last, ..] if NOBODYS.contains(&last.as_slice()) => Some((1, Meaning::Nothing)),
            [last, second, rest @ ..] if last == b"arpa" && second == b"in-addr" => {
                let (octets, meaning) = self.reverse(rest, names)?;
                Some((2 + octets, meaning))
            }
            [last, second, rest @ ..] if last == b"arpa" && second == b"ip6" => {
                let (nibbles, meaning) = self.reverse_v6(rest, names)?;
                Some((2 + nibbles, meaning))
            }
            [last, second, rest @ ..] if last == b"arpa" && second == b"ipv4only" => {
                let meaning = match rest {
                    [] => ipv4_only(self.nat64?),
                    _ => Meaning::Nothing,
                };
                self.nat64.map(|_| (2, meaning))
            }
            _ => None,
        }
    }

    /// The same for the labels that are an address: the zones are the pod network's, as large as
    /// labels can say.
    fn reverse(&self, labels: &[Vec<u8>], names: &Names) -> Option<(usize, Meaning)> {
        let octets: Vec<_> = labels
            .iter()
            .map_while(|label| octet(label))
            .take(4)
            .collect();
        let network = self.network.ipv4()?;
        let cut = usize::from(network.prefix_len().div_ceil(8));
        let mut address = [0; 4];
        address[..octets.len()].copy_from_slice(&octets);
        let address = Ipv4Addr::from(address);
        if octets.len() < cut || !network.contains(&address) {
            return None;
        }
        let meaning = match (octets.len() == labels.len(), octets.len()) {
            (false, _) => Meaning::Nothing,
            (true, 4) => pointer(address.into(), names).map_or(Meaning::Nothing, Meaning::Data),
            (true, _) => Meaning::Parent,
        };
        Some((cut, meaning))
    }
}

impl Zones {
    /// The same for addresses of IPv6, whose labels are nibbles (RFC 3596 section 2.5).
    fn reverse_v6(&self, labels: &[Vec<u8>], names: &Names) -> Option<(usize, Meaning)> {
        let network = self.network.ipv6()?;
        let nibbles = labels.iter().map_while(|label| nibble(label)).take(NIBBLES);
        let nibbles: Vec<_> = nibbles.collect();
        let cut = usize::from(network.prefix_len().div_ceil(4));
        let bits = (0..NIBBLES).fold(0, |bits: u128, at| {
            bits << 4 | u128::from(nibbles.get(at).copied().unwrap_or_default())
        });
        let address = Ipv6Addr::from(bits);
        if nibbles.len() < cut || !network.contains(&address) {
            return None;
        }
        let meaning = match (nibbles.len() == labels.len(), nibbles.len()) {
            (false, _) => Meaning::Nothing,
            (true, NIBBLES) => {
                pointer(address.into(), names).map_or(Meaning::Nothing, Meaning::Data)
            }
            (true, _) => Meaning::Parent,
        };
        Some((cut, meaning))
    }
}

/// A pod's name alone, of which no resolver outside has to know: clients ask for it when there is no
/// address of the type that they want, or they look in no domain. Other types than addresses are not
/// answered: a pod that is named as a top-level domain must not hide that from who verifies names.
fn short(request: &Request, labels: &[Vec<u8>], names: &Names) -> Option<(usize, Meaning)> {
    let kind = request.question.query_type();
    if labels.len() != 1 || !matches!(kind, RecordType::A | RecordType::AAAA) {
        return None;
    }
    match pods(labels, names) {
        data @ Meaning::Data(_) => Some((1, data)),
        Meaning::Parent | Meaning::Nothing => None,
    }
}

/// What the labels in front of the zone's name stand for.
fn pods(labels: &[Vec<u8>], names: &Names) -> Meaning {
    let is_plain = |label: &Vec<u8>| !label.contains(&b'.') && label.is_ascii();
    if labels.is_empty() {
        return Meaning::Parent;
    } else if !labels.iter().all(is_plain) {
        return Meaning::Nothing;
    }
    let texts = labels.iter().rev();
    let texts: Vec<_> = texts.map(|label| String::from_utf8_lossy(label)).collect();
    match names.find(&texts.join(".")) {
        Found::Addresses(all) => Meaning::Data(
            all.into_iter()
                .map(|address| match address {
                    IpAddr::V4(address) => RData::A(A(address)),
                    IpAddr::V6(address) => RData::AAAA(AAAA(address)),
                })
                .collect(),
        ),
        Found::Parent => Meaning::Parent,
        Found::Nothing => Meaning::Nothing,
    }
}

fn pointer(address: IpAddr, names: &Names) -> Option<Vec<RData>> {
    let name = names.name_of(address)?;
    // Names of a pod and a node together can be longer than a name of the DNS may be.
    let name = Name::from_ascii(format!("{name}.{DOMAIN}.")).ok()?;
    Some(vec![RData::PTR(PTR(name))])
}

/// What a resolver answers for the machine itself (RFC 6761 section 6.3).
fn localhost() -> Meaning {
    Meaning::Data(vec![
        RData::A(A(Ipv4Addr::LOCALHOST)),
        RData::AAAA(AAAA(Ipv6Addr::LOCALHOST)),
    ])
}

/// What tells a pod by which prefix it reaches IPv4: this name has these addresses everywhere (RFC 7050
/// section 2.2), and is to be asked of nobody else (RFC 8880 section 7.1).
fn ipv4_only(nat64: Nat64Prefix) -> Meaning {
    let well_known = [Ipv4Addr::new(192, 0, 0, 170), Ipv4Addr::new(192, 0, 0, 171)];
    let made = well_known.map(|ipv4| RData::AAAA(AAAA(nat64.embed(ipv4))));
    let known = well_known.map(|ipv4| RData::A(A(ipv4)));
    Meaning::Data(known.into_iter().chain(made).collect())
}

/// The label of four bits, in the one way in which it is written.
fn nibble(label: &[u8]) -> Option<u8> {
    match label {
        [digit @ b'0'..=b'9'] => Some(digit - b'0'),
        [letter @ b'a'..=b'f'] => Some(letter - b'a' + 10),
        _ => None,
    }
}

/// The label of a number from 0 to 255, in the one way in which it is written.
fn octet(label: &[u8]) -> Option<u8> {
    let text = std::str::from_utf8(label).ok()?;
    let octet: u8 = text.parse().ok()?;
    (octet.to_string() == text).then_some(octet)
}

/// A zone's SOA record, which says how long it holds that there is no such name (RFC 2308).
fn start(apex: &Name) -> SOA {
    let mailbox = Name::from_ascii("nobody.invalid.").unwrap_or_default();
    SOA::new(apex.clone(), mailbox, 1, 3600, 600, 86_400, TTL)
}
