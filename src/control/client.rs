//! The client's end of the control socket.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use muslin_stack::api::capture::Capture;
use muslin_stack::api::control::{
    Answer, Attach, Attached, Code, DropLease, Dropped, Hello, Link, Namespace, PROTOCOL,
    PodNamespaces, Refusal, Request, Table, Welcome,
};
use muslin_stack::api::events::Event;
use muslin_stack::api::live;
use muslin_stack::api::trace;
use muslin_stack::control::ipam::PodName;
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use tokio_seqpacket::UnixSeqpacket;

use super::connection::Connection;
use super::version::{VERSION, mismatch};
use crate::error::{Context, Error, Result};
use crate::state;
use crate::terminal::suggest::hint;

/// How long a node may take for an answer: to give a lease back is what takes longest.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection to a node.
#[derive(Debug)]
pub struct Client {
    connection: Connection,
    /// Who the node is.
    welcome: Welcome,
    /// What came while an answer was waited for.
    missed: Mutex<Option<Link>>,
}

/// The socket of the node called `name`, or of the only one that runs.
///
/// # Errors
/// A usage error if there is none of that name, or several and none is named.
pub fn locate(state_dir: &Path, name: Option<&str>) -> Result<PathBuf> {
    if let Some(name) = name {
        let name = state::node_name(name)?;
        return Ok(state::socket_path(state_dir, &name));
    }
    locate_only(state_dir)?.ok_or_else(|| {
        Error::failed(format!(
            "no node runs here (looked in {}): start one with 'muslin node'",
            state_dir.display()
        ))
    })
}

/// The socket of the only node that runs, if one does.
///
/// # Errors
/// A usage error if there are several.
pub fn locate_only(state_dir: &Path) -> Result<Option<PathBuf>> {
    let running = state::nodes(state_dir)
        .into_iter()
        .filter(|name| state::is_listening(&state::socket_path(state_dir, name)))
        .collect::<Vec<_>>();
    match &running[..] {
        [] => Ok(None),
        [only] => Ok(Some(state::socket_path(state_dir, only))),
        several => Err(Error::usage(format!(
            "several nodes run here: choose one with --node: {}",
            several.join(", ")
        ))),
    }
}

impl Client {
    /// Connects to a node.
    ///
    /// # Errors
    /// If no node listens there, or one of another version.
    pub async fn connect(socket: &Path) -> Result<Self> {
        let at = socket.display();
        let client = Self::reach(socket).await?;
        client.ok_or_else(|| {
            let hint = hint_of_node(socket);
            Error::failed(format!(
                "no node listens at {at}{hint}: start it with 'muslin node'"
            ))
        })
    }

    /// Connects to a node, if one listens there.
    ///
    /// # Errors
    /// If it is of another version, or does not answer.
    pub async fn reach(socket: &Path) -> Result<Option<Self>> {
        let at = socket.display();
        match UnixSeqpacket::connect(socket).await {
            Ok(connected) => {
                let greeted = Self::greet(Connection::new(connected), socket);
                greeted.await.map(Some)
            }
            Err(error) => match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Ok(None),
                io::ErrorKind::PermissionDenied => Err(Error::failed(format!(
                    "no permission to use {at}: the node belongs to another user"
                ))),
                _ => Err(Error::failed(format!(
                    "cannot connect to the node at {at}: {error}"
                ))),
            },
        }
    }

    /// Says hello over a connection to the node that listens at `socket`.
    async fn greet(connection: Connection, socket: &Path) -> Result<Self> {
        let at = socket.display();
        let mut client = Self {
            connection,
            welcome: Welcome::new("", "", 0),
            missed: Mutex::new(None),
        };
        let hello = Request::Hello(Hello::new(VERSION));
        match client.ask(&hello, &[]).await {
            Ok(Answer::Welcome(welcome)) if welcome.protocol == PROTOCOL => {
                client.welcome = welcome;
                Ok(client)
            }
            Ok(Answer::Welcome(welcome)) => {
                let mismatch = mismatch(at, &welcome, "muslin");
                let message = format!("{mismatch}: update the older of the two");
                Err(Error::refused(Code::WrongVersion, message))
            }
            Ok(other) => Err(unexpected(&other)),
            Err(Error::Refused {
                code: Code::WrongVersion,
                ..
            }) => {
                let message = format!(
                    "the node at {at} is of an older muslin than this one ({VERSION}): restart it \
                     with muslin {VERSION}"
                );
                Err(Error::refused(Code::WrongVersion, message))
            }
            Err(error) => Err(error),
        }
    }

    /// The node's name.
    pub fn node(&self) -> &str {
        &self.welcome.node
    }

    /// How many queues a pod's device is to have.
    ///
    /// # Errors
    /// If the node cannot attach pods yet.
    pub fn queues(&self) -> Result<usize> {
        match &self.welcome.not_ready {
            Some(reason) => Err(Error::refused(Code::NotReady, reason)),
            None => Ok(self.welcome.queues.max(1)),
        }
    }

    /// Why the node cannot attach pods yet, if it cannot.
    pub fn obstacle(&self) -> Option<String> {
        self.welcome.not_ready.clone()
    }

    /// Attaches a pod by its device, each descriptor a queue of it.
    ///
    /// # Errors
    /// What the node says against it.
    pub async fn attach(&self, request: Attach, device: &[BorrowedFd<'_>]) -> Result<Attached> {
        match self.ask(&Request::Attach(request), device).await? {
            Answer::Attached(attached) => Ok(attached),
            other => Err(unexpected(&other)),
        }
    }

    /// Asks for something that is answered with "done".
    ///
    /// # Errors
    /// What the node says against it.
    pub async fn command(&self, request: &Request) -> Result<()> {
        match self.ask(request, &[]).await? {
            Answer::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Has the node keep the namespaces of an attached pod.
    ///
    /// # Errors
    /// What the node says against it; a usage error if it is too old for that.
    pub async fn keep_namespaces(
        &self,
        pod: &PodName,
        namespaces: &[(Namespace, OwnedFd)],
    ) -> Result<()> {
        let request = Request::KeepNamespaces {
            pod: pod.clone(),
            kinds: namespaces.iter().map(|(kind, _)| *kind).collect(),
        };
        let beside: Vec<_> = namespaces.iter().map(|(_, fd)| fd.as_fd()).collect();
        match self.ask(&request, &beside).await? {
            Answer::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// The namespaces of a pod.
    ///
    /// # Errors
    /// If there is no such pod, or it has none.
    pub async fn namespaces(
        &self,
        pod: &PodName,
    ) -> Result<(PodNamespaces, Vec<(Namespace, OwnedFd)>)> {
        self.send(&Request::Namespaces { pod: pod.clone() }, &[])
            .await?;
        match self.receive_with_descriptors().await? {
            (Answer::Namespaces(pod), beside) if pod.kinds.len() == beside.len() => {
                let namespaces = pod.kinds.iter().copied().zip(beside).collect();
                Ok((pod, namespaces))
            }
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Gives another node's lease back.
    ///
    /// # Errors
    /// What the node says against it.
    pub async fn drop_lease(&self, request: DropLease) -> Result<Dropped> {
        match self.ask(&Request::DropLease(request), &[]).await? {
            Answer::Dropped(dropped) => Ok(dropped),
            other => Err(unexpected(&other)),
        }
    }

    /// Begins to capture packets, as a pcapng file into a stream socket of which this is one end.
    ///
    /// # Errors
    /// What the node says against it.
    pub async fn capture(&self, request: Capture, stream: BorrowedFd<'_>) -> Result<()> {
        match self.ask(&Request::Capture(request), &[stream]).await? {
            Answer::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// The node's part of a packet's way.
    ///
    /// # Errors
    /// What the node says against it.
    pub async fn trace(&self, question: trace::Question) -> Result<trace::Part> {
        match self.ask(&Request::Trace(question), &[]).await? {
            Answer::Trace(part) => Ok(*part),
            other => Err(unexpected(&other)),
        }
    }

    /// Sends and watches probes.
    ///
    /// # Errors
    /// What the node says against it.
    pub async fn live(&self, call: live::Call) -> Result<live::Told> {
        match self.ask(&Request::Live(call), &[]).await? {
            Answer::Live(told) => Ok(told),
            other => Err(unexpected(&other)),
        }
    }

    /// The rows of a table.
    ///
    /// # Errors
    /// What the node says against it.
    pub async fn report<T: DeserializeOwned>(&self, table: Table) -> Result<Vec<T>> {
        self.rows(&Request::Report(table)).await
    }

    /// The first events of numbers higher than `after`, which waits for a while if there are none.
    ///
    /// # Errors
    /// If the node is gone, or too old for that.
    pub async fn await_events(&self, after: u64) -> Result<Vec<Event>> {
        self.rows(&Request::AwaitEvents { after }).await
    }

    async fn rows<T: DeserializeOwned>(&self, request: &Request) -> Result<Vec<T>> {
        let mut answer = self.ask(request, &[]).await?;
        let mut all = Vec::new();
        loop {
            let Answer::Rows { rows, more } = answer else {
                return Err(unexpected(&answer));
            };
            for row in rows {
                all.push(serde_json::from_value(row).context("cannot parse the node's answer")?);
            }
            if !more {
                return Ok(all);
            }
            answer = self.receive().await?;
        }
    }

    /// The next change of what the interface of a pod that was attached over this connection is to
    /// have; nothing when the node is gone.
    pub async fn changed(&self) -> Option<Link> {
        if let Some(link) = self.missed.lock().take() {
            return Some(link);
        }
        loop {
            match self.connection.receive().await {
                Ok(Some((Answer::Changed(link), _))) => return Some(link),
                Ok(Some(_)) => {}
                // Something that this version does not know.
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {}
                Ok(None) | Err(_) => return None,
            }
        }
    }

    async fn ask(&self, request: &Request, beside: &[BorrowedFd<'_>]) -> Result<Answer> {
        self.send(request, beside).await?;
        self.receive().await
    }

    async fn send(&self, request: &Request, beside: &[BorrowedFd<'_>]) -> Result<()> {
        let sent = self.connection.send(request, beside).await;
        sent.context("cannot send a request to the node")
    }

    /// The next message that answers a request.
    async fn answer(&self) -> io::Result<Option<(Answer, Vec<OwnedFd>)>> {
        loop {
            match self.connection.receive().await? {
                Some((Answer::Changed(link), _)) => *self.missed.lock() = Some(link),
                answer => return Ok(answer),
            }
        }
    }

    async fn receive(&self) -> Result<Answer> {
        let (answer, _) = self.receive_with_descriptors().await?;
        Ok(answer)
    }

    /// The next answer, unless it is a refusal, and what is beside it.
    async fn receive_with_descriptors(&self) -> Result<(Answer, Vec<OwnedFd>)> {
        let received = tokio::time::timeout(PATIENCE, self.answer()).await;
        let received = received
            .map_err(|_| {
                Error::failed("the node does not answer: its process hangs or is stopped")
            })?
            .context("cannot parse the node's answer")?;
        let (answer, beside) =
            received.ok_or_else(|| Error::failed("the node ended the connection"))?;
        match answer {
            Answer::Refused(Refusal { code, message }) => Err(Error::refused(code, message)),
            answer => Ok((answer, beside)),
        }
    }
}

/// Which node may be meant in place of one that does not run.
fn hint_of_node(socket: &Path) -> String {
    let directory = socket.parent().and_then(Path::file_name);
    let Some((name, state_dir)) = directory.zip(socket.ancestors().nth(3)) else {
        return String::new();
    };
    let running = state::nodes(state_dir);
    let running = running
        .iter()
        .filter(|node| state::is_listening(&state::socket_path(state_dir, node)));
    hint(&name.to_string_lossy(), running)
}

fn unexpected(answer: &Answer) -> Error {
    Error::failed(format!("the node gave an unexpected answer: {answer:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a client says of a node that answers so.
    async fn greeted(answer: &str) -> Result<Client> {
        let (ours, theirs) = UnixSeqpacket::pair().unwrap();
        let node = async {
            let mut hello = [0; 1000];
            let len = theirs.recv(&mut hello).await.unwrap();
            let hello: Request = serde_json::from_slice(&hello[..len.bytes_read()]).unwrap();
            assert_eq!(hello, Request::Hello(Hello::new(VERSION)));
            theirs.send(answer.as_bytes()).await.unwrap();
        };
        let client = Client::greet(Connection::new(ours), Path::new("/n.sock"));
        let (client, ()) = tokio::join!(client, node);
        client
    }

    #[tokio::test]
    async fn a_node_of_another_version_is_told_in_one_line() {
        let old = concat!(
            r#"{"refused":{"usage":true,"message":"the request is not understood: unknown variant "#,
            r#"`hello`, expected one of `attach`, `detach` at line 1 column 8"}}"#
        );
        let new = r#"{"welcome":{"protocol":7,"version":"9.1.0","colour":"red"}}"#;
        let own = format!("({VERSION}): restart it with muslin {VERSION}");
        for (answer, parts) in [
            (old, ["/n.sock is of an older muslin", &own]),
            (
                new,
                ["muslin 9.1.0 (control protocol 7)", "update the older"],
            ),
        ] {
            let error = greeted(answer).await.unwrap_err();
            assert_eq!(error.exit_code(), 1);
            let line = error.to_string();
            assert!(!line.contains('\n') && !line.contains("variant"), "{line}");
            for part in parts {
                assert!(line.contains(part), "{line}");
            }
        }
    }

    #[tokio::test]
    async fn a_node_says_what_a_device_is_to_have() {
        let client = greeted(r#"{"welcome":{"protocol":1,"version":"x","queues":4}}"#);
        assert_eq!(client.await.unwrap().queues().unwrap(), 4);
        let waits = r#"{"welcome":{"protocol":1,"queues":4,"not_ready":"no lease yet"}}"#;
        let error = greeted(waits).await.unwrap().queues().unwrap_err();
        assert_eq!(error.to_string(), "no lease yet");
        let busy = r#"{"refused":{"code":"denied","message":"not you"}}"#;
        assert_eq!(greeted(busy).await.unwrap_err().to_string(), "not you");
    }
}
