//! What an event of epoll is about: the 64 bits that come with it.

use muslin_stack::datapath::egress::FlowId;
use muslin_stack::datapath::port::PortId;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use thiserror::Error;

/// What a descriptor that epoll watches is.
///
/// A flow's token is told by its highest bit; its generation and its index are in the rest. All
/// others have their kind in the upper 32 bits, and a number in the lower ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Token {
    /// A queue of a pod's device, at a port of the node.
    Port(PortId),
    /// A queue of the tunnel, by its place among them.
    Tunnel(u32),
    /// A queue of the uplink, by its place among them.
    Uplink(u32),
    /// A published port, by its number.
    Published(u32),
    /// A flow's socket.
    Flow(FlowId),
    /// The sidecar's end of the way to its node.
    Node,
    /// A queue of the host interface.
    Host,
    /// What others wake the thread by.
    Wake,
}

impl Token {
    /// The epoll event to wait for: input to read.
    pub(crate) fn readable(self) -> EpollEvent {
        EpollEvent::new(EpollFlags::EPOLLIN, self.into())
    }

    /// The epoll event of a descriptor that is not to be read for a while.
    pub(crate) fn silent(self) -> EpollEvent {
        EpollEvent::new(EpollFlags::empty(), self.into())
    }
}

const PORT: u32 = 0;
const TUNNEL: u32 = 1;
const UPLINK: u32 = 2;
const PUBLISHED: u32 = 3;
const NODE: u32 = 4;
const WAKE: u32 = 5;
const HOST: u32 = 6;
/// The highest bit; a generation is below it.
const FLOW: u32 = 1 << 31;
const _: () = assert!(FlowId::GENERATIONS <= FLOW);

impl From<Token> for u64 {
    fn from(token: Token) -> Self {
        let (high, low) = match token {
            Token::Port(port) => (PORT, port.0),
            Token::Tunnel(queue) => (TUNNEL, queue),
            Token::Uplink(queue) => (UPLINK, queue),
            Token::Published(number) => (PUBLISHED, number),
            Token::Flow(flow) => (FLOW | flow.generation, flow.index),
            Token::Node => (NODE, 0),
            Token::Wake => (WAKE, 0),
            Token::Host => (HOST, 0),
        };
        Self::from(high) << 32 | Self::from(low)
    }
}

/// These 64 bits are not a token's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("an event has an unknown token: {0:#018x}")]
pub(crate) struct UnknownToken(pub(crate) u64);

impl TryFrom<u64> for Token {
    type Error = UnknownToken;

    fn try_from(data: u64) -> Result<Self, UnknownToken> {
        let (high, low) = ((data >> 32) as u32, data as u32);
        Ok(match (high, low) {
            (FLOW.., index) if high & !FLOW < FlowId::GENERATIONS => Self::Flow(FlowId {
                index,
                generation: high & !FLOW,
            }),
            (PORT, port) => Self::Port(PortId(port)),
            (TUNNEL, queue) => Self::Tunnel(queue),
            (UPLINK, queue) => Self::Uplink(queue),
            (PUBLISHED, number) => Self::Published(number),
            (NODE, 0) => Self::Node,
            (WAKE, 0) => Self::Wake,
            (HOST, 0) => Self::Host,
            _ => return Err(UnknownToken(data)),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Every kind of token; a new one does not compile before it is here.
    fn any_token() -> impl Strategy<Value = Token> {
        let number = || prop_oneof![Just(0), Just(u32::MAX), any::<u32>()];
        let kinds = |token: &Token| match token {
            Token::Port(_)
            | Token::Tunnel(_)
            | Token::Uplink(_)
            | Token::Published(_)
            | Token::Flow(_)
            | Token::Node
            | Token::Host
            | Token::Wake => true,
        };
        let last = FlowId::GENERATIONS - 1;
        let generation = prop_oneof![Just(0), Just(last), 0..=last];
        let flow = (number(), generation);
        let flow = flow.prop_map(|(index, generation)| FlowId { index, generation });
        prop_oneof![
            number().prop_map(|port| Token::Port(PortId(port))),
            number().prop_map(Token::Tunnel),
            number().prop_map(Token::Uplink),
            number().prop_map(Token::Published),
            flow.prop_map(Token::Flow),
            Just(Token::Node),
            Just(Token::Host),
            Just(Token::Wake),
        ]
        .prop_filter("all kinds are known", kinds)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(4096) })]

        #[test]
        fn a_token_comes_back_from_its_bits(token in any_token()) {
            prop_assert_eq!(Token::try_from(u64::from(token)), Ok(token));
        }

        #[test]
        fn two_tokens_have_two_values(one in any_token(), other in any_token()) {
            prop_assert_eq!(one == other, u64::from(one) == u64::from(other));
        }

        #[test]
        fn bits_are_those_of_one_token_or_of_none(
            data in prop_oneof![any::<u64>(), (0_u64..8, any::<u32>()).prop_map(|(kind, number)| kind << 32 | u64::from(number))]
        ) {
            match Token::try_from(data) {
                Ok(token) => prop_assert_eq!(u64::from(token), data),
                Err(unknown) => prop_assert_eq!(unknown, UnknownToken(data)),
            }
        }
    }

    #[test]
    fn what_no_token_has_is_unknown() {
        for data in [
            u64::MAX,
            7 << 32,
            1 << 62,
            3 << 62,
            4 << 32 | 1,
            5 << 32 | 7,
            6 << 32 | 1,
        ] {
            assert_eq!(Token::try_from(data), Err(UnknownToken(data)));
        }
    }
}
