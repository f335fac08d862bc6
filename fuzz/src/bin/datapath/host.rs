//! Sockets of the host, of one worker.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;

use muslin_stack::datapath::egress::{
    Complaint, FlowId, FlowKey, Host, HostError, IpVersion, Marks, Protocol,
};

/// What the workers' sockets have sent: by which mapping or flow, where to, and which bytes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Sent {
    pub(crate) flow: FlowId,
    pub(crate) to: Option<SocketAddr>,
    pub(crate) bytes: Vec<u8>,
}

/// A worker's sockets.
#[derive(Debug, Default)]
pub(crate) struct Sockets {
    /// Those that egress has made, or was given with a flow.
    pub(crate) open: BTreeMap<FlowId, Socket>,
    /// Datagrams that went out, until somebody looks.
    pub(crate) sent: Vec<Sent>,
    /// What became of connections to pods, likewise.
    pub(crate) dialled: Vec<(FlowId, Result<(), HostError>)>,
    pub(crate) closed: u64,
}

/// A socket.
#[derive(Debug, Default)]
pub(crate) struct Socket {
    /// What has come to it, and from whom.
    pub(crate) waiting: VecDeque<(SocketAddr, Vec<u8>)>,
    /// Whether it is a connection's.
    pub(crate) is_stream: bool,
}

impl Sockets {
    /// Gives a flow that began on the host's side its socket, if it has none.
    pub(crate) fn adopt(&mut self, flow: FlowId, is_stream: bool) {
        self.open.entry(flow).or_insert_with(|| Socket {
            is_stream,
            ..Socket::default()
        });
    }

    fn get(&mut self, flow: FlowId) -> &mut Socket {
        self.open.get_mut(&flow).expect("the flow has a socket")
    }
}

impl Host for Sockets {
    fn open(&mut self, flow: FlowId, protocol: Protocol, _: IpVersion) -> Result<(), HostError> {
        assert_eq!(protocol, Protocol::Udp);
        let before = self.open.insert(flow, Socket::default());
        assert!(before.is_none(), "{flow:?} has a socket");
        Ok(())
    }

    fn connect(&mut self, _: FlowId, _: Protocol, to: SocketAddr) -> Result<(), HostError> {
        panic!("no pod begins a connection to {to}");
    }

    fn serve(&mut self, _: FlowId, _: FlowKey) -> Result<(), HostError> {
        Err(HostError::Refused)
    }

    fn dialled(&mut self, flow: FlowId, result: Result<(), HostError>) {
        assert!(self.get(flow).is_stream);
        self.dialled.push((flow, result));
    }

    fn connected(&mut self, flow: FlowId) -> Result<(), HostError> {
        panic!("{flow:?} is no connection of a pod's");
    }

    fn send(&mut self, flow: FlowId, to: SocketAddr, bytes: &[u8]) -> Result<(), HostError> {
        assert!(!self.get(flow).is_stream);
        let (to, bytes) = (Some(to), bytes.to_vec());
        self.sent.push(Sent { flow, to, bytes });
        Ok(())
    }

    fn receive(
        &mut self,
        flow: FlowId,
        buffer: &mut [u8],
    ) -> Result<(usize, SocketAddr), HostError> {
        let waiting = self.get(flow).waiting.pop_front();
        let (from, bytes) = waiting.ok_or(HostError::WouldBlock)?;
        buffer[..bytes.len()].copy_from_slice(&bytes);
        Ok((bytes.len(), from))
    }

    fn read(&mut self, flow: FlowId, _: &mut [u8]) -> Result<usize, HostError> {
        self.get(flow);
        Err(HostError::WouldBlock)
    }

    fn write(&mut self, flow: FlowId, bytes: &[u8]) -> Result<usize, HostError> {
        if !self.get(flow).is_stream {
            let bytes = bytes.to_vec();
            let to = None;
            self.sent.push(Sent { flow, to, bytes });
            return Ok(self.sent.last().map_or(0, |sent| sent.bytes.len()));
        }
        Ok(bytes.len())
    }

    fn mark(&mut self, flow: FlowId, _: Marks) {
        self.get(flow);
    }

    fn complaint(&mut self, flow: FlowId, _: &mut [u8]) -> Option<Complaint> {
        self.get(flow);
        None
    }

    fn shutdown(&mut self, flow: FlowId) -> Result<(), HostError> {
        self.get(flow);
        Ok(())
    }

    fn close(&mut self, flow: FlowId, _: bool) {
        self.closed += 1;
        assert!(
            self.open.remove(&flow).is_some(),
            "{flow:?} is closed twice"
        );
    }
}
