//! The metrics, part by part. A family is there also while it has no samples, so that all that a node can
//! tell is told from its start.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use muslin_stack::api::control::{Peer, Traffic};
use muslin_stack::control::lease::Standing;

use super::super::report;
use super::super::running::RunningNode;
use super::{Tables, Vitals};
use crate::condition::{Need, State};
use crate::metrics::{
    Both, Family, Labels, Shares, Value, classes, counter, gauge, histogram, info, number, truth,
};
use crate::store::{self, Timings};
use crate::worker::batches::{self, Sizes};

/// The longest label in characters whose text is somebody else's: a value of a store can be megabytes.
const MAX_FOREIGN: usize = 64;
/// How a peer is doing to which nothing can be sent.
const UNUSABLE: &str = "unusable";

/// One label.
fn label(name: &'static str, value: impl ToString) -> Labels {
    vec![(name, value.to_string())]
}

fn count_of(count: usize) -> Value {
    number(count as u64)
}

/// A moment so long ago or in so long, in whole seconds since 1970.
fn timestamp(distance: Duration, is_past: bool) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or_default();
    let moment = match is_past {
        true => now.saturating_sub(distance),
        false => now + distance,
    };
    Value::Gauge(moment.as_secs_f64().round())
}

/// Who the node is.
pub(super) fn node(name: &str, running: Option<&RunningNode>) -> Vec<Family> {
    let mut labels = vec![
        ("node", name.to_owned()),
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
    ];
    if let Some(running) = running {
        let facts = &running.facts;
        labels.push(("backend", facts.config.backend.name().to_owned()));
        labels.push(("network", facts.config.networks().to_string()));
        labels.push(("subnet", facts.subnets.to_string()));
    }
    let help =
        "The node: name and version; once it has its lease also backend, network and subnet.";
    vec![info("muslin_node", help).with([(labels, Value::Info)])]
}

/// What the health checks say.
pub(super) fn health(state: &State) -> Vec<Family> {
    let checks = [
        ("healthz", state.is_alive()),
        ("readyz", state.is_ready && state.is_alive()),
    ];
    let checks = checks.map(|(check, is_well)| (label("check", check), truth(is_well)));
    vec![
        gauge(
            "muslin_healthy",
            "Whether a health check succeeds: healthz, or readyz for a node that serves its pods.",
        )
        .with(checks),
        gauge(
            "muslin_store_up",
            "Whether the store of leases has done what it was asked last.",
        )
        .is(truth(!state.lacks(Need::Store))),
    ]
}

/// The node's lease.
pub(super) fn lease(vitals: &Vitals, running: Option<&RunningNode>) -> Vec<Family> {
    let ends = *vitals.lease_ends.borrow();
    let ends = running.zip(ends).map(|(running, ends)| {
        let now = running.facts.clock.now();
        let between = |from, to: muslin_stack::Instant| {
            let micros = if to > from {
                (to - from).total_micros()
            } else {
                0
            };
            Duration::from_micros(micros)
        };
        timestamp(between(now, ends).max(between(ends, now)), ends < now)
    });
    let ago = |of: fn(&RunningNode) -> std::time::Instant| {
        running.map(|running| timestamp(of(running).elapsed(), true))
    };
    vec![
        gauge(
            "muslin_lease_acquired_timestamp",
            "When the node got its lease, in seconds since 1970.",
        )
        .seconds()
        .may_be(ago(|running| running.since)),
        gauge(
            "muslin_lease_confirmed_timestamp",
            "When the store confirmed the lease last, in seconds since 1970.",
        )
        .seconds()
        .may_be(ago(|running| *running.confirmed.lock())),
        gauge(
            "muslin_lease_expiry_timestamp",
            "When the lease ends if it is not renewed, in seconds since 1970; none for a reservation.",
        )
        .seconds()
        .may_be(ends),
    ]
}

/// The store's requests.
pub(super) fn store(timings: &Timings) -> Vec<Family> {
    let all: Vec<_> = timings.read().collect();
    let durations = all.iter().map(|(request, durations)| {
        let value = Value::Histogram {
            sum: durations.sum.as_secs_f64(),
            classes: classes(store::BOUNDS, durations.classes),
        };
        (label("request", request), value)
    });
    let failures = all.iter().map(|(request, durations)| {
        let labels = label("request", request);
        (labels, Value::Counter(durations.failed))
    });
    vec![
        histogram(
            "muslin_store_request_duration",
            "How long the store has taken for a request, in seconds, be it to refuse it.",
        )
        .seconds()
        .with(durations),
        counter(
            "muslin_store_request_failures",
            "Requests that the store has not done.",
        )
        .with(failures),
    ]
}

/// The packet threads, and what waits for them.
pub(super) fn data_path(running: Option<&RunningNode>, tables: Option<&Tables>) -> Vec<Family> {
    let backlog = tables.map(|tables| tables.totals.backlog);
    vec![
        gauge("muslin_workers", "Packet threads.")
            .may_be(running.map(|running| count_of(running.facts.settings.workers))),
        gauge(
            "muslin_data_path_up",
            "Whether all packet threads have answered; if not, what they count is missing here.",
        )
        .may_be(running.map(|_| truth(tables.is_some()))),
        gauge(
            "muslin_tunnel_queue",
            "Memory of packets from other nodes that wait to be read, in bytes, in all queues.",
        )
        .bytes()
        .may_be(backlog.map(|backlog| number(backlog.bytes))),
        gauge(
            "muslin_tunnel_queue_limit",
            "Memory that these queues may take together, in bytes; each has the same share.",
        )
        .bytes()
        .may_be(backlog.map(|backlog| number(backlog.limit))),
    ]
}

/// What became of all packets: what came in and began ends in one of the other ways.
pub(super) fn packets(tables: Option<&Tables>) -> Vec<Family> {
    let counters = tables.map(|tables| &tables.totals.counters);
    let count = |of: fn(&muslin_stack::drops::Counters) -> u64| {
        counters.map(|counters| Value::Counter(of(counters)))
    };
    let drops = counters.map(|counters| counters.drops()).into_iter();
    let drops = drops.flatten().map(|(reason, packets)| {
        let labels = label("reason", reason.name());
        (labels, Value::Counter(packets))
    });
    vec![
        counter(
            "muslin_received_packets",
            "Packets from pods, other nodes and the host; a superpacket is one.",
        )
        .may_be(count(|it| it.received)),
        counter(
            "muslin_originated_packets",
            "Packets that began in the node.",
        )
        .may_be(count(|it| it.originated)),
        counter(
            "muslin_delivered_packets",
            "Packets to one pod or to the host.",
        )
        .may_be(count(|it| it.delivered)),
        counter("muslin_sent_packets", "Packets to other nodes.").may_be(count(|it| it.sent)),
        counter(
            "muslin_flooded_packets",
            "Packets to all pods but the sender, each counted once.",
        )
        .may_be(count(|it| it.flooded)),
        counter("muslin_consumed_packets", "Packets to the node itself.")
            .may_be(count(|it| it.consumed)),
        counter(
            "muslin_dropped_packets",
            "Lost packets by reason; `muslin drops` explains the reasons.",
        )
        .with(drops),
        counter(
            "muslin_superseded_acknowledgements",
            "TCP acknowledgements that were not carried, since a newer one says the same.",
        )
        .may_be(count(|it| it.superseded)),
    ]
}

/// How much is done at once.
pub(super) fn batches(tables: Option<&Tables>) -> Vec<Family> {
    let all = tables.map(|tables| tables.totals.batches);
    let sizes = |sizes: Sizes| Value::Histogram {
        sum: sizes.packets as f64,
        classes: classes(batches::BOUNDS.map(|bound| bound as f64), sizes.classes),
    };
    let superpackets = all.map(|all| [("pod", all.from_pods), ("peer", all.merged)]);
    let superpackets = superpackets.into_iter().flatten();
    let superpackets =
        superpackets.map(|(from, count)| (label("from", from), Value::Counter(count)));
    vec![
        histogram(
            "muslin_received_batch_size",
            "Messages from other nodes that one system call brought; a train of datagrams is one.",
        )
        .may_be(all.map(|all| sizes(all.received))),
        histogram(
            "muslin_sent_batch_size",
            "Packets to other nodes that left together; a superpacket is one.",
        )
        .may_be(all.map(|all| sizes(all.sent))),
        counter(
            "muslin_superpackets",
            "Superpackets that pods sent, and those merged from packets of other nodes.",
        )
        .with(superpackets),
    ]
}

/// Pods, and what came from and went to each.
pub(super) fn pods(shares: &mut Shares, tables: Option<&Tables>) -> Vec<Family> {
    let rows = tables.map(|tables| {
        let pods = tables.pods.iter();
        let rows = pods.map(|pod| (pod.pod.to_string(), both(pod.received, pod.sent)));
        rows.collect()
    });
    let [packets, bytes] = traffic("pod", rows.map(|rows| shares.share(rows)));
    let published = tables.map(|tables| {
        let each = tables.pods.iter().map(|pod| pod.published.len());
        count_of(each.sum())
    });
    vec![
        gauge("muslin_pods", "Attached pods.")
            .may_be(tables.map(|tables| count_of(tables.pods.len()))),
        gauge(
            "muslin_published_ports",
            "Ports of this machine that lead to pods.",
        )
        .may_be(published),
        counter(
            "muslin_pod_packets",
            "Packets from and to a pod; a superpacket is one. Beyond 256 pods the rest is _other.",
        )
        .with(packets),
        counter(
            "muslin_pod",
            "Bytes from and to a pod, with Ethernet headers.",
        )
        .bytes()
        .with(bytes),
    ]
}

/// Other nodes, and what came from and went to each.
pub(super) fn peers(shares: &mut Shares, tables: Option<&Tables>) -> Vec<Family> {
    let all = tables.map(|tables| tables.peers.as_slice());
    let rows = all.map(|peers| {
        let rows = peers.iter();
        let rows = rows.map(|peer| (peer.subnet.to_string(), both(peer.received, peer.sent)));
        rows.collect()
    });
    let [packets, bytes] = traffic("peer", rows.map(|rows| shares.share(rows)));
    let own = all.unwrap_or_default().iter();
    let own = own.filter(|peer| shares.has_own(&peer.subnet.to_string()));
    let own: Vec<_> = own.collect();
    let up = |peer: &&Peer| {
        let labels = label("peer", peer.subnet);
        (labels, truth(state(peer) == Standing::Alive.to_string()))
    };
    vec![
        gauge(
            "muslin_peers",
            "Other nodes by state: alive, silent, stopped in order, or unusable.",
        )
        .with(all.map(states).into_iter().flatten()),
        info(
            "muslin_peer",
            "Another node, by its subnet: name, address, backend and path.",
        )
        .with(own.iter().map(|peer| (about(peer), Value::Info))),
        gauge("muslin_peer_up", "Whether another node is alive.").with(own.iter().map(up)),
        counter(
            "muslin_peer_packets",
            "Packets from and to another node. Beyond 256 nodes the rest is _other.",
        )
        .with(packets),
        counter(
            "muslin_peer",
            "Bytes from and to another node, as its tunnel carries them.",
        )
        .bytes()
        .with(bytes),
    ]
}

fn about(peer: &Peer) -> Labels {
    vec![
        ("peer", peer.subnet.to_string()),
        ("node", peer.node.clone().unwrap_or_default()),
        ("address", peer.public_ip.to_string()),
        ("backend", peer.backend.chars().take(MAX_FOREIGN).collect()),
        ("path", peer.path.clone().unwrap_or_default()),
    ]
}

/// How a peer is doing, in a word.
fn state(peer: &Peer) -> &str {
    match peer.usable {
        true => &peer.state,
        false => UNUSABLE,
    }
}

/// How many peers are in which state.
fn states(peers: &[Peer]) -> Vec<(Labels, Value)> {
    let known = [Standing::Alive, Standing::Silent, Standing::Stopped];
    let known = known.iter().map(ToString::to_string);
    let known = known.chain([UNUSABLE.to_owned()]);
    let states = known.map(|name| {
        let count = peers.iter().filter(|peer| state(peer) == name).count();
        (label("state", name), count_of(count))
    });
    states.collect()
}

/// What went through the host interface.
pub(super) fn host(tables: Option<&Tables>) -> Vec<Family> {
    let host = tables.and_then(|tables| tables.totals.host);
    let host = host.map(|host| both(report::traffic(host.received), report::traffic(host.sent)));
    let [packets, bytes] = directions(&[(Labels::new(), host.unwrap_or_default())]);
    let (packets, bytes) = match host {
        Some(_) => (packets, bytes),
        None => Default::default(),
    };
    vec![
        counter(
            "muslin_host_packets",
            "Packets from and to the host by the host interface, if there is one.",
        )
        .with(packets),
        counter("muslin_host", "Bytes of these packets.")
            .bytes()
            .with(bytes),
    ]
}

/// Flows to and from addresses outside the pod network.
pub(super) fn egress(tables: Option<&Tables>) -> Vec<Family> {
    let flows = tables.map(|tables| tables.totals.egress);
    let ends = flows.map(|flows| {
        [
            ("refused", flows.refused),
            ("unreachable", flows.unreachable),
            ("reset", flows.reset),
            ("expired", flows.expired),
            ("evicted", flows.evicted),
        ]
    });
    let ends = ends.into_iter().flatten();
    let ends = ends.map(|(reason, count)| (label("reason", reason), Value::Counter(count)));
    vec![
        gauge(
            "muslin_egress_flows",
            "Flows to and from addresses outside the pod network that are there.",
        )
        .may_be(flows.map(|flows| number(flows.open))),
        gauge("muslin_egress_flow_limit", "Flows that may be there.")
            .may_be(tables.map(|tables| number(tables.totals.flow_limit))),
        counter("muslin_egress_flows_opened", "Flows that began.")
            .may_be(flows.map(|flows| Value::Counter(flows.opened))),
        counter(
            "muslin_egress_flow_ends",
            "Flows that no end closed in order: TCP refused, unreachable or reset; expired or evicted.",
        )
        .with(ends),
        counter(
            "muslin_published_flows",
            "TCP connections and UDP flows of clients that came by published ports.",
        )
        .may_be(flows.map(|flows| Value::Counter(flows.inbound))),
    ]
}

/// What pods have asked their gateway.
pub(super) fn dns(running: Option<&RunningNode>) -> Vec<Family> {
    let dns = running.map(|running| running.naming.dns.counters());
    let results = dns.as_ref().map(|dns| {
        [
            ("answered", dns.answered),
            ("forwarded", dns.forwarded),
            ("failed", dns.failed),
        ]
    });
    let results = results.into_iter().flatten();
    let results = results.map(|(result, count)| (label("result", result), Value::Counter(count)));
    vec![
        counter("muslin_dns_queries", "DNS queries of pods.")
            .may_be(dns.as_ref().map(|dns| Value::Counter(dns.queries))),
        counter(
            "muslin_dns_results",
            "What became of them: answered by the node, forwarded and answered, or failed.",
        )
        .with(results),
    ]
}

fn both(from: Traffic, to: Traffic) -> Both {
    Both { from, to }
}

/// The samples of packets and of bytes of those who are shown.
fn traffic(name: &'static str, shown: Option<Vec<(String, Both)>>) -> [Vec<(Labels, Value)>; 2] {
    let rows = shown.into_iter().flatten();
    let rows: Vec<_> = rows.map(|(who, both)| (label(name, who), both)).collect();
    directions(&rows)
}

/// The samples of packets and of bytes from and to those with these labels.
fn directions(rows: &[(Labels, Both)]) -> [Vec<(Labels, Value)>; 2] {
    let of: [fn(Traffic) -> u64; 2] = [|it| it.packets, |it| it.bytes];
    of.map(|of| {
        let samples = rows.iter().flat_map(|(labels, both)| {
            [("from", both.from), ("to", both.to)].map(|(direction, traffic)| {
                let mut labels = labels.clone();
                labels.push(("direction", direction.to_owned()));
                (labels, Value::Counter(of(traffic)))
            })
        });
        samples.collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_in_seconds_since_1970() {
        let seconds = |value| match value {
            Value::Gauge(seconds) => seconds,
            other => panic!("{other:?}"),
        };
        let hour = Duration::from_secs(3600);
        let (past, next) = (
            seconds(timestamp(hour, true)),
            seconds(timestamp(hour, false)),
        );
        assert!((7199.0..=7201.0).contains(&(next - past)), "{past} {next}");
        assert!(past > 1.6e9 && past.fract() == 0.0, "{past}");
    }

    #[test]
    fn a_peer_is_in_one_state_and_a_label_is_short() {
        let row = |state: &str, usable| {
            let row = serde_json::json!({
                "subnet": "10.244.7.0/24", "public_ip": "10.9.0.7", "backend": "é".repeat(100_000),
                "state": state, "usable": usable,
                "received": {"packets": 1, "bytes": 2}, "sent": {"packets": 3, "bytes": 4},
            });
            serde_json::from_value::<Peer>(row).unwrap()
        };
        let peers = [
            row("alive", true),
            row("silent", true),
            row("not on the link 10.9.0.0/24", false),
            row("alive", true),
        ];
        let states = states(&peers);
        let expected = [("alive", 2), ("silent", 1), ("stopped", 0), ("unusable", 1)];
        let expected = expected.map(|(name, count)| (label("state", name), count_of(count)));
        assert_eq!(states, expected);
        let labels = about(&peers[0]);
        assert_eq!(labels[0], ("peer", "10.244.7.0/24".to_owned()));
        assert!(
            labels
                .iter()
                .all(|(_, value)| value.chars().count() <= MAX_FOREIGN)
        );
    }

    #[test]
    fn without_tables_all_families_are_there_and_have_no_samples() {
        let mut shares = Shares::new(1);
        let all = [
            data_path(None, None),
            packets(None),
            batches(None),
            pods(&mut shares, None),
            peers(&mut shares, None),
            host(None),
            egress(None),
            dns(None),
        ];
        let all: Vec<_> = all.into_iter().flatten().collect();
        assert!(all.len() > 25, "{}", all.len());
        assert!(all.iter().all(Family::is_empty), "{all:?}");
    }
}
