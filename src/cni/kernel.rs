//! rtnetlink without a runtime: many changes in one system call.

use std::io;

use nix::errno::Errno;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{Socket, SocketAddr};

/// A connection to the kernel, in the network namespace in which it was opened.
pub(super) struct Kernel {
    socket: Socket,
    sequence: u32,
}

/// One change, and how it is made (`NLM_F_CREATE` and the like).
pub(super) type Change = (RouteNetlinkMessage, u16);

impl Kernel {
    /// Opens a connection in the namespace of this thread.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Makes changes one after the other, by one system call, and says how each went. Those behind
    /// one that fails are made all the same.
    pub(super) fn change(&mut self, changes: Vec<Change>) -> io::Result<Vec<io::Result<()>>> {
        let first = self.sequence + 1;
        let count = changes.len();
        let mut bytes = Vec::new();
        for (message, flags) in changes {
            self.append(&mut bytes, message, NLM_F_REQUEST | NLM_F_ACK | flags);
        }
        self.socket.send(&bytes, 0)?;
        let mut results: Vec<Option<io::Result<()>>> = (0..count).map(|_| None).collect();
        while results.iter().any(Option::is_none) {
            for message in self.receive()? {
                let index = message.header.sequence_number.wrapping_sub(first) as usize;
                let Some(place) = results.get_mut(index) else {
                    continue;
                };
                if let NetlinkPayload::Error(answer) = message.payload {
                    *place = Some(answer.code.map_or(Ok(()), |code| Err(error(code.get()))));
                }
            }
        }
        Ok(results.into_iter().flatten().collect())
    }

    /// Asks for one thing, or with `all` for all of its kind.
    pub(super) fn ask(
        &mut self,
        question: RouteNetlinkMessage,
        all: bool,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        let flags = if all { NLM_F_DUMP } else { NLM_F_ACK };
        let mut bytes = Vec::new();
        self.append(&mut bytes, question, NLM_F_REQUEST | flags);
        self.socket.send(&bytes, 0)?;
        let mut answers = Vec::new();
        loop {
            for message in self.receive()? {
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::InnerMessage(answer) => answers.push(answer),
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::Error(answer) => match answer.code {
                        None => return Ok(answers),
                        Some(code) => return Err(error(code.get())),
                    },
                    _ => {}
                }
            }
        }
    }

    fn append(&mut self, bytes: &mut Vec<u8>, message: RouteNetlinkMessage, flags: u16) {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.sequence_number = self.sequence;
        header.flags = flags;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let begin = bytes.len();
        // Each begins at a multiple of four (`NLMSG_ALIGN`).
        let end = begin + message.buffer_len();
        bytes.resize(end.next_multiple_of(4), 0);
        message.serialize(&mut bytes[begin..end]);
    }

    fn receive(&self) -> io::Result<Vec<NetlinkMessage<RouteNetlinkMessage>>> {
        let (bytes, _) = self.socket.recv_from_full()?;
        let mut rest = &bytes[..];
        let mut messages = Vec::new();
        while !rest.is_empty() {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
            let len = (message.header.length as usize).next_multiple_of(4);
            messages.push(message);
            rest = rest.get(len.max(4)..).unwrap_or_default();
        }
        Ok(messages)
    }
}

/// An error as the kernel tells it: its number, negative.
fn error(code: i32) -> io::Error {
    Errno::from_raw(code.saturating_neg()).into()
}
