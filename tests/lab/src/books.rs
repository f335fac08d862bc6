//! A node's books: with all its pods gone it holds what it held at its start, and every packet is
//! accounted for.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use muslin_stack::drops::DropReason;
use serde_json::Value;

/// Where etcd listens. A connection to a store may be another one at any time, or several.
const STORE_PORT: u16 = 2379;

/// Losses that nothing a test does asks for: the node itself is at fault.
const FAULTS: [DropReason; 7] = [
    DropReason::UnknownPort,
    DropReason::VirtioHeader,
    DropReason::OutputQueueFull,
    DropReason::HeadroomExceeded,
    DropReason::SuperpacketRefused,
    DropReason::PortFailed,
    DropReason::EgressHandoverFull,
];

/// What a node holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Books {
    pid: u64,
    /// Open descriptors by what they are of.
    descriptors: BTreeMap<String, usize>,
}

impl Books {
    /// What a node holds now that reports this status.
    pub(crate) fn open(status: &Value) -> Option<Self> {
        let pid = status["pid"].as_u64()?;
        Some(Self {
            pid,
            descriptors: descriptors(pid, status["store"].as_str().unwrap_or_default())?,
        })
    }

    /// Compares with what it holds now, without pods.
    ///
    /// # Errors
    /// What there is too much, or what does not add up.
    pub(crate) fn close(&self, status: &Value, drops: &Value) -> Result<(), String> {
        for (what, count) in [
            ("pods", &status["pods"]),
            ("published ports", &status["published"]["ports"]),
            ("flows", &status["egress"]["open"]),
        ] {
            if count.as_u64().unwrap_or_default() > 0 {
                return Err(format!("{count} {what} are left"));
            }
        }
        let now = Self::open(status).ok_or("it cannot be looked at")?;
        // Another process counts anew.
        if now.pid == self.pid {
            for (kind, count) in &now.descriptors {
                let before = self.descriptors.get(kind).copied().unwrap_or_default();
                if *count > before {
                    let kinds = (&self.descriptors, &now.descriptors);
                    return Err(format!("descriptors of {kind} are left: {kinds:?}"));
                }
            }
        }
        let rows = drops.as_array().into_iter().flatten();
        let mut lost = rows.filter(|row| row["packets"].as_u64() > Some(0));
        let is_fault = |row: &&Value| FAULTS.iter().any(|fault| row["reason"] == fault.name());
        if let Some(row) = lost.find(is_fault) {
            return Err(format!("packets are lost that should not be: {row}"));
        }
        every_packet_ends_in_one_way(status, drops)
    }
}

/// What a process has open, by kind; nothing if it may not be looked at. The files of its store do
/// not count: SQLite keeps some of them for its next connection.
fn descriptors(pid: u64, store: &str) -> Option<BTreeMap<String, usize>> {
    let to_store = connections_to_store(pid);
    let is_store = |path: &str| {
        store
            .split_once(':')
            .is_some_and(|(_, it)| path.starts_with(it))
    };
    let mut kinds = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).ok()? {
        // It may be closed by now.
        let Ok(target) = fs::read_link(entry.ok()?.path()) else {
            continue;
        };
        let target = target.to_string_lossy();
        if to_store.contains(&*target) || is_store(&target) {
            continue;
        }
        let kind = match target.split_once(":[") {
            Some((kind @ ("socket" | "pipe"), _)) => kind.to_owned(),
            _ => target.into_owned(),
        };
        *kinds.entry(kind).or_default() += 1;
    }
    Some(kinds)
}

/// Its host's TCP sockets that lead to etcd, as links in `/proc/PID/fd` have them.
fn connections_to_store(pid: u64) -> BTreeSet<String> {
    let table = fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap_or_default();
    let port = format!(":{STORE_PORT:04X}");
    let rows = table.lines().map(|row| row.split_whitespace());
    rows.filter_map(|mut words| {
        let remote = words.nth(2)?;
        let inode = words.nth(6)?;
        remote.ends_with(&port).then(|| format!("socket:[{inode}]"))
    })
    .collect()
}

/// The law of `muslin_stack::drops`, over all workers. What is lost outside of the node had its
/// verdict before.
pub(crate) fn every_packet_ends_in_one_way(status: &Value, drops: &Value) -> Result<(), String> {
    let packets = |key: &str| status["packets"][key].as_u64().unwrap_or_default();
    let is_io = |row: &&Value| {
        let mut all = DropReason::ALL.iter();
        all.any(|reason| reason.is_io() && row["reason"] == reason.name())
    };
    let rows = drops.as_array().into_iter().flatten().filter(is_io);
    let late: u64 = rows.filter_map(|row| row["packets"].as_u64()).sum();
    let ways = ["delivered", "sent", "flooded", "consumed", "dropped"];
    let ended = ways.map(packets).iter().sum::<u64>();
    if packets("received") + packets("originated") + late == ended {
        Ok(())
    } else {
        Err(format!(
            "not every packet ends in one way, with {late} lost outside: {}",
            status["packets"]
        ))
    }
}
