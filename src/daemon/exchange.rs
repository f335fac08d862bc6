//! Questions of this node to others about packets, and of others to this one: over the pod network,
//! from gateway to gateway, for those that share a secret.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::Ipv4Net;
use muslin_stack::api::exchange::{
    self, Answering, Ask, Asked, CODE_LEN, Code, Ends, Fault, Id, Kind, Told,
};
use muslin_stack::api::trace::Question;
use muslin_stack::datapath::exchange::Message;
use muslin_stack::datapath::gateway;
use muslin_stack::drops::DropReason;
use parking_lot::Mutex;
use ring::hmac;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use tracing::debug;

use super::running::RunningNode;
use super::settings::TraceSecret;
use super::trace;
use crate::error::{Error, Result};
use crate::random::random;
use crate::worker::Workers;

/// How often a question is sent, and how long it waits each time: datagrams may be lost.
const TRIES: usize = 3;
const PATIENCE: Duration = Duration::from_millis(800);
/// Questions of this node that may be open.
const MAX_OPEN: usize = 64;
/// Questions of others that are answered at once.
const MAX_ANSWERING: usize = 8;

/// What is asked of other nodes, and by them.
pub(super) struct Exchange {
    /// Without one nobody is asked, and nobody answered.
    secret: Option<Secret>,
    open: Mutex<HashMap<Id, Open>>,
    answering: Arc<Semaphore>,
}

/// HMAC-SHA-256 with the nodes' secret.
struct Secret(hmac::Key);

/// A question of this node.
struct Open {
    answering: Answering,
    answer: oneshot::Sender<Told>,
}

impl exchange::Secret for Secret {
    fn code(&self, parts: &[&[u8]]) -> Code {
        let mut context = hmac::Context::with_key(&self.0);
        parts.iter().for_each(|part| context.update(part));
        let mut code = [0; CODE_LEN];
        // SHA-256 has as many bytes.
        let tag = context.sign();
        code.iter_mut()
            .zip(tag.as_ref())
            .for_each(|(to, from)| *to = *from);
        code
    }
}

impl Exchange {
    pub(super) fn new(secret: Option<&TraceSecret>) -> Self {
        let key = |secret: &TraceSecret| hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
        Self {
            secret: secret.map(|secret| Secret(key(secret))),
            open: Mutex::default(),
            answering: Arc::new(Semaphore::new(MAX_ANSWERING)),
        }
    }

    /// Has the data path take messages, if there is a secret.
    pub(super) fn open(&self, workers: &Workers) -> Option<mpsc::Receiver<Message>> {
        self.secret.as_ref()?;
        // A data path that has ended ends the node.
        workers.open_exchange().ok()
    }

    /// Asks the node with that public address.
    ///
    /// # Errors
    /// Why it does not tell, in one line.
    pub(super) async fn ask(
        &self,
        running: &RunningNode,
        public_ip: IpAddr,
        ask: Ask,
    ) -> Result<Told> {
        let Some(secret) = &self.secret else {
            return Err(Error::failed(
                "it does not run on this machine, and this one has no --trace-secret-file by which it \
                 could be asked",
            ));
        };
        let lease = lease_at(running, public_ip);
        let lease = lease.ok_or_else(|| Error::failed("it has no lease any more"))?;
        let ends = Ends {
            asker: gateway::address(running.facts.subnet),
            answerer: gateway::address(lease),
        };
        let id = random()?;
        let written = exchange::write_question(secret, ends, id, &ask);
        let (asked, question) = written.map_err(|_| {
            Error::failed("the packet is too long to be asked about: it fits no datagram")
        })?;
        let (answer, mut answered) = oneshot::channel();
        let _open = self.begin(id, asked, answer)?;
        for _ in 0..TRIES {
            let told = running.workers.tell(ends.answerer, question.clone());
            told.map_err(Error::failed)?;
            if let Ok(Ok(told)) = timeout(PATIENCE, &mut answered).await {
                return Ok(told);
            }
        }
        Err(Error::failed(format!(
            "its gateway {} does not answer: it has another secret or no --trace-secret-file, or is \
             not reached",
            ends.answerer
        )))
    }

    fn begin(&self, id: Id, asked: Asked, answer: oneshot::Sender<Told>) -> Result<Closes<'_>> {
        let mut open = self.open.lock();
        if open.len() >= MAX_OPEN {
            return Err(Error::failed("this node asks too much at once"));
        }
        let answering = Answering::new(asked);
        open.insert(id, Open { answering, answer });
        Ok(Closes { exchange: self, id })
    }

    /// Takes a piece of an answer.
    fn answered(
        &self,
        secret: &Secret,
        id: Id,
        message: &Message,
    ) -> std::result::Result<(), Fault> {
        let mut all = self.open.lock();
        let open = all.get_mut(&id).ok_or(Fault::Stray)?;
        let told = open.answering.take(secret, message.from, &message.bytes)?;
        if let (Some(told), Some(open)) = (told, all.remove(&id)) {
            // Whoever asked may have gone.
            let _ = open.answer.send(told);
        }
        Ok(())
    }
}

/// Forgets a question.
struct Closes<'a> {
    exchange: &'a Exchange,
    id: Id,
}

impl Drop for Closes<'_> {
    fn drop(&mut self) {
        self.exchange.open.lock().remove(&self.id);
    }
}

/// Takes the messages of other nodes.
pub(super) async fn serve(running: Arc<RunningNode>, mut messages: mpsc::Receiver<Message>) {
    while let Some(message) = messages.recv().await {
        if let Err(fault) = take(&running, &message) {
            debug!("a message of the gateway {}: {fault}", message.from);
            // A data path that has ended ends the node.
            let _ = running.workers.count_drops(DropReason::ExchangeRefused, 1);
        }
    }
}

fn take(running: &Arc<RunningNode>, message: &Message) -> std::result::Result<(), Fault> {
    let exchange = &running.exchange;
    let Some(secret) = &exchange.secret else {
        return Ok(());
    };
    let (kind, id) = exchange::kind(&message.bytes)?;
    if kind == Kind::Answer {
        return match exchange.answered(secret, id, message) {
            // The last piece came twice, or after who asked had gone.
            Err(Fault::Stray) => Ok(()),
            answered => answered,
        };
    }
    let ends = Ends {
        asker: message.from,
        answerer: gateway::address(running.facts.subnet),
    };
    let (asked, ask) = exchange::read_question(secret, ends, &message.bytes)?;
    let place = exchange.answering.clone().try_acquire_owned();
    let place = place.map_err(|_| Fault::TooMany)?;
    let running = running.clone();
    tokio::spawn(async move {
        let told = answer(&running, ends.asker, ask).await;
        let told = told.unwrap_or_else(|error| Told::Refused(error.to_string()));
        send(&running, &asked, &told);
        drop(place);
    });
    Ok(())
}

async fn answer(running: &Arc<RunningNode>, asker: Ipv4Addr, ask: Ask) -> Result<Told> {
    let is_allowed =
        lease_of(running, asker).is_some_and(|(lease, public_ip)| ask.is_allowed(lease, public_ip));
    if !is_allowed {
        return Err(Error::usage("that is not the asking node's"));
    }
    match ask {
        Ask::Trace(arrival) => {
            let part = trace::part(running, Question::Arrival(arrival)).await?;
            Ok(Told::Trace(Box::new(part)))
        }
        Ask::Live(call) => super::live::answer(running, call).await.map(Told::Live),
        _ => Err(Error::usage("this node is too old to be asked that")),
    }
}

fn send(running: &RunningNode, asked: &Asked, told: &Told) {
    let Some(secret) = &running.exchange.secret else {
        return;
    };
    let pieces = exchange::write_answer(secret, asked, told).or_else(|_| {
        let refused = Told::Refused("its answer is too long".to_owned());
        exchange::write_answer(secret, asked, &refused)
    });
    for piece in pieces.into_iter().flatten() {
        // A data path that has ended ends the node.
        let _ = running.workers.tell(asked.asker(), piece);
    }
}

/// What is said of an answer to something else, or of a refusal.
pub(super) fn unexpected(told: Told) -> Error {
    match told {
        Told::Refused(why) => Error::failed(format!("it refuses: {why}")),
        _ => Error::failed("it answers something else: it has another version"),
    }
}

/// The lease of the node with a public address.
fn lease_at(running: &RunningNode, public_ip: IpAddr) -> Option<Ipv4Net> {
    let control = running.control.lock();
    let mut peers = control.peers().iter();
    let found = peers.find(|(_, known)| IpAddr::V4(known.record.public_ip) == public_ip);
    found.and_then(|(key, _)| key.ipv4())
}

/// The lease and the public address of the node with a gateway.
fn lease_of(running: &RunningNode, address: Ipv4Addr) -> Option<(Ipv4Net, IpAddr)> {
    let control = running.control.lock();
    let peers = control.peers().iter();
    let mut leases = peers.filter_map(|(key, known)| Some((key.ipv4()?, known)));
    let (subnet, known) = leases.find(|(subnet, _)| gateway::address(*subnet) == address)?;
    Some((subnet, known.record.public_ip.into()))
}
