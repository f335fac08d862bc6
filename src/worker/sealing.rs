//! WireGuard at a worker's sockets: packets for peers are sealed as they leave, and what comes is opened
//! before the data path takes it. What keys and sessions are is in `muslin_stack::datapath::wireguard`.

use std::net::SocketAddr;
use std::ops::Range;
use std::time::{Instant, SystemTime};

use muslin_encap::offload::batch::{self, Queued, SendBatch};
use muslin_stack::datapath::peer::{PeerId, PeerState};
use muslin_stack::datapath::wireguard::{
    Opened, Origin, Output, Staged, WireGuard, WireGuardConfig,
};
use muslin_stack::drops::DropReason;

use super::output::{Tally, lost_to_peer};
use crate::error::Result;
use crate::error::errno;
use crate::host::Clock;
use crate::random::random;
use crate::underlay::{Route, TunnelSockets};

/// Bytes of the messages that are sealed before they are sent: two trains of the longest kind.
const AREA_LEN: usize = 128 * 1024;

/// A worker's sessions, and where its messages are sealed.
pub(super) struct Sealing {
    pub(super) wireguard: WireGuard,
    clock: Clock,
    area: Box<[u8]>,
    /// Memory for what is received next.
    spare: Contents,
}

/// What was in datagrams, in their order: a peer's packet, and where it is in the datagram.
#[derive(Default)]
pub(super) struct Contents(Vec<Option<(PeerId, Range<usize>)>>);

impl Contents {
    /// The packets in these datagrams, which were opened.
    pub(super) fn packets<'a>(
        &self,
        datagrams: impl Iterator<Item = (SocketAddr, &'a mut [u8])>,
    ) -> impl Iterator<Item = (PeerId, SocketAddr, &'a mut [u8])> {
        let opened = datagrams.zip(&self.0);
        opened.filter_map(|((source, datagram), opened)| {
            let (peer, range) = opened.as_ref()?;
            Some((*peer, source, datagram.get_mut(range.clone())?))
        })
    }
}

impl Sealing {
    /// Sessions with these peers, none of which has begun.
    ///
    /// # Errors
    /// If the kernel gives no randomness.
    pub(super) fn new(
        config: WireGuardConfig,
        clock: Clock,
        peers: impl Iterator<Item = PeerState>,
    ) -> Result<Self> {
        let now = clock.now();
        let origin = Origin {
            now,
            instant: Instant::now(),
            // A clock before 1970 is none.
            unix: SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default(),
            seed: random()?.into(),
        };
        let mut wireguard = WireGuard::new(config, origin);
        for state in peers {
            wireguard.set_peer(now, &state.peer);
        }
        Ok(Self {
            wireguard,
            clock,
            area: vec![0; AREA_LEN].into_boxed_slice(),
            spare: Contents::default(),
        })
    }

    /// Sends packets to peers in as few calls as it takes. Those that no session is there for wait.
    pub(super) fn send<'a>(
        &mut self,
        tunnel: &TunnelSockets,
        packets: impl IntoIterator<Item = (PeerId, Queued<'a, ()>)>,
        tally: &mut Tally,
    ) {
        self.seal_and_send(tunnel, packets, tally);
        self.send_own(tunnel, tally);
    }

    fn seal_and_send<'a>(
        &mut self,
        tunnel: &TunnelSockets,
        packets: impl IntoIterator<Item = (PeerId, Queued<'a, ()>)>,
        tally: &mut Tally,
    ) {
        let now = self.clock.now();
        let Self {
            wireguard, area, ..
        } = self;
        let mut packets = packets.into_iter().peekable();
        let mut split = None;
        while packets.peek().is_some() {
            let mut batch = SendBatch::new(area, tunnel.has_gso());
            while let Some((peer, queued)) = packets.peek() {
                let route = match wireguard.ready(now, *peer) {
                    Some(endpoint) => tunnel.route(endpoint, 0).ok_or(DropReason::UnderlayFailed),
                    // It was ready for the part that has left.
                    None if split.take().is_some() => Err(DropReason::WireguardNoSession),
                    None => match wireguard.stage(now, *peer, staged(queued)) {
                        Ok(()) => {
                            packets.next();
                            continue;
                        }
                        Err(reason) => Err(reason),
                    },
                };
                let pushed = route.and_then(|route| {
                    let queued = with_route(queued, route);
                    let mut sealer = wireguard.sealer(now, *peer);
                    let pushed = batch.push_sealed(&queued, &mut split, &mut sealer);
                    pushed.map_err(|_| DropReason::SuperpacketRefused)
                });
                match pushed {
                    Ok(Ok(())) => {}
                    Ok(Err(batch::Full)) if !batch.is_empty() => break,
                    // It is longer than all there is room for.
                    Ok(Err(batch::Full)) => tally.lose(DropReason::HeadroomExceeded, 1),
                    Err(reason) => tally.lose(reason, 1),
                }
                packets.next();
            }
            tunnel.send(&batch, |send, error| {
                tally.lose(lost_to_peer(error), send.packets.max(1) as u64);
            });
        }
    }

    /// Sends handshakes, keepalives, and what has waited for a session that is there now.
    fn send_own(&mut self, tunnel: &TunnelSockets, tally: &mut Tally) {
        while let Some(output) = self.wireguard.poll_output() {
            match output {
                // One that is lost is sent again by the protocol.
                Output::Datagram(to, datagram) => {
                    if let Err(error) = tunnel.send_one(&datagram, to) {
                        tracing::debug!("WireGuard to {to}: {}", errno(&error));
                    }
                }
                Output::Packet(peer, staged) => {
                    let Staged {
                        packet,
                        offload,
                        checksums,
                    } = &staged;
                    let queued = Queued {
                        key: (),
                        packet,
                        network: 0,
                        offload: *offload,
                        checksums: *checksums,
                    };
                    self.seal_and_send(tunnel, [(peer, queued)], tally);
                }
            }
        }
        let given_up = self.wireguard.take_given_up();
        if given_up > 0 {
            tally.lose(DropReason::WireguardNoHandshake, given_up);
        }
    }

    /// Opens datagrams in their places, and says which are packets.
    pub(super) fn open<'a>(
        &mut self,
        tunnel: &TunnelSockets,
        datagrams: impl Iterator<Item = (SocketAddr, &'a mut [u8])>,
        tally: &mut Tally,
    ) -> Contents {
        let now = self.clock.now();
        let mut contents = std::mem::take(&mut self.spare);
        for (source, datagram) in datagrams {
            let opened = match self.wireguard.open(now, source, datagram) {
                Ok(Opened::Packet(peer, range)) => Some((peer, range)),
                Ok(Opened::Consumed) => None,
                Err(reason) => {
                    tally.lose(reason, 1);
                    None
                }
            };
            contents.0.push(opened);
        }
        self.send_own(tunnel, tally);
        contents
    }

    /// Takes memory back.
    pub(super) fn recycle(&mut self, mut contents: Contents) {
        contents.0.clear();
        self.spare = contents;
    }

    /// Does what is due.
    pub(super) fn handle_timeout(&mut self, tunnel: Option<&TunnelSockets>, tally: &mut Tally) {
        self.wireguard.handle_timeout(self.clock.now());
        if let Some(tunnel) = tunnel {
            self.send_own(tunnel, tally);
        }
    }
}

/// A packet that has to wait, in memory of its own.
fn staged(queued: &Queued<'_, ()>) -> Staged {
    Staged {
        packet: queued.packet.to_vec(),
        offload: queued.offload,
        checksums: queued.checksums,
    }
}

fn with_route<'p>(queued: &Queued<'p, ()>, key: Route) -> Queued<'p, Route> {
    let Queued {
        packet,
        network,
        offload,
        checksums,
        ..
    } = *queued;
    Queued {
        key,
        packet,
        network,
        offload,
        checksums,
    }
}
