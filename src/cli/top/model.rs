//! What is on the screen: what the node has told, as rates, and what was typed.

use std::time::Duration;

use muslin_stack::api::control::{Drop, Flow, Packets, Peer, Pod, Status};
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::meter::Meter;
use super::table::{Kind, Row};

/// What is counted of all packets: received, delivered, sent and dropped.
type Counted = [u64; 4];

/// What a node has told at one moment, but for its peers, which may take it longer.
#[derive(Debug)]
pub(super) struct Tables {
    pub(super) status: Status,
    pub(super) pods: Vec<Pod>,
    pub(super) flows: Vec<Flow>,
    pub(super) drops: Vec<Drop>,
}

/// What is told to the model.
#[derive(Debug)]
pub(super) enum News {
    Tables(Box<Tables>),
    Peers(Vec<Peer>),
    /// Why there is nothing new.
    Trouble(String),
}

/// How a table is shown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Shown {
    /// The column that it is sorted by; else by traffic.
    pub(super) sort: Option<usize>,
    pub(super) is_reversed: bool,
    /// The row that is marked.
    pub(super) marked: usize,
}

/// Everything that is shown.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) status: Status,
    pub(super) trouble: Option<String>,
    pods: Vec<Pod>,
    peers: Vec<Peer>,
    flows: Vec<Flow>,
    drops: Vec<Drop>,
    packet_rates: Meter<4>,
    pod_rates: Meter<4>,
    peer_rates: Meter<4>,
    flow_rates: Meter<2>,
    drop_rates: Meter<1>,
    /// The table that keys are for.
    pub(super) kind: Kind,
    shown: [Shown; Kind::ALL.len()],
    /// What rows must have in them.
    pub(super) filter: String,
    /// Whether it is being typed.
    pub(super) is_filtering: bool,
    pub(super) has_help: bool,
}

impl Model {
    /// What is shown first, at this moment.
    pub(super) fn new(at: Duration, tables: Tables) -> Self {
        let mut model = Self {
            status: tables.status.clone(),
            trouble: None,
            pods: Vec::new(),
            peers: Vec::new(),
            flows: Vec::new(),
            drops: Vec::new(),
            packet_rates: Meter::default(),
            pod_rates: Meter::default(),
            peer_rates: Meter::default(),
            flow_rates: Meter::default(),
            drop_rates: Meter::default(),
            kind: Kind::Pods,
            shown: Default::default(),
            filter: String::new(),
            is_filtering: false,
            has_help: false,
        };
        model.learn(at, News::Tables(Box::new(tables)));
        model
    }

    /// Takes what the node told at this moment.
    pub(super) fn learn(&mut self, at: Duration, news: News) {
        match news {
            News::Tables(tables) => {
                self.trouble = tables.status.trouble.clone();
                self.learn_tables(at, *tables);
            }
            News::Peers(peers) => {
                let counters = peers.iter().map(|peer| {
                    let (received, sent) = (peer.received, peer.sent);
                    let bits = [received, sent].map(|it| it.bytes.saturating_mul(8));
                    (
                        peer_key(peer),
                        [received.packets, bits[0], sent.packets, bits[1]],
                    )
                });
                self.peer_rates.read(at, counters);
                self.peers = peers;
            }
            News::Trouble(why) => self.trouble = Some(why),
        }
    }

    fn learn_tables(&mut self, at: Duration, tables: Tables) {
        let packets = counted(&tables.status.packets);
        // Another process counts from the start.
        let process = tables.status.pid.to_string();
        self.packet_rates.read(at, [(process, packets)]);
        let pods = tables.pods.iter().map(|pod| {
            let (received, sent) = (pod.received, pod.sent);
            let bits = [received, sent].map(|it| it.bytes.saturating_mul(8));
            (
                pod_key(pod),
                [received.packets, bits[0], sent.packets, bits[1]],
            )
        });
        self.pod_rates.read(at, pods);
        let flows = tables.flows.iter().map(|flow| {
            let bytes = [flow.sent_bytes, flow.received_bytes];
            (flow_key(flow), bytes.map(|it| it.saturating_mul(8)))
        });
        self.flow_rates.read(at, flows);
        let drops = tables.drops.iter();
        let drops = drops.map(|drop| (drop.reason.clone(), [drop.packets]));
        self.drop_rates.read(at, drops);
        let Tables {
            status,
            pods,
            flows,
            drops,
        } = tables;
        (self.status, self.pods) = (status, pods);
        (self.flows, self.drops) = (flows, drops);
    }

    /// Packets received, delivered, sent and dropped in a second.
    pub(super) fn packet_rates(&self) -> Option<[f64; 4]> {
        self.packet_rates.rates(&self.status.pid.to_string())
    }

    /// How a table is shown.
    pub(super) fn shown(&self, kind: Kind) -> Shown {
        self.shown[kind as usize]
    }

    fn shown_mut(&mut self) -> &mut Shown {
        &mut self.shown[self.kind as usize]
    }

    /// The rows of a table that have what they must have in them, in their order.
    pub(super) fn rows(&self, kind: Kind) -> Vec<Row> {
        let mut rows: Vec<_> = match kind {
            Kind::Pods => {
                let pods = self.pods.iter();
                pods.map(|pod| Row::pod(pod, self.pod_rates.rates(&pod_key(pod))))
                    .collect()
            }
            Kind::Peers => {
                let peers = self.peers.iter();
                peers
                    .map(|peer| Row::peer(peer, self.peer_rates.rates(&peer_key(peer))))
                    .collect()
            }
            Kind::Flows => {
                let flows = self.flows.iter();
                flows
                    .map(|flow| Row::flow(flow, self.flow_rates.rates(&flow_key(flow))))
                    .collect()
            }
            Kind::Drops => {
                let drops = self.drops.iter().filter(|drop| drop.packets > 0);
                drops
                    .map(|drop| Row::drop(drop, self.drop_rates.rates(&drop.reason)))
                    .collect()
            }
        };
        rows.retain(|row| row.has(&self.filter));
        let Shown {
            sort, is_reversed, ..
        } = self.shown(kind);
        rows.sort_by(|one, other| one.compare(other, sort));
        if is_reversed {
            rows.reverse();
        }
        rows
    }

    /// How many rows a table has without a filter.
    pub(super) fn count(&self, kind: Kind) -> usize {
        match kind {
            Kind::Pods => self.pods.len(),
            Kind::Peers => self.peers.len(),
            Kind::Flows => self.flows.len(),
            Kind::Drops => self.drops.iter().filter(|drop| drop.packets > 0).count(),
        }
    }

    /// Does what a key asks for; whether that is not the end.
    pub(super) fn press(&mut self, key: KeyEvent) -> bool {
        if key.kind == KeyEventKind::Release {
            return true;
        }
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return !matches!(key.code, KeyCode::Char('c' | 'd'));
        }
        if self.has_help {
            self.has_help = false;
        } else if self.is_filtering {
            self.type_filter(key.code);
        } else {
            return self.command(key.code);
        }
        true
    }

    fn type_filter(&mut self, key: KeyCode) {
        match key {
            KeyCode::Enter => self.is_filtering = false,
            KeyCode::Esc => {
                self.is_filtering = false;
                self.filter.clear();
            }
            KeyCode::Backspace => {
                self.filter.pop();
            }
            KeyCode::Char(letter) => self.filter.push(letter),
            _ => {}
        }
    }

    fn command(&mut self, key: KeyCode) -> bool {
        let last = self.rows(self.kind).len().saturating_sub(1);
        let columns = self.kind.columns().len();
        match key {
            // What is filtered is seen whole again first.
            KeyCode::Esc if !self.filter.is_empty() => self.filter.clear(),
            KeyCode::Char('q') | KeyCode::Esc => return false,
            KeyCode::Tab | KeyCode::Right => self.kind = neighbour(self.kind, 1),
            KeyCode::BackTab | KeyCode::Left => {
                self.kind = neighbour(self.kind, Kind::ALL.len() - 1);
            }
            KeyCode::Char('s') => {
                let shown = self.shown_mut();
                shown.sort = match shown.sort {
                    None => Some(0),
                    Some(column) => Some(column + 1).filter(|next| *next < columns),
                };
            }
            KeyCode::Char('r') => self.shown_mut().is_reversed ^= true,
            KeyCode::Char('/') => self.is_filtering = true,
            KeyCode::Char('?' | 'h') => self.has_help = true,
            _ => {
                let marked = &mut self.shown_mut().marked;
                let before = (*marked).min(last);
                *marked = match key {
                    KeyCode::Up => before.saturating_sub(1),
                    KeyCode::Down => (before + 1).min(last),
                    KeyCode::PageUp => before.saturating_sub(10),
                    KeyCode::PageDown => (before + 10).min(last),
                    KeyCode::Home => 0,
                    KeyCode::End => last,
                    _ => before,
                };
            }
        }
        true
    }
}

fn neighbour(kind: Kind, by: usize) -> Kind {
    Kind::ALL[(kind as usize + by) % Kind::ALL.len()]
}

const fn counted(packets: &Packets) -> Counted {
    [
        packets.received,
        packets.delivered,
        packets.sent,
        packets.dropped,
    ]
}

/// A pod that is attached again has another port.
fn pod_key(pod: &Pod) -> String {
    format!("{} {}", pod.pod, pod.port)
}

fn peer_key(peer: &Peer) -> String {
    format!("{} {}", peer.subnet, peer.public_ip)
}

fn flow_key(flow: &Flow) -> String {
    format!("{} {} {}", flow.protocol, flow.local, flow.remote)
}
