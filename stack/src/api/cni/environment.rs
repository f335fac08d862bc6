//! What a runtime says in the plugin's environment.

use std::fmt;
use std::net::IpAddr;

use super::KubernetesPod;
use super::error::{Error, shown};
use super::fields::{address, is_identifier, mac};

/// Bytes of the longest container identity: what an interface's alias has room for.
pub const MAX_CONTAINER: usize = 255 - ALIAS.len();
/// Bytes of the longest interface name (`IFNAMSIZ` less one).
pub const MAX_INTERFACE: usize = 15;
/// Bytes of the longest path (`PATH_MAX` less one).
pub const MAX_PATH: usize = 4095;
/// Bytes of the longest `CNI_ARGS`.
pub const MAX_ARGUMENTS: usize = 16 << 10;
/// Bytes of the longest name of Kubernetes.
const MAX_NAME: usize = 253;
/// What the alias of an interface begins with that is ours; the container's identity follows.
pub const ALIAS: &str = "muslin:";

/// What a runtime asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Attach a container.
    Add,
    /// Say whether a container is attached as it is to be.
    Check,
    /// Detach a container.
    Del,
    /// Detach all containers but some.
    Gc,
    /// Say whether a container could be attached.
    Status,
    /// Say which versions are spoken.
    Version,
}

impl Command {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Add,
        Self::Check,
        Self::Del,
        Self::Gc,
        Self::Status,
        Self::Version,
    ];

    /// Its name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Check => "CHECK",
            Self::Del => "DEL",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }

    /// Whether it is about one container.
    const fn has_container(self) -> bool {
        matches!(self, Self::Add | Self::Check | Self::Del)
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The environment of one command.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Environment {
    /// `CNI_COMMAND`.
    pub command: Command,
    /// `CNI_CONTAINERID`; empty for commands that are not about one container.
    pub container: String,
    /// `CNI_NETNS`, which only DEL may be without.
    pub netns: Option<String>,
    /// `CNI_IFNAME`; empty like the container.
    pub interface: String,
    /// `CNI_ARGS` of ADD. Others have no use for it.
    pub arguments: Arguments,
    /// `CNI_PATH`, where delegates are.
    pub path: String,
    /// `CNI_NETNS_OVERRIDE`: the container's namespace may be that of the plugin.
    pub may_be_own_netns: bool,
}

/// What `CNI_ARGS` says, as far as it is known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Arguments {
    /// `K8S_POD_NAMESPACE`, `K8S_POD_NAME` and `K8S_POD_UID`.
    pub pod: Option<KubernetesPod>,
    /// `IP`: one address or several with commas in between, with a prefix length or without.
    pub addresses: Vec<IpAddr>,
    /// `MAC`.
    pub mac: Option<String>,
}

impl Environment {
    /// The environment as `get` has it, bytes of a variable by its name; nothing if there is no
    /// command at all.
    ///
    /// # Errors
    /// Those of code 4.
    pub fn read(get: impl Fn(&str) -> Option<Vec<u8>>) -> Result<Option<Self>, Error> {
        let text = |name: &'static str| -> Result<String, Error> {
            let bytes = get(name).unwrap_or_default();
            String::from_utf8(bytes).map_err(|_| Error::Variable {
                name,
                problem: "it is not UTF-8".to_owned(),
            })
        };
        let command = text("CNI_COMMAND")?;
        if command.is_empty() {
            return Ok(None);
        }
        let known = Command::ALL.into_iter().find(|it| it.as_str() == command);
        let command = known.ok_or(Error::UnknownCommand(command))?;
        let mut environment = Self {
            command,
            container: String::new(),
            netns: None,
            interface: String::new(),
            arguments: Arguments::default(),
            path: String::new(),
            may_be_own_netns: false,
        };
        if command == Command::Version {
            return Ok(Some(environment));
        }
        environment.path = text("CNI_PATH")?;
        if !command.has_container() {
            return Ok(Some(environment));
        }
        environment.container = text("CNI_CONTAINERID")?;
        environment.netns = Some(text("CNI_NETNS")?).filter(|path| !path.is_empty());
        environment.interface = text("CNI_IFNAME")?;
        environment.require()?;
        check_container(&environment.container)?;
        check_interface(&environment.interface)?;
        if let Some(path) = &environment.netns
            && path.len() > MAX_PATH
        {
            return Err(Error::Variable {
                name: "CNI_NETNS",
                problem: "it is longer than a path can be".to_owned(),
            });
        }
        let is_set = text("CNI_NETNS_OVERRIDE")?;
        environment.may_be_own_netns =
            matches!(&*is_set, "1" | "t" | "T" | "true" | "TRUE" | "True");
        if command == Command::Add {
            environment.arguments = Arguments::read(&text("CNI_ARGS")?)?;
        }
        Ok(Some(environment))
    }

    /// Names all that is missing at once. `CNI_PATH` alone is not worth an error, as the
    /// specification has it: only delegates need it.
    fn require(&self) -> Result<(), Error> {
        let needs_netns = self.command != Command::Del;
        let variables = [
            ("CNI_CONTAINERID", self.container.is_empty(), true),
            ("CNI_NETNS", needs_netns && self.netns.is_none(), true),
            ("CNI_IFNAME", self.interface.is_empty(), true),
            ("CNI_PATH", self.path.is_empty(), false),
        ];
        let missing = variables.iter().filter(|(_, is_missing, _)| *is_missing);
        if missing.clone().any(|(_, _, is_needed)| *is_needed) {
            let names = missing.map(|(name, _, _)| *name).collect();
            return Err(Error::MissingVariables(names));
        }
        Ok(())
    }

    /// The alias that the container's interface has.
    #[must_use]
    pub fn alias(&self) -> String {
        alias(&self.container)
    }
}

/// The alias of a container's interface.
#[must_use]
pub fn alias(container: &str) -> String {
    format!("{ALIAS}{container}")
}

impl Arguments {
    /// Reads `KEY=VALUE;KEY=VALUE`. Keys that are not known are left alone.
    fn read(text: &str) -> Result<Self, Error> {
        let wrong = |problem: String| Error::Variable {
            name: "CNI_ARGS",
            problem,
        };
        if text.len() > MAX_ARGUMENTS {
            return Err(wrong(format!("it has more than {MAX_ARGUMENTS} bytes")));
        }
        let mut arguments = Self::default();
        for pair in text.split(';').filter(|pair| !pair.is_empty()) {
            let Some((key, value)) = pair.split_once('=') else {
                return Err(wrong(format!("invalid pair {:?}", shown(pair))));
            };
            let of_pod = match key {
                "K8S_POD_NAMESPACE" | "K8S_POD_NAME" | "K8S_POD_UID" => {
                    if value.len() > MAX_NAME {
                        return Err(wrong(format!("{key} has more than {MAX_NAME} bytes")));
                    }
                    arguments.pod.get_or_insert_default()
                }
                "IP" => {
                    for part in value.split(',').filter(|part| !part.is_empty()) {
                        let read = address(part).map_err(|why| wrong(format!("IP: {why}")))?;
                        arguments.addresses.push(read);
                    }
                    continue;
                }
                "MAC" if value.is_empty() => continue,
                "MAC" => {
                    let read = mac(value).map_err(|why| wrong(format!("MAC: {why}")))?;
                    arguments.mac = Some(read);
                    continue;
                }
                _ => continue,
            };
            let field = match key {
                "K8S_POD_NAMESPACE" => &mut of_pod.namespace,
                "K8S_POD_NAME" => &mut of_pod.name,
                _ => &mut of_pod.uid,
            };
            value.clone_into(field);
        }
        Ok(arguments)
    }
}

pub(in crate::api) fn check_container(name: &str) -> Result<(), Error> {
    if !is_identifier(name) {
        return Err(Error::ContainerCharacters(name.to_owned()));
    }
    if name.len() > MAX_CONTAINER {
        return Err(Error::ContainerLength(MAX_CONTAINER));
    }
    Ok(())
}

pub(in crate::api) fn check_interface(name: &str) -> Result<(), Error> {
    if name.len() > MAX_INTERFACE {
        return Err(Error::InterfaceLength(MAX_INTERFACE));
    }
    if name == "." || name == ".." {
        return Err(Error::InterfaceDots);
    }
    // A zero byte cannot be in an environment, but in what else calls this.
    let is_bad = |c: char| c == '/' || c == ':' || c == '\0' || c.is_whitespace();
    if name.contains(is_bad) {
        return Err(Error::InterfaceCharacters);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A command with these variables beside those that a container has.
    fn read(changes: &[(&str, &str)]) -> Result<Option<Environment>, Error> {
        let mut all = vec![
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", "c1"),
            ("CNI_NETNS", "/run/netns/c1"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", "/opt/cni/bin"),
        ];
        all.extend(changes);
        Environment::read(|name| {
            let (_, value) = all.iter().rev().find(|(it, _)| *it == name)?;
            Some(value.as_bytes().to_vec())
        })
    }

    fn refused(changes: &[(&str, &str)]) -> (u32, String, String) {
        let error = read(changes).unwrap_err();
        (error.code(), error.to_string(), error.details())
    }

    #[test]
    fn all_that_is_missing_is_told_at_once() {
        let none = [
            ("CNI_CONTAINERID", ""),
            ("CNI_NETNS", ""),
            ("CNI_IFNAME", ""),
            ("CNI_PATH", ""),
        ];
        for (command, names) in [
            ("ADD", "CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME,CNI_PATH"),
            ("CHECK", "CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME,CNI_PATH"),
            ("DEL", "CNI_CONTAINERID,CNI_IFNAME,CNI_PATH"),
        ] {
            let mut changes = none.to_vec();
            changes.push(("CNI_COMMAND", command));
            let (code, message, _) = refused(&changes);
            assert_eq!(code, 4);
            assert_eq!(message, format!("required env variables [{names}] missing"));
        }
        for command in ["GC", "STATUS", "VERSION"] {
            let mut changes = none.to_vec();
            changes.push(("CNI_COMMAND", command));
            assert_eq!(read(&changes).unwrap().unwrap().command.as_str(), command);
        }
        assert_eq!(read(&[("CNI_COMMAND", "")]).unwrap(), None);
        assert!(read(&[("CNI_PATH", "")]).is_ok());
        let gone = read(&[("CNI_COMMAND", "DEL"), ("CNI_NETNS", "")]);
        assert_eq!(gone.unwrap().unwrap().netns, None);
    }

    #[test]
    fn what_is_wrong_is_told_as_the_reference_does() {
        let long = "x".repeat(MAX_CONTAINER + 1);
        let path = "x".repeat(MAX_PATH + 1);
        let cases: &[(&str, &str, &str, &str)] = &[
            ("CNI_COMMAND", "add", "unknown CNI_COMMAND: add", ""),
            (
                "CNI_CONTAINERID",
                "-a",
                "invalid characters in containerID",
                "-a",
            ),
            (
                "CNI_CONTAINERID",
                "a/b",
                "invalid characters in containerID",
                "a/b",
            ),
            (
                "CNI_CONTAINERID",
                "ä",
                "invalid characters in containerID",
                "ä",
            ),
            (
                "CNI_CONTAINERID",
                &long,
                "containerID is too long",
                "containerID should be less than 249 characters",
            ),
            (
                "CNI_IFNAME",
                "0123456789012345",
                "interface name is too long",
                "interface name should be less than 16 characters",
            ),
            ("CNI_IFNAME", ".", "interface name is . or ..", ""),
            ("CNI_IFNAME", "..", "interface name is . or ..", ""),
            (
                "CNI_IFNAME",
                "a/b",
                "interface name contains / or : or whitespace characters",
                "",
            ),
            (
                "CNI_IFNAME",
                "a:b",
                "interface name contains / or : or whitespace characters",
                "",
            ),
            (
                "CNI_IFNAME",
                "a\u{a0}b",
                "interface name contains / or : or whitespace characters",
                "",
            ),
            (
                "CNI_NETNS",
                &path,
                "CNI_NETNS: it is longer than a path can be",
                "",
            ),
            ("CNI_ARGS", "A=1;B", "CNI_ARGS: invalid pair \"B\"", ""),
            (
                "CNI_ARGS",
                "IP=10.0.0.300",
                "CNI_ARGS: IP: '10.0.0.300' is not an address",
                "",
            ),
            (
                "CNI_ARGS",
                "MAC=02:00",
                "CNI_ARGS: MAC: '02:00' is not a MAC address",
                "",
            ),
        ];
        for (name, value, message, details) in cases {
            let expected = (4, (*message).to_owned(), (*details).to_owned());
            assert_eq!(refused(&[(name, value)]), expected);
        }
        let not_text = Environment::read(|name| {
            let value: &[u8] = if name == "CNI_COMMAND" {
                b"DEL"
            } else {
                b"\xff"
            };
            Some(value.to_vec())
        });
        assert_eq!(
            not_text.unwrap_err().to_string(),
            "CNI_PATH: it is not UTF-8"
        );
    }

    #[test]
    fn arguments_are_read_and_others_left_alone() {
        let text = "IgnoreUnknown=1;K8S_POD_UID=u;X=a=b;;K8S_POD_NAME=web;IP=10.1.2.3/24,fd00::3;\
                    MAC=0A:00:00:00:00:01;K8S_POD_NAMESPACE=default";
        let arguments = read(&[("CNI_ARGS", text)]).unwrap().unwrap().arguments;
        let pod = KubernetesPod {
            namespace: "default".to_owned(),
            name: "web".to_owned(),
            uid: "u".to_owned(),
        };
        assert_eq!(arguments.pod, Some(pod));
        let addresses: [IpAddr; 2] = ["10.1.2.3".parse().unwrap(), "fd00::3".parse().unwrap()];
        assert_eq!(arguments.addresses, addresses);
        assert_eq!(arguments.mac.as_deref(), Some("0a:00:00:00:00:01"));
        // What does not matter to a command does not stop it.
        let del = read(&[("CNI_COMMAND", "DEL"), ("CNI_ARGS", "B")]);
        assert_eq!(del.unwrap().unwrap().arguments, Arguments::default());
    }

    #[test]
    fn longest_names_have_room() {
        let container = "x".repeat(MAX_CONTAINER);
        let read = read(&[
            ("CNI_CONTAINERID", &container),
            ("CNI_IFNAME", "012345678901234"),
        ]);
        let environment = read.unwrap().unwrap();
        assert_eq!(environment.alias().len(), 255);
        assert!(!environment.may_be_own_netns);
    }
}
