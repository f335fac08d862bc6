//! Captures: what workers see becomes a pcapng file, which is written into a client's socket.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use muslin_encap::tunnel::{Format, ipip, vxlan};
use muslin_stack::addresses::ipv4;
use muslin_stack::api::capture::Capture;
use muslin_stack::api::control::Code;
use muslin_stack::api::pcapng::{self, LinkType};
use muslin_stack::datapath::capture::{Batch, Hook, Record, Segmenter, Wanted, WantedPeer};
use muslin_stack::datapath::node::Verdict;
use muslin_stack::datapath::observe::Source;
use muslin_stack::datapath::peer::PeerId;
use muslin_stack::datapath::port::PortId;
use nix::sys::socket::{SockType, getsockopt, sockopt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::OwnedSemaphorePermit;
use tracing::debug;

use super::pods::not_attached;
use super::running::{RunningNode, endpoint_words};
use crate::error::{Context, Error, Result};
use crate::terminal::quantity::count;
use crate::terminal::suggest::hint;

/// Captures that may run at once.
pub(super) const MAX_CAPTURES: usize = 4;
/// What is said of a client that reads no more.
const GONE: &str = "the client is gone";
/// Longer than any packet.
const WHOLE: usize = 1 << 17;

/// A capture that can begin.
pub(super) struct Ready {
    wanted: Wanted,
    segments: bool,
    stream: UnixStream,
    place: OwnedSemaphorePermit,
}

/// What a capture asks for.
///
/// # Errors
/// If there is no such thing, or there are too many captures.
pub(super) fn prepare(
    running: &RunningNode,
    request: &Capture,
    stream: Vec<OwnedFd>,
) -> Result<Ready> {
    let place = place(running)?;
    let hooks: Vec<_> = request
        .hooks
        .iter()
        .map(|name| hook(name))
        .collect::<Result<_>>()?;
    let hooks = match hooks.is_empty() && !request.dropped {
        true => Hook::ALL.to_vec(),
        false => hooks,
    };
    let port = request.pod.as_ref().map(|name| {
        let pods = running.pods.lock();
        let pod = pods.get(name).ok_or_else(|| not_attached(&pods, name))?;
        Ok::<_, Error>(pod.port)
    });
    let peer = request.peer.as_ref().map(|name| peer_named(running, name));
    let snap_len = usize::try_from(request.snap_len).unwrap_or(WHOLE);
    let wanted = Wanted {
        hooks,
        dropped: request.dropped,
        port: port.transpose()?,
        peer: peer.transpose()?,
        filter: request.filter.parse().map_err(Error::usage)?,
        snap_len: if snap_len == 0 {
            WHOLE
        } else {
            snap_len.min(WHOLE)
        },
        format: running.plan().tunnel.format(),
    };
    Ok(Ready {
        wanted,
        segments: request.segments,
        stream: self::stream(stream)?,
        place,
    })
}

/// A place for a capture.
pub(super) fn place(running: &RunningNode) -> Result<OwnedSemaphorePermit> {
    let place = running.captures.clone().try_acquire_owned();
    place.map_err(|_| {
        let message = format!("{MAX_CAPTURES} captures run already: end one of them");
        Error::refused(Code::Busy, message)
    })
}

fn hook(name: &str) -> Result<Hook> {
    let found = Hook::ALL.into_iter().find(|hook| hook.name() == name);
    found.ok_or_else(|| {
        let all = Hook::ALL.map(Hook::name).join(", ");
        Error::usage(format!("there is no hook '{name}': hooks are {all}"))
    })
}

fn peer_named(running: &RunningNode, name: &str) -> Result<WantedPeer> {
    let control = running.control.lock();
    let names = running.naming.names.read();
    let is_it =
        |node: Option<&str>, address: IpAddr| node == Some(name) || name.parse() == Ok(address);
    let mut peers = control.peers().iter();
    let found = peers.find(|(key, known)| {
        let record = names.record(key.first());
        is_it(
            record.map(|it| it.node.as_str()),
            known.record.node_address(),
        )
    });
    let (key, known) = found.ok_or_else(|| {
        let nodes = control.peers().iter();
        let nodes = nodes.filter_map(|(key, _)| names.record(key.first()));
        let hint = hint(name, nodes.map(|it| it.node.as_str()));
        Error::usage(format!(
            "there is no other node '{name}'{hint}: 'muslin peers' lists them"
        ))
    })?;
    Ok(WantedPeer {
        id: known
            .id_v6
            .filter(|_| key.ipv4().is_none())
            .unwrap_or(known.id),
        address: known.record.node_address(),
        subnet: key.first(),
    })
}

fn stream(mut beside: Vec<OwnedFd>) -> Result<UnixStream> {
    let is_stream = |fd: &OwnedFd| getsockopt(fd, sockopt::SockType) == Ok(SockType::Stream);
    let stream = beside.pop().filter(|fd| beside.is_empty() && is_stream(fd));
    let stream = stream.ok_or_else(|| Error::usage("a capture needs one stream socket"))?;
    let stream = std::os::unix::net::UnixStream::from(stream);
    stream
        .set_nonblocking(true)
        .context("cannot use the socket of the capture")?;
    UnixStream::from_std(stream).context("cannot use the socket of the capture")
}

/// Captures until the client has enough, or is gone.
pub(super) async fn run(running: Arc<RunningNode>, ready: Ready) {
    let Ready {
        wanted,
        segments,
        mut stream,
        place,
    } = ready;
    let mut file = File::new(&running, &wanted);
    file.segmenter = segments.then(Segmenter::default);
    let written = write(&running, &wanted, file, &mut stream).await;
    if let Err(error) = written {
        debug!("a capture ended: {error}");
    }
    drop(place);
}

async fn write(
    running: &RunningNode,
    wanted: &Wanted,
    mut file: File<'_>,
    stream: &mut UnixStream,
) -> Result<()> {
    let mut capturing = running.workers.capture(wanted).map_err(Error::failed)?;
    let (mut ends, mut output) = stream.split();
    output.write_all(&file.take()).await.context(GONE)?;
    let mut byte = [0];
    let mut is_over = false;
    loop {
        let next = tokio::select! {
            next = capturing.next() => next,
            _ = ends.read(&mut byte), if !is_over => {
                is_over = true;
                capturing.finish();
                continue;
            }
        };
        let Some((worker, batch)) = next else {
            break;
        };
        file.add(&batch);
        capturing.give_back(worker, batch);
        output.write_all(&file.take()).await.context(GONE)?;
    }
    output.write_all(&file.end()).await.context(GONE)
}

/// A pcapng file in the making. An interface is described before its first packet, and not at all
/// without any: libpcap, and with it tcpdump, reads no file whose interfaces have different link types.
struct File<'a> {
    running: &'a RunningNode,
    /// Those that are described, in the order of their numbers.
    hooks: Vec<Hook>,
    format: Option<Format>,
    snap_len: u32,
    /// When the node's clock began, in microseconds since 1970.
    epoch: u64,
    out: Vec<u8>,
    /// Where a packet is made as it is to be read.
    packet: Vec<u8>,
    /// Packets that were lost, by the number of the interface.
    lost: Vec<u64>,
    /// What makes segments of superpackets, if they are wanted.
    segmenter: Option<Segmenter>,
    /// What pods and peers are called in the batch that is being written.
    words: VerdictWords<'a>,
}

impl<'a> File<'a> {
    fn new(running: &'a RunningNode, wanted: &Wanted) -> Self {
        let mut file = Self {
            running,
            hooks: Vec::new(),
            format: wanted.format,
            snap_len: u32::try_from(wanted.snap_len).unwrap_or(u32::MAX),
            epoch: epoch(running),
            out: Vec::new(),
            packet: Vec::new(),
            lost: Vec::new(),
            segmenter: None,
            words: VerdictWords::new(running),
        };
        pcapng::section(&mut file.out, concat!("muslin ", env!("CARGO_PKG_VERSION")));
        file
    }

    /// What is to be written now.
    fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.out)
    }

    fn add(&mut self, batch: &Batch) {
        self.words = VerdictWords::new(self.running);
        let mut last = 0;
        for (record, bytes) in batch.iter() {
            let interface = self.interface(record.hook);
            last = interface;
            self.add_one(interface, record, bytes);
        }
        if let Some(lost) = self.lost.get_mut(last) {
            *lost += batch.lost();
        }
    }

    /// The number of a hook's interface, which is described if it is new.
    fn interface(&mut self, hook: Hook) -> usize {
        if let Some(number) = self.hooks.iter().position(|it| *it == hook) {
            return number;
        }
        let is_tunnels = matches!(hook, Hook::FromTunnel | Hook::ToTunnel);
        let has_frames = match self.format {
            Some(Format::Vxlan) if is_tunnels => true,
            _ => hook.has_frames(),
        };
        let link = match has_frames {
            true => LinkType::Ethernet,
            false => LinkType::Raw,
        };
        let node = &self.running.facts.settings.name;
        let description = format!("Node {node}: {}", describe(hook));
        let words = (hook.name(), description.as_str());
        pcapng::interface(&mut self.out, link, self.snap_len, words);
        self.hooks.push(hook);
        self.lost.push(0);
        self.hooks.len() - 1
    }

    fn add_one(&mut self, interface: usize, record: &Record, bytes: &[u8]) {
        self.lost[interface] += record.lost;
        let comment = self.comment(record);
        let Some(mut segmenter) = self.segmenter.take() else {
            return self.put(
                (interface, record.lost),
                record,
                (bytes, record.len),
                &comment,
            );
        };
        segmenter.split(record, self.format, bytes, |segment| {
            let (number, count) = (segment.number, segment.count);
            let packet = (segment.bytes, segment.len);
            match count {
                1 => self.put((interface, record.lost), record, packet, &comment),
                _ => {
                    let comment = format!("{comment}; segment {number} of {count}");
                    let lost = if number == 1 { record.lost } else { 0 };
                    self.put((interface, lost), record, packet, &comment);
                }
            }
        });
        self.segmenter = Some(segmenter);
    }

    /// Writes a packet of which so much is there and which has so many bytes, behind others that were lost.
    fn put(
        &mut self,
        (interface, lost): (usize, u64),
        record: &Record,
        (bytes, len): (&[u8], usize),
        comment: &str,
    ) {
        let before = match lost {
            0 => String::new(),
            _ => format!(
                "; {} before this one came faster than they were read",
                count(lost, "packet")
            ),
        };
        let mut packet = std::mem::take(&mut self.packet);
        let len = self.readable(record, (bytes, len), &mut packet);
        let micros = u64::try_from(record.at.total_micros()).unwrap_or_default();
        pcapng::packet(
            &mut self.out,
            &pcapng::Packet {
                interface: u32::try_from(interface).unwrap_or_default(),
                micros: self.epoch + micros,
                bytes: &packet,
                len: u32::try_from(len).unwrap_or(u32::MAX),
                lost,
                comment: &format!("{comment}{before}"),
            },
        );
        self.packet = packet;
    }

    /// A packet as it is to be read: of VXLAN the inner frame, of IPv4 in IPv4 with the outer header, which
    /// the kernel writes. What is outside is in the comment.
    fn readable(
        &self,
        record: &Record,
        (bytes, len): (&[u8], usize),
        packet: &mut Vec<u8>,
    ) -> usize {
        packet.clear();
        let is_tunnels = matches!(record.hook, Hook::FromTunnel | Hook::ToTunnel);
        let (bytes, len) = match (self.format.filter(|_| is_tunnels), record.verdict) {
            (Some(Format::Vxlan), _) => (
                bytes.get(vxlan::HEADER_LEN..).unwrap_or_default(),
                len.saturating_sub(vxlan::HEADER_LEN),
            ),
            (Some(Format::Ipip), Verdict::Peer { destination, .. })
                if record.hook == Hook::ToTunnel =>
            {
                let ends = self.running.interface().ends;
                let own = ends.ipv4().map_or(Ipv4Addr::UNSPECIFIED, |end| end.address);
                let to = ipv4(destination.ip()).unwrap_or(Ipv4Addr::UNSPECIFIED);
                packet.extend(ipip::received(own, to, bytes));
                return len + packet.len() - bytes.len();
            }
            _ => (bytes, len),
        };
        packet.extend_from_slice(bytes);
        len
    }

    /// What became of a packet.
    fn comment(&mut self, record: &Record) -> String {
        let from = match record.source {
            Source::Port(port) => format!("from {}; ", self.words.pod(port)),
            Source::Underlay(address) => format!("from {}; ", endpoint_words(address)),
            Source::Node => "made by the node; ".to_owned(),
            // That is what the hook says.
            _ => String::new(),
        };
        let became = self.words.verdict(record.verdict);
        from + &became
    }

    /// The end of the file: how much was lost.
    fn end(mut self) -> Vec<u8> {
        let micros =
            u64::try_from(self.running.facts.clock.now().total_micros()).unwrap_or_default();
        for (number, lost) in (0..).zip(&self.lost) {
            pcapng::statistics(&mut self.out, number, self.epoch + micros, *lost);
        }
        self.out
    }
}

/// What verdicts mean for packets, in words. Pods and peers are found once: to find one means to look at all.
pub(super) struct VerdictWords<'a> {
    running: &'a RunningNode,
    pods: HashMap<PortId, String>,
    peers: HashMap<PeerId, String>,
}

impl<'a> VerdictWords<'a> {
    pub(super) fn new(running: &'a RunningNode) -> Self {
        Self {
            running,
            pods: HashMap::new(),
            peers: HashMap::new(),
        }
    }

    fn pod(&mut self, port: PortId) -> &str {
        let words = self.pods.entry(port);
        words.or_insert_with(|| self.running.pod_words(port))
    }

    fn peer(&mut self, id: PeerId) -> &str {
        let words = self.peers.entry(id);
        words.or_insert_with(|| self.running.peer_words(id))
    }

    pub(super) fn verdict(&mut self, verdict: Verdict) -> String {
        match verdict {
            Verdict::Port(port) => format!("to {}", self.pod(port)),
            Verdict::Flood { .. } => "to all other pods".to_owned(),
            Verdict::Uplink { id: Some(id) } => format!("to {} by the uplink", self.peer(id)),
            Verdict::Uplink { id: None } => "to the uplink".to_owned(),
            Verdict::Peer {
                id, destination, ..
            } => format!("to {} at {}", self.peer(id), endpoint_words(destination)),
            Verdict::Host => "to this machine".to_owned(),
            Verdict::Egress => "to egress".to_owned(),
            Verdict::Consumed => "kept by the node".to_owned(),
            Verdict::Drop(reason) => format!("dropped: {}: {}", reason.name(), reason.describe()),
        }
    }
}

/// When the node's clock began, in microseconds since 1970.
pub(super) fn epoch(running: &RunningNode) -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let now = u64::try_from(running.facts.clock.now().total_micros()).unwrap_or_default();
    u64::try_from(since.as_micros())
        .unwrap_or_default()
        .saturating_sub(now)
}

fn describe(hook: Hook) -> &'static str {
    match hook {
        Hook::FromPod => "frames from pods",
        Hook::ToPod => "frames to pods",
        Hook::FromTunnel => "what datagrams of the tunnel carry, to the node",
        Hook::ToTunnel => "what datagrams of the tunnel carry, from the node",
        Hook::FromUplink => "frames from the uplink",
        Hook::ToUplink => "frames to the uplink",
        Hook::FromHost => "packets from the host interface",
        Hook::ToHost => "packets to the host interface",
        Hook::FromEgress => "packets from outside to pods",
        Hook::ToEgress => "packets of pods to outside",
    }
}
