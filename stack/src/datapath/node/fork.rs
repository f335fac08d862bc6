//! A copy of a node for a look ahead: what it does to packets nobody notices.

use std::sync::Arc;

use muslin_encap::buffer::HEADROOM;

use super::ledger::Ledger;
use super::{Node, Output};
use crate::datapath::filter::Filter;
use crate::datapath::frame;
use crate::datapath::gateway::Gateway;
use crate::datapath::observe::Observer;

impl<O: Observer, F: Filter + Clone> Node<O, F> {
    /// A copy of the node as it is, with an observer of its own, and without the packets that it has
    /// yet to send. It shares nothing with this one.
    pub(in crate::datapath) fn fork<P: Observer>(&self, observer: P) -> Node<P, F> {
        let mut ports = self.ports.clone();
        for port in ports.values_mut() {
            port.attachment.rates = port.attachment.rates.fork();
        }
        let mut host = self.host.clone();
        if let Some(host) = &mut host {
            host.interface.flows = Arc::new(host.interface.flows.fork());
        }
        Node {
            config: self.config.clone(),
            home: self.home,
            home_v6: self.home_v6,
            seed: self.seed,
            ports,
            unguarded: self.unguarded,
            limited: self.limited,
            now: self.now,
            awaited: self.awaited.clone(),
            peers: self.peers.clone(),
            routes: self.routes.clone(),
            fdb: self.fdb.clone(),
            neighbours: self.neighbours.clone(),
            link_locals: self.link_locals.clone(),
            // It knows nothing that it was not made with.
            own: self.own,
            gateway: Gateway::new(
                self.config.subnet,
                self.config.gateway_mac,
                self.seed.0,
                self.now,
            ),
            errors: self.errors.clone(),
            ledger: Ledger::new(observer),
            output: Output::default(),
            filter: self.filter.clone(),
            uplink: self.uplink.clone(),
            host,
            exchange: self.exchange.clone(),
            groups: self.groups.clone(),
            claimed: self.claimed,
            egress: self.egress,
            egress_v6: self.egress_v6,
            scratch: vec![0; HEADROOM + frame::MAX_LEN],
            answers: Vec::new(),
            ident: self.ident,
            next_ageing: self.next_ageing,
        }
    }
}
