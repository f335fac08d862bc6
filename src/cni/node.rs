//! The plugin's end of the control socket: blocking, and with a deadline for everything.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use muslin_stack::api::cni::error::Error;
use muslin_stack::api::cni::{Call, Reply};
use muslin_stack::api::control::{Answer, Code, Hello, PROTOCOL, Refusal, Request};

use crate::control::BlockingConnection;
use crate::control::version::{VERSION, mismatch};

/// How often a node that is not there is looked for again.
const PAUSE: Duration = Duration::from_millis(50);
/// How long a call may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// A connection to a node.
pub(super) struct Node {
    connection: BlockingConnection,
    /// Why it cannot attach pods yet.
    pub(super) not_ready: Option<String>,
}

/// Why a node does not do what it is asked.
#[derive(Debug)]
pub(super) enum Trouble {
    /// None listens.
    Absent(String),
    /// One does, and does not answer, or ends the connection.
    Lost(String),
    /// It says why.
    Refused(Refusal),
}

impl Trouble {
    /// What the runtime is told.
    pub(super) fn into_error(self) -> Error {
        match self {
            Self::Absent(text) | Self::Lost(text) => Error::TryAgainLater(text),
            Self::Refused(Refusal { code, message }) => match code {
                Code::NotReady => Error::TryAgainLater(message),
                Code::NoSuchPod => Error::Failed(message),
                code if code.is_usage() => Error::Invalid {
                    key: "the node refuses",
                    problem: message,
                },
                _ => Error::Failed(message),
            },
        }
    }

    /// In one line.
    pub(super) fn text(self) -> String {
        match self {
            Self::Absent(text) | Self::Lost(text) => text,
            Self::Refused(refusal) => refusal.message,
        }
    }
}

impl Node {
    /// Connects to the node that listens at a socket.
    pub(super) fn connect(path: &str, until: Instant) -> Result<Self, Trouble> {
        let connection = BlockingConnection::connect(Path::new(path), until);
        let connection = connection.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Trouble::Absent(format!(
                "no node listens at {path}: there is no such socket; start 'muslin node'"
            )),
            io::ErrorKind::ConnectionRefused => Trouble::Absent(format!(
                "no node listens at {path}: its process has ended; start 'muslin node'"
            )),
            _ if is_late(&error) => Trouble::Lost(does_not_answer(path)),
            _ => Trouble::Absent(format!("cannot connect to the node at {path}: {error}")),
        })?;
        let mut node = Self {
            connection,
            not_ready: None,
        };
        match node.exchange(&Request::Hello(Hello::new(VERSION)), &[], until)? {
            Answer::Welcome(welcome) if welcome.protocol == PROTOCOL => {
                node.not_ready = welcome.not_ready;
                Ok(node)
            }
            Answer::Welcome(welcome) => Err(Trouble::Refused(Refusal {
                code: Code::WrongVersion,
                message: format!(
                    "{}: update the older of the two",
                    mismatch(path, &welcome, "muslin-cni")
                ),
            })),
            other => Err(unexpected(&other)),
        }
    }

    /// Waits until a node listens there that can attach pods.
    pub(super) fn await_ready(path: &str, until: Instant) -> Result<Self, Trouble> {
        loop {
            let trouble = match Self::connect(path, until) {
                Ok(Self {
                    not_ready: Some(message),
                    ..
                }) => Trouble::Refused(Refusal {
                    code: Code::NotReady,
                    message,
                }),
                Err(refused @ Trouble::Refused(_)) => return Err(refused),
                Err(trouble) => trouble,
                Ok(ready) => return Ok(ready),
            };
            if Instant::now() + PAUSE >= until {
                return Err(trouble);
            }
            sleep(PAUSE);
        }
    }

    /// Asks for something.
    pub(super) fn ask<T: AsFd>(
        &mut self,
        call: Call,
        beside: &[T],
        until: Instant,
    ) -> Result<Reply, Trouble> {
        self.send(call, beside, until)?;
        self.answer(until)
    }

    /// Asks for something that is answered with "done".
    pub(super) fn command(&mut self, call: Call, until: Instant) -> Result<(), Trouble> {
        self.command_with::<std::fs::File>(call, &[], until)
    }

    /// The same with descriptors beside it.
    pub(super) fn command_with<T: AsFd>(
        &mut self,
        call: Call,
        beside: &[T],
        until: Instant,
    ) -> Result<(), Trouble> {
        match self.ask(call, beside, until)? {
            Reply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Asks for something; the answer comes by [`Self::answer`].
    pub(super) fn send<T: AsFd>(
        &mut self,
        call: Call,
        beside: &[T],
        until: Instant,
    ) -> Result<(), Trouble> {
        let beside: Vec<_> = beside.iter().map(AsFd::as_fd).collect();
        self.transmit(&Request::Cni(call), &beside, until)
    }

    /// The answer to the last call.
    pub(super) fn answer(&mut self, until: Instant) -> Result<Reply, Trouble> {
        match self.receive(until)? {
            Answer::Cni(reply) => Ok(reply),
            Answer::Done => Ok(Reply::Done),
            other => Err(unexpected(&other)),
        }
    }

    fn exchange(
        &mut self,
        request: &Request,
        beside: &[BorrowedFd<'_>],
        until: Instant,
    ) -> Result<Answer, Trouble> {
        self.transmit(request, beside, until)?;
        self.receive(until)
    }

    fn transmit(
        &mut self,
        request: &Request,
        beside: &[BorrowedFd<'_>],
        until: Instant,
    ) -> Result<(), Trouble> {
        let sent = self.connection.send(request, beside, until);
        sent.map_err(|error| lost(&error))
    }

    /// The next answer that somebody has asked for, unless it is a refusal.
    fn receive(&mut self, until: Instant) -> Result<Answer, Trouble> {
        loop {
            match self.connection.receive(until) {
                Ok(Some((Answer::Changed(_), _))) => {}
                Ok(Some((Answer::Refused(refusal), _))) => return Err(Trouble::Refused(refusal)),
                Ok(Some((answer, _))) => return Ok(answer),
                Ok(None) => {
                    let text = "the node has ended the connection: its process was stopped";
                    return Err(Trouble::Lost(text.to_owned()));
                }
                Err(error) if is_late(&error) => {
                    return Err(Trouble::Lost(does_not_answer("its socket")));
                }
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    let text = "the node's answer is not understood: is it of another version?";
                    return Err(Trouble::Lost(text.to_owned()));
                }
                Err(error) => return Err(lost(&error)),
            }
        }
    }
}

fn lost(error: &io::Error) -> Trouble {
    Trouble::Lost(format!("the node is gone: {error}"))
}

fn is_late(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

fn does_not_answer(at: &str) -> String {
    format!("the node does not answer at {at}: its process hangs or is stopped")
}

pub(super) fn unexpected(answer: &impl std::fmt::Debug) -> Trouble {
    Trouble::Lost(format!("the node gave an unexpected answer: {answer:?}"))
}
