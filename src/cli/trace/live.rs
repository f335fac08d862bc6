//! `muslin trace --live`: packets that are really sent, and where they went.

use std::time::Duration;

use muslin_stack::api::live::{
    Call, LiveReport, MAX_TOLD, NodeReport, Send, Sighting, Told, Watch,
};
use muslin_stack::api::trace::{Beginning, Elsewhere, Journey, Protocol, Verdict};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use super::{Arguments, asked, sockets};
use crate::error::{Error, Result};
use crate::page::journey::{self, Stop};
use crate::process::block_on;
use crate::random::random;
use crate::terminal::output::{Table, print, print_json};
use crate::terminal::quantity::count;
use crate::terminal::text::plain;

/// Time between two probes.
const INTERVAL: Duration = Duration::from_millis(200);
/// How long the last one is waited for.
const PATIENCE: Duration = Duration::from_secs(1);
/// When it is looked again what nodes have seen.
const LOOK: Duration = Duration::from_millis(50);

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    if let "host" | "outside" = arguments.from.as_str() {
        return Err(Error::usage(format!(
            "--live sends as a pod, and not as '{}'",
            arguments.from
        )));
    }
    let (report, remote) = block_on(probe(arguments))?;
    if arguments.json {
        print_json(&report)?;
    } else {
        print(&text(&report, &remote))?;
    }
    match report.arrived == report.sent {
        true => Ok(()),
        false => Err(Error::Command(1)),
    }
}

/// What became of the probes, and which of the nodes have clocks of their own.
async fn probe(arguments: &Arguments) -> Result<(LiveReport, Vec<bool>)> {
    let nodes = journey::reach(&sockets(arguments)?).await?;
    let beginning = arguments.beginning();
    let way = journey::stops(&nodes, asked(arguments, &nodes), &beginning).await?;
    let (Journey { parts, unknown }, stops) = way;
    let (Some(first), Some(sender)) = (parts.first(), stops.first()) else {
        return Err(Error::failed("no node has told its part"));
    };
    let packet = first.packet.clone();
    let id = u64::from_ne_bytes(random()?);
    // Nodes may take their time for each.
    let time = 2 * INTERVAL * arguments.count + Duration::from_secs(10);
    let watch = Watch {
        id,
        source: packet.source,
        destination: packet.destination,
        for_ms: time.as_millis() as u64,
    };
    let mut reports = Vec::new();
    for (stop, part) in stops.iter().zip(&parts) {
        let told = stop.live(Call::Watch(watch)).await;
        // Without the first nothing is known.
        if reports.is_empty() {
            told?;
            reports.push(NodeReport::new(&part.node, None));
        } else {
            let why = told.err().map(|error| error.to_string());
            reports.push(NodeReport::new(&part.node, why));
        }
    }
    let sent = send(sender, id, arguments.count, &beginning).await;
    if sent.is_ok() {
        let deadline = Instant::now() + PATIENCE;
        loop {
            look(id, &stops, &mut reports).await;
            let has_ended = |sequence| has_ended(&reports, beginning.protocol, sequence);
            if (1..=arguments.count).all(has_ended) || Instant::now() >= deadline {
                break;
            }
            sleep(LOOK).await;
        }
    }
    for (stop, report) in stops.iter().zip(&reports) {
        if report.silent.is_none() {
            // It ends by itself after a while.
            let _ = stop.live(Call::End { id }).await;
        }
    }
    sent?;
    let mut remote: Vec<_> = stops.iter().map(|stop| stop.elsewhere.is_some()).collect();
    if let Some(Elsewhere {
        public_ip,
        node,
        why,
    }) = unknown
    {
        let node = node.unwrap_or_else(|| public_ip.to_string());
        reports.push(NodeReport::new(&node, Some(why)));
        remote.push(true);
    }
    let all = || 1..=arguments.count;
    let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let report = LiveReport {
        packet,
        sent: arguments.count,
        arrived: number(all().filter(|it| has_arrived(&reports, *it)).count()),
        answered: number(all().filter(|it| is_answered(&reports, *it)).count()),
        nodes: reports,
    };
    Ok((report, remote))
}

/// Sends the probes, one after the other.
async fn send(sender: &Stop<'_>, id: u64, count: u32, packet: &Beginning) -> Result<()> {
    let mut times = interval(INTERVAL);
    times.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for sequence in 1..=count {
        times.tick().await;
        let send = Send {
            id,
            sequence,
            packet: packet.clone(),
        };
        sender.live(Call::Send(send)).await?;
    }
    Ok(())
}

/// Takes what the nodes have seen until now.
async fn look(id: u64, stops: &[Stop<'_>], reports: &mut [NodeReport]) {
    for (stop, report) in stops.iter().zip(reports) {
        if report.silent.is_some() {
            continue;
        }
        if let Err(error) = look_at(id, stop, report).await {
            report.silent = Some(error.to_string());
        }
        // Its workers tell of what they saw one after the other.
        report.sightings.sort_by_key(|it| it.at_us);
    }
}

/// Takes what a node has seen since it was asked last.
async fn look_at(id: u64, stop: &Stop<'_>, report: &mut NodeReport) -> Result<()> {
    loop {
        let from = report.sightings.len();
        let Told::Seen(seen) = stop.live(Call::Seen { id, from }).await? else {
            return Err(Error::failed("it answers something else"));
        };
        let is_all = seen.sightings.len() < MAX_TOLD;
        report.missed = seen.missed;
        report.sightings.extend(seen.sightings);
        if is_all {
            return Ok(());
        }
    }
}

/// What was seen of one probe, in the order of the nodes.
fn of(reports: &[NodeReport], sequence: u32) -> impl Iterator<Item = &Sighting> {
    let all = reports.iter().flat_map(|report| &report.sightings);
    all.filter(move |it| it.sequence == sequence)
}

/// Whether there was an answer, which is at the sender or lost.
fn has_ended(reports: &[NodeReport], protocol: Protocol, sequence: u32) -> bool {
    let is_lost = of(reports, sequence).any(|it| it.verdict == Verdict::Dropped);
    let has_arrived = protocol != Protocol::Icmp && has_arrived(reports, sequence);
    is_lost || has_arrived || is_answered(reports, sequence)
}

/// Whether the sender got an answer.
fn is_answered(reports: &[NodeReport], sequence: u32) -> bool {
    let is_lost = of(reports, sequence).any(|it| !it.is_answer && it.verdict == Verdict::Dropped);
    let sender = reports.get(..1).unwrap_or_default();
    let back = |it: &Sighting| it.is_answer && it.verdict == Verdict::Delivered;
    // An ICMP error about a packet that is lost is no answer.
    !is_lost && of(sender, sequence).any(back)
}

/// Whether it got to where it was to go.
fn has_arrived(reports: &[NodeReport], sequence: u32) -> bool {
    let is_there = |it: &Sighting| {
        let ends = matches!(
            it.verdict,
            Verdict::Delivered | Verdict::Flooded | Verdict::Egress
        );
        ends && !it.is_answer
    };
    let is_lost = of(reports, sequence).any(|it| !it.is_answer && it.verdict == Verdict::Dropped);
    !is_lost && of(reports, sequence).any(is_there) || is_answered(reports, sequence)
}

/// A time at a node, from when the probe was seen first, in microseconds.
enum At {
    Known(i64),
    /// By another clock, which is set so that the way there takes as long as the way back.
    Guessed(i64),
    /// By another clock, of which nothing is known: since that node saw it first.
    Own(i64),
}

impl At {
    fn text(&self) -> String {
        let (sign, micros) = match self {
            Self::Known(micros) => ("", micros),
            Self::Guessed(micros) => ("~", micros),
            Self::Own(micros) => ("+", micros),
        };
        format!("{sign}{:.3} ms", *micros as f64 / 1000.0)
    }
}

/// When a node saw a probe.
fn at(reports: &[NodeReport], node: usize, is_remote: bool, seen: &Sighting) -> At {
    let sequence = seen.sequence;
    let one = |number: usize| reports.get(number..=number).unwrap_or_default();
    let time = |it: &Sighting| i64::try_from(it.at_us).unwrap_or(i64::MAX);
    let first = |number| of(one(number), sequence).next().map(time);
    let answer = |number| {
        let mut all = of(one(number), sequence);
        all.find(|it| it.is_answer).map(time)
    };
    let begun = first(0).unwrap_or_default();
    if !is_remote {
        return At::Known(time(seen).saturating_sub(begun));
    }
    match (answer(0), first(node), answer(node)) {
        (Some(back), Some(there), Some(away)) => {
            let shift = (begun.saturating_add(back) - there.saturating_add(away)) / 2;
            At::Guessed(time(seen) + shift - begun)
        }
        (_, there, _) => At::Own(time(seen).saturating_sub(there.unwrap_or_default())),
    }
}

fn text(report: &LiveReport, remote: &[bool]) -> String {
    let packet = &report.packet;
    let mut text = format!(
        "{} to {}: {}, {} sent\n\n",
        packet.source,
        packet.destination,
        plain(&packet.text),
        count(report.sent.into(), "time")
    );
    let mut table = Table::new(&["PROBE", "NODE", "SEEN", "TIME", "THEN"]);
    for sequence in 1..=report.sent {
        for (index, (node, is_remote)) in report.nodes.iter().zip(remote).enumerate() {
            let own = std::slice::from_ref(node);
            for seen in of(own, sequence) {
                let back = if seen.is_answer { "answer " } else { "" };
                let then = match seen.text.strip_prefix("dropped: ") {
                    Some(why) if seen.reason.is_some() => format!("LOST, {why}"),
                    _ => seen.text.clone(),
                };
                table.add_row(vec![
                    sequence.to_string(),
                    node.node.clone(),
                    format!("{back}{}", seen.hook),
                    at(&report.nodes, index, *is_remote, seen).text(),
                    then,
                ]);
            }
        }
    }
    text.push_str(&table.text());
    for node in &report.nodes {
        let name = plain(&node.node);
        if let Some(why) = &node.silent {
            let why = plain(why);
            text.push_str(&format!("\nnode {name} tells nothing: {why}\n"));
        }
        if node.missed > 0 {
            let missed = count(node.missed, "packet");
            text.push_str(&format!("\nnode {name} could not look at {missed}\n"));
        }
    }
    text.push_str(&format!(
        "\n{} sent, {} arrived, {} answered\n",
        count(report.sent.into(), "probe"),
        report.arrived,
        report.answered
    ));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(at_us: u64, is_answer: bool, verdict: Verdict) -> Sighting {
        Sighting {
            sequence: 1,
            at_us,
            hook: "from-pod".to_owned(),
            is_answer,
            verdict,
            reason: None,
            text: String::new(),
        }
    }

    fn node(sightings: &[Sighting]) -> NodeReport {
        NodeReport {
            sightings: sightings.to_vec(),
            ..NodeReport::new("n", None)
        }
    }

    #[test]
    fn a_clock_is_set_by_halves_of_the_round_trip() {
        let here = [
            seen(1000, false, Verdict::Sent),
            seen(1500, true, Verdict::Delivered),
        ];
        let there = [
            seen(90_000, false, Verdict::Delivered),
            seen(90_100, true, Verdict::Sent),
        ];
        let both = [node(&here), node(&there)];
        let text =
            |reports: &[NodeReport], number, remote, seen| at(reports, number, remote, seen).text();
        assert_eq!(text(&both, 0, false, &here[1]), "0.500 ms");
        assert_eq!(text(&both, 1, true, &there[0]), "~0.200 ms");
        assert_eq!(text(&both, 1, true, &there[1]), "~0.300 ms");
        // Without an answer nothing is known of the clock.
        let both = [node(&here[..1]), node(&there[..1])];
        assert_eq!(text(&both, 1, true, &there[0]), "+0.000 ms");
    }

    #[test]
    fn an_error_about_a_lost_probe_is_no_answer() {
        let error = [
            seen(1, false, Verdict::Sent),
            seen(9, true, Verdict::Delivered),
        ];
        let lost = [seen(5, false, Verdict::Dropped)];
        let both = [node(&error), node(&lost)];
        assert!(!is_answered(&both, 1) && !has_arrived(&both, 1));
        assert!(has_ended(&both, Protocol::Icmp, 1));
        let there = [seen(5, false, Verdict::Delivered)];
        let both = [node(&error), node(&there)];
        assert!(is_answered(&both, 1) && has_arrived(&both, 1));
        let both = [node(&error[..1]), node(&there)];
        assert!(!is_answered(&both, 1) && has_arrived(&both, 1));
        assert!(has_ended(&both, Protocol::Udp, 1) && !has_ended(&both, Protocol::Icmp, 1));
        assert!(!has_ended(&both, Protocol::Udp, 2));
    }
}
