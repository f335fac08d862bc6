//! The node's end of the control socket.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use muslin_stack::api::cni;
use muslin_stack::api::control::{
    Answer, Attach, Attached, Code, DropLease, Dropped, Hello, Link, Namespace, PROTOCOL,
    PodNamespaces, Refusal, Request, Table, Welcome,
};
use muslin_stack::control::ipam::PodName;
use nix::unistd::geteuid;
use tokio::sync::watch;
use tokio_seqpacket::UnixSeqpacketListener;
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
            | (Self::Status, Request::Report(_)) => Ok(()),
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

/// What a node does for its clients.
pub trait Service: Send + Sync + 'static {
    /// A pod that is detached when this is dropped.
    type Attachment: Send;
    /// What a CNI plugin has said over a connection, and what it has reserved, which is given up when
    /// this is dropped.
    type Session: Default + Send;

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

    /// The rows of a table.
    ///
    /// # Errors
    /// If the node is about to end.
    fn report(&self, table: Table) -> impl Future<Output = Result<Vec<serde_json::Value>>> + Send;

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

/// Answers clients until the listener fails.
pub async fn serve<S: Service>(
    mut listener: UnixSeqpacketListener,
    level: Level,
    service: Arc<S>,
) -> io::Error {
    let mut clients = Clients::new(MAX_CONNECTIONS);
    let mut refused = Lines::new(Instant::now());
    loop {
        let socket = match listener.accept().await {
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
            let connection = Connection::new(socket);
            if let Err(error) = converse(&connection, level, &*service, &place).await {
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

async fn converse<S: Service>(
    connection: &Connection,
    level: Level,
    service: &S,
    place: &Place,
) -> io::Result<()> {
    let uid = connection.peer_uid()?;
    if level == Level::Full && uid != geteuid().as_raw() && uid != 0 {
        return Err(io::Error::from(io::ErrorKind::PermissionDenied));
    }
    // Pods that end with the connection.
    let mut attachments: Vec<(PodName, S::Attachment)> = Vec::new();
    let mut session = S::Session::default();
    let mut link = None;
    let mut hello: Option<Hello> = None;
    loop {
        let received = tokio::select! {
            received = connection.receive::<Request>() => received,
            link = changed(&mut link) => {
                connection.send(&Answer::Changed(link), &[]).await?;
                continue;
            }
        };
        let (request, beside) = match received {
            Ok(Some(received)) => received,
            Ok(None) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                // It quotes the request, which may be as long as an answer can be.
                let reason: String = error.to_string().chars().take(MAX_REASON).collect();
                let message = format!("cannot parse the request: {reason}");
                connection
                    .send(&Answer::from(Error::usage(message)), &[])
                    .await?;
                continue;
            }
            Err(error) => return Err(error),
        };
        if let Request::Hello(said) = request {
            hello = Some(said);
            connection
                .send(&Answer::Welcome(service.welcome()), &[])
                .await?;
            continue;
        }
        if let Some(error) = stranger(hello.as_ref()) {
            connection.send(&Answer::from(error), &[]).await?;
            continue;
        }
        if let Err(error) = level.check(&request, &attachments) {
            connection.send(&Answer::from(error), &[]).await?;
            continue;
        }
        place.keep();
        let answer = match request {
            Request::Attach(attach) => {
                let attached = answer_attach(service, attach, beside).await;
                attached.and_then(|(attached, held)| {
                    if let Some(held) = held {
                        link = Some(service.link()?);
                        attachments.push((attached.pod.clone(), held));
                    }
                    Ok(Answer::Attached(attached))
                })
            }
            Request::KeepNamespaces { pod, kinds } if kinds.len() == beside.len() => service
                .keep_namespaces(&pod, kinds, beside)
                .map(|()| Answer::Done),
            Request::KeepNamespaces { .. } => Err(Error::usage(
                "the request needs one descriptor for each namespace",
            )),
            Request::Namespaces { pod } => match service.namespaces(&pod) {
                Ok((pod, namespaces)) => {
                    let beside: Vec<_> = namespaces.iter().map(AsFd::as_fd).collect();
                    connection.send(&Answer::Namespaces(pod), &beside).await?;
                    continue;
                }
                Err(error) => Err(error),
            },
            // By what it holds and not by a name, which may be another client's by now.
            Request::Detach { pod } if level == Level::Attach => {
                for (_, held) in attachments.extract_if(.., |(own, _)| *own == pod) {
                    service.release(held).await;
                }
                Ok(Answer::Done)
            }
            Request::Detach { pod } => service.detach(&pod).await.map(|()| Answer::Done),
            Request::DropLease(request) => service.drop_lease(request).await.map(Answer::Dropped),
            Request::Leave => service.leave().await.map(|()| Answer::Done),
            Request::Cni(call) => {
                let replied = service.cni(call, beside, &mut session);
                replied.await.map(Answer::Cni)
            }
            Request::Report(table) => match service.report(table).await {
                Ok(rows) => {
                    send_rows(connection, rows).await?;
                    continue;
                }
                Err(error) => Err(error),
            },
            other => Err(Error::usage(format!(
                "this node does not support the request {other:?}"
            ))),
        };
        connection
            .send(&answer.unwrap_or_else(Answer::from), &[])
            .await?;
    }
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

async fn answer_attach<S: Service>(
    service: &S,
    attach: Attach,
    device: Vec<OwnedFd>,
) -> Result<(Attached, Option<S::Attachment>)> {
    if device.is_empty() {
        return Err(Error::usage("the request to attach carries no device"));
    }
    service.attach(attach, device).await
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

        async fn report(&self, _: Table) -> Result<Vec<serde_json::Value>> {
            Ok(Vec::new())
        }

        async fn drop_lease(&self, request: DropLease) -> Result<Dropped> {
            Err(Error::failed(format!("no lease {}", request.lease)))
        }

        async fn leave(&self) -> Result<()> {
            Ok(())
        }
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
        let server = tokio::spawn(serve(listener, Level::Full, Arc::new(Empty)));
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
            let connection = Connection::new(theirs);
            let (place, _) = Clients::new(1).wait().await.take();
            tokio::spawn(async move { converse(&connection, Level::Full, &Empty, &place).await });
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
        let cases: [(Request, &[Level]); 13] = [
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
        let connection = Connection::new(theirs);
        let (place, _) = Clients::new(1).wait().await.take();
        let server =
            tokio::spawn(async move { converse(&connection, Level::Full, &Empty, &place).await });
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
