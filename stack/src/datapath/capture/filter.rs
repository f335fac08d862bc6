//! Filters: which packets are captured, in the words of pcap-filter(7).
//!
//! Of that language there are `host`, `net`, `port` and `portrange` with `src` or `dst`, the protocols
//! `ip`, `ip6`, `arp`, `tcp`, `udp`, `icmp` and `icmp6`, `and`, `or`, `not` and parentheses. An address
//! or a number alone is what the term before it was about, as there.

use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::str::FromStr;

use ipnet::IpNet;
use smoltcp::wire::{EthernetProtocol, IpProtocol};
use thiserror::Error;

use super::fields::Fields;

/// Words that a filter may have.
const MAX_WORDS: usize = 256;
/// How deep parentheses and negations may be nested.
const MAX_DEPTH: usize = 32;

/// Which packets are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter(Option<Expression>);

/// Why a text is no filter.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FilterError {
    /// A word that is not known, or not there.
    #[error(
        "a filter cannot have '{0}' here: it has host, net, port, portrange, src, dst, ip, ip6, arp, tcp, \
         udp, icmp, icmp6, and, or, not and parentheses"
    )]
    Word(String),
    /// A value is missing or is none of its kind.
    #[error("{kind} needs {}, and '{value}' is none", example(kind))]
    Value {
        /// The word that it belongs to.
        kind: &'static str,
        /// What is there.
        value: String,
    },
    /// It ends too early.
    #[error("the filter ends too early")]
    End,
    /// There is a parenthesis without its other.
    #[error("the filter has a parenthesis too many or too few")]
    Parenthesis,
    /// It is too long.
    #[error("the filter has more than {MAX_WORDS} words, or is nested too deeply")]
    TooLong,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Expression {
    Term(Term),
    Not(Box<Expression>),
    And(Box<Expression>, Box<Expression>),
    Or(Box<Expression>, Box<Expression>),
}

/// One condition.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Term {
    Network(Network),
    Transport(IpProtocol),
    Address(End, IpNet),
    Port(End, RangeInclusive<u16>),
}

/// What an Ethernet frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Network {
    Ip,
    Ip6,
    Arp,
}

/// Which end of a packet is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Source,
    Destination,
    Either,
}

/// What a value stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Host,
    Net,
    Port,
    PortRange,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Net => "net",
            Self::Port => "port",
            Self::PortRange => "portrange",
        }
    }
}

/// What a word that needs a value needs.
fn example(kind: &str) -> &'static str {
    match kind {
        "host" => "an address",
        "net" => "a network, as 10.244.0.0/16",
        "port" => "a number up to 65535",
        _ => "two numbers, as 8000-8080",
    }
}

impl Filter {
    /// All packets.
    pub const ALL: Self = Self(None);

    /// Whether all packets are wanted.
    #[must_use]
    pub const fn is_all(&self) -> bool {
        self.0.is_none()
    }

    pub(super) fn matches(&self, fields: &Fields) -> bool {
        self.0.as_ref().is_none_or(|it| it.matches(fields))
    }
}

impl Expression {
    fn matches(&self, fields: &Fields) -> bool {
        match self {
            Self::Term(term) => term.matches(fields),
            Self::Not(inner) => !inner.matches(fields),
            Self::And(one, other) => one.matches(fields) && other.matches(fields),
            Self::Or(one, other) => one.matches(fields) || other.matches(fields),
        }
    }
}

impl Term {
    fn matches(&self, fields: &Fields) -> bool {
        match self {
            Self::Network(network) => {
                let wanted = match network {
                    Network::Ip => EthernetProtocol::Ipv4,
                    Network::Ip6 => EthernetProtocol::Ipv6,
                    Network::Arp => EthernetProtocol::Arp,
                };
                fields.ethertype == Some(wanted)
            }
            Self::Transport(protocol) => fields.protocol == Some(*protocol),
            Self::Address(end, net) => {
                let is = |address: Option<IpAddr>| address.is_some_and(|it| net.contains(&it));
                end.any(is(fields.source), is(fields.destination))
            }
            Self::Port(end, range) => fields.ports.is_some_and(|(source, destination)| {
                end.any(range.contains(&source), range.contains(&destination))
            }),
        }
    }
}

impl End {
    const fn any(self, source: bool, destination: bool) -> bool {
        match self {
            Self::Source => source,
            Self::Destination => destination,
            Self::Either => source || destination,
        }
    }
}

impl FromStr for Filter {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Self, FilterError> {
        let spaced = text
            .replace('(', " ( ")
            .replace(')', " ) ")
            .replace('!', " ! ");
        let words: Vec<_> = spaced.split_whitespace().collect();
        if words.is_empty() {
            return Ok(Self::ALL);
        }
        if words.len() > MAX_WORDS {
            return Err(FilterError::TooLong);
        }
        let mut parser = Parser {
            words: &words,
            last: (End::Either, None),
        };
        let expression = parser.expression(0)?;
        match parser.words {
            [] => Ok(Self(Some(expression))),
            [")", ..] => Err(FilterError::Parenthesis),
            [word, ..] => Err(FilterError::Word((*word).to_owned())),
        }
    }
}

struct Parser<'a> {
    words: &'a [&'a str],
    /// What a value alone belongs to.
    last: (End, Option<Kind>),
}

impl Parser<'_> {
    /// Terms with `and` and `or` between them, which bind alike, from left to right.
    fn expression(&mut self, depth: usize) -> Result<Expression, FilterError> {
        let mut left = self.operand(depth)?;
        loop {
            match self.words {
                ["and" | "&&", ..] => {
                    self.skip();
                    let right = self.operand(depth)?;
                    left = Expression::And(Box::new(left), Box::new(right));
                }
                ["or" | "||", ..] => {
                    self.skip();
                    let right = self.operand(depth)?;
                    left = Expression::Or(Box::new(left), Box::new(right));
                }
                _ => return Ok(left),
            }
        }
    }

    fn operand(&mut self, depth: usize) -> Result<Expression, FilterError> {
        if depth > MAX_DEPTH {
            return Err(FilterError::TooLong);
        }
        match self.words {
            [] => Err(FilterError::End),
            ["not" | "!", ..] => {
                self.skip();
                let inner = self.operand(depth + 1)?;
                Ok(Expression::Not(Box::new(inner)))
            }
            ["(", ..] => {
                self.skip();
                let inner = self.expression(depth + 1)?;
                match self.words {
                    [")", ..] => {
                        self.skip();
                        Ok(inner)
                    }
                    [] => Err(FilterError::Parenthesis),
                    [word, ..] => Err(FilterError::Word((*word).to_owned())),
                }
            }
            _ => self.primitive(),
        }
    }

    /// A protocol, an end and a kind with its value, of which each may be left out.
    fn primitive(&mut self) -> Result<Expression, FilterError> {
        let protocol = self.protocol();
        let end = self.end();
        let kind = self.kind();
        if protocol.is_some() && end.is_none() && kind.is_none() {
            return protocol.ok_or(FilterError::End);
        }
        let kind = match (end, kind) {
            (Some(_), None) => Some(Kind::Host),
            (None, None) => self.last.1,
            (_, kind) => kind,
        };
        let end = match (end, kind == self.last.1) {
            (Some(end), _) => end,
            // Nothing but a value: it is as the one before.
            (None, true) if protocol.is_none() => self.last.0,
            (None, _) => End::Either,
        };
        let term = Expression::Term(self.value(end, kind)?);
        Ok(match protocol {
            Some(protocol) => Expression::And(Box::new(protocol), Box::new(term)),
            None => term,
        })
    }

    fn protocol(&mut self) -> Option<Expression> {
        let [word, ..] = self.words else {
            return None;
        };
        let term = match *word {
            "ip" => Term::Network(Network::Ip),
            "ip6" => Term::Network(Network::Ip6),
            "arp" => Term::Network(Network::Arp),
            "tcp" => Term::Transport(IpProtocol::Tcp),
            "udp" => Term::Transport(IpProtocol::Udp),
            "icmp" => Term::Transport(IpProtocol::Icmp),
            "icmp6" => Term::Transport(IpProtocol::Icmpv6),
            _ => return None,
        };
        self.skip();
        Some(Expression::Term(term))
    }

    fn end(&mut self) -> Option<End> {
        let (end, words) = match self.words {
            ["src", "or", "dst", ..] | ["dst", "or", "src", ..] => (End::Either, 3),
            ["src", ..] => (End::Source, 1),
            ["dst", ..] => (End::Destination, 1),
            _ => return None,
        };
        self.words = &self.words[words..];
        Some(end)
    }

    fn kind(&mut self) -> Option<Kind> {
        let kind = match self.words {
            ["host", ..] => Kind::Host,
            ["net", ..] => Kind::Net,
            ["port", ..] => Kind::Port,
            ["portrange", ..] => Kind::PortRange,
            _ => return None,
        };
        self.skip();
        Some(kind)
    }

    fn value(&mut self, end: End, kind: Option<Kind>) -> Result<Term, FilterError> {
        let [word, ..] = self.words else {
            return Err(FilterError::End);
        };
        let word = (*word).to_owned();
        // What is no keyword and belongs to none is an address.
        let kind = match kind {
            Some(kind) => kind,
            None if word.parse::<IpAddr>().is_ok() => Kind::Host,
            None => return Err(FilterError::Word(word)),
        };
        let wrong = || FilterError::Value {
            kind: kind.name(),
            value: word.clone(),
        };
        let term = match kind {
            Kind::Host => {
                let address: IpAddr = word.parse().map_err(|_| wrong())?;
                Term::Address(end, address.into())
            }
            Kind::Net => Term::Address(end, word.parse().map_err(|_| wrong())?),
            Kind::Port => {
                let port: u16 = word.parse().map_err(|_| wrong())?;
                Term::Port(end, port..=port)
            }
            Kind::PortRange => {
                let (first, last) = word.split_once('-').ok_or_else(wrong)?;
                let first: u16 = first.parse().map_err(|_| wrong())?;
                let last: u16 = last.parse().map_err(|_| wrong())?;
                Term::Port(end, first.min(last)..=first.max(last))
            }
        };
        self.skip();
        self.last = (end, Some(kind));
        Ok(term)
    }

    fn skip(&mut self) {
        self.words = self.words.get(1..).unwrap_or_default();
    }
}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            None => Ok(()),
            Some(expression) => expression.fmt(f),
        }
    }
}

impl fmt::Display for Expression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Term(term) => term.fmt(f),
            Self::Not(inner) => write!(f, "not ({inner})"),
            Self::And(one, other) => write!(f, "({one}) and ({other})"),
            Self::Or(one, other) => write!(f, "({one}) or ({other})"),
        }
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network(Network::Ip) => f.write_str("ip"),
            Self::Network(Network::Ip6) => f.write_str("ip6"),
            Self::Network(Network::Arp) => f.write_str("arp"),
            Self::Transport(IpProtocol::Tcp) => f.write_str("tcp"),
            Self::Transport(IpProtocol::Udp) => f.write_str("udp"),
            Self::Transport(IpProtocol::Icmp) => f.write_str("icmp"),
            Self::Transport(_) => f.write_str("icmp6"),
            Self::Address(end, net) => write!(f, "{end} net {net}"),
            Self::Port(end, range) => {
                write!(f, "{end} portrange {}-{}", range.start(), range.end())
            }
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "src",
            Self::Destination => "dst",
            Self::Either => "src or dst",
        })
    }
}
