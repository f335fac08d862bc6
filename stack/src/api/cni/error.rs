//! What a runtime is told when a command does not succeed.

use std::fmt::Display;

use serde_json::json;
use thiserror::Error;

use super::environment::Command;
use super::version::Version;

/// Characters of what others wrote that an error repeats.
const SHOWN: usize = 200;

/// Why a command does not succeed: codes and, where the reference implementation has one, its text
/// (`pkg/skel/skel.go` and `pkg/utils` of containernetworking/cni).
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Error {
    /// Variables that the command needs are not there.
    #[error("required env variables [{}] missing", .0.join(","))]
    MissingVariables(Vec<&'static str>),
    /// There is no such command.
    #[error("unknown CNI_COMMAND: {}", shown(.0))]
    UnknownCommand(String),
    /// A container's identity has characters that it may not have.
    #[error("invalid characters in containerID")]
    ContainerCharacters(String),
    /// A container's identity is longer than any runtime makes one.
    #[error("containerID is too long")]
    ContainerLength(usize),
    /// An interface's name is longer than the kernel has room for.
    #[error("interface name is too long")]
    InterfaceLength(usize),
    /// An interface's name is a directory's.
    #[error("interface name is . or ..")]
    InterfaceDots,
    /// An interface's name has characters that the kernel does not take.
    #[error("interface name contains / or : or whitespace characters")]
    InterfaceCharacters,
    /// Another variable is wrong.
    #[error("{name}: {problem}")]
    Variable {
        /// Its name.
        name: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// The configuration, or something else, cannot be read or written.
    #[error("{0}")]
    Io(String),
    /// The configuration is no JSON object.
    #[error("error unmarshall network config: {0}")]
    Json(String),
    /// A key of the configuration has a value of another type.
    #[error("error unmarshall network config: {key}: {problem}")]
    Type {
        /// The key.
        key: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// The network has no name.
    #[error("missing network name")]
    MissingName,
    /// The network's name has characters that it may not have, or too many.
    #[error("invalid characters found in network name")]
    NameCharacters(String),
    /// The configuration is of a version that is not spoken.
    #[error("incompatible CNI versions")]
    IncompatibleVersion(String),
    /// The configuration is of a version that does not have the command.
    #[error("config version does not allow {0}")]
    CommandNotAllowed(Command),
    /// A key of the configuration asks for what there is not.
    #[error("unsupported field {key}: {}", shown(.value))]
    Unsupported {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
    },
    /// A key of the configuration has a value that means nothing.
    #[error("invalid network config: {key}: {problem}")]
    Invalid {
        /// The key.
        key: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// CNI_NETNS is no network namespace for a container.
    #[error("{0}")]
    Namespace(String),
    /// There is no such attachment. Only CHECK may say so: a runtime that hears it need not clean up.
    #[error("{0}")]
    UnknownContainer(String),
    /// It may succeed later.
    #[error("{0}")]
    TryAgainLater(String),
    /// No pod could be attached now; for STATUS.
    #[error("{0}")]
    NotAvailable(String),
    /// A delegate did not succeed, and has said this.
    #[error("{message}")]
    Delegate {
        /// Its code.
        code: u32,
        /// What it says.
        message: String,
        /// And further.
        details: String,
    },
    /// Anything else.
    #[error("{0}")]
    Failed(String),
}

impl Error {
    /// Its code: up to 99 those of the specification, 8 that of libcni.
    #[must_use]
    pub const fn code(&self) -> u32 {
        match self {
            Self::IncompatibleVersion(_) | Self::CommandNotAllowed(_) => 1,
            Self::Unsupported { .. } => 2,
            Self::UnknownContainer(_) => 3,
            Self::MissingVariables(_)
            | Self::UnknownCommand(_)
            | Self::ContainerCharacters(_)
            | Self::ContainerLength(_)
            | Self::InterfaceLength(_)
            | Self::InterfaceDots
            | Self::InterfaceCharacters
            | Self::Variable { .. } => 4,
            Self::Io(_) => 5,
            Self::Json(_) | Self::Type { .. } => 6,
            Self::MissingName | Self::NameCharacters(_) | Self::Invalid { .. } => 7,
            Self::Namespace(_) => 8,
            Self::TryAgainLater(_) => 11,
            Self::NotAvailable(_) => 50,
            Self::Delegate { code, .. } => *code,
            Self::Failed(_) => 100,
        }
    }

    /// What there is to say beyond the message; nothing for most.
    #[must_use]
    pub fn details(&self) -> String {
        match self {
            Self::ContainerCharacters(text) | Self::NameCharacters(text) => shown(text),
            Self::ContainerLength(most) | Self::InterfaceLength(most) => {
                let what = match self {
                    Self::ContainerLength(_) => "containerID",
                    _ => "interface name",
                };
                format!("{what} should be less than {} characters", most + 1)
            }
            Self::IncompatibleVersion(version) => {
                let spoken = Version::ALL.map(|it| format!("\"{it}\"")).join(" ");
                let version = shown(version);
                format!("config is {version:?}, plugin supports [{spoken}]")
            }
            Self::Delegate { details, .. } => shown(details),
            _ => String::new(),
        }
    }

    /// What goes to standard output, in one line: as of this version of the specification, or the
    /// newest if it is not known.
    #[must_use]
    pub fn print(&self, version: Option<Version>) -> String {
        let mut printed = json!({
            "cniVersion": version.unwrap_or(Version::NEWEST).as_str(),
            "code": self.code(),
            "msg": self.to_string(),
        });
        let details = self.details();
        if !details.is_empty() {
            printed["details"] = details.into();
        }
        printed.to_string()
    }
}

/// What others wrote, or a beginning of it.
pub(in crate::api) fn shown(text: impl Display) -> String {
    let text = text.to_string();
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
