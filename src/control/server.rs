//! The node's end of the control socket.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use muslin_stack::api::capture::Capture;
use muslin_stack::api::cni;
use muslin_stack::api::control::{
    Answer, Attach, Attached, Code, DropLease, Dropped, Hello, Link, Namespace, PROTOCOL,
    PodNamespaces, Refusal, Request, Table, Welcome,
};
use muslin_stack::api::events::Event;
use muslin_stack::api::live;
use muslin_stack::api::trace;
use muslin_stack::control::ipam::PodName;
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use tokio_seqpacket::{UnixSeqpacket, UnixSeqpacketListener};
use tracing::{debug, warn};

use super::connection::{Connection, MAX_MESSAGE};
use super::version::VERSION;
use crate::clients::{Clients, Place};
use crate::error::{Context, Error, Result, errno};
use crate::lines::Lines;

/// Connections at a time; each attached pod has one. Those that ask nothing make room for others.
const MAX_CONNECTIONS: usize = 4096;
/// Characters of the reason why a request is not understood.
const MAX_REASON: usize = 200;

/// What clients of a socket may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Everything. Only the node's own user and root are answered; of the other levels it is whoever
    /// can open the socket.
    Full,
    /// To attach pods that end with the connection, to detach these, and the node's status.
    Attach,
    /// All tables.
    Status,
}

impl Level {
    /// In one word.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Full => "all",
            Self::Attach => "attach",
            Self::Status => "status",
        }
    }

    /// Refuses what clients of this level may not ask for, if they have attached these pods.
    fn check<T>(self, request: &Request, own: &[(PodName, T)]) -> Result<()> {
        let is_own = |pod| own.iter().any(|(own, _)| own == pod);
        let refuse = |what| {
            let message = format!("not allowed on this socket: {what}");
            Err(Error::refused(Code::Denied, message))
        };
        match (self, request) {
            (Self::Full, _)
            | (_, Request::Hello(_))
            | (Self::Attach, Request::Report(Table::Status))
            | (
                Self::Status,
                Request::Report(_) | Request::Trace(_) | Request::AwaitEvents { .. },
            ) => Ok(()),
            (Self::Status, _) => refuse("it only serves tables"),
            (Self::Attach, Request::Attach(attach)) if attach.persistent => {
                refuse("a pod that outlives its client")
            }
            (Self::Attach, Request::Attach(attach)) if !attach.publish.is_empty() => {
                refuse("published ports")
            }
            (Self::Attach, Request::Attach(_)) => Ok(()),
            (Self::Attach, Request::Detach { pod } | Request::KeepNamespaces { pod, .. }) => {
                match is_own(pod) {
                    true => Ok(()),
                    false => refuse("the pod is not this client's"),
                }
            }
            (Self::Attach, _) => refuse("it only attaches pods"),
        }
    }
}

/// Whether another process takes the node over.
#[derive(Debug, Clone)]
pub(crate) enum Stage {
    /// None does.
    Here,
    /// One does: it is told of the clients of pods that end with their connections. Nobody else is let
    /// in.
    Leaving(mpsc::UnboundedSender<Departing>),
    /// It has done so.
    Gone,
}

/// A connection with which pods end, for another process.
#[derive(Debug)]
pub(crate) struct Departing {
    /// What its client said first.
    pub(crate) hello: Hello,
    /// What it may ask for.
    pub(crate) level: Level,
    /// Its pods.
    pub(crate) pods: Vec<PodName>,
    /// The socket.
    pub(crate) socket: OwnedFd,
}

/// What a node does for its clients.
pub(crate) trait Service: Send + Sync + 'static {
    /// A pod that is detached when this is dropped.
    type Attachment: Send + Sync;
    /// What a CNI plugin has said over a connection, and what it has reserved, which is given up when
    /// this is dropped.
    type Session: Default + Send + Sync;

    /// Who the node is.
    fn welcome(&self) -> Welcome;

    /// Attaches a pod by its device, for as long as what comes with the answer lives; for good if
    /// it is persistent and nothing comes.
    ///
    /// # Errors
    /// Why it cannot be attached.
    fn attach(
        &self,
        request: Attach,
        device: Vec<OwnedFd>,
    ) -> impl Future<Output = Result<(Attached, Option<Self::Attachment>)>> + Send;

    /// Keeps the namespaces of an attached pod.
    ///
    /// # Errors
    /// If there is none of that name.
    fn keep_namespaces(
        &self,
        pod: &PodName,
        kinds: Vec<Namespace>,
        namespaces: Vec<OwnedFd>,
    ) -> Result<()>;

    /// The namespaces of a pod.
    ///
    /// # Errors
    /// If there is none of that name, or it has none.
    fn namespaces(&self, pod: &PodName) -> Result<(PodNamespaces, Arc<[OwnedFd]>)>;

    /// What interfaces of attached pods are to have.
    ///
    /// # Errors
    /// If there are no pods yet.
    fn link(&self) -> Result<watch::Receiver<Link>>;

    /// Detaches a pod, and closes its device and its published ports.
    ///
    /// # Errors
    /// If there is none of that name.
    fn detach(&self, pod: &PodName) -> impl Future<Output = Result<()>> + Send;

    /// The same for a pod that is held.
    fn release(&self, attachment: Self::Attachment) -> impl Future<Output = ()> + Send;

    /// Answers a CNI plugin, which sends the descriptors of its device beside its call.
    ///
    /// # Errors
    /// Why it cannot be done.
    fn cni(
        &self,
        call: cni::Call,
        device: Vec<OwnedFd>,
        session: &mut Self::Session,
    ) -> impl Future<Output = Result<cni::Reply>> + Send;

    /// Begins to capture packets, into the socket whose descriptor was beside the request.
    ///
    /// # Errors
    /// Why it cannot be done.
    fn capture(&self, request: Capture, stream: Vec<OwnedFd>) -> Result<()>;

    /// What would become of a packet.
    ///
    /// # Errors
    /// If there can be no such packet.
    fn trace(&self, question: trace::Question) -> impl Future<Output = Result<trace::Part>> + Send;

    /// Sends and watches probes.
    ///
    /// # Errors
    /// Why it cannot be done.
    fn live(&self, call: live::Call) -> impl Future<Output = Result<live::Told>> + Send;

    /// The rows of a table.
    ///
    /// # Errors
    /// If the node is about to end.
    fn report(&self, table: Table) -> impl Future<Output = Result<Vec<serde_json::Value>>> + Send;

    /// The first events of numbers higher than `after`, or none if there are none for a while.
    fn await_events(&self, after: u64) -> impl Future<Output = Vec<Event>> + Send;

    /// Gives another node's lease back.
    ///
    /// # Errors
    /// Why that would be wrong, or why the store did not do it.
    fn drop_lease(&self, request: DropLease) -> impl Future<Output = Result<Dropped>> + Send;

    /// Gives the lease back; the node ends then.
    ///
    /// # Errors
    /// If the store did not take it.
    fn leave(&self) -> impl Future<Output = Result<()>> + Send;

    /// Whether another process takes the node over.
    fn stage(&self) -> watch::Receiver<Stage>;

    /// Lets the process at the other end of a connection take the node over.
    ///
    /// # Errors
    /// Why it does not.
    fn hand_over(
        &self,
        version: u32,
        connection: &Connection,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Takes a pod again that ends with a client of the process before this one.
    fn take_again(&self, pod: &PodName) -> Option<Self::Attachment>;
}

impl From<Error> for Answer {
    fn from(error: Error) -> Self {
        let code = match error {
            Error::Refused { code, .. } => code,
            Error::Usage(_) => Code::Usage,
            Error::Failed(_) | Error::LeaseLost(_) | Error::Start { .. } | Error::Command(_) => {
                Code::Failed
            }
        };
        Self::Refused(Refusal {
            code,
            message: error.to_string(),
        })
    }
}

/// Listens at a path, for this user and root.
///
/// # Errors
/// If that is not possible there.
pub(crate) fn listen(path: &Path) -> Result<UnixSeqpacketListener> {
    let at = path.display();
    let listener = UnixSeqpacketListener::bind(path);
    let listener = listener.context(format!("cannot listen for commands at {at}"))?;
    fs::set_permissions(path, Permissions::from_mode(0o600))
        .context(format!("cannot protect {at}"))?;
    Ok(listener)
}

/// Answers clients until the listener fails: those of a process before this one, and those that come.
pub(crate) async fn serve<S: Service>(
    mut listener: UnixSeqpacketListener,
    level: Level,
    service: Arc<S>,
    inherited: Vec<Departing>,
) -> io::Error {
    let mut clients = Clients::new(MAX_CONNECTIONS);
    for client in inherited {
        if let Some(room) = clients.make_room().await {
            let service = service.clone();
            clients.serve(room, |place| async move {
                place.keep();
                let pods = client.pods;
                let result = match UnixSeqpacket::try_from(client.socket) {
                    Ok(socket) => {
                        let mut conversation =
                            Conversation::new(Connection::new(socket), level, &*service);
                        conversation.go_on(client.hello, &pods);
                        conversation.run(&place).await
                    }
                    Err(error) => Err(error),
                };
                if let Err(error) = result {
                    debug!("a control connection ended: {error}");
                }
            });
        }
    }
    let mut refused = Lines::new(Instant::now());
    let mut stage = service.stage();
    loop {
        // Who comes while another process takes over waits for that.
        let is_here = stage.wait_for(|stage| matches!(stage, Stage::Here));
        if is_here.await.is_err() {
            std::future::pending::<()>().await;
        }
        let accepted = tokio::select! {
            biased;
            _ = leaving(&mut stage) => continue,
            accepted = listener.accept() => accepted,
        };
        let socket = match accepted {
            Ok(socket) => socket,
            Err(error) if is_passing(&error) => {
                warn!("cannot accept on the control socket: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
            Err(error) => return error,
        };
        let Some(room) = clients.make_room().await else {
            refused.log("refused connections", || {
                warn!("too many connections to the control socket")
            });
            continue;
        };
        let service = service.clone();
        clients.serve(room, |place| async move {
            let conversation = Conversation::new(Connection::new(socket), level, &*service);
            if let Err(error) = conversation.run(&place).await {
                debug!("a control connection ended: {error}");
            }
        });
    }
}

/// Whether accepting can work again: a connection that was given up, or no descriptors now.
fn is_passing(error: &io::Error) -> bool {
    use nix::errno::Errno;
    matches!(
        errno(error),
        Errno::ECONNABORTED
            | Errno::EMFILE
            | Errno::ENFILE
            | Errno::ENOBUFS
            | Errno::ENOMEM
            // The user's limit of watched descriptors (epoll_ctl(2)).
            | Errno::ENOSPC
    )
}

/// What is said over a connection.
struct Conversation<'s, S: Service> {
    connection: Connection,
    level: Level,
    service: &'s S,
    /// Pods that end with the connection.
    attachments: Vec<(PodName, S::Attachment)>,
    session: S::Session,
    link: Option<watch::Receiver<Link>>,
    hello: Option<Hello>,
}

impl<'s, S: Service> Conversation<'s, S> {
    fn new(connection: Connection, level: Level, service: &'s S) -> Self {
        Self {
            connection,
            level,
            service,
            attachments: Vec::new(),
            session: S::Session::default(),
            link: None,
            hello: None,
        }
    }

    /// Goes on with what was said to a process before this one.
    fn go_on(&mut self, hello: Hello, pods: &[PodName]) {
        self.hello = Some(hello);
        self.link = self.service.link().ok();
        let pods = pods.iter();
        let held = pods.filter_map(|pod| Some((pod.clone(), self.service.take_again(pod)?)));
        self.attachments = held.collect();
    }

    async fn run(mut self, place: &Place) -> io::Result<()> {
        let uid = self.connection.peer_uid()?;
        if self.level == Level::Full && uid != geteuid().as_raw() && uid != 0 {
            return Err(io::Error::from(io::ErrorKind::PermissionDenied));
        }
        let mut stage = self.service.stage();
        loop {
            let received = tokio::select! {
                received = self.connection.receive::<Request>() => received,
                link = changed(&mut self.link) => {
                    self.connection.send(&Answer::Changed(link), &[]).await?;
                    continue;
                }
                departures = leaving(&mut stage), if !self.attachments.is_empty() => {
                    if self.depart(&departures, &mut stage).await? {
                        return Ok(());
                    }
                    continue;
                }
            };
            match received {
                Ok(Some((request, beside))) => {
                    if self.answer(request, beside, place).await? {
                        return Ok(());
                    }
                }
                Ok(None) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    // It quotes the request, which may be as long as an answer can be.
                    let reason: String = error.to_string().chars().take(MAX_REASON).collect();
                    let message = format!("cannot parse the request: {reason}");
                    self.refuse(Error::usage(message)).await?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn refuse(&self, error: Error) -> io::Result<()> {
        self.connection.send(&Answer::from(error), &[]).await
    }

    /// Answers a request; whether that was the last.
    async fn answer(
        &mut self,
        request: Request,
        beside: Vec<OwnedFd>,
        place: &Place,
    ) -> io::Result<bool> {
        if let Request::Hello(said) = request {
            self.hello = Some(said);
            let welcome = Answer::Welcome(self.service.welcome());
            self.connection.send(&welcome, &[]).await?;
            return Ok(false);
        }
        if let Some(error) = stranger(self.hello.as_ref()) {
            self.refuse(error).await?;
            return Ok(false);
        }
        if let Err(error) = self.level.check(&request, &self.attachments) {
            self.refuse(error).await?;
            return Ok(false);
        }
        place.keep();
        let answer = match request {
            Request::Attach(attach) => self.attach(attach, beside).await,
            Request::KeepNamespaces { pod, kinds } if kinds.len() == beside.len() => self
                .service
                .keep_namespaces(&pod, kinds, beside)
                .map(|()| Answer::Done),
            Request::KeepNamespaces { .. } => Err(Error::usage(
                "the request needs one descriptor for each namespace",
            )),
            Request::Namespaces { pod } => match self.service.namespaces(&pod) {
                Ok((pod, namespaces)) => {
                    let beside: Vec<_> = namespaces.iter().map(AsFd::as_fd).collect();
                    let answer = Answer::Namespaces(pod);
                    self.connection.send(&answer, &beside).await?;
                    return Ok(false);
                }
                Err(error) => Err(error),
            },
            Request::Detach { pod } => self.detach(&pod).await,
            Request::DropLease(request) => {
                let dropped = self.service.drop_lease(request);
                dropped.await.map(Answer::Dropped)
            }
            Request::Leave => self.service.leave().await.map(|()| Answer::Done),
            Request::Cni(call) => {
                let replied = self.service.cni(call, beside, &mut self.session);
                replied.await.map(Answer::Cni)
            }
            Request::Report(table) => match self.service.report(table).await {
                Ok(rows) => {
                    send_rows(&self.connection, rows).await?;
                    return Ok(false);
                }
                Err(error) => Err(error),
            },
            Request::Capture(capture) => {
                self.service.capture(capture, beside).map(|()| Answer::Done)
            }
            Request::Live(call) => self.service.live(call).await.map(Answer::Live),
            Request::Trace(question) => {
                let part = self.service.trace(question).await;
                part.map(|part| Answer::Trace(Box::new(part)))
            }
            Request::AwaitEvents { after } => {
                let events = self.service.await_events(after).await;
                send_events(&self.connection, &events).await?;
                return Ok(false);
            }
            Request::TakeOver(version) => {
                match self.service.hand_over(version, &self.connection).await {
                    Ok(()) => return Ok(true),
                    Err(error) => Err(error),
                }
            }
            other => Err(Error::usage(format!(
                "this node does not support the request {other:?}"
            ))),
        };
        let answer = answer.unwrap_or_else(Answer::from);
        self.connection.send(&answer, &[]).await?;
        Ok(false)
    }

    async fn attach(&mut self, attach: Attach, device: Vec<OwnedFd>) -> Result<Answer> {
        if device.is_empty() {
            return Err(Error::usage("the request to attach carries no device"));
        }
        let (attached, held) = self.service.attach(attach, device).await?;
        if let Some(held) = held {
            self.link = Some(self.service.link()?);
            self.attachments.push((attached.pod.clone(), held));
        }
        Ok(Answer::Attached(attached))
    }

    async fn detach(&mut self, pod: &PodName) -> Result<Answer> {
        if self.level != Level::Attach {
            return self.service.detach(pod).await.map(|()| Answer::Done);
        }
        // By what it holds and not by a name, which may be another client's by now.
        for (_, held) in self.attachments.extract_if(.., |(own, _)| own == pod) {
            self.service.release(held).await;
        }
        Ok(Answer::Done)
    }

    /// Lets another process go on with this connection; whether it does.
    async fn depart(
        &self,
        departures: &mpsc::UnboundedSender<Departing>,
        stage: &mut watch::Receiver<Stage>,
    ) -> io::Result<bool> {
        let Some(hello) = self.hello.clone() else {
            return Ok(false);
        };
        let departing = Departing {
            hello,
            level: self.level,
            pods: self
                .attachments
                .iter()
                .map(|(pod, _)| pod.clone())
                .collect(),
            socket: self.connection.copy()?,
        };
        // If nobody waits for it any more, it is over.
        let _ = departures.send(departing);
        let decided = stage.wait_for(|stage| !matches!(stage, Stage::Leaving(_)));
        Ok(decided
            .await
            .is_ok_and(|stage| matches!(*stage, Stage::Gone)))
    }
}

/// Returns when another process begins to take over.
async fn leaving(stage: &mut watch::Receiver<Stage>) -> mpsc::UnboundedSender<Departing> {
    if let Ok(stage) = stage.wait_for(|it| matches!(it, Stage::Leaving(_))).await
        && let Stage::Leaving(departures) = &*stage
    {
        return departures.clone();
    }
    std::future::pending().await
}

/// Why a client is not served that has said this of itself; nothing if it speaks as this node does.
fn stranger(hello: Option<&Hello>) -> Option<Error> {
    let client = match hello {
        Some(hello) if hello.protocol == PROTOCOL => return None,
        Some(Hello {
            protocol, version, ..
        }) => format!("muslin {version} (control protocol {protocol})"),
        None => "an older one, from before there were versions".to_owned(),
    };
    let message = format!(
        "this node is muslin {VERSION} (control protocol {PROTOCOL}), and the client is {client}: \
         update the older of the two, and restart pods that were started before"
    );
    Some(Error::refused(Code::WrongVersion, message))
}

/// The next change of what pods' interfaces are to have; for ever if there are none.
async fn changed(link: &mut Option<watch::Receiver<Link>>) -> Link {
    if let Some(link) = link
        && link.changed().await.is_ok()
    {
        return *link.borrow_and_update();
    }
    std::future::pending().await
}

/// Sends events, few enough for one packet.
async fn send_events(connection: &Connection, events: &[Event]) -> io::Result<()> {
    let rows = events.iter().map(serde_json::to_value);
    let rows = rows.collect::<std::result::Result<_, _>>()?;
    let answer = Answer::Rows { rows, more: false };
    connection.send(&answer, &[]).await
}

/// Sends rows in as many packets as they need.
async fn send_rows(connection: &Connection, rows: Vec<serde_json::Value>) -> io::Result<()> {
    let mut part = Vec::new();
    let mut len = 0;
    for row in rows {
        let row_len = row.to_string().len() + 1;
        // Half of a packet leaves more than enough for what is around the rows.
        if len + row_len > MAX_MESSAGE / 2 && !part.is_empty() {
            let rows = std::mem::take(&mut part);
            connection
                .send(&Answer::Rows { rows, more: true }, &[])
                .await?;
            len = 0;
        }
        len += row_len;
        part.push(row);
    }
    connection
        .send(
            &Answer::Rows {
                rows: part,
                more: false,
            },
            &[],
        )
        .await
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use muslin_lab::skip::skip;
    use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
    use tokio_seqpacket::UnixSeqpacket;

    use super::*;

    /// A node that has nothing.
    struct Empty;

    fn not_attached(pod: &PodName) -> Error {
        Error::refused(Code::NoSuchPod, format!("no pod named '{pod}' is attached"))
    }

    impl Service for Empty {
        type Attachment = ();
        type Session = ();

        fn welcome(&self) -> Welcome {
            Welcome::new(VERSION, "n", 3)
        }

        async fn attach(&self, _: Attach, _: Vec<OwnedFd>) -> Result<(Attached, Option<()>)> {
            Err(Error::failed("full"))
        }

        fn keep_namespaces(&self, pod: &PodName, _: Vec<Namespace>, _: Vec<OwnedFd>) -> Result<()> {
            Err(not_attached(pod))
        }

        fn namespaces(&self, pod: &PodName) -> Result<(PodNamespaces, Arc<[OwnedFd]>)> {
            Err(not_attached(pod))
        }

        fn link(&self) -> Result<watch::Receiver<Link>> {
            Err(Error::failed("none"))
        }

        async fn detach(&self, pod: &PodName) -> Result<()> {
            Err(not_attached(pod))
        }

        async fn release(&self, (): ()) {}

        async fn cni(&self, _: cni::Call, _: Vec<OwnedFd>, (): &mut ()) -> Result<cni::Reply> {
            Err(Error::failed("full"))
        }

        fn capture(&self, _: Capture, _: Vec<OwnedFd>) -> Result<()> {
            Err(Error::usage("nothing to capture"))
        }

        async fn trace(&self, _: trace::Question) -> Result<trace::Part> {
            Err(Error::usage("nothing to trace"))
        }

        async fn live(&self, _: live::Call) -> Result<live::Told> {
            Err(Error::usage("nothing to probe"))
        }

        async fn report(&self, _: Table) -> Result<Vec<serde_json::Value>> {
            Ok(Vec::new())
        }

        async fn await_events(&self, _: u64) -> Vec<Event> {
            Vec::new()
        }

        async fn drop_lease(&self, request: DropLease) -> Result<Dropped> {
            Err(Error::failed(format!("no lease {}", request.lease)))
        }

        async fn leave(&self) -> Result<()> {
            Ok(())
        }

        fn stage(&self) -> watch::Receiver<Stage> {
            watch::channel(Stage::Here).1
        }

        async fn hand_over(&self, version: u32, _: &Connection) -> Result<()> {
            Err(Error::failed(format!("not in version {version}")))
        }

        fn take_again(&self, _: &PodName) -> Option<()> {
            None
        }
    }

    /// Answers one client.
    async fn converse(socket: UnixSeqpacket) -> io::Result<()> {
        let (place, _) = Clients::new(1).wait().await.take();
        let conversation = Conversation::new(Connection::new(socket), Level::Full, &Empty);
        conversation.run(&place).await
    }

    /// Says hello by a name without a file, and prints how long the answer is.
    const CLIENT: &str = r#"
        alarm 60; socket(my $s, AF_UNIX, SOCK_SEQPACKET, 0) or die "socket: $!";
        connect($s, pack("Sa*", AF_UNIX, "\0$ARGV[0]")) or die "connect: $!";
        send($s, '{"hello":{"protocol":1}}', 0); recv($s, my $answer, 65536, 0); print length $answer;
    "#;

    #[tokio::test]
    async fn only_the_nodes_user_and_root_are_answered() {
        if !geteuid().is_root() {
            return skip("only root can be another user");
        }
        let name = format!("muslin-test-{}", std::process::id());
        let listener = socket::socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )
        .unwrap();
        let address = UnixAddr::new_abstract(name.as_bytes()).unwrap();
        socket::bind(listener.as_raw_fd(), &address).unwrap();
        socket::listen(&listener, Backlog::MAXALLOWABLE).unwrap();
        let listener = UnixSeqpacketListener::try_from(listener).unwrap();
        let server = tokio::spawn(serve(listener, Level::Full, Arc::new(Empty), Vec::new()));
        let ask = async |uid| {
            let mut client = tokio::process::Command::new("perl");
            client.args(["-MSocket", "-e", CLIENT, &name]).uid(uid);
            let output = client.output().await.unwrap();
            assert!(output.status.success(), "{output:?}");
            let len = String::from_utf8(output.stdout).unwrap();
            len.parse::<usize>().unwrap()
        };
        assert!(ask(0).await > 0);
        assert_eq!(ask(65_534).await, 0, "nobody is answered");
        assert!(ask(0).await > 0);
        server.abort();
    }

    /// A refusal as clients read it that know of no versions.
    #[derive(Debug, serde::Deserialize)]
    enum OldAnswer {
        #[serde(rename = "refused")]
        Refused { usage: bool, message: String },
    }

    #[tokio::test]
    async fn who_speaks_another_version_is_told_in_one_line() {
        let old = r#"{"report":"pods"}"#;
        let new = r#"{"hello":{"protocol":7,"version":"9.1.0"}}"#;
        for (greeting, client) in [(None, "an older one"), (Some(new), "muslin 9.1.0")] {
            let (ours, theirs) = UnixSeqpacket::pair().unwrap();
            tokio::spawn(converse(theirs));
            let ours = Connection::new(ours);
            let say = async |text: &str| {
                let message: serde_json::Value = serde_json::from_str(text).unwrap();
                ours.send(&message, &[]).await.unwrap();
            };
            if let Some(greeting) = greeting {
                say(greeting).await;
                let (answer, _) = ours.receive::<Answer>().await.unwrap().unwrap();
                assert!(matches!(answer, Answer::Welcome(it) if it.protocol == PROTOCOL));
            }
            say(old).await;
            let answer = ours.receive::<OldAnswer>().await.unwrap().unwrap();
            let (OldAnswer::Refused { usage, message }, _) = answer;
            let own = format!("this node is muslin {VERSION} (control protocol {PROTOCOL})");
            assert!(!usage && !message.contains('\n'), "{message}");
            for part in [&own, client, "update the older"] {
                assert!(message.contains(part), "{message}");
            }
            // It may say who it is at any time.
            say(r#"{"hello":{"protocol":1}}"#).await;
            ours.receive::<Answer>().await.unwrap().unwrap();
            say(old).await;
            let (answer, _) = ours.receive::<Answer>().await.unwrap().unwrap();
            assert!(matches!(answer, Answer::Rows { .. }), "{answer:?}");
        }
    }

    #[test]
    fn each_level_has_its_requests() {
        let pod = |name: &str| name.parse::<PodName>().unwrap();
        let own = [(pod("own"), ())];
        let attach = |persistent, publish: &[&str]| {
            let ports: Vec<muslin_stack::api::published::Ports> =
                publish.iter().map(|it| it.parse().unwrap()).collect();
            let mut attach = Attach::new(None, None);
            attach.persistent = persistent;
            attach.publish = muslin_stack::api::published::Ports::all(&ports);
            Request::Attach(attach)
        };
        let keep = |name| Request::KeepNamespaces {
            pod: pod(name),
            kinds: Vec::new(),
        };
        let drop = Request::DropLease(DropLease {
            lease: "a".to_owned(),
            force: true,
        });
        let (attached, status) = ([Level::Full, Level::Attach], [Level::Full, Level::Status]);
        let full = [Level::Full];
        let cases: [(Request, &[Level]); 14] = [
            (attach(false, &[]), &attached),
            (attach(true, &[]), &full),
            (attach(false, &["80:80"]), &full),
            (Request::Detach { pod: pod("own") }, &attached),
            (Request::Detach { pod: pod("x") }, &full),
            (keep("own"), &attached),
            (keep("x"), &full),
            (Request::Namespaces { pod: pod("own") }, &full),
            (drop, &full),
            (Request::Leave, &full),
            (Request::Cni(cni::Call::Ready), &full),
            (Request::Report(Table::Leases), &status),
            (Request::Report(Table::Pods), &status),
            (Request::AwaitEvents { after: 7 }, &status),
        ];
        for (request, levels) in cases {
            for level in [Level::Full, Level::Attach, Level::Status] {
                let is_allowed = level.check(&request, &own).is_ok();
                assert_eq!(is_allowed, levels.contains(&level), "{level:?} {request:?}");
            }
        }
        let report = Request::Report(Table::Status);
        for level in [Level::Full, Level::Attach, Level::Status] {
            level.check(&report, &own).unwrap();
        }
    }

    #[tokio::test]
    async fn nonsense_is_answered_and_the_connection_stays() {
        let (ours, theirs) = UnixSeqpacket::pair().unwrap();
        let server = tokio::spawn(converse(theirs));
        let copy = ours.as_fd().try_clone_to_owned().unwrap();
        let answers = Connection::new(UnixSeqpacket::try_from(copy).unwrap());
        let long = "x".repeat(MAX_MESSAGE - 10);
        ours.send(br#"{"hello":{"protocol":1,"version":"x","more":[]}}"#)
            .await
            .unwrap();
        let (answer, _) = answers.receive::<Answer>().await.unwrap().unwrap();
        assert_eq!(answer, Answer::Welcome(Empty.welcome()));
        for nonsense in [
            "nonsense".to_owned(),
            "{".to_owned(),
            "[".repeat(MAX_MESSAGE),
            format!("\"{long}\""),
            format!("{{\"{long}\":1}}"),
            format!("{{\"detach\":{{\"pod\":\"{}\"}}}}", &long[30..]),
            "\"".repeat(MAX_MESSAGE + 1),
            r#"{"attach":{"pod":null,"address":null,"persistent":false}}"#.to_owned(),
            r#"{"keep-namespaces":{"pod":"a","kinds":["user"]}}"#.to_owned(),
        ] {
            ours.send(nonsense.as_bytes()).await.unwrap();
            let start: String = nonsense.chars().take(20).collect();
            let answer = answers.receive::<Answer>().await;
            let (answer, _) = answer.unwrap().expect(&start);
            assert!(
                matches!(&answer, Answer::Refused(refusal) if refusal.code == Code::Usage),
                "{start}: {answer:?}"
            );
        }
        ours.send(br#"{"report":"pods"}"#).await.unwrap();
        let (answer, _) = answers.receive::<Answer>().await.unwrap().unwrap();
        let none = Answer::Rows {
            rows: Vec::new(),
            more: false,
        };
        assert_eq!(answer, none);
        drop((ours, answers));
        server.await.unwrap().unwrap();
    }
}
