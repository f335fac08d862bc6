//! Names, by the resolver at the overlay's gateway.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};
use tokio::time::{Instant, timeout_at};

use super::dial::DialError;
use super::overlay::DatagramSocket;
use crate::state;

/// Where resolvers listen.
pub(super) const PORT: u16 = 53;
/// The domain of the cluster's names, in which names without a dot are looked for.
const DOMAIN: &str = "muslin";
/// When the question is asked again, since datagrams get lost.
const TRIES: [Duration; 3] = [
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(2),
];

/// Asks `resolver` for an address of `name`, by a port that nobody else has.
pub(super) async fn resolve(
    socket: &DatagramSocket,
    resolver: Ipv4Addr,
    name: &str,
) -> Result<Ipv4Addr, DialError> {
    let lost = DialError::Resolver;
    let query = question(name)?;
    let bytes = query.to_vec().map_err(|_| nobody(name))?;
    let to = SocketAddrV4::new(resolver, PORT);
    for patience in TRIES {
        socket.send(to, &bytes).map_err(lost)?;
        let until = Instant::now() + patience;
        while let Ok(received) = timeout_at(until, socket.receive()).await {
            let (from, answer) = received.map_err(lost)?;
            // What answers another question, or nobody asked for, does not count.
            if let Some(result) = (from == to).then(|| read(&query, &answer)).flatten() {
                return result.map_err(lost)?.ok_or_else(|| nobody(name));
            }
        }
    }
    let silent = format!("the resolver {resolver} does not answer");
    Err(lost(io::Error::new(io::ErrorKind::TimedOut, silent)))
}

/// The question for a name's address.
fn question(name: &str) -> Result<Message, DialError> {
    let is_plain = !name.contains('.');
    let full = if is_plain {
        format!("{name}.{DOMAIN}.")
    } else {
        format!("{}.", name.trim_end_matches('.'))
    };
    let full = Name::from_ascii(full).map_err(|_| nobody(name))?;
    let mut query = Message::query();
    let random = state::random().map_err(|error| DialError::Resolver(io::Error::other(error)))?;
    query.metadata.id = u16::from_ne_bytes(random);
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(full, RecordType::A));
    Ok(query)
}

/// The address in an answer, if it is one to the question; or that there is none.
fn read(query: &Message, bytes: &[u8]) -> Option<io::Result<Option<Ipv4Addr>>> {
    let answer = Message::from_vec(bytes).ok()?;
    let is_answer = answer.message_type == MessageType::Response
        && answer.id == query.id
        && answer.queries == query.queries;
    if !is_answer {
        return None;
    }
    // Aliases come with what they stand for.
    let mut addresses = answer.answers.iter().filter_map(|it| match &it.data {
        RData::A(address) => Some(address.0),
        _ => None,
    });
    Some(match (addresses.next(), answer.response_code) {
        (Some(address), _) => Ok(Some(address)),
        (None, ResponseCode::NoError | ResponseCode::NXDomain) => Ok(None),
        (None, code) => Err(io::Error::other(format!("the resolver says: {code}"))),
    })
}

fn nobody(name: &str) -> DialError {
    DialError::NoName(name.to_owned())
}

#[cfg(test)]
mod tests {
    use hickory_proto::rr::Record;
    use hickory_proto::rr::rdata::A;

    use super::*;

    #[test]
    fn names_without_a_dot_are_the_clusters() {
        let asked = |name: &str| question(name).unwrap().queries[0].name().to_string();
        assert_eq!(asked("web"), "web.muslin.");
        assert_eq!(asked("web.n1.muslin"), "web.n1.muslin.");
        assert_eq!(asked("example.org."), "example.org.");
    }

    #[test]
    fn only_what_answers_the_question_counts() {
        let query = question("web").unwrap();
        let address = Ipv4Addr::new(10, 244, 1, 2);
        let mut answer = query.clone().into_response();
        let name = query.queries[0].name().clone();
        answer.add_answer(Record::from_rdata(name, 5, RData::A(A(address))));
        let told = |message: &Message| read(&query, &message.to_vec().unwrap());
        assert_eq!(told(&answer).unwrap().unwrap(), Some(address));

        let mut other = answer.clone();
        other.metadata.id ^= 1;
        assert!(told(&other).is_none());
        assert!(told(&query).is_none());
        assert!(read(&query, b"garbage").is_none());
        let mut other = question("else").unwrap().into_response();
        other.metadata.id = query.id;
        assert!(told(&other).is_none());

        let mut none = query.clone().into_response();
        none.metadata.response_code = ResponseCode::NXDomain;
        assert_eq!(told(&none).unwrap().unwrap(), None);
        none.metadata.response_code = ResponseCode::ServFail;
        assert!(told(&none).unwrap().is_err());
    }
}
