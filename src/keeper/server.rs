//! The keeper's end.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use muslin_stack::api::cni::Key;
use nix::unistd::geteuid;
use parking_lot::Mutex;
use tokio_seqpacket::UnixSeqpacketListener;
use tracing::{debug, info};

use super::client::Keeper;
use super::messages::{Answer, Demand};
use crate::control::{Connection, listen};
use crate::error::{Context, Result};
use crate::state;

/// Attachments whose devices are held at the most.
const MAX_DEVICES: usize = 4096;

type Devices = Arc<Mutex<BTreeMap<Key, Vec<OwnedFd>>>>;
type Held = Vec<(Key, Vec<OwnedFd>)>;

/// Holds devices for the node that speaks to this socket, for ever; at first those that a keeper
/// holds which has the socket now, and will be asked no more.
///
/// # Errors
/// If the socket cannot be had, or fails.
pub(crate) async fn run(socket: &Path) -> Result<()> {
    let (mut listener, held) = match state::is_listening(socket) {
        false => {
            state::vacate(socket)?;
            (listen(socket)?, Vec::new())
        }
        true => take_place(socket).await?,
    };
    info!("devices are held at {}", socket.display());
    let devices = Arc::new(Mutex::new(held.into_iter().collect()));
    serve(&mut listener, devices)
        .await
        .context("the socket failed")
}

/// Takes the place of a keeper, and what it holds.
async fn take_place(socket: &Path) -> Result<(UnixSeqpacketListener, Held)> {
    let former = Keeper::new(socket).connect().await?;
    // What listens there may be no keeper.
    former.give().await?;
    let mut beside = socket.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    state::vacate(&beside)?;
    let listener = listen(&beside)?;
    fs::rename(&beside, socket).context(format!("cannot replace {}", socket.display()))?;
    // From here on nothing new comes to the former one.
    let held = former.give().await?;
    info!("the devices of the keeper that was here before are held, too");
    Ok((listener, held))
}

async fn serve(listener: &mut UnixSeqpacketListener, devices: Devices) -> io::Result<()> {
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
                Answer::Done
            }
            Demand::Give => {
                give(connection, devices).await?;
                Answer::Done
            }
        };
        connection.send(&answer, &[]).await?;
    }
    Ok(())
}

fn hold(devices: &Devices, key: Key, queues: Vec<OwnedFd>) -> Answer {
    let mut devices = devices.lock();
    if devices.len() >= MAX_DEVICES && !devices.contains_key(&key) {
        return Answer::Full;
    }
    devices.insert(key, queues);
    Answer::Done
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
        connection.send(&Answer::Device(key), &beside).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};

    use super::*;
    use crate::underlay::Adopted;

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
        tokio::spawn(async move { serve(&mut listener, Devices::default()).await });
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

    #[tokio::test]
    async fn a_keeper_takes_the_place_of_another() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("keep.sock");
        let first = tokio::spawn({
            let socket = socket.clone();
            async move { run(&socket).await }
        });
        let keeper = Keeper::new(&socket);
        while keeper.hold(&key("a"), &[file("a")]).await.is_err() {
            tokio::task::yield_now().await;
        }
        let (mut listener, held) = take_place(&socket).await.unwrap();
        assert_eq!(held.len(), 1);
        let devices = Arc::new(Mutex::new(held.into_iter().collect()));
        tokio::spawn(async move { serve(&mut listener, devices).await });
        first.abort();
        keeper.hold(&key("b"), &[file("b")]).await.unwrap();
        let given = keeper.give().await.unwrap();
        let texts: Vec<_> = given.into_iter().flat_map(|(_, it)| it).map(text).collect();
        assert_eq!(texts, ["a", "b"]);
    }

    #[tokio::test]
    async fn a_tunnels_sockets_are_held_until_they_are_taken() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("keep.sock");
        let mut listener = listen(&socket).unwrap();
        tokio::spawn(async move { serve(&mut listener, Devices::default()).await });
        let keeper = Keeper::new(&socket);
        keeper.hold(&key("a"), &[file("pod")]).await.unwrap();
        let worker = |name: &str| Adopted {
            queues: vec![file(name), file("queue")],
            others: vec![file("other")],
        };
        let names: Vec<_> = (0..12).map(|it| format!("worker {it}")).collect();
        let workers = names.iter().map(|name| worker(name));
        keeper.hold_tunnel(workers.collect()).await.unwrap();
        let taken = keeper.take().await.unwrap();
        assert_eq!(taken.devices.keys().collect::<Vec<_>>(), [&key("a")]);
        let all = |sockets: Vec<OwnedFd>| sockets.into_iter().map(text).collect::<Vec<_>>();
        for (worker, name) in taken.tunnel.into_iter().zip(&names) {
            assert_eq!(all(worker.queues), [name, "queue"]);
            assert_eq!(all(worker.others), ["other"]);
        }
        assert!(keeper.take().await.unwrap().tunnel.is_empty());
        let held = keeper.give().await.unwrap();
        assert_eq!(held.len(), 1, "the pod's device stays");
    }

    #[tokio::test]
    async fn what_is_no_keeper_keeps_its_place() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("control.sock");
        let mut other = listen(&socket).unwrap();
        let served = tokio::spawn(async move { other.accept().await.map(drop) });
        take_place(&socket).await.unwrap_err();
        served.await.unwrap().unwrap();
        assert!(!directory.path().join("control.sock.new").exists());
    }
}
