//! What the host's `resolv.conf` says: which resolvers it asks, and how it looks for short names.

use std::fs;
use std::net::{SocketAddr, SocketAddrV6};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_proto::rr::Name;
use ipnet::IpNet;
use muslin_stack::addresses::Nets;
use nix::net::if_::if_nametoindex;
use parking_lot::Mutex;
use resolv_conf::{Config, ScopedIp};
use tracing::{debug, info};

use super::zones::DOMAIN;

/// The port of the service.
pub(crate) const PORT: u16 = 53;
/// Where a host's resolvers are listed.
pub(crate) const RESOLV_CONF: &str = "/etc/resolv.conf";

/// How long the file is not looked at again.
const HOLD: Duration = Duration::from_secs(1);
/// As many resolvers as libraries use (resolv.conf(5)).
const MAX_RESOLVERS: usize = 3;
/// The longest line in bytes that every library reads: musl skips longer ones.
const MAX_LINE: usize = 254;

/// What the file says, as far as it is of use to pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HostConfig {
    /// Its resolvers without those in the pod network.
    pub(super) resolvers: Vec<SocketAddr>,
    /// The domains in which pods look for short names: that of pods first.
    pub(super) search: Vec<String>,
    /// Options as they are written there.
    pub(super) options: Vec<String>,
}

impl HostConfig {
    /// What the bytes of such a file say.
    fn parse(text: &[u8], network: Nets) -> Self {
        let (config, _) = Config::parse_with_errors(text);
        let listed = config.get_nameservers_or_local();
        let listed = listed.iter().filter_map(socket_address);
        let networks: Vec<IpNet> = network.iter().collect();
        let is_pods = |address: &SocketAddr| {
            let ip = address.ip().to_canonical();
            networks.iter().any(|network| network.contains(&ip))
        };
        Self {
            resolvers: listed
                .filter(|it| !is_pods(it))
                .take(MAX_RESOLVERS)
                .collect(),
            search: search(config.get_last_search_or_domain().map(String::as_str)),
            options: options(text),
        }
    }
}

/// The domains of pods and of a host, as many as a line holds.
pub(super) fn search<'a>(host: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut search = vec![DOMAIN.to_owned()];
    let mut len = "search".len() + 1 + DOMAIN.len();
    for domain in host.map(|domain| domain.trim_end_matches('.')) {
        let is_known = |other: &String| other.eq_ignore_ascii_case(domain);
        if !is_domain(domain) || search.iter().any(is_known) {
            continue;
        }
        len += 1 + domain.len();
        if len > MAX_LINE {
            debug!("{domain} is not a search domain of pods: the line is full");
            break;
        }
        search.push(domain.to_owned());
    }
    search
}

fn is_domain(text: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    !text.is_empty() && text.bytes().all(is_plain) && Name::from_ascii(text).is_ok()
}

/// All options, also those that only newer libraries know, as many as a line holds.
fn options(text: &[u8]) -> Vec<String> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_:".contains(&byte);
    let mut options = Vec::new();
    let mut len = "options".len();
    for line in String::from_utf8_lossy(text).lines() {
        let mut words = line.split_whitespace();
        if words.next() != Some("options") {
            continue;
        }
        for word in words.take_while(|word| !word.starts_with(['#', ';'])) {
            len += 1 + word.len();
            if word.bytes().all(is_plain) && len <= MAX_LINE {
                options.push(word.to_owned());
            }
        }
    }
    options
}

fn socket_address(address: &ScopedIp) -> Option<SocketAddr> {
    Some(match address {
        ScopedIp::V4(v4) => SocketAddr::new((*v4).into(), PORT),
        ScopedIp::V6(v6, None) => SocketAddr::new((*v6).into(), PORT),
        ScopedIp::V6(v6, Some(interface)) => {
            let index = interface.parse().ok();
            let index = index.or_else(|| if_nametoindex(interface.as_str()).ok())?;
            SocketAddrV6::new(*v6, PORT, 0, index).into()
        }
    })
}

/// A file like [`RESOLV_CONF`] that may change at any time.
#[derive(Debug)]
pub(super) struct HostFile {
    path: PathBuf,
    /// Addresses of pods: no socket of the host reaches one, and one of them is the service's own.
    network: Nets,
    last: Mutex<Option<Read>>,
}

/// What was read last.
#[derive(Debug)]
struct Read {
    at: Instant,
    text: Vec<u8>,
    config: Arc<HostConfig>,
}

impl HostFile {
    pub(super) fn new(path: impl Into<PathBuf>, network: impl Into<Nets>) -> Self {
        Self {
            path: path.into(),
            network: network.into(),
            last: Mutex::default(),
        }
    }

    /// What it says now. A file that cannot be read says what an empty one does.
    pub(super) fn read(&self) -> Arc<HostConfig> {
        let mut last = self.last.lock();
        let now = Instant::now();
        if let Some(read) = last.as_ref().filter(|read| now < read.at + HOLD) {
            return read.config.clone();
        }
        let text = fs::read(&self.path).unwrap_or_else(|error| {
            debug!("{}: {error}", self.path.display());
            Vec::new()
        });
        let config = match last.take().filter(|read| read.text == text) {
            Some(read) => read.config,
            None => {
                let config = Arc::new(HostConfig::parse(&text, self.network));
                let HostConfig {
                    resolvers, search, ..
                } = &*config;
                let path = self.path.display();
                info!("resolvers of {path}: {resolvers:?}; search domains: {search:?}");
                config
            }
        };
        *last = Some(Read {
            at: now,
            text,
            config: config.clone(),
        });
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> HostConfig {
        HostConfig::parse(text.as_bytes(), "10.1.0.0/16".parse().unwrap())
    }

    #[test]
    fn short_names_are_looked_for_as_on_the_host() {
        for (text, domains) in [
            ("", &[][..]),
            ("search corp.example\n", &["corp.example"]),
            ("domain corp.example\n", &["corp.example"]),
            // The last one counts.
            (
                "search a.example b.example\nsearch c.example\n",
                &["c.example"],
            ),
            (
                "domain a.example\nsearch b.example c.example.\n",
                &["b.example", "c.example"],
            ),
            // As systemd-resolved writes it where there is none.
            ("search .\n", &[]),
            (
                "search muslin a.example A.example Muslin.\n",
                &["a.example"],
            ),
            (
                "search a..example x/y \u{fc}.example _a.example\n",
                &["_a.example"],
            ),
            (
                "# search no.example\n;search no.example\n search yes.example # no\n",
                &["yes.example"],
            ),
        ] {
            let search = parse(text).search;
            assert_eq!(search[0], "muslin", "{text}");
            assert_eq!(search[1..], *domains, "{text}");
        }
    }

    #[test]
    fn options_are_the_hosts_own() {
        for (text, expected) in [
            ("", &[][..]),
            ("options ndots:2 timeout:1\n", &["ndots:2", "timeout:1"]),
            (
                "options edns0\nnameserver 192.0.2.1\noptions trust-ad new-one:7 # no\n",
                &["edns0", "trust-ad", "new-one:7"],
            ),
            (
                "#options ndots:2\noptions a\u{fc} b$c rotate\n",
                &["rotate"],
            ),
        ] {
            assert_eq!(parse(text).options, expected, "{text}");
        }
    }

    #[test]
    fn a_line_is_no_longer_than_every_library_reads() {
        let domains: Vec<_> = (0..100).map(|i| format!("d{i}.example")).collect();
        let words: Vec<_> = (0..100).map(|i| format!("option-{i}")).collect();
        let config = parse(&format!(
            "search {}\noptions {}\n",
            domains.join(" "),
            words.join(" ")
        ));
        for (line, longest) in [
            (format!("search {}", config.search.join(" ")), 12),
            (format!("options {}", config.options.join(" ")), 10),
        ] {
            let lacking = MAX_LINE - line.len();
            assert!(lacking < longest, "{lacking}: {line}");
        }
        assert_eq!(config.search[1..], domains[..config.search.len() - 1]);
        assert_eq!(config.options, words[..config.options.len()]);
    }
}
