//! Probes: marked packets that are really sent, and what this node sees of them.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use muslin_stack::api::exchange;
use muslin_stack::api::live::{
    Call, MAX_COUNT, MAX_TOLD, MAX_WATCH_MS, Seen, Send, Sighting, Told, Watch,
};
use muslin_stack::api::trace;
use muslin_stack::datapath::capture::{self, Batch, Hook, Record, Wanted};
use muslin_stack::datapath::node::Verdict;
use muslin_stack::datapath::observe::Source;
use muslin_stack::datapath::trace::Mark;
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use super::capture::{VerdictWords, epoch, place};
use super::running::RunningNode;
use crate::error::{Error, Result};

/// Bytes of a packet in which its mark ends, with all headers before it.
const HEAD: usize = 256;
/// What is kept of one number at most.
const MAX_SIGHTINGS: usize = 8 * MAX_COUNT as usize;

/// Probes that are watched for, by their numbers.
#[derive(Default)]
pub(super) struct Watched(Mutex<HashMap<u64, Sightings>>);

struct Sightings {
    /// Who sends the probes.
    source: IpAddr,
    all: Vec<Sighting>,
    missed: u64,
    /// It is watched until this goes.
    _watches: oneshot::Sender<()>,
}

/// Answers a client.
///
/// # Errors
/// Why it cannot be done.
pub(super) async fn call(running: &Arc<RunningNode>, call: Call) -> Result<Told> {
    match call {
        Call::Elsewhere { public_ip, call } => {
            let ask = exchange::Ask::Live(*call);
            match running.exchange.ask(running, public_ip, ask).await? {
                exchange::Told::Live(told) => Ok(told),
                told => Err(super::exchange::unexpected(told)),
            }
        }
        call => answer(running, call).await,
    }
}

/// Answers what is asked of this node itself.
///
/// # Errors
/// Why it cannot be done.
pub(super) async fn answer(running: &Arc<RunningNode>, call: Call) -> Result<Told> {
    match call {
        Call::Watch(watch) => begin(running, watch).await.map(|()| Told::Done),
        Call::Send(Send {
            id,
            sequence,
            packet,
        }) => {
            let mark = Mark { id, sequence };
            let (port, frame) = super::trace::marked(running, &packet, mark).await?;
            running.workers.inject(port, frame).map_err(Error::failed)?;
            Ok(Told::Done)
        }
        Call::End { id } => {
            running.watched.0.lock().remove(&id);
            Ok(Told::Done)
        }
        Call::Seen { id, from } => seen(running, id, from).map(Told::Seen),
        _ => Err(Error::usage("this node is too old to do that")),
    }
}

fn seen(running: &RunningNode, id: u64, from: usize) -> Result<Seen> {
    let all = running.watched.0.lock();
    let seen = all.get(&id);
    let seen = seen.ok_or_else(|| Error::usage("the node does not watch for these probes"))?;
    let sightings = seen.all.iter().skip(from).take(MAX_TOLD);
    Ok(Seen {
        node: running.facts.settings.name.clone(),
        sightings: sightings.cloned().collect(),
        missed: seen.missed,
    })
}

/// Watches from when this returns.
async fn begin(running: &Arc<RunningNode>, watch: Watch) -> Result<()> {
    let Watch {
        id,
        source,
        destination,
        for_ms,
    } = watch;
    if for_ms > MAX_WATCH_MS {
        return Err(Error::usage(format!(
            "probes are watched for at most {MAX_WATCH_MS} ms"
        )));
    }
    if running.watched.0.lock().contains_key(&id) {
        // The question was asked again.
        return Ok(());
    }
    let place = place(running)?;
    let icmp = if source.is_ipv4() { "icmp" } else { "icmp6" };
    let filter = format!("host {source} and (host {destination} or {icmp})");
    let wanted = Wanted {
        hooks: Hook::ALL.to_vec(),
        dropped: true,
        port: None,
        peer: None,
        filter: filter.parse().map_err(Error::usage)?,
        snap_len: HEAD,
        format: running.plan().tunnel.format(),
    };
    let (watches, ended) = oneshot::channel();
    running.watched.0.lock().insert(
        id,
        Sightings {
            source,
            all: Vec::new(),
            missed: 0,
            _watches: watches,
        },
    );
    let (begun, ready) = oneshot::channel();
    let running = running.clone();
    tokio::spawn(async move {
        let time = Duration::from_millis(for_ms);
        if let Ok(mut capturing) = running.workers.capture(&wanted) {
            // Whoever asked may have gone.
            let _ = begun.send(());
            let watching = async {
                while let Some((worker, batch)) = capturing.next().await {
                    running.note(id, &batch);
                    capturing.give_back(worker, batch);
                }
                sleep(time).await;
            };
            tokio::select! {
                _ = timeout(time, watching) => {}
                _ = ended => {}
            }
        }
        running.watched.0.lock().remove(&id);
        drop(place);
    });
    ready
        .await
        .map_err(|_| Error::failed("the data path has ended"))
}

impl RunningNode {
    fn note(&self, id: u64, batch: &Batch) {
        let (epoch, format) = (epoch(self), self.plan().tunnel.format());
        let mut all = self.watched.0.lock();
        let Some(seen) = all.get_mut(&id) else {
            return;
        };
        seen.missed += batch.lost();
        let mut words = VerdictWords::new(self);
        for (record, bytes) in batch.iter() {
            seen.missed += record.lost;
            if let Some(sequence) = Mark::find(id, bytes)
                && is_first_look(record)
                && seen.all.len() < MAX_SIGHTINGS
            {
                let addresses = capture::addresses(record.hook, format, bytes);
                let is_answer = addresses.is_some_and(|(_, to)| to == seen.source);
                let sighting = sighting(epoch, sequence, record, &mut words);
                seen.all.push(Sighting {
                    is_answer,
                    ..sighting
                });
            }
        }
    }
}

fn sighting(epoch: u64, sequence: u32, record: &Record, words: &mut VerdictWords<'_>) -> Sighting {
    let reason = match record.verdict {
        Verdict::Drop(reason) => Some(reason.name().to_owned()),
        _ => None,
    };
    let at = u64::try_from(record.at.total_micros()).unwrap_or_default();
    Sighting {
        sequence,
        at_us: epoch + at,
        hook: record.hook.name().to_owned(),
        is_answer: false,
        verdict: verdict(record.verdict),
        reason,
        text: words.verdict(record.verdict),
    }
}

/// A packet is seen where it comes in and where it leaves, with the same verdict. What the node sends
/// itself, as after a packet waited, only leaves.
fn is_first_look(record: &Record) -> bool {
    let comes_in = matches!(
        record.hook,
        Hook::FromPod | Hook::FromTunnel | Hook::FromUplink | Hook::FromHost | Hook::FromEgress
    );
    comes_in || record.source == Source::Node || matches!(record.verdict, Verdict::Drop(_))
}

fn verdict(verdict: Verdict) -> trace::Verdict {
    match verdict {
        Verdict::Port(_) | Verdict::Host => trace::Verdict::Delivered,
        Verdict::Flood { .. } => trace::Verdict::Flooded,
        Verdict::Peer { .. } | Verdict::Uplink { .. } => trace::Verdict::Sent,
        Verdict::Egress => trace::Verdict::Egress,
        Verdict::Consumed => trace::Verdict::Consumed,
        Verdict::Drop(_) => trace::Verdict::Dropped,
    }
}
