//! What a command ends with when it does not succeed: one line for people and an exit code.

use std::fmt::Display;

use muslin_stack::api::control::Code;
use nix::errno::Errno;

/// Why a command failed, in one line that says what was wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Wrong usage or configuration; nothing was begun. Exit code 2.
    #[error("{0}")]
    Usage(String),
    /// It failed at run time. Exit code 1.
    #[error("{0}")]
    Failed(String),
    /// A node refuses a request. Exit code 2 if the request itself was wrong, else 1.
    #[error("{message}")]
    Refused {
        /// Why, for programs.
        code: Code,
        /// Why, for people.
        message: String,
    },
    /// The node's lease is another's now, or is fought over: starting again by itself would not
    /// help. Exit code 3.
    #[error("{0}")]
    LeaseLost(String),
    /// A command cannot be started. The exit codes are those of shells: 127 if there is none of that
    /// name, else 126.
    #[error("cannot run {program}: {error}")]
    Start {
        /// Its name.
        program: String,
        /// Why.
        error: std::io::Error,
    },
    /// A command in a pod ended with this exit code, which becomes ours; nothing is printed.
    #[error("the command ended with exit code {0}")]
    Command(u8),
}

/// A result whose error ends the command.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Wrong usage or configuration.
    pub fn usage(message: impl Display) -> Self {
        Self::Usage(message.to_string())
    }

    /// Failed at run time.
    pub fn failed(message: impl Display) -> Self {
        Self::Failed(message.to_string())
    }

    /// A node refuses a request.
    pub fn refused(code: Code, message: impl Display) -> Self {
        let message = message.to_string();
        Self::Refused { code, message }
    }

    /// The process' exit code for this error.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Refused { code, .. } if code.is_usage() => 2,
            Self::Refused { .. } => 1,
            Self::Failed(_) => 1,
            Self::LeaseLost(_) => 3,
            Self::Start { error, .. } if error.kind() == std::io::ErrorKind::NotFound => 127,
            Self::Start { .. } => 126,
            Self::Command(code) => *code,
        }
    }
}

/// The system's number of an error; `UnknownErrno` if it is not the system's.
pub(crate) fn errno(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or_default())
}

/// Says where an error happened, in the words of the one who reads it.
pub trait Context<T> {
    /// `what: error`, as a failure at run time.
    fn context(self, what: impl Display) -> Result<T>;
}

impl<T, E: Display> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl Display) -> Result<T> {
        self.map_err(|error| Error::Failed(format!("{what}: {error}")))
    }
}
