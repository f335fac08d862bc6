//! Names, by the resolver at the overlay's gateway.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};
use muslin_stack::addresses::Addresses;
use thiserror::Error;
use tokio::time::{Instant, timeout_at};

use super::overlay::DatagramSocket;
use crate::random::random;

/// Where resolvers listen.
pub(super) const PORT: u16 = 53;
/// When the question is asked again, since datagrams get lost.
const TRIES: [Duration; 3] = [
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(2),
];

/// How long an answer of IPv4 waits for that of IPv6 (RFC 8305 section 3).
const RESOLUTION_DELAY: Duration = Duration::from_millis(50);

/// Why a name has no address.
#[derive(Debug, Error)]
pub(super) enum ResolveError {
    /// There is no such name.
    #[error("the name {0} does not exist")]
    NoName(String),
    /// Names cannot be looked up.
    #[error("cannot look up names: {0}")]
    Resolver(io::Error),
}

/// Asks `resolver` for the addresses of `name`, of the IP versions that `own` has, by a port that nobody
/// else has; one at least. A short name is looked for in the domains of `search`.
pub(super) async fn resolve(
    socket: &DatagramSocket,
    resolver: IpAddr,
    name: &str,
    search: &[String],
    own: Addresses,
) -> Result<Vec<IpAddr>, ResolveError> {
    let aaaa = own.ipv6().map(|_| RecordType::AAAA);
    let a = own.ipv4().map(|_| RecordType::A);
    let types: Vec<_> = aaaa.into_iter().chain(a).collect();
    let mut fault = None;
    for full in candidates(name, search) {
        match ask(socket, resolver, &full, &types).await? {
            Outcome::Addresses(addresses) => return Ok(addresses),
            Outcome::Nothing => {}
            // Another domain may have an answer.
            Outcome::Failure(code) => fault = Some(code),
        }
    }
    Err(match fault {
        None => ResolveError::NoName(name.to_owned()),
        Some(code) => {
            ResolveError::Resolver(io::Error::other(format!("the resolver answered {code}")))
        }
    })
}

/// The whole names that a name may stand for, in the order in which libraries ask for them
/// (resolv.conf(5), `ndots:1`). One that is too long stands for nothing.
fn candidates(name: &str, search: &[String]) -> Vec<Name> {
    let plain = name.strip_suffix('.');
    let domains = if plain.is_some() { &[] } else { search };
    let within = domains.iter().map(|domain| format!("{name}.{domain}."));
    let as_it_is = format!("{}.", plain.unwrap_or(name));
    let all: Vec<_> = if name.contains('.') {
        std::iter::once(as_it_is).chain(within).collect()
    } else {
        within.chain([as_it_is]).collect()
    };
    let all = all.into_iter().map(Name::from_ascii);
    all.filter_map(std::result::Result::ok).collect()
}

/// What a resolver knows of a name.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Addresses(Vec<IpAddr>),
    Nothing,
    Failure(ResponseCode),
}

/// A question and what is known of its answer.
struct Asked {
    query: Message,
    bytes: Vec<u8>,
    outcome: Option<Outcome>,
}

/// Asks for records of these types, all at once.
async fn ask(
    socket: &DatagramSocket,
    resolver: IpAddr,
    name: &Name,
    types: &[RecordType],
) -> Result<Outcome, ResolveError> {
    let lost = ResolveError::Resolver;
    let mut all = Vec::new();
    for kind in types {
        let query = question(name, *kind)?;
        let bytes = query
            .to_vec()
            .map_err(|error| lost(io::Error::other(error)))?;
        all.push(Asked {
            query,
            bytes,
            outcome: None,
        });
    }
    let to = SocketAddr::new(resolver, PORT);
    for patience in TRIES {
        for asked in all.iter().filter(|it| it.outcome.is_none()) {
            socket.send(to, &asked.bytes).map_err(lost)?;
        }
        let mut until = Instant::now() + patience;
        while let Ok(received) = timeout_at(until, socket.receive()).await {
            let (from, answer) = received.map_err(lost)?;
            // An answer to another query, or to none, does not count.
            for asked in all.iter_mut().filter(|_| from == to) {
                if let Some(outcome) = read(&asked.query, &answer) {
                    asked.outcome = Some(outcome);
                }
            }
            if all.iter().all(|it| it.outcome.is_some()) {
                return Ok(together(all));
            }
            if has_address(&all) {
                until = until.min(Instant::now() + RESOLUTION_DELAY);
            }
        }
        if has_address(&all) {
            return Ok(together(all));
        }
    }
    let silent = format!("the resolver {resolver} does not answer");
    Err(lost(io::Error::new(io::ErrorKind::TimedOut, silent)))
}

fn has_address(all: &[Asked]) -> bool {
    let mut outcomes = all.iter().filter_map(|it| it.outcome.as_ref());
    outcomes.any(|it| matches!(it, Outcome::Addresses(_)))
}

/// What several answers say: the addresses of all, if there are any.
fn together(all: Vec<Asked>) -> Outcome {
    let (mut addresses, mut fault) = (Vec::new(), None);
    for outcome in all.into_iter().filter_map(|it| it.outcome) {
        match outcome {
            Outcome::Addresses(more) => addresses.extend(more),
            Outcome::Nothing => {}
            Outcome::Failure(code) => fault = Some(code),
        }
    }
    match fault {
        _ if !addresses.is_empty() => Outcome::Addresses(addresses),
        Some(code) => Outcome::Failure(code),
        None => Outcome::Nothing,
    }
}

/// The question for a name's addresses of one IP version.
fn question(name: &Name, kind: RecordType) -> Result<Message, ResolveError> {
    let mut query = Message::query();
    let random = random().map_err(|error| ResolveError::Resolver(io::Error::other(error)))?;
    query.metadata.id = u16::from_ne_bytes(random);
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(name.clone(), kind));
    Ok(query)
}

/// What an answer says, if it is one to the question.
fn read(query: &Message, bytes: &[u8]) -> Option<Outcome> {
    let answer = Message::from_vec(bytes).ok()?;
    let is_answer = answer.message_type == MessageType::Response
        && answer.id == query.id
        && answer.queries == query.queries;
    if !is_answer {
        return None;
    }
    // Aliases come with what they stand for.
    let kind = query.queries.first()?.query_type();
    let addresses = answer.answers.iter().filter_map(|it| match &it.data {
        RData::A(address) if kind == RecordType::A => Some(IpAddr::V4(address.0)),
        RData::AAAA(address) if kind == RecordType::AAAA => Some(IpAddr::V6(address.0)),
        _ => None,
    });
    let addresses: Vec<_> = addresses.collect();
    let found = (!addresses.is_empty()).then_some(addresses);
    Some(match (found, answer.response_code) {
        (Some(addresses), _) => Outcome::Addresses(addresses),
        (None, ResponseCode::NoError | ResponseCode::NXDomain) => Outcome::Nothing,
        (None, code) => Outcome::Failure(code),
    })
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use hickory_proto::rr::Record;
    use hickory_proto::rr::rdata::A;

    use super::*;

    #[test]
    fn short_names_are_looked_for_as_libraries_do() {
        let search = ["muslin".to_owned(), "corp.example".to_owned()];
        let asked = |name: &str| -> Vec<_> {
            let all = candidates(name, &search);
            all.iter().map(ToString::to_string).collect()
        };
        assert_eq!(asked("web"), ["web.muslin.", "web.corp.example.", "web."]);
        assert_eq!(
            asked("web.n1"),
            ["web.n1.", "web.n1.muslin.", "web.n1.corp.example."]
        );
        assert_eq!(asked("example.org."), ["example.org."]);
        assert_eq!(asked("web."), ["web."]);
        // What is too long in a domain may be there without it.
        let long = vec!["x".repeat(60); 4].join(".");
        assert_eq!(
            asked(&long),
            [format!("{long}."), format!("{long}.muslin.")]
        );
        assert_eq!(asked(&"x".repeat(64)), [""; 0]);
    }

    #[test]
    fn only_what_answers_the_question_counts() {
        let name = |name: &str| Name::from_ascii(name).unwrap();
        let query = question(&name("web.muslin."), RecordType::A).unwrap();
        let address = Ipv4Addr::new(10, 244, 1, 2);
        let mut answer = query.clone().into_response();
        answer.add_answer(Record::from_rdata(
            name("web.muslin."),
            5,
            RData::A(A(address)),
        ));
        let told = |message: &Message| read(&query, &message.to_vec().unwrap());
        let addresses = Outcome::Addresses(vec![address.into()]);
        assert_eq!(told(&answer), Some(addresses));
        let of_ipv6 = question(&name("web.muslin."), RecordType::AAAA).unwrap();
        let mut other = of_ipv6.clone().into_response();
        other.answers.clone_from(&answer.answers);
        let bytes = other.to_vec().unwrap();
        assert_eq!(read(&of_ipv6, &bytes), Some(Outcome::Nothing));

        let mut other = answer.clone();
        other.metadata.id ^= 1;
        assert!(told(&other).is_none());
        assert!(told(&query).is_none());
        assert!(read(&query, b"garbage").is_none());
        let mut other = question(&name("else.muslin."), RecordType::A)
            .unwrap()
            .into_response();
        other.metadata.id = query.id;
        assert!(told(&other).is_none());

        let mut none = query.clone().into_response();
        none.metadata.response_code = ResponseCode::NXDomain;
        assert_eq!(told(&none), Some(Outcome::Nothing));
        none.metadata.response_code = ResponseCode::ServFail;
        let failure = Outcome::Failure(ResponseCode::ServFail);
        assert_eq!(told(&none), Some(failure));
    }
}
