//! What a node writes down of attachments until the next boot, and the deletions that plugins have left
//! for it: files beside its control socket.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use muslin_stack::addresses::Addresses;
use muslin_stack::api::cni::{Key, Reserve, deletion};
use muslin_stack::api::published::PortMapping;
use muslin_stack::control::ipam::PodName;
use serde::{Deserialize, Serialize};
use tracing::{debug, warn};

use crate::replace::{self, place};
use crate::state::read_regular;

/// The directory of records, beside the control socket.
const DIRECTORY: &str = "attachments";
/// What differs from boot to boot (random(4)).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// An attachment, as a later process of the node is to know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// The boot that it belongs to: with its end all namespaces are gone.
    boot: String,
    /// What was asked for.
    pub(super) reserve: Reserve,
    /// The pod.
    pub(super) pod: PodName,
    /// Its addresses.
    pub(super) address: Addresses,
    /// The MAC address of its interface.
    pub(super) mac: String,
    /// Ports of the machine that lead to it.
    pub(super) published: Vec<PortMapping>,
    /// Whether the node can see its namespace.
    pub(super) is_visible: bool,
}

/// The files.
#[derive(Debug)]
pub(super) struct Records {
    records: PathBuf,
    deletions: PathBuf,
    boot: String,
}

/// The directories of a node with this control socket.
pub(crate) fn directories(socket: &Path) -> [PathBuf; 2] {
    [DIRECTORY, deletion::DIRECTORY].map(|name| replace::directory(socket).join(name))
}

impl Records {
    /// Those of the node with this control socket. Who cannot make the directories does without, until
    /// an attachment is to be written.
    pub(super) fn open(socket: &Path) -> Self {
        let [records, deletions] = directories(socket);
        for directory in [&records, &deletions] {
            let made = DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(directory);
            if let Err(error) = made {
                debug!("{}: {error}", directory.display());
            }
        }
        let boot = fs::read_to_string(BOOT_ID).unwrap_or_default();
        Self {
            records,
            deletions,
            boot: boot.trim().to_owned(),
        }
    }

    /// A record of this boot.
    pub(super) fn record(
        &self,
        reserve: Reserve,
        pod: PodName,
        address: Addresses,
        mac: String,
        published: Vec<PortMapping>,
        is_visible: bool,
    ) -> Record {
        Record {
            boot: self.boot.clone(),
            reserve,
            pod,
            address,
            mac,
            published,
            is_visible,
        }
    }

    /// Writes a record down, which is there or not after a crash, but never half.
    pub(super) fn write(&self, record: &Record) -> io::Result<()> {
        let text = serde_json::to_vec(record)?;
        place(&self.path(&record.reserve.key), &text, 0o600)
    }

    /// Removes a record, if there is one.
    pub(super) fn remove(&self, key: &Key) {
        let path = self.path(key);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                warn!("cannot remove {}: {error}", path.display());
            }
            _ => {}
        }
    }

    /// The records of this boot. Others, and those that cannot be read, are removed.
    pub(super) fn all(&self) -> Vec<Record> {
        let mut all = Vec::new();
        for path in files(&self.records) {
            let record =
                read_regular(&path).and_then(|bytes| Ok(serde_json::from_slice::<Record>(&bytes)?));
            match record {
                Ok(record) if record.boot == self.boot => all.push(record),
                Ok(_) => remove(&path),
                Err(error) => {
                    warn!("{} is not used: {error}", path.display());
                    remove(&path);
                }
            }
        }
        all
    }

    /// The attachments whose end was called for while no node was there, each with its file.
    pub(super) fn deletions(&self) -> Vec<(Option<Key>, PathBuf)> {
        let files = files(&self.deletions).into_iter();
        let all = files.filter_map(|path| match read_regular(&path) {
            Ok(bytes) => Some((deletion::read(&bytes), path)),
            Err(error) => {
                warn!("cannot read {}: {error}", path.display());
                None
            }
        });
        all.collect()
    }

    /// Forgets that the end of an attachment was called for; says whether it was.
    pub(super) fn take_deletion(&self, key: &Key) -> bool {
        fs::remove_file(self.deletions.join(deletion::file_name(key))).is_ok()
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.records.join(deletion::file_name(key))
    }
}

/// Removes a file, if it is there.
pub(super) fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path) {
        debug!("cannot remove {}: {error}", path.display());
    }
}

/// The finished files of a directory.
fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    paths
        .filter(|path| path.extension().is_some_and(|it| it == "json"))
        .collect()
}

#[cfg(test)]
mod tests {
    use muslin_stack::api::cni::NetworkNamespace;

    use super::*;

    fn key(container: &str) -> Key {
        Key::new("muslin", container, "eth0")
    }

    fn record(records: &Records, container: &str) -> Record {
        let netns = NetworkNamespace {
            path: "/run/netns/a".to_owned(),
            device: 4,
            inode: 5,
        };
        let reserve = Reserve::new(key(container), netns);
        let pod = "a".parse().unwrap();
        let address = "10.244.1.2".parse().unwrap();
        records.record(
            reserve,
            pod,
            address,
            "0a:58:0a:f4:01:02".into(),
            vec![],
            true,
        )
    }

    #[test]
    fn records_last_until_they_are_removed_or_the_machine_boots() {
        let directory = tempfile::tempdir().unwrap();
        let mut records = Records::open(&directory.path().join("control.sock"));
        let [a, b] = ["a", "b"].map(|container| record(&records, container));
        records.write(&a).unwrap();
        records.write(&b).unwrap();
        fs::write(records.records.join("damaged.json"), "{\"boot\":").unwrap();
        fs::write(records.records.join(".tmpX"), "{").unwrap();
        let mut all = records.all();
        all.sort_by(|one, other| one.reserve.key.cmp(&other.reserve.key));
        assert_eq!(all, [a, b.clone()]);
        assert!(!records.records.join("damaged.json").exists());
        records.remove(&key("a"));
        records.remove(&key("a"));
        assert_eq!(records.all(), [b]);
        records.boot = "another".to_owned();
        assert!(records.all().is_empty());
        assert!(!records.path(&key("b")).exists());
    }

    #[test]
    fn deletions_are_found() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::open(&directory.path().join("control.sock"));
        let path = records.deletions.join(deletion::file_name(&key("a")));
        fs::write(&path, deletion::print(&key("a"))).unwrap();
        assert_eq!(records.deletions(), [(Some(key("a")), path.clone())]);
        fs::write(&path, "nonsense").unwrap();
        assert_eq!(records.deletions(), [(None, path.clone())]);
        assert!(!records.take_deletion(&key("b")));
        assert!(records.take_deletion(&key("a")));
        assert!(!records.take_deletion(&key("a")));
        fs::write(&path, "nonsense").unwrap();
        remove(&path);
        assert!(records.deletions().is_empty());
    }
}
