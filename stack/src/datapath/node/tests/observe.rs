//! What an observer of a node sees.

use super::*;
use crate::datapath::observe::Observed;

/// Takes down all that it is told.
#[derive(Default)]
pub(super) struct Recorder {
    now: Option<Instant>,
    /// Packets that entered and have not left, the last one last.
    inside: Vec<(Source, usize)>,
    /// When packets entered and from where, their lengths, and what became of them.
    seen: Vec<(Instant, Source, usize, Verdict)>,
    refused: Vec<(Source, DropReason)>,
    lost: Vec<(DropReason, u64)>,
    /// The sum of all that.
    told: Counters,
}

impl Observer for Recorder {
    fn at(&mut self, now: Instant) {
        self.now = Some(now);
    }

    fn enters(&mut self, source: Source, packet: &(impl Observed + ?Sized)) {
        self.inside.push((source, packet.bytes().len()));
    }

    fn leaves(&mut self, source: Source, verdict: Verdict, _: &(impl Observed + ?Sized)) {
        let (from, len) = self.inside.pop().expect("it has entered");
        assert_eq!(from, source);
        let now = self.now.expect("it was told");
        self.seen.push((now, source, len, verdict));
        self.count(source, verdict);
    }

    fn refused(&mut self, source: Source, reason: DropReason) {
        self.refused.push((source, reason));
        self.count(source, Verdict::Drop(reason));
    }

    fn lost(&mut self, reason: DropReason, packets: u64) {
        self.lost.push((reason, packets));
        self.told.drop_many(reason, packets);
    }
}

impl Recorder {
    fn count(&mut self, source: Source, verdict: Verdict) {
        let told = &mut self.told;
        match source {
            Source::Egress | Source::Node => told.originated += 1,
            Source::Host | Source::Port(_) | Source::Underlay(_) | Source::Uplink => {
                told.received += 1
            }
        }
        match verdict {
            Verdict::Port(_) | Verdict::Host => told.delivered += 1,
            Verdict::Flood { .. } => told.flooded += 1,
            Verdict::Uplink { .. } | Verdict::Peer { .. } => told.sent += 1,
            Verdict::Egress | Verdict::Consumed => told.consumed += 1,
            Verdict::Drop(reason) => told.drop(reason),
        }
    }

    /// What it was told adds up to what the node has counted.
    pub(super) fn assert_agrees(&self, counted: &Counters) {
        assert!(self.inside.is_empty(), "{:?}", self.inside);
        assert_eq!(self.told, *counted);
    }
}

#[test]
fn an_observer_sees_packets_and_what_becomes_of_them() {
    let mut node = node(1, "udp");
    let later = NOW + Duration::from_secs(1);
    let (short, echo) = (
        ping(pod(1, 2), pod(2, 2), 1, 56),
        ping(pod(2, 2), pod(1, 2), 64, 56),
    );
    assert_eq!(
        from_pod(&mut node, &pod_frame(&short)).0,
        Verdict::Drop(DropReason::TtlExceeded)
    );
    let (from_peer, _) = through(&echo, |packet| {
        node.from_underlay(later, underlay(2).into(), packet)
    });
    assert_eq!(from_peer, Verdict::Port(POD_PORT));
    let (error, bytes) = outputs(&mut node).remove(0);
    assert_eq!(error, Verdict::Port(POD_PORT));
    node.refuse_frame(OTHER_PORT, 60);
    node.count_drops(DropReason::PortDown, 3);
    let peer = Source::Underlay(underlay(2).into());
    let seen = [
        (
            NOW,
            Source::Port(POD_PORT),
            short.len() + frame::HEADER_LEN,
            Verdict::Drop(DropReason::TtlExceeded),
        ),
        (later, peer, echo.len(), Verdict::Port(POD_PORT)),
        (later, Source::Node, bytes.len(), Verdict::Port(POD_PORT)),
    ];
    let observer = node.observer();
    assert_eq!(observer.seen, seen);
    let refused = (Source::Port(OTHER_PORT), DropReason::VirtioHeader);
    assert_eq!(observer.refused, [refused]);
    assert_eq!(observer.lost, [(DropReason::PortDown, 3)]);
    assert_adds_up(&node);
}
