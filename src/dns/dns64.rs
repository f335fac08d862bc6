//! IPv6 addresses for names that have none, by which pods reach IPv4 (DNS64, RFC 6147).
//!
//! It is for those that ask by IPv6: a pod that has both versions asks its gateway by the one that it
//! likes, and loses nothing by an answer.

use std::net::IpAddr;

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::rdata::AAAA;
use hickory_proto::rr::{DNSClass, RData, Record, RecordType};
use muslin_stack::datapath::egress::Nat64Prefix;

use super::forward::forward;
use super::message::Request;
use super::resolvers::Resolvers;

/// How long an address holds that was made, in seconds, if nothing else is known (RFC 6147 section
/// 5.1.7).
const TTL: u32 = 600;

/// Whether a pod's query may have an answer with addresses that are made. Who verifies names would
/// find them forged (RFC 6147 section 5.5).
pub(super) fn is_for(pod: IpAddr, request: &Request) -> bool {
    pod.is_ipv6()
        && request.question.query_type() == RecordType::AAAA
        && request.question.query_class() == DNSClass::IN
        && !request.verifies()
}

/// The answer to a query for addresses of IPv6: what resolvers know, or addresses that mean those of
/// IPv4; nothing if there is none in time.
pub(super) async fn ask(
    prefix: Nat64Prefix,
    resolvers: &Resolvers,
    request: &Request,
) -> Option<Vec<u8>> {
    let known = forward(resolvers, request).await?;
    let Some(ttl) = Message::from_vec(&known).ok().and_then(|it| may_make(&it)) else {
        return Some(known);
    };
    let Some(of_ipv4) = request.for_type(RecordType::A) else {
        return Some(known);
    };
    let answer = forward(resolvers, &of_ipv4).await;
    let answer = answer.and_then(|bytes| Message::from_vec(&bytes).ok());
    let made = answer.and_then(|answer| make(prefix, request, answer, ttl));
    Some(made.unwrap_or(known))
}

/// How long addresses may hold that are made in place of this answer; nothing if they must not be.
fn may_make(known: &Message) -> Option<u32> {
    let is_address = |record: &Record| match &record.data {
        // What is mapped no host has (section 5.1.4).
        RData::AAAA(AAAA(address)) => address.to_ipv4_mapped().is_none(),
        _ => false,
    };
    let has_any = known.answers.iter().any(is_address);
    if has_any || known.metadata.truncation {
        return None;
    }
    match known.metadata.response_code {
        // There is no such name, of any type.
        ResponseCode::NXDomain => None,
        // Some servers fail where they know no more than IPv4 (section 5.1.2).
        _ => {
            let start = known
                .authorities
                .iter()
                .find_map(|record| match &record.data {
                    RData::SOA(start) => Some(record.ttl.min(start.minimum)),
                    _ => None,
                });
            Some(start.unwrap_or(TTL))
        }
    }
}

/// An answer with addresses made of those of IPv4.
fn make(prefix: Nat64Prefix, request: &Request, of_ipv4: Message, ttl: u32) -> Option<Vec<u8>> {
    let mut has_any = false;
    let records = of_ipv4
        .answers
        .into_iter()
        .filter_map(|record| match &record.data {
            RData::A(address) if prefix.may_mean(address.0) => {
                has_any = true;
                let ttl = record.ttl.min(ttl);
                let data = RData::AAAA(AAAA(prefix.embed(address.0)));
                Some(Record::from_rdata(record.name, ttl, data))
            }
            // The way from one name to another is the same.
            RData::CNAME(_) => Some(record),
            _ => None,
        });
    let records: Vec<_> = records.collect();
    if !has_any {
        return None;
    }
    let mut answer = request.answer(ResponseCode::NoError);
    answer.add_answers(records);
    Some(request.encode(&answer))
}
