//! What nodes ask each other about packets, over the pod network, from gateway to gateway.
//!
//! A question is one datagram, an answer as many pieces as it takes, up to [`MAX_PIECES`]. All are
//! authenticated by a secret that the nodes share (RFC 2104): a question with its number, which who
//! asks has drawn, and both ends; a piece of an answer with all that and the code of the question, so
//! that it is no answer to another one, nor the question of another node.
//!
//! ```text
//! 0      4      5       6       7         8        24                  len-32
//! | "MTX2" | kind | piece | pieces | zero | number | a part of the JSON | code |
//! ```

use std::net::{IpAddr, Ipv6Addr};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::credentials::is_same;
use super::live;
use super::trace::{Arrival, Part};
use crate::addresses::{Addresses, Nets};
pub use crate::datapath::exchange::MAX_LEN;

/// Pieces that an answer may have.
pub const MAX_PIECES: usize = 16;
/// Bytes of the number of a question.
pub const ID_LEN: usize = 16;
/// Bytes of an authentication code: HMAC-SHA-256 (RFC 4231).
pub const CODE_LEN: usize = 32;

const MAGIC: &[u8; 4] = b"MTX2";
const HEADER_LEN: usize = MAGIC.len() + 4 + ID_LEN;
const MAX_BODY: usize = MAX_LEN - HEADER_LEN - CODE_LEN;

/// The number of a question, which nobody can foresee.
pub type Id = [u8; ID_LEN];
/// An authentication code.
pub type Code = [u8; CODE_LEN];

/// The secret that nodes share.
pub trait Secret {
    /// The authentication code of these bytes, one after the other.
    fn code(&self, parts: &[&[u8]]) -> Code;
}

/// What a datagram is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A question.
    Question,
    /// A piece of an answer.
    Answer,
}

/// The gateways between which it is asked, of one IP version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    /// Who asks.
    pub asker: IpAddr,
    /// Who is to answer.
    pub answerer: IpAddr,
}

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Ask {
    /// What becomes of a packet that the asking node has sent.
    Trace(Arrival),
    /// To watch for probes of the asking node's pods, or what was seen of them.
    Live(live::Call),
}

impl Ask {
    /// Whether the node with that lease and those public addresses may ask it: about packets that it can
    /// have sent, and probes of its own pods. Nothing is sent for others.
    #[must_use]
    pub fn is_allowed(&self, lease: Nets, public_ip: Addresses) -> bool {
        match self {
            Self::Trace(arrival) => public_ip
                .iter::<IpAddr>()
                .any(|own| own == arrival.source.ip()),
            Self::Live(live::Call::Watch(watch)) => match watch.source {
                IpAddr::V4(source) => lease.ipv4().is_some_and(|it| it.contains(&source)),
                IpAddr::V6(source) => lease.ipv6().is_some_and(|it| it.contains(&source)),
            },
            // Who knows the number has begun to watch.
            Self::Live(live::Call::Seen { .. } | live::Call::End { .. }) => true,
            Self::Live(live::Call::Send(_) | live::Call::Elsewhere { .. }) => false,
        }
    }
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Told {
    /// The node's part of a packet's way.
    Trace(Box<Part>),
    /// What the node says about probes.
    Live(live::Told),
    /// Why the node does not tell it, in one line.
    Refused(String),
}

/// A question that was asked: what its answer belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    ends: Ends,
    id: Id,
    code: Code,
}

impl Asked {
    /// The gateway that asked.
    #[must_use]
    pub const fn asker(&self) -> IpAddr {
        self.ends.asker
    }
}

/// Why a datagram is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Fault {
    /// It is not written as one.
    #[error("it is not a message between nodes")]
    Format,
    /// Who sent it does not know the secret, or sent it for something else.
    #[error("its authentication code is wrong")]
    Code,
    /// It belongs to no question that is open.
    #[error("it belongs to no open question")]
    Stray,
    /// There are too many.
    #[error("there are too many of them")]
    TooMany,
    /// It is longer than a datagram, or an answer, may be.
    #[error("it is too long")]
    TooLong,
}

/// The head of a datagram.
struct Head<'a> {
    kind: Kind,
    piece: usize,
    pieces: usize,
    id: Id,
    /// All that is authenticated.
    header: &'a [u8],
    body: &'a [u8],
    code: &'a [u8],
}

impl<'a> Head<'a> {
    fn read(bytes: &'a [u8]) -> Result<Self, Fault> {
        if bytes.len() > MAX_LEN {
            return Err(Fault::TooLong);
        }
        let (rest, code) = bytes.split_last_chunk::<CODE_LEN>().ok_or(Fault::Format)?;
        let (header, body) = rest
            .split_first_chunk::<HEADER_LEN>()
            .ok_or(Fault::Format)?;
        let [m, a, g, i, kind, piece, pieces, 0, id @ ..] = header else {
            return Err(Fault::Format);
        };
        let kind = match kind {
            1 => Kind::Question,
            2 => Kind::Answer,
            _ => return Err(Fault::Format),
        };
        let (piece, pieces) = (usize::from(*piece), usize::from(*pieces));
        let most = if kind == Kind::Question {
            1
        } else {
            MAX_PIECES
        };
        if [*m, *a, *g, *i] != *MAGIC || piece >= pieces || pieces > most {
            return Err(Fault::Format);
        }
        Ok(Self {
            kind,
            piece,
            pieces,
            id: *id,
            header,
            body,
            code,
        })
    }

    fn check(&self, secret: &impl Secret, ends: Ends, question: &Code) -> Result<(), Fault> {
        let code = code(secret, self.header, ends, question, self.body);
        is_same(&code, self.code).then_some(()).ok_or(Fault::Code)
    }
}

/// What a datagram is, and the number of its question. Nothing is checked yet.
///
/// # Errors
/// `Fault::Format` or `Fault::TooLong`.
pub fn kind(bytes: &[u8]) -> Result<(Kind, Id), Fault> {
    Head::read(bytes).map(|head| (head.kind, head.id))
}

/// Writes a question.
///
/// # Errors
/// `Fault::TooLong` if it does not fit.
pub fn write_question(
    secret: &impl Secret,
    ends: Ends,
    id: Id,
    ask: &Ask,
) -> Result<(Asked, Vec<u8>), Fault> {
    let body = serde_json::to_vec(ask).map_err(|_| Fault::Format)?;
    if body.len() > MAX_BODY {
        return Err(Fault::TooLong);
    }
    let (code, bytes) = write(
        secret,
        (Kind::Question, 0, 1),
        ends,
        id,
        &[0; CODE_LEN],
        &body,
    );
    Ok((Asked { ends, id, code }, bytes))
}

/// Reads a question.
///
/// # Errors
/// `Fault`.
pub fn read_question(
    secret: &impl Secret,
    ends: Ends,
    bytes: &[u8],
) -> Result<(Asked, Ask), Fault> {
    let head = Head::read(bytes)?;
    if head.kind != Kind::Question {
        return Err(Fault::Format);
    }
    head.check(secret, ends, &[0; CODE_LEN])?;
    let code = head.code.try_into().map_err(|_| Fault::Format)?;
    let id = head.id;
    Ok((Asked { ends, id, code }, json(head.body)?))
}

/// Writes an answer, in pieces.
///
/// # Errors
/// `Fault::TooLong` if it takes too many.
pub fn write_answer(
    secret: &impl Secret,
    asked: &Asked,
    told: &Told,
) -> Result<Vec<Vec<u8>>, Fault> {
    let body = serde_json::to_vec(told).map_err(|_| Fault::Format)?;
    let parts: Vec<_> = body.chunks(MAX_BODY).collect();
    if parts.len() > MAX_PIECES {
        return Err(Fault::TooLong);
    }
    let count = parts.len() as u8;
    let pieces = (0..count).zip(parts).map(|(piece, part)| {
        let what = (Kind::Answer, piece, count);
        write(secret, what, asked.ends, asked.id, &asked.code, part).1
    });
    Ok(pieces.collect())
}

/// An answer in the making.
#[derive(Debug, Clone)]
pub struct Answering {
    asked: Asked,
    pieces: Vec<Option<Vec<u8>>>,
}

impl Answering {
    /// That of a question.
    #[must_use]
    pub const fn new(asked: Asked) -> Self {
        Self {
            asked,
            pieces: Vec::new(),
        }
    }

    /// Takes a piece, which came from `from`, in whatever order; the answer, if it is whole.
    ///
    /// # Errors
    /// `Fault`. The answer can still come.
    pub fn take(
        &mut self,
        secret: &impl Secret,
        from: IpAddr,
        bytes: &[u8],
    ) -> Result<Option<Told>, Fault> {
        let head = Head::read(bytes)?;
        let Asked { ends, id, code } = self.asked;
        if head.kind != Kind::Answer || head.id != id || from != ends.answerer {
            return Err(Fault::Stray);
        }
        head.check(secret, ends, &code)?;
        // It may be answered twice if it was asked twice.
        if self.pieces.len() != head.pieces {
            self.pieces = vec![None; head.pieces];
        }
        if let Some(place) = self.pieces.get_mut(head.piece) {
            *place = Some(head.body.to_vec());
        }
        let whole: Option<Vec<_>> = self.pieces.iter().map(Option::as_deref).collect();
        whole.map(|whole| json(&whole.concat())).transpose()
    }
}

fn json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Fault> {
    serde_json::from_slice(bytes).map_err(|_| Fault::Format)
}

fn write(
    secret: &impl Secret,
    (kind, piece, pieces): (Kind, u8, u8),
    ends: Ends,
    id: Id,
    question: &Code,
    body: &[u8],
) -> (Code, Vec<u8>) {
    let kind = match kind {
        Kind::Question => 1,
        Kind::Answer => 2,
    };
    let mut bytes = Vec::with_capacity(HEADER_LEN + body.len() + CODE_LEN);
    bytes.extend_from_slice(MAGIC);
    bytes.extend([kind, piece, pieces, 0]);
    bytes.extend(id);
    let code = code(secret, &bytes, ends, question, body);
    bytes.extend_from_slice(body);
    bytes.extend(code);
    (code, bytes)
}

/// All before the body has one length: addresses of IPv4 are written as those of IPv6 that stand for them
/// (RFC 4291 section 2.5.5.2).
fn code(secret: &impl Secret, header: &[u8], ends: Ends, question: &Code, body: &[u8]) -> Code {
    let octets = |address| match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => Ipv6Addr::octets(&address),
    };
    let (asker, answerer) = (octets(ends.asker), octets(ends.answerer));
    secret.code(&[header, &asker, &answerer, question, body])
}

#[cfg(test)]
mod tests {
    use super::super::trace::{Medium, Outcome, Packet, Summary};
    use super::*;
    use crate::drops::DropReason;

    /// No code for use: each byte counts, and where it is.
    struct Sum(u64);

    impl Secret for Sum {
        fn code(&self, parts: &[&[u8]]) -> Code {
            let mut code = [0; CODE_LEN];
            for (number, word) in (0..).zip(code.as_chunks_mut::<8>().0) {
                let bytes = parts.iter().copied().flatten();
                let sum = bytes.fold(self.0 + number, |sum, byte| {
                    (sum ^ u64::from(*byte))
                        .wrapping_mul(0x0100_0000_01b3)
                        .rotate_left(9)
                });
                *word = sum.to_be_bytes();
            }
            code
        }
    }

    const SECRET: Sum = Sum(7);
    const ID: Id = [5; ID_LEN];

    fn ends() -> Ends {
        Ends {
            asker: [10, 244, 1, 1].into(),
            answerer: [10, 244, 2, 1].into(),
        }
    }

    fn ask() -> Ask {
        Ask::Trace(Arrival {
            by: Medium::Tunnel,
            source: "192.0.2.1:8472".parse().unwrap(),
            packet: Packet(vec![1, 2, 3]),
        })
    }

    /// A part with so long a text.
    fn told(len: usize) -> Told {
        Told::Trace(Box::new(Part {
            node: "n2".to_owned(),
            packet: Summary {
                source: [10, 244, 1, 2].into(),
                destination: [10, 244, 2, 2].into(),
                text: "x".repeat(len),
            },
            steps: Vec::new(),
            outcome: Outcome::dropped(DropReason::NoRoute),
            own: Vec::new(),
            more_own: 0,
            next: None,
        }))
    }

    #[test]
    fn a_question_is_answered_in_pieces_of_any_order() {
        let (asked, question) = write_question(&SECRET, ends(), ID, &ask()).unwrap();
        assert_eq!(kind(&question), Ok((Kind::Question, ID)));
        let (heard, read) = read_question(&SECRET, ends(), &question).unwrap();
        assert_eq!((heard, read), (asked, ask()));
        let told = told(3000);
        let mut pieces = write_answer(&SECRET, &heard, &told).unwrap();
        assert_eq!(pieces.len(), 3);
        assert!(pieces.iter().all(|piece| piece.len() <= MAX_LEN));
        pieces.reverse();
        pieces.insert(1, pieces[0].clone());
        let mut answering = Answering::new(asked);
        let last = pieces.pop().unwrap();
        for piece in &pieces {
            assert_eq!(answering.take(&SECRET, ends().answerer, piece), Ok(None));
        }
        let whole = answering.take(&SECRET, ends().answerer, &last);
        assert_eq!(whole, Ok(Some(told)));
    }

    #[test]
    fn nothing_that_is_changed_or_of_others_is_taken() {
        let (asked, question) = write_question(&SECRET, ends(), ID, &ask()).unwrap();
        let Ends { asker, answerer } = ends();
        let back = Ends {
            asker: answerer,
            answerer: asker,
        };
        let refused = |bytes: &[u8]| read_question(&SECRET, ends(), bytes).unwrap_err();
        for at in 0..question.len() {
            let mut changed = question.clone();
            changed[at] ^= 1;
            let _ = refused(&changed);
            let _ = refused(&question[..at]);
        }
        assert_eq!(refused(&[0; MAX_LEN + 1]), Fault::TooLong);
        let other = read_question(&Sum(8), ends(), &question);
        assert_eq!(other, Err(Fault::Code));
        // Sent back to who asked it, it is no question of the other node.
        assert_eq!(read_question(&SECRET, back, &question), Err(Fault::Code));
        // Nor one to a third node, in either IP version.
        let third = |answerer: &str| Ends {
            asker,
            answerer: answerer.parse().unwrap(),
        };
        for ends in [third("10.244.3.1"), third("fd00:2::1")] {
            assert_eq!(read_question(&SECRET, ends, &question), Err(Fault::Code));
        }

        let answer = write_answer(&SECRET, &asked, &told(3)).unwrap().remove(0);
        let take = |asked, from, bytes: &[u8]| Answering::new(asked).take(&SECRET, from, bytes);
        assert!(take(asked, answerer, &answer).unwrap().is_some());
        for at in 0..answer.len() {
            let mut changed = answer.clone();
            changed[at] ^= 1;
            assert!(take(asked, answerer, &changed).is_err(), "{at}");
            assert!(take(asked, answerer, &answer[..at]).is_err(), "{at}");
        }
        assert_eq!(take(asked, asker, &answer), Err(Fault::Stray));
        assert_eq!(take(asked, answerer, &question), Err(Fault::Stray));
        // One to another question is none, also where who asks draws the same number again.
        let (later, _) = write_question(&SECRET, ends(), [6; ID_LEN], &ask()).unwrap();
        assert_eq!(take(later, answerer, &answer), Err(Fault::Stray));
        let Ask::Trace(mut arrival) = ask() else {
            unreachable!()
        };
        arrival.packet.0.push(4);
        let (same, _) = write_question(&SECRET, ends(), ID, &Ask::Trace(arrival)).unwrap();
        assert_eq!(take(same, answerer, &answer), Err(Fault::Code));
    }

    #[test]
    fn nodes_ask_about_what_is_theirs_only() {
        let addresses = |text: &str| text.parse::<Addresses>().unwrap();
        let own = addresses("192.0.2.1,fd09::1");
        let lease: Nets = "10.244.1.0/24,fd00:1::/64".parse().unwrap();
        for (own, allowed) in [("192.0.2.1,fd09::1", true), ("192.0.2.3,fd09::3", false)] {
            assert_eq!(ask().is_allowed(lease, addresses(own)), allowed);
        }
        let Ask::Trace(mut arrival) = ask() else {
            unreachable!()
        };
        for (source, allowed) in [("[fd09::1]:8472", true), ("[fd09::3]:8472", false)] {
            arrival.source = source.parse().unwrap();
            let is_allowed = Ask::Trace(arrival.clone()).is_allowed(lease, own);
            assert_eq!(is_allowed, allowed, "{source}");
        }
        let watch = |source: &str| {
            live::Call::Watch(live::Watch {
                id: 1,
                source: source.parse().unwrap(),
                destination: [10, 244, 2, 2].into(),
                for_ms: 1,
            })
        };
        let packet = super::super::trace::Beginning {
            from: "web".to_owned(),
            to: "db".to_owned(),
            protocol: super::super::trace::Protocol::Icmp,
            source_port: 1,
            destination_port: 1,
            size: 0,
            ttl: 1,
            dont_fragment: false,
            version: None,
            has_mark: false,
        };
        let send = live::Call::Send(live::Send {
            id: 1,
            sequence: 1,
            packet,
        });
        let call = Box::new(watch("10.244.1.2"));
        let elsewhere = live::Call::Elsewhere {
            public_ip: [192, 0, 2, 1].into(),
            call,
        };
        for (call, allowed) in [
            (watch("10.244.1.2"), true),
            (watch("10.244.2.2"), false),
            (watch("fd00:1::2"), true),
            (watch("fd00:2::2"), false),
            (live::Call::Seen { id: 1, from: 0 }, true),
            (live::Call::End { id: 1 }, true),
            (send, false),
            (elsewhere, false),
        ] {
            let is_allowed = Ask::Live(call.clone()).is_allowed(lease, own);
            assert_eq!(is_allowed, allowed, "{call:?}");
        }
    }

    #[test]
    fn what_is_too_long_is_not_sent() {
        let Ask::Trace(mut arrival) = ask() else {
            unreachable!()
        };
        arrival.packet.0 = vec![7; MAX_LEN];
        let written = write_question(&SECRET, ends(), ID, &Ask::Trace(arrival));
        assert_eq!(written, Err(Fault::TooLong));
        let (asked, _) = write_question(&SECRET, ends(), ID, &ask()).unwrap();
        assert!(write_answer(&SECRET, &asked, &told(15_000)).is_ok());
        let long = write_answer(&SECRET, &asked, &told(MAX_LEN * MAX_PIECES));
        assert_eq!(long, Err(Fault::TooLong));
    }
}
