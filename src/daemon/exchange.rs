//! Questions of this node to others about packets, and of others to this one: over the pod network,
//! from gateway to gateway, for those that share a secret.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use muslin_stack::addresses::{Addresses, Nets};
use muslin_stack::api::exchange::{
    self, Answering, Ask, Asked, CODE_LEN, Code, Ends, Fault, Id, Kind, Told,
};
use muslin_stack::api::trace::Question;
use muslin_stack::control::peers::Known;
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
        let ends = ends(running, lease, public_ip);
        let ends =
            ends.ok_or_else(|| Error::failed("it has no gateway in this node's IP version"))?;
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
    let own = running.facts.gateways();
    let answerer = match message.from {
        IpAddr::V4(_) => own.ipv4().map(IpAddr::V4),
        IpAddr::V6(_) => own.ipv6().map(IpAddr::V6),
    };
    let ends = Ends {
        asker: message.from,
        answerer: answerer.ok_or(Fault::Stray)?,
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

async fn answer(running: &Arc<RunningNode>, asker: IpAddr, ask: Ask) -> Result<Told> {
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

/// The gateways by which a node is asked: of the IP version of the address by which it is known, if both
/// have one of that, since packets go there in that version.
fn ends(running: &RunningNode, lease: Nets, public_ip: IpAddr) -> Option<Ends> {
    let own = running.facts.gateways();
    let theirs = gateways(lease);
    let ends = |(asker, answerer)| Ends { asker, answerer };
    let ipv4 = own.ipv4().zip(theirs.ipv4());
    let ipv4 = ipv4
        .map(|(own, their)| (own.into(), their.into()))
        .map(ends);
    let ipv6 = own.ipv6().zip(theirs.ipv6());
    let ipv6 = ipv6
        .map(|(own, their)| (own.into(), their.into()))
        .map(ends);
    match public_ip {
        IpAddr::V4(_) => ipv4.or(ipv6),
        IpAddr::V6(_) => ipv6.or(ipv4),
    }
}

fn gateways(lease: Nets) -> Addresses {
    lease.map(gateway::address, gateway::address_v6)
}

/// The lease of the node with a public address.
fn lease_at(running: &RunningNode, public_ip: IpAddr) -> Option<Nets> {
    let control = running.control.lock();
    let mut peers = control.peers().iter();
    let is_at = |known: &Known| public(known).iter().any(|own: IpAddr| own == public_ip);
    let found = peers.find(|(_, known)| is_at(known));
    found.map(|(key, _)| key.nets())
}

/// The lease and the public addresses of the node with a gateway.
fn lease_of(running: &RunningNode, address: IpAddr) -> Option<(Nets, Addresses)> {
    let control = running.control.lock();
    let mut peers = control.peers().iter();
    let has = |lease: Nets| gateways(lease).iter().any(|its: IpAddr| its == address);
    let (key, known) = peers.find(|(key, _)| has(key.nets()))?;
    Some((key.nets(), public(known)))
}

/// Where a node is.
fn public(known: &Known) -> Addresses {
    known.record.addresses()
}
