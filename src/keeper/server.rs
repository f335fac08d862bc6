//! The keeper's end.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use muslin_stack::api::cni::Key;
use nix::unistd::geteuid;
use parking_lot::Mutex;
use tokio_seqpacket::UnixSeqpacketListener;
use tracing::{debug, info};

use super::messages::{Demand, Held};
use crate::control::{Connection, listen};
use crate::error::{Context, Result};
use crate::state;

/// Attachments whose devices are held at the most.
const MAX_DEVICES: usize = 4096;

type Devices = Arc<Mutex<BTreeMap<Key, Vec<OwnedFd>>>>;

/// Holds devices for the node that speaks to this socket, for ever.
///
/// # Errors
/// If the socket cannot be had, or fails.
pub(crate) async fn run(socket: &Path) -> Result<()> {
    state::vacate(socket)?;
    let mut listener = listen(socket)?;
    info!("devices are held at {}", socket.display());
    serve(&mut listener).await.context("the socket failed")
}

async fn serve(listener: &mut UnixSeqpacketListener) -> io::Result<()> {
    let devices = Devices::default();
    loop {
        let connection = Connection::new(listener.accept().await?);
        let devices = devices.clone();
        tokio::spawn(async move {
            if let Err(error) = converse(&connection, &devices).await {
                debug!("a connection ended: {error}");
            }
        });
    }
}

async fn converse(connection: &Connection, devices: &Devices) -> io::Result<()> {
    let uid = connection.peer_uid()?;
    if uid != geteuid().as_raw() && uid != 0 {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    while let Some((demand, beside)) = connection.receive::<Demand>().await? {
        let answer = match demand {
            Demand::Hold(key) => hold(devices, key, beside),
            Demand::Close(key) => {
                devices.lock().remove(&key);
                Held::Done
            }
            Demand::Give => {
                give(connection, devices).await?;
                Held::Done
            }
        };
        connection.send(&answer, &[]).await?;
    }
    Ok(())
}

fn hold(devices: &Devices, key: Key, queues: Vec<OwnedFd>) -> Held {
    let mut devices = devices.lock();
    if devices.len() >= MAX_DEVICES && !devices.contains_key(&key) {
        return Held::Full;
    }
    devices.insert(key, queues);
    Held::Done
}

async fn give(connection: &Connection, devices: &Devices) -> io::Result<()> {
    let keys: Vec<_> = devices.lock().keys().cloned().collect();
    for key in keys {
        let queues = devices.lock().get(&key).map(|queues| {
            let copies = queues.iter().map(OwnedFd::try_clone);
            copies.collect::<io::Result<Vec<_>>>()
        });
        // It may be closed by now.
        let Some(queues) = queues.transpose()? else {
            continue;
        };
        let beside: Vec<_> = queues.iter().map(AsFd::as_fd).collect();
        connection.send(&Held::Device(key), &beside).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};

    use super::*;
    use crate::keeper::Keeper;

    fn key(container: &str) -> Key {
        Key::new("muslin", container, "eth0")
    }

    /// A file stands for a device.
    fn file(text: &str) -> OwnedFd {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file.into()
    }

    fn text(file: OwnedFd) -> String {
        let mut file = std::fs::File::from(file);
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[tokio::test]
    async fn what_is_held_is_given_until_it_is_closed() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("keep.sock");
        let mut listener = listen(&socket).unwrap();
        tokio::spawn(async move { serve(&mut listener).await });
        let keeper = Keeper::new(&socket);
        assert!(keeper.give().await.unwrap().is_empty());
        keeper.hold(&key("a"), &[file("old")]).await.unwrap();
        let queues = [file("first"), file("second")];
        keeper.hold(&key("a"), &queues).await.unwrap();
        keeper.hold(&key("b"), &[file("other")]).await.unwrap();
        drop(queues);
        for _ in 0..2 {
            let mut held = keeper.give().await.unwrap();
            let (b, other) = held.pop().unwrap();
            let (a, queues) = held.pop().unwrap();
            assert!(held.is_empty() && a == key("a") && b == key("b"));
            let queues: Vec<_> = queues.into_iter().map(text).collect();
            assert_eq!(queues, ["first", "second"]);
            assert_eq!(other.into_iter().map(text).collect::<Vec<_>>(), ["other"]);
        }
        keeper.close(&key("a")).await.unwrap();
        keeper.close(&key("a")).await.unwrap();
        let held = keeper.give().await.unwrap();
        assert_eq!(held.len(), 1);
    }
}
