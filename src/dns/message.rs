//! DNS messages of pods: which are queries, and how they are answered.

use hickory_proto::op::{
    Edns, Header, HeaderCounts, Message, MessageType, Metadata, OpCode, Query, ResponseCode,
};
use hickory_proto::rr::RecordType;
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};

/// The longest datagram without EDNS (RFC 1035 section 4.2.1).
const PLAIN: u16 = 512;
/// The longest datagram that the service wants to be sent: what every path takes.
const OFFERED: u16 = 1232;
/// The longest datagram that it sends to those who want more: what servers send at most.
const LONGEST: u16 = 4096;

/// How a pod asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    /// By UDP.
    Datagram,
    /// By TCP.
    Stream,
}

/// A query with one question.
#[derive(Debug)]
pub(super) struct Request {
    /// As it came.
    pub(super) bytes: Vec<u8>,
    pub(super) transport: Transport,
    pub(super) question: Query,
    metadata: Metadata,
    edns: Option<Edns>,
}

/// Why a message is no such query.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Rejected {
    /// It is an answer, or has no header: nothing is answered to that.
    NoQuery,
    /// This is to be answered.
    With(Vec<u8>),
}

/// A resolver's answer.
#[derive(Debug)]
pub(super) struct Answer {
    /// As the pod is to have it.
    pub(super) bytes: Vec<u8>,
    /// Whether it says of the resolver that it fails, and nothing of the name: another one may know.
    pub(super) is_failure: bool,
}

impl Request {
    pub(super) fn read(bytes: &[u8], transport: Transport) -> Result<Self, Rejected> {
        let header = Header::read(&mut BinDecoder::new(bytes)).map_err(|_| Rejected::NoQuery)?;
        let metadata = header.metadata;
        if metadata.message_type == MessageType::Response {
            return Err(Rejected::NoQuery);
        }
        let reject = |code| {
            let mut answer = Message::response(metadata.id, metadata.op_code);
            answer.metadata = Metadata::response_from_request(&metadata);
            answer.metadata.response_code = code;
            Err(Rejected::With(answer.to_vec().unwrap_or_default()))
        };
        if metadata.op_code != OpCode::Query {
            return reject(ResponseCode::NotImp);
        }
        let Ok(mut message) = Message::from_vec(bytes) else {
            return reject(ResponseCode::FormErr);
        };
        let (Some(question), true) = (message.queries.pop(), message.queries.is_empty()) else {
            return reject(ResponseCode::FormErr);
        };
        let request = Self {
            bytes: bytes.to_vec(),
            transport,
            question,
            metadata,
            edns: message.edns,
        };
        let code = match request.question.query_type() {
            _ if request.edns.as_ref().is_some_and(|edns| edns.version() > 0) => {
                ResponseCode::BADVERS
            }
            // The answer would be a whole zone, in many messages.
            RecordType::AXFR | RecordType::IXFR => ResponseCode::Refused,
            _ => return Ok(request),
        };
        Err(Rejected::With(request.encode(&request.answer(code))))
    }

    /// An answer without records.
    pub(super) fn answer(&self, code: ResponseCode) -> Message {
        let mut answer = Message::response(self.metadata.id, self.metadata.op_code);
        answer.metadata = Metadata::response_from_request(&self.metadata);
        answer.metadata.recursion_available = true;
        answer.metadata.response_code = code;
        answer.add_query(self.question.clone());
        if let Some(theirs) = &self.edns {
            let mut edns = Edns::new();
            edns.set_max_payload(OFFERED);
            edns.set_dnssec_ok(theirs.flags().dnssec_ok);
            answer.set_edns(edns);
        }
        answer
    }

    /// Whether who asks verifies names, or has asked for what that takes (RFC 4035 section 3.2).
    pub(super) fn verifies(&self) -> bool {
        let wants_more = |edns: &Edns| edns.flags().dnssec_ok;
        self.metadata.checking_disabled || self.edns.as_ref().is_some_and(wants_more)
    }

    /// The same query for another type; nothing if that cannot be written.
    pub(super) fn for_type(&self, kind: RecordType) -> Option<Self> {
        let mut question = self.question.clone();
        question.set_query_type(kind);
        let mut message = Message::from_vec(&self.bytes).ok()?;
        message.queries = vec![question.clone()];
        Some(Self {
            bytes: message.to_vec().ok()?,
            transport: self.transport,
            question,
            metadata: self.metadata,
            edns: self.edns.clone(),
        })
    }

    /// That no resolver has answered.
    pub(super) fn failure(&self) -> Vec<u8> {
        self.encode(&self.answer(ResponseCode::ServFail))
    }

    /// That the query is to be repeated over TCP.
    pub(super) fn truncated(&self) -> Answer {
        Answer {
            bytes: self.encode(&self.answer(ResponseCode::NoError).truncate()),
            is_failure: false,
        }
    }

    /// The longest answer in bytes.
    pub(super) fn limit(&self) -> usize {
        let limit = match (self.transport, &self.edns) {
            (Transport::Stream, _) => u16::MAX,
            (Transport::Datagram, Some(edns)) => edns.max_payload().clamp(PLAIN, LONGEST),
            (Transport::Datagram, None) => PLAIN,
        };
        limit.into()
    }

    /// An answer as it is sent: without records and marked, if it is too long.
    pub(super) fn encode(&self, answer: &Message) -> Vec<u8> {
        match answer.to_vec() {
            Ok(bytes) if bytes.len() <= self.limit() => bytes,
            Ok(_) | Err(_) => answer.truncate().to_vec().unwrap_or_default(),
        }
    }

    /// The query under another number.
    pub(super) fn bytes_as(&self, id: u16) -> Vec<u8> {
        with_id(self.bytes.clone(), id)
    }

    /// The resolver's answer to [`Self::bytes_as`]; nothing if it is none.
    pub(super) fn take_answer(&self, id: u16, bytes: Vec<u8>) -> Option<Answer> {
        let mut decoder = BinDecoder::new(&bytes);
        let Header { metadata, counts } = Header::read(&mut decoder).ok()?;
        if metadata.id != id || metadata.message_type != MessageType::Response {
            return None;
        }
        let is_ours = match counts.queries {
            // As servers do that cannot read the question.
            0 => metadata.response_code != ResponseCode::NoError,
            1 => Query::read(&mut decoder).is_ok_and(|asked| asked == self.question),
            _ => false,
        };
        is_ours.then(|| Answer {
            bytes: with_id(bytes, self.metadata.id),
            is_failure: is_failure(&metadata, &counts),
        })
    }
}

/// Whether a resolver fails, as libraries see it: it says so, or refers to others, as a server does
/// that does not resolve names.
fn is_failure(metadata: &Metadata, counts: &HeaderCounts) -> bool {
    match metadata.response_code {
        ResponseCode::ServFail
        | ResponseCode::Refused
        | ResponseCode::NotImp
        | ResponseCode::FormErr => true,
        ResponseCode::NoError => {
            let knows = metadata.authoritative || metadata.recursion_available;
            counts.answers == 0 && !knows && !metadata.truncation
        }
        _ => false,
    }
}

fn with_id(mut bytes: Vec<u8>, id: u16) -> Vec<u8> {
    // The first field of every header.
    bytes[..2].copy_from_slice(&id.to_be_bytes());
    bytes
}
