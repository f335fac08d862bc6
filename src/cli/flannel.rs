//! flanneld's flags and variables, with its names, defaults and meaning, so that `muslin node` can
//! stand where flanneld stood.

use std::ffi::{OsStr, OsString};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{BoolishValueParser, Resettable};
use clap::{Arg, Args, Command};
use muslin_stack::control::lease::{RENEW_MARGIN, is_public_ipv6};
use regex::Regex;

use super::secret;
use crate::error::{Error, Result};
use crate::store::EtcdOptions;
use crate::underlay::InterfaceChoice;

#[derive(Debug, Args)]
#[group(skip)]
#[command(next_help_heading = "Options that flanneld has too")]
pub(super) struct Arguments {
    /// etcd servers with a flannel cluster's leases and network configuration
    #[arg(long, value_name = "URL,URL", conflicts_with = "store")]
    etcd_endpoints: Option<String>,
    /// Prefix of flannel's keys, in any store
    #[arg(long, value_name = "KEY", default_value = "/coreos.com/network")]
    etcd_prefix: String,
    /// CA certificate of the etcd servers
    #[arg(long, value_name = "FILE")]
    etcd_cafile: Option<PathBuf>,
    #[arg(long, value_name = "FILE", requires = "etcd_keyfile")]
    etcd_certfile: Option<PathBuf>,
    /// The key of that certificate
    #[arg(long, value_name = "FILE", requires = "etcd_certfile")]
    etcd_keyfile: Option<PathBuf>,
    /// User name for etcd
    #[arg(long, value_name = "NAME")]
    etcd_username: Option<String>,
    /// Password for etcd; better in a file or in FLANNELD_ETCD_PASSWORD
    #[arg(long, value_name = "TEXT", requires = "etcd_username")]
    etcd_password: Option<String>,
    /// A file with the password for etcd [default: systemd's credential etcd-password]
    #[arg(
        long,
        value_name = "FILE",
        requires = "etcd_username",
        conflicts_with = "etcd_password"
    )]
    etcd_password_file: Option<PathBuf>,
    /// The interface to other nodes, by name or address; if given several times, the first that
    /// exists [default: that of --public-ip, or of the default route]
    #[arg(long, value_name = "NAME")]
    iface: Vec<String>,
    /// The same, by a regular expression for its address or name
    #[arg(long, value_name = "REGEX")]
    iface_regex: Vec<Regex>,
    /// The same, by an address that is reached through it
    #[arg(long, value_name = "IP")]
    iface_can_reach: Option<Ipv4Addr>,
    /// The address that other nodes send to [default: the interface's]; with --iface it may be one that
    /// NAT translates to the interface's
    #[arg(long, value_name = "IP")]
    public_ip: Option<Ipv4Addr>,
    /// The IPv6 address that other nodes send to, where the network has IPv6 [default: the one of the
    /// interface that lasts longest]
    #[arg(long, value_name = "IP")]
    public_ipv6: Option<Ipv6Addr>,
    /// The subnet file for CNI plugins and Docker: flannel's is /run/flannel/subnet.env [default:
    /// subnet.env in the node's state directory]
    #[arg(long, value_name = "PATH")]
    subnet_file: Option<PathBuf>,
    /// Minutes before its expiry at which a lease is renewed; flannel's default is 60 [default: 720,
    /// half of its lifetime]
    #[arg(
        long,
        value_name = "MINUTES",
        value_parser = clap::value_parser!(u16).range(1..=1439)
    )]
    subnet_lease_renew_margin: Option<u16>,
    /// Address to serve /healthz and /readyz on
    #[arg(long, value_name = "IP", default_value = "0.0.0.0")]
    healthz_ip: IpAddr,
    /// TCP port to serve them on, 0 for none
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    healthz_port: u16,
    #[command(flatten)]
    idle: Idle,
    #[command(flatten)]
    refused: Refused,
}

/// Flags that are accepted, and have little or no effect.
#[derive(Debug, Args)]
#[group(skip)]
struct Idle {
    /// Write FLANNEL_IPMASQ=true into the subnet file
    #[arg(long, value_name = "BOOL", hide_short_help = true, num_args = 0..=1,
        require_equals = true, default_missing_value = "true",
        value_parser = BoolishValueParser::new())]
    ip_masq: Option<bool>,
    /// Without effect
    #[arg(long, value_name = "BOOL", hide_short_help = true, num_args = 0..=1,
        require_equals = true, default_missing_value = "true",
        value_parser = BoolishValueParser::new())]
    ip_masq_fully_random_disable: Option<bool>,
    /// Without effect
    #[arg(long, value_name = "SECONDS", hide_short_help = true)]
    iptables_resync: Option<u32>,
    /// Without effect
    #[arg(long, value_name = "BOOL", hide_short_help = true, num_args = 0..=1,
        require_equals = true, default_missing_value = "true",
        value_parser = BoolishValueParser::new())]
    iptables_forward_rules: Option<bool>,
    /// Without effect
    #[arg(long, value_name = "BOOL", hide_short_help = true, num_args = 0..=1,
        require_equals = true, default_missing_value = "true",
        value_parser = BoolishValueParser::new())]
    ip_blackhole_route: Option<bool>,
    /// Without effect: see MUSLIN_LOG
    #[arg(long, value_name = "LEVEL", hide_short_help = true)]
    v: Option<String>,
    /// Without effect: see MUSLIN_LOG
    #[arg(long, value_name = "LEVELS", hide_short_help = true)]
    vmodule: Option<String>,
    /// Without effect
    #[arg(
        long = "log_backtrace_at",
        value_name = "PLACE",
        hide_short_help = true
    )]
    log_backtrace_at: Option<String>,
}

/// Flags that must not be ignored.
#[derive(Debug, Args)]
#[group(skip)]
struct Refused {
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true,
        default_missing_value = "true", value_parser = BoolishValueParser::new())]
    kube_subnet_mgr: Option<bool>,
    #[arg(long, hide = true)]
    kube_api_url: Option<String>,
    #[arg(long, hide = true)]
    kubeconfig_file: Option<String>,
    #[arg(long, hide = true)]
    kube_annotation_prefix: Option<String>,
    #[arg(long, hide = true)]
    net_config_path: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true,
        default_missing_value = "true", value_parser = BoolishValueParser::new())]
    set_node_network_unavailable: Option<bool>,
}

impl Arguments {
    /// Refuses flags that a node cannot honour and must not ignore.
    pub(super) fn check(&self) -> Result<()> {
        let refused = &self.refused;
        if let Some(ipv6) = self.public_ipv6
            && (!is_public_ipv6(ipv6) || ipv6.is_loopback())
        {
            return Err(Error::usage(format!(
                "--public-ipv6: other nodes cannot reach this one at {ipv6}"
            )));
        }
        let kube = [
            ("kube-subnet-mgr", refused.kube_subnet_mgr == Some(true)),
            ("kube-api-url", refused.kube_api_url.is_some()),
            ("kubeconfig-file", refused.kubeconfig_file.is_some()),
            (
                "kube-annotation-prefix",
                refused.kube_annotation_prefix.is_some(),
            ),
            ("net-config-path", refused.net_config_path.is_some()),
            (
                "set-node-network-unavailable",
                refused.set_node_network_unavailable == Some(true),
            ),
        ];
        match kube.into_iter().find(|(_, is_given)| *is_given) {
            Some((flag, _)) => Err(Error::usage(format!(
                "--{flag} is not supported: leases are in etcd (--etcd-endpoints) or in another \
                 --store, not in Kubernetes"
            ))),
            None => Ok(()),
        }
    }

    /// One line to log about each given flag that has little or no effect.
    pub(super) fn notices(&self) -> Vec<String> {
        const RULES: &str = "has no effect: muslin writes no iptables rules";
        const LOGS: &str = "has no effect: MUSLIN_LOG sets what is logged";
        let idle = &self.idle;
        let lines = [
            (
                "ip-masq",
                idle.ip_masq == Some(true),
                "is passed on in the subnet file, and has no other effect: muslin writes no iptables \
                 rules",
            ),
            (
                "ip-masq-fully-random-disable",
                idle.ip_masq_fully_random_disable.is_some(),
                RULES,
            ),
            ("iptables-resync", idle.iptables_resync.is_some(), RULES),
            (
                "iptables-forward-rules",
                idle.iptables_forward_rules.is_some(),
                RULES,
            ),
            (
                "ip-blackhole-route",
                idle.ip_blackhole_route.is_some(),
                "has no effect: a node answers for unassigned addresses of its subnet",
            ),
            ("v", idle.v.is_some(), LOGS),
            ("vmodule", idle.vmodule.is_some(), LOGS),
            ("log_backtrace_at", idle.log_backtrace_at.is_some(), LOGS),
        ];
        let given = lines.into_iter().filter(|(_, is_given, _)| *is_given);
        given
            .map(|(flag, _, line)| format!("--{flag} {line}"))
            .collect()
    }

    /// The store's URL for the given etcd servers.
    pub(super) fn etcd_store(&self) -> Option<String> {
        self.etcd_endpoints.as_deref().map(etcd_store)
    }

    /// The credentials for etcd.
    pub(super) fn etcd_options(&self) -> Result<EtcdOptions> {
        Ok(EtcdOptions {
            cafile: self.etcd_cafile.clone(),
            certfile: self.etcd_certfile.clone(),
            keyfile: self.etcd_keyfile.clone(),
            username: self.etcd_username.clone(),
            password: self.etcd_password()?,
        })
    }

    fn etcd_password(&self) -> Result<Option<String>> {
        if self.etcd_username.is_none() {
            return Ok(None);
        }
        secret::warn_of_words("etcd-password", "MUSLIN_ETCD_PASSWORD");
        let password = match &self.etcd_password {
            Some(password) => Some(password.clone()),
            None => secret::read(self.etcd_password_file.as_deref(), "etcd-password")?,
        };
        match password {
            Some(password) => Ok(Some(password)),
            None => Err(Error::usage(
                "--etcd-username requires a password: give it in a file with \
                 --etcd-password-file, or use the variable MUSLIN_ETCD_PASSWORD",
            )),
        }
    }

    /// The first flag that only means something with etcd.
    pub(super) fn needs_etcd(&self) -> Option<&'static str> {
        let flags = [
            ("--etcd-cafile", self.etcd_cafile.is_some()),
            ("--etcd-certfile", self.etcd_certfile.is_some()),
            ("--etcd-username", self.etcd_username.is_some()),
        ];
        let given = flags.into_iter().find(|(_, is_given)| *is_given);
        given.map(|(flag, _)| flag)
    }

    /// The prefix of all keys, cleaned as flannel does.
    pub(super) fn prefix(&self) -> Result<String> {
        let clean = path_clean::clean(&self.etcd_prefix);
        match clean.to_str() {
            // The root's keys begin with the slash of what follows.
            Some("/") => Ok(String::new()),
            Some(clean) if clean != "." && !clean.starts_with("..") => Ok(clean.to_owned()),
            _ => Err(Error::usage(format!(
                "--etcd-prefix '{}' is not a key prefix: use one like /coreos.com/network",
                self.etcd_prefix
            ))),
        }
    }

    pub(super) fn underlay(&self) -> InterfaceChoice {
        InterfaceChoice {
            interfaces: self.iface.clone(),
            patterns: self.iface_regex.clone(),
            reach: self.iface_can_reach,
            public_ip: self.public_ip,
            public_ipv6: self.public_ipv6,
        }
    }

    pub(super) fn subnet_file(&self) -> Option<PathBuf> {
        self.subnet_file.clone()
    }

    pub(super) fn ip_masq(&self) -> bool {
        self.idle.ip_masq == Some(true)
    }

    /// Time before its expiry at which a lease is renewed.
    pub(super) fn renew_margin(&self) -> Duration {
        match self.subnet_lease_renew_margin {
            Some(minutes) => Duration::from_secs(60 * u64::from(minutes)),
            None => RENEW_MARGIN,
        }
    }

    /// The address that serves the health checks.
    pub(super) fn health(&self) -> Option<SocketAddr> {
        (self.healthz_port != 0).then(|| SocketAddr::new(self.healthz_ip, self.healthz_port))
    }
}

/// The store's address for flannel's list of servers: `http://HOST:PORT,https://HOST:PORT`.
fn etcd_store(endpoints: &str) -> String {
    let servers = endpoints.split(',').map(str::trim).map(|server| {
        // As flannel's client takes a server that is named without.
        let scheme = if server.contains("://") {
            ""
        } else {
            "http://"
        };
        format!("{scheme}{server}")
    });
    let servers: Vec<_> = servers.collect();
    format!("etcd:{}", servers.join(","))
}

/// The words of a `muslin node` command line as the parser here wants them: a long flag may have
/// one dash, as Go's have, and a flag of flannel's with an empty value is as if it was not there.
pub(super) fn normalize(
    words: impl IntoIterator<Item = OsString>,
    flags: &Command,
) -> Vec<OsString> {
    let own = Arguments::augment_args(Command::new("flanneld"));
    let takes_word = |name: &str| {
        let mut all = flags.get_arguments();
        let arg = all.find(|arg| arg.get_long() == Some(name))?;
        Some(arg.get_action().takes_values() && !arg.is_require_equals_set())
    };
    let is_flannels = |name: &str| own.get_arguments().any(|arg| arg.get_long() == Some(name));
    let mut words = words.into_iter().peekable();
    let mut normal = Vec::new();
    while let Some(word) = words.next() {
        // What is no flag begins a command, if there can be one, and so does what follows two dashes.
        if word == "--" || !word.as_encoded_bytes().starts_with(b"-") {
            normal.push(word);
            break;
        }
        let Some((name, value)) = word.to_str().and_then(flag) else {
            normal.push(word);
            continue;
        };
        let Some(takes_word) = takes_word(name) else {
            normal.push(word);
            continue;
        };
        let mut next = words.next_if(|_| takes_word && value.is_none());
        let is_empty = value == Some("") || next.as_deref() == Some(OsStr::new(""));
        if !(is_empty && is_flannels(name)) {
            let text = word.to_string_lossy();
            normal.push(format!("--{}", text.trim_start_matches('-')).into());
            normal.extend(next.take());
        }
    }
    normal.extend(words);
    normal
}

/// The name and the value of a flag with one or two dashes.
fn flag(word: &str) -> Option<(&str, Option<&str>)> {
    let rest = word.strip_prefix('-')?;
    let rest = rest.strip_prefix('-').unwrap_or(rest);
    match rest.split_once('=') {
        Some((name, value)) => Some((name, Some(value))),
        None => Some((rest, None)),
    }
}

/// The flag for which flannel has a variable alone, without a prefix.
const KEY_FILE: &str = "wireguard-key-file";

/// Lets each flag be set by `MUSLIN_<FLAG>`, and those that are flannel's by `FLANNELD_<FLAG>` too,
/// which comes after it; an empty variable is none.
pub(super) fn with_environment(command: Command) -> Command {
    let own = Arguments::augment_args(Command::new("flanneld"));
    command.mut_args(|arg| match variable(&arg, &own) {
        Some(variable) => arg.env(variable).hide_env(true),
        None => arg.env(Resettable::Reset),
    })
}

/// The variable that has a flag's value.
fn variable(arg: &Arg, own: &Command) -> Option<String> {
    let long = arg.get_long()?;
    let name = long.to_ascii_uppercase().replace('-', "_");
    let is_flannels = own.get_arguments().any(|arg| arg.get_long() == Some(long));
    let prefixes: &[&str] = match (is_flannels, arg.is_hide_set()) {
        _ if long == KEY_FILE => &["MUSLIN_", ""],
        (true, _) => &["MUSLIN_", "FLANNELD_"],
        (false, false) => &["MUSLIN_"],
        (false, true) => &[],
    };
    let names = prefixes.iter().map(|prefix| format!("{prefix}{name}"));
    let is_set = |name: &String| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    names.into_iter().find(is_set)
}

#[cfg(test)]
mod tests {
    use clap::FromArgMatches;

    use super::*;

    fn flags() -> Command {
        let store = Arg::new("store").long("store");
        Arguments::augment_args(Command::new("node").arg(store))
    }

    fn normal(words: &[&str]) -> Vec<String> {
        let words = normalize(words.iter().map(OsString::from), &flags());
        words
            .into_iter()
            .map(|word| word.into_string().unwrap())
            .collect()
    }

    fn parse(words: &[&str]) -> Arguments {
        let words = ["node".to_owned()].into_iter().chain(normal(words));
        let matches = flags().try_get_matches_from(words).unwrap();
        Arguments::from_arg_matches(&matches).unwrap()
    }

    #[test]
    fn one_dash_is_enough_for_long_flags() {
        assert_eq!(
            normal(&[
                "-iface=eth0",
                "-iface",
                "eth1",
                "--ip-masq",
                "-v=2",
                "-ip-masq=true"
            ]),
            [
                "--iface=eth0",
                "--iface",
                "eth1",
                "--ip-masq",
                "--v=2",
                "--ip-masq=true"
            ]
        );
        // What is no flag here is left to the parser, and so is what follows two dashes.
        let others = ["-h", "-x=1", "word", "-", "--", "-iface=eth0", "--iface="];
        assert_eq!(normal(&others), others);
    }

    #[test]
    fn an_empty_value_is_as_if_the_flag_was_not_there() {
        assert!(normal(&["--iface=", "-public-ip=", "--iface", "", "-etcd-cafile", ""]).is_empty());
        assert_eq!(normal(&["--store="]), ["--store="]);
        assert_eq!(normal(&["--ip-masq", ""]), ["--ip-masq", ""]);
        let arguments = parse(&["--etcd-prefix=", "--healthz-ip="]);
        assert_eq!(arguments.prefix().unwrap(), "/coreos.com/network");
    }

    #[test]
    fn defaults_are_flannels() {
        let arguments = parse(&[]);
        assert_eq!(arguments.prefix().unwrap(), "/coreos.com/network");
        assert_eq!(arguments.renew_margin(), RENEW_MARGIN);
        let margin = parse(&["--subnet-lease-renew-margin=60"]).renew_margin();
        assert_eq!(margin, Duration::from_secs(3600));
        assert_eq!(arguments.health(), None);
        assert_eq!(arguments.healthz_ip, Ipv4Addr::UNSPECIFIED);
        assert_eq!(arguments.etcd_store(), None);
        assert!(!arguments.ip_masq());
        assert!(arguments.notices().is_empty());
        arguments.check().unwrap();
    }

    #[test]
    fn switches_are_gos() {
        for (word, is_on) in [
            ("--ip-masq", true),
            ("-ip-masq=true", true),
            ("--ip-masq=1", true),
            ("--ip-masq=T", true),
            ("--ip-masq=false", false),
            ("--ip-masq=0", false),
        ] {
            assert_eq!(parse(&[word]).ip_masq(), is_on, "{word}");
        }
    }

    #[test]
    fn prefixes_are_cleaned() {
        for (prefix, clean) in [
            ("/coreos.com/network/", Some("/coreos.com/network")),
            ("/a//b/./c/../d", Some("/a/b/d")),
            ("a/b", Some("a/b")),
            ("/", Some("")),
            ("..", None),
            ("a/..", None),
        ] {
            let arguments = parse(&["--etcd-prefix", prefix]);
            assert_eq!(arguments.prefix().ok().as_deref(), clean, "{prefix}");
        }
    }

    #[test]
    fn servers_are_a_store() {
        for (endpoints, store) in [
            (
                "http://127.0.0.1:4001,https://127.0.0.1:2379/",
                "etcd:http://127.0.0.1:4001,https://127.0.0.1:2379/",
            ),
            (
                "h:1, [fd00::1]:2379",
                "etcd:http://h:1,http://[fd00::1]:2379",
            ),
        ] {
            assert_eq!(etcd_store(endpoints), store);
        }
    }

    #[test]
    fn what_may_not_be_ignored_is_refused() {
        for word in [
            "--kube-subnet-mgr",
            "--kube-api-url=http://x",
            "--kubeconfig-file=x",
            "--kube-annotation-prefix=x",
            "--net-config-path=x",
            "--set-node-network-unavailable",
            "--public-ipv6=fe80::1",
            "--public-ipv6=::",
            "--public-ipv6=::ffff:192.0.2.1",
        ] {
            let error = parse(&[word]).check().unwrap_err();
            assert_eq!(error.exit_code(), 2);
            let flag = word.split('=').next().unwrap();
            assert!(error.to_string().starts_with(flag), "{error}");
        }
        parse(&["--kube-subnet-mgr=false", "-kube-api-url="])
            .check()
            .unwrap();
    }

    #[test]
    fn what_is_ignored_is_said_once_each() {
        for (word, flag) in [
            ("--ip-masq", "--ip-masq "),
            (
                "--ip-masq-fully-random-disable",
                "--ip-masq-fully-random-disable ",
            ),
            ("--iptables-resync=5", "--iptables-resync "),
            (
                "--iptables-forward-rules=false",
                "--iptables-forward-rules ",
            ),
            ("--ip-blackhole-route", "--ip-blackhole-route "),
            ("-v=2", "--v "),
            ("-vmodule=x=1", "--vmodule "),
            ("-log_backtrace_at=x:1", "--log_backtrace_at "),
        ] {
            let notices = parse(&[word]).notices();
            assert_eq!(notices.len(), 1, "{word}");
            assert!(notices[0].starts_with(flag), "{notices:?}");
        }
    }
}
