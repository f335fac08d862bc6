//! The tables: their columns, and rows of what the node reports.

use std::cmp::Ordering;

use muslin_stack::api::control::{Drop, Flow, Peer, Pod};

use crate::terminal::quantity::{bytes, duration, rate};
use crate::terminal::text::plain;

/// A table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Pods,
    Peers,
    Flows,
    Drops,
}

/// A column.
#[derive(Debug, Clone, Copy)]
pub(super) struct Column {
    pub(super) title: &'static str,
    /// How soon it is left out where there is no room; 0 is never.
    pub(super) optional: u8,
    /// Whether its cells are numbers, which are aligned at their ends.
    pub(super) is_number: bool,
}

const fn text(title: &'static str, optional: u8) -> Column {
    Column {
        title,
        optional,
        is_number: false,
    }
}

const fn number(title: &'static str, optional: u8) -> Column {
    Column {
        title,
        optional,
        is_number: true,
    }
}

const PODS: [Column; 9] = [
    text("POD", 0),
    text("ADDRESS", 1),
    number("FROM PKT/S", 0),
    number("FROM BIT/S", 0),
    number("TO PKT/S", 0),
    number("TO BIT/S", 0),
    number("FROM IT", 2),
    number("TO IT", 2),
    number("ATTACHED", 3),
];
const PEERS: [Column; 10] = [
    text("NODE", 0),
    text("SUBNET", 2),
    text("STATE", 1),
    number("FROM PKT/S", 0),
    number("FROM BIT/S", 0),
    number("TO PKT/S", 0),
    number("TO BIT/S", 0),
    number("FROM IT", 3),
    number("TO IT", 3),
    text("PATH", 4),
];
const FLOWS: [Column; 10] = [
    text("PROTOCOL", 2),
    text("POD", 0),
    text("LOCAL", 4),
    text("REMOTE", 0),
    text("STATE", 1),
    number("OUT BIT/S", 0),
    number("IN BIT/S", 0),
    number("OUT", 3),
    number("IN", 3),
    number("AGE", 5),
];
const DROPS: [Column; 5] = [
    text("▲", 0),
    text("REASON", 0),
    number("PKT/S", 0),
    number("PACKETS", 0),
    text("WHAT HAPPENED", 1),
];

impl Kind {
    pub(super) const ALL: [Self; 4] = [Self::Pods, Self::Peers, Self::Flows, Self::Drops];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Pods => "Pods",
            Self::Peers => "Peers",
            Self::Flows => "Flows",
            Self::Drops => "Drops",
        }
    }

    pub(super) const fn columns(self) -> &'static [Column] {
        match self {
            Self::Pods => &PODS,
            Self::Peers => &PEERS,
            Self::Flows => &FLOWS,
            Self::Drops => &DROPS,
        }
    }

    /// Why it may have no rows.
    pub(super) const fn why_none(self) -> &'static str {
        match self {
            Self::Pods => "no pod is attached to this node now",
            Self::Peers => "no other node has a lease yet",
            Self::Flows => "no pod speaks with the outside now",
            Self::Drops => "no packet was lost since the start",
        }
    }
}

/// A cell, and what it is sorted by.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Cell {
    pub(super) text: String,
    order: Option<f64>,
}

impl Cell {
    fn text(text: &str) -> Self {
        Self {
            text: plain(text).into_owned(),
            order: None,
        }
    }

    fn number(value: f64, text: String) -> Self {
        Self {
            text,
            order: Some(value),
        }
    }

    fn rate(value: Option<f64>) -> Self {
        let text = value.map_or_else(|| "-".to_owned(), rate);
        Self::number(value.unwrap_or(-1.0), text)
    }

    fn bytes(count: u64) -> Self {
        Self::number(count as f64, bytes(count))
    }

    fn seconds(seconds: u64) -> Self {
        Self::number(seconds as f64, duration(seconds))
    }

    /// Numbers from the highest to the lowest, texts from A to Z.
    fn compare(&self, other: &Self) -> Ordering {
        match (self.order, other.order) {
            (Some(own), Some(other)) => other.total_cmp(&own),
            _ => self.text.cmp(&other.text),
        }
    }
}

/// A row.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Row {
    pub(super) cells: Vec<Cell>,
    /// What moves now, and what has moved in all: by these it is sorted unless a column is chosen.
    traffic: (f64, u64),
    /// Whether it is to be seen at once.
    pub(super) is_loud: bool,
}

impl Row {
    pub(super) fn pod(pod: &Pod, rates: Option<[f64; 4]>) -> Self {
        let [from_packets, from_bits, to_packets, to_bits] = spread(rates);
        Self {
            cells: vec![
                Cell::text(pod.pod.as_str()),
                Cell::text(&pod.address.to_string()),
                Cell::rate(from_packets),
                Cell::rate(from_bits),
                Cell::rate(to_packets),
                Cell::rate(to_bits),
                Cell::bytes(pod.received.bytes),
                Cell::bytes(pod.sent.bytes),
                Cell::seconds(pod.attached_seconds),
            ],
            traffic: (
                from_bits.unwrap_or_default() + to_bits.unwrap_or_default(),
                pod.received.bytes.saturating_add(pod.sent.bytes),
            ),
            is_loud: false,
        }
    }

    pub(super) fn peer(peer: &Peer, rates: Option<[f64; 4]>) -> Self {
        let [from_packets, from_bits, to_packets, to_bits] = spread(rates);
        let public = peer.public_ip.to_string();
        let path = peer.path.as_ref().unwrap_or(&peer.backend);
        let mtu = peer
            .mtu
            .map_or_else(String::new, |mtu| format!(", MTU {mtu}"));
        Self {
            cells: vec![
                Cell::text(peer.node.as_ref().unwrap_or(&public)),
                Cell::text(&peer.subnet.to_string()),
                Cell::text(&peer.state),
                Cell::rate(from_packets),
                Cell::rate(from_bits),
                Cell::rate(to_packets),
                Cell::rate(to_bits),
                Cell::bytes(peer.received.bytes),
                Cell::bytes(peer.sent.bytes),
                Cell::text(&format!("{path}{mtu}")),
            ],
            traffic: (
                from_bits.unwrap_or_default() + to_bits.unwrap_or_default(),
                peer.received.bytes.saturating_add(peer.sent.bytes),
            ),
            is_loud: peer.state != "alive" && peer.state != "stopped",
        }
    }

    pub(super) fn flow(flow: &Flow, rates: Option<[f64; 2]>) -> Self {
        let [out, back] = spread(rates);
        let arrow = if flow.direction == "in" { "<-" } else { "->" };
        let remote = match flow.remote.port() {
            0 => flow.remote.ip().to_string(),
            _ => flow.remote.to_string(),
        };
        let pod = flow.pod.as_ref().map(|pod| pod.as_str());
        Self {
            cells: vec![
                Cell::text(&flow.protocol),
                Cell::text(pod.unwrap_or_default()),
                Cell::text(&flow.local.to_string()),
                Cell::text(&format!("{arrow} {remote}")),
                Cell::text(&flow.state),
                Cell::rate(out),
                Cell::rate(back),
                Cell::bytes(flow.sent_bytes),
                Cell::bytes(flow.received_bytes),
                Cell::seconds(flow.age_seconds),
            ],
            traffic: (
                out.unwrap_or_default() + back.unwrap_or_default(),
                flow.sent_bytes.saturating_add(flow.received_bytes),
            ),
            is_loud: false,
        }
    }

    pub(super) fn drop(drop: &Drop, rates: Option<[f64; 1]>) -> Self {
        let [lost] = spread(rates);
        let grows = lost.is_some_and(|lost| lost > 0.0);
        Self {
            cells: vec![
                Cell::text(if grows { "▲" } else { "" }),
                Cell::text(&drop.reason),
                Cell::rate(lost),
                Cell::number(drop.packets as f64, drop.packets.to_string()),
                Cell::text(&drop.description),
            ],
            traffic: (lost.unwrap_or_default(), drop.packets),
            is_loud: grows,
        }
    }

    /// Whether one of its cells has these letters, in either case.
    pub(super) fn has(&self, letters: &str) -> bool {
        let letters = letters.to_lowercase();
        let mut cells = self.cells.iter();
        cells.any(|cell| cell.text.to_lowercase().contains(&letters))
    }

    /// The order of two rows by a column, or by their traffic; then by their first texts.
    pub(super) fn compare(&self, other: &Self, column: Option<usize>) -> Ordering {
        let by = match column.and_then(|it| self.cells.get(it).zip(other.cells.get(it))) {
            Some((own, other)) => own.compare(other),
            None => {
                let [(now, all), (its_now, its_all)] = [self.traffic, other.traffic];
                its_now.total_cmp(&now).then(its_all.cmp(&all))
            }
        };
        by.then_with(|| {
            let texts = |row: &Self| {
                let texts = row.cells.iter().filter(|cell| cell.order.is_none());
                texts.map(|cell| cell.text.clone()).collect::<Vec<_>>()
            };
            texts(self).cmp(&texts(other))
        })
    }
}

fn spread<const N: usize>(rates: Option<[f64; N]>) -> [Option<f64>; N] {
    match rates {
        Some(rates) => rates.map(Some),
        None => [None; N],
    }
}
