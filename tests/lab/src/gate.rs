//! A gate between two ends of a `SOCK_SEQPACKET` conversation: it passes all messages on, with their
//! descriptors, and holds one of them until the test has done what it wants meanwhile.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use muslin::control::Connection;
use serde_json::Value;
use tokio::sync::oneshot;
use tokio_seqpacket::{UnixSeqpacket, UnixSeqpacketListener};

use super::SOON;
use super::watch::{stretched, waits_for};

/// A message of a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// A call of this name.
    Call(&'static str),
    /// The answer to a call of this name.
    Answer(&'static str),
}

/// A gate, whose socket is to be given to whoever calls. It stays until the test's process ends.
pub struct Gate {
    socket: PathBuf,
    order: Arc<Mutex<Option<Order>>>,
}

/// What is to be held, and who waits for it.
struct Order {
    message: Message,
    is_held: Sender<()>,
    passes: oneshot::Receiver<bool>,
}

/// A message that is held, or will be.
pub struct Held {
    is_held: Receiver<()>,
    passes: oneshot::Sender<bool>,
}

impl Gate {
    /// Opens a gate at a socket, before the one at `to`, which need not be there yet.
    pub fn open(socket: &Path, to: &Path) -> Self {
        let order = Arc::default();
        let gate = Self {
            socket: socket.to_owned(),
            order: Arc::clone(&order),
        };
        let (socket, to) = (socket.to_owned(), to.to_owned());
        let (is_open, opened) = channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = { runtime }.enable_all().build().unwrap();
            runtime.block_on(async move {
                let mut listener = UnixSeqpacketListener::bind(&socket).unwrap();
                is_open.send(()).unwrap();
                while let Ok(caller) = listener.accept().await {
                    let (to, order) = (to.clone(), Arc::clone(&order));
                    tokio::spawn(async move {
                        // Where nobody listens the caller finds its connection closed.
                        if let Ok(called) = UnixSeqpacket::connect(&to).await {
                            let ends = [caller, called].map(Connection::new);
                            // As when one of them has ended.
                            let _ = pass_on(ends, &order).await;
                        }
                    });
                }
            });
        });
        opened.recv().unwrap();
        gate
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Holds the next message of this kind.
    pub fn hold(&self, message: Message) -> Held {
        let (is_held, held) = channel();
        let (passes, passed) = oneshot::channel();
        *self.order.lock().unwrap() = Some(Order {
            message,
            is_held,
            passes: passed,
        });
        Held {
            is_held: held,
            passes,
        }
    }
}

impl Held {
    /// Waits until the message is here.
    ///
    /// # Panics
    /// If it does not come.
    pub fn wait(&self) {
        waits_for("a message at a gate");
        self.is_held.recv_timeout(stretched(SOON)).unwrap();
    }

    /// Lets it go on.
    pub fn pass(self) {
        // Whoever it was for may have ended.
        let _ = self.passes.send(true);
    }

    /// Ends the conversation instead.
    pub fn lose(self) {
        let _ = self.passes.send(false);
    }
}

async fn pass_on(
    [caller, called]: [Connection; 2],
    order: &Mutex<Option<Order>>,
) -> std::io::Result<()> {
    let mut call = String::new();
    loop {
        let (from_caller, received) = tokio::select! {
            received = caller.receive::<Value>() => (true, received?),
            received = called.receive::<Value>() => (false, received?),
        };
        let Some((message, beside)) = received else {
            return Ok(());
        };
        if from_caller {
            name(&message).clone_into(&mut call);
        }
        let is_it = |order: &mut Order| match order.message {
            Message::Call(name) => from_caller && name == call,
            Message::Answer(name) => !from_caller && name == call,
        };
        let held = order.lock().unwrap().take_if(is_it);
        if let Some(held) = held {
            let _ = held.is_held.send(());
            if !held.passes.await.unwrap_or(false) {
                return Ok(());
            }
        }
        let beside: Vec<_> = beside.iter().map(OwnedFd::as_fd).collect();
        let to = if from_caller { &called } else { &caller };
        to.send(&message, &beside).await?;
    }
}

/// The name of a message: of the variant that is in it, within those for plugins.
fn name(message: &Value) -> &str {
    match message {
        Value::String(name) => name,
        Value::Object(variant) => match variant.iter().next() {
            Some((name, inner)) if name == "cni" => self::name(inner),
            Some((name, _)) => name,
            None => "",
        },
        _ => "",
    }
}
