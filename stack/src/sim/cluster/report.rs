//! A cluster's tables, for those who look for a cause.

use std::fmt::Write;

use super::Cluster;
use crate::control::lease::lease_prefix;
use crate::datapath::node::NextHop;
use crate::sim::constants::PREFIX;

impl Cluster {
    /// Leases, peers, routes and drops of all nodes, and what the store has.
    pub(in crate::sim) fn tables(&self) -> String {
        let mut text = String::new();
        let _ = writeln!(text, "store, revision {}:", self.store.revision());
        for (entry, writer) in self.store.entries(self.queue.now(), &lease_prefix(PREFIX)) {
            let writer = writer.map_or("others".to_owned(), |machine| format!("machine {machine}"));
            let ttl = match entry.ttl {
                Some(ttl) => format!("{} s", ttl.as_secs()),
                None => "for ever".to_owned(),
            };
            let _ = writeln!(
                text,
                "  {} = {} (revision {}, by {writer}, {ttl})",
                entry.key, entry.value, entry.revision
            );
        }
        for number in 0..self.machines.len() {
            self.tables_of(number, &mut text);
        }
        text
    }

    fn tables_of(&self, number: usize, text: &mut String) {
        let machine = &self.machines[number];
        let _ = write!(text, "machine {number} at {}: ", machine.public_ip);
        let Some(process) = &machine.process else {
            let _ = writeln!(text, "no node runs");
            return;
        };
        let Some(running) = &process.running else {
            let _ = writeln!(text, "no lease; {:?}", process.agent.doing);
            return;
        };
        let _ = writeln!(text, "lease {}; {:?}", running.key, process.agent.doing);
        for plugged in running.ports.values() {
            let _ = writeln!(text, "  pod {} at {}", plugged.name, plugged.address);
        }
        let mut routes: Vec<_> = running.node().routes().collect();
        routes.sort_by_key(|(prefix, _)| *prefix);
        for (prefix, hop) in routes {
            let via = match hop {
                NextHop::Local => "its pods".to_owned(),
                NextHop::Peer(id) => {
                    let mut peers = running.node().peers();
                    let peer = peers.find(|state| state.peer.id == *id);
                    peer.map_or("nobody".to_owned(), |state| state.peer.address.to_string())
                }
            };
            let _ = writeln!(text, "  route {prefix} via {via}");
        }
        running.describe_flows(text);
        let nodes = running.workers.iter().map(|worker| worker.path.node());
        for (reason, count) in nodes
            .flat_map(|node| node.counters().drops())
            .filter(|(_, count)| *count > 0)
        {
            let _ = writeln!(text, "  dropped {count}: {}", reason.describe());
        }
    }
}
