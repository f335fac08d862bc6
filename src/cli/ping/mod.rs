//! `muslin ping`: who answers, after which time, and which packets fit, from inside a pod.

mod mtu;
mod tally;
mod way;

use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use mtu::{Outcome, Search};
use muslin_stack::api::ping::{PathMtu, PingReport, PingedHop};
use muslin_stack::control::ipam::PodName;
use tally::{Echo, Tally, milliseconds};
use tokio::task::spawn_blocking;
use way::{Hop, Way};

use super::{NodeChoice, VersionChoice, watch};
use crate::agent::{Agent, IcmpError, Ping, Pinged};
use crate::control::Client;
use crate::error::{Context, Error, Result};
use crate::process::block_on;
use crate::signals::Signals;
use crate::terminal::output::{Table, print, print_json};
use crate::terminal::quantity::count;
use crate::terminal::text::plain;

/// How long a ping is waited for.
const PATIENCE: Duration = Duration::from_secs(1);
/// Bytes of payload of a ping of which only the time matters.
const SMALL: u16 = 56;
/// Packets of each size, since one may be lost for another reason.
const TRIES: u16 = 3;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    node: NodeChoice,
    #[command(flatten)]
    version: VersionChoice,
    /// A pod by its name, also POD.NODE, a node by its name, or an address of the pod network
    target: String,
    /// End after so many pings [default: until Ctrl-C; 1 with --mtu]
    #[arg(short, long, value_name = "COUNT")]
    count: Option<NonZeroU32>,
    /// Time between two pings in seconds
    #[arg(short, long, value_name = "SECONDS", default_value = "1", value_parser = watch::seconds)]
    interval: Duration,
    /// Find the longest packet that gets there and back, and who limits it
    #[arg(long)]
    mtu: bool,
    /// Ping from inside this pod [default: from a new one]
    #[arg(long, value_name = "POD")]
    from: Option<PodName>,
    /// Print JSON, at the end
    #[arg(long)]
    json: bool,
}

/// Pings from one pod.
struct Session {
    way: Way,
    from: String,
    tallies: Vec<Tally>,
    is_json: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let socket = arguments.node.socket()?;
    block_on(async {
        // What is typed while the pod is made ends it all the same.
        let mut signals = Signals::listen()?;
        let begun = tokio::select! {
            begun = Session::begin(arguments, socket) => begun?,
            _ = signals.next() => return Ok(()),
        };
        let (mut session, agent) = begun;
        let agent = session.ask_all(agent, arguments, &mut signals).await?;
        let has_answered = session.target().answered() > 0;
        let mtu = match agent {
            Some(agent) if arguments.mtu && has_answered => {
                tokio::select! {
                    mtu = session.path_mtu(agent) => Some(mtu?),
                    _ = signals.next() => None,
                }
            }
            _ => None,
        };
        session.sum_up(&arguments.target, mtu.as_ref())?;
        match has_answered {
            true => Ok(()),
            false => Err(Error::Command(1)),
        }
    })
}

impl Session {
    async fn begin(arguments: &Arguments, socket: PathBuf) -> Result<(Self, Agent)> {
        let new = format!("ping-{}", std::process::id()).parse::<PodName>();
        let from = match &arguments.from {
            Some(pod) => {
                // It says why it cannot be entered, and who may have been meant.
                Client::connect(&socket).await?.namespaces(pod).await?;
                pod.clone()
            }
            None => new.map_err(Error::failed)?,
        };
        let is_new = arguments.from.is_none();
        let agent = in_background({
            let (socket, pod) = (socket.clone(), from.clone());
            move || start(&socket, &pod, is_new)
        });
        let agent = agent.await?;
        let version = arguments.version.version();
        let way = way::find(&socket, from.as_str(), &arguments.target, version).await?;
        let session = Self {
            tallies: vec![Tally::default(); way.hops.len()],
            way,
            from: from.to_string(),
            is_json: arguments.json,
        };
        Ok((session, agent))
    }

    fn target(&self) -> &Tally {
        // There is a tally for each hop, and at least one.
        &self.tallies[self.tallies.len() - 1]
    }

    /// Pings every hop again and again. The agent is there for more unless a signal came.
    async fn ask_all(
        &mut self,
        mut agent: Agent,
        arguments: &Arguments,
        signals: &mut Signals,
    ) -> Result<Option<Agent>> {
        self.say(&self.title())?;
        let default = arguments.mtu.then_some(1);
        let rounds = arguments.count.map(NonZeroU32::get).or(default);
        let mut round = 0;
        loop {
            let began = Instant::now();
            let hops = self.way.hops.clone();
            let asked = in_background(move || {
                let echoes = hops.iter().map(|hop| ask(&mut agent, hop.address));
                let echoes = echoes.collect::<Result<Vec<_>>>();
                echoes.map(|echoes| (agent, echoes))
            });
            let (back, echoes) = tokio::select! {
                told = asked => told?,
                _ = signals.next() => return Ok(None),
            };
            agent = back;
            round += 1;
            for (tally, echo) in self.tallies.iter_mut().zip(&echoes) {
                tally.add(echo);
            }
            self.say(&self.line(round, &echoes))?;
            if rounds.is_some_and(|rounds| round >= rounds) {
                return Ok(Some(agent));
            }
            tokio::select! {
                () = tokio::time::sleep(arguments.interval.saturating_sub(began.elapsed())) => {}
                _ = signals.next() => return Ok(None),
            }
        }
    }

    /// Says something to people, if they read.
    fn say(&self, text: &str) -> Result<()> {
        match self.is_json {
            true => Ok(()),
            false => print(text),
        }
    }

    fn title(&self) -> String {
        let (from, node) = (&self.from, &self.way.node);
        let target = self.way.hops.last();
        let target = target.map(|hop| format!("{} ({})", plain(&hop.name), hop.address));
        format!(
            "ping {} from pod {from} of node {}\n",
            target.unwrap_or_default(),
            plain(node)
        )
    }

    /// One round: first what is pinged, then the way there.
    fn line(&self, round: u32, echoes: &[Echo]) -> String {
        let Some((target, way)) = echoes.split_last() else {
            return String::new();
        };
        let told = |echo: &Echo| match echo {
            Echo::Answered(time) => milliseconds(time.as_micros() as u64),
            Echo::Refused(why) => plain(why).into_owned(),
            Echo::Silence => "no answer".to_owned(),
        };
        let way = self.way.hops.iter().zip(way);
        let way: Vec<_> = way
            .map(|(hop, echo)| format!("{} {}", plain(&hop.name), told(echo)))
            .collect();
        let line = format!("{round:>4}  {:<12}  {}", told(target), way.join(", "));
        format!("{}\n", line.trim_end())
    }

    fn sum_up(&self, target: &str, mtu: Option<&PathMtu>) -> Result<()> {
        if self.is_json {
            return print_json(&self.report(target, mtu));
        }
        let tally = self.target();
        let mut text = format!(
            "\n{} sent, {} answered, {:.0} % lost\n",
            count(tally.sent(), "ping"),
            tally.answered(),
            tally.lost()
        );
        text.push_str(&self.table());
        if let Some(PathMtu { mtu_bytes, limit }) = mtu {
            text.push_str(&format!("path MTU {mtu_bytes} bytes: {}\n", plain(limit)));
        }
        print(&text)
    }

    /// The hops in their order, so that one sees where time goes.
    fn table(&self) -> String {
        let mut table = Table::new(&[
            "WHO",
            "ADDRESS",
            "ANSWERED",
            "LEAST",
            "MEAN",
            "MOST",
            "DEVIATION",
            "ADDS",
        ]);
        let mut before = 0;
        for (hop, tally) in self.way.hops.iter().zip(&self.tallies) {
            let answered = format!("{} of {}", tally.answered(), tally.sent());
            let mut cells = vec![hop.name.clone(), hop.address.to_string(), answered];
            match tally.times() {
                Some(times) => {
                    let all = [times.min, times.mean, times.max, times.deviation];
                    cells.extend(all.map(milliseconds));
                    // A gateway may be slower than what is behind it.
                    let sign = if times.mean < before { "-" } else { "" };
                    cells.push(format!(
                        "{sign}{}",
                        milliseconds(times.mean.abs_diff(before))
                    ));
                    before = times.mean;
                }
                None => cells.extend([const { String::new() }; 5]),
            }
            table.add_row(cells);
        }
        table.text()
    }

    fn report(&self, target: &str, path_mtu: Option<&PathMtu>) -> PingReport {
        let hops = self.way.hops.iter().zip(&self.tallies);
        let way: Vec<_> = hops
            .map(|(hop, tally)| {
                let times = tally.times();
                PingedHop {
                    name: hop.name.clone(),
                    address: hop.address,
                    sent: tally.sent(),
                    answered: tally.answered(),
                    min_us: times.map(|it| it.min),
                    mean_us: times.map(|it| it.mean),
                    max_us: times.map(|it| it.max),
                    deviation_us: times.map(|it| it.deviation),
                }
            })
            .collect();
        PingReport {
            node: self.way.node.clone(),
            from: self.from.clone(),
            target: target.to_owned(),
            address: way
                .last()
                .map_or(Ipv4Addr::UNSPECIFIED.into(), |target| target.address),
            way,
            path_mtu: path_mtu.cloned(),
        }
    }

    /// Finds the path MTU by packets that nobody may fragment.
    async fn path_mtu(&self, mut agent: Agent) -> Result<PathMtu> {
        let (way, from) = (self.way.clone(), self.from.clone());
        in_background(move || path_mtu(&mut agent, &way, &from)).await
    }
}

fn start(socket: &Path, pod: &PodName, is_new: bool) -> Result<Agent> {
    match is_new {
        true => Agent::in_new_pod(socket, pod.as_str()),
        false => Agent::in_pod(socket, pod),
    }
}

/// What waits, beside what is listened for.
async fn in_background<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    spawn_blocking(work).await.context("cannot ping")?
}

/// One small ping.
fn ask(agent: &mut Agent, to: IpAddr) -> Result<Echo> {
    let told = agent.ping(&Ping {
        count: 1,
        size: SMALL.into(),
        timeout_ms: PATIENCE.as_millis() as u64,
        ..Ping::new(to)
    })?;
    Ok(
        match (&told.replies[..], &told.errors[..], &told.refused[..]) {
            ([reply, ..], _, _) if !reply.intact => {
                Echo::Refused("the answer is not what was sent".to_owned())
            }
            ([reply, ..], _, _) => Echo::Answered(reply.rtt()),
            ([], [error, ..], _) => Echo::Refused(said(error)),
            ([], [], [refused, ..]) => Echo::Refused(format!("not sent: {}", refused.error)),
            ([], [], []) => Echo::Silence,
        },
    )
}

/// Bytes of an IP header and that of an echo request.
const fn headers(to: IpAddr) -> u16 {
    match to {
        IpAddr::V4(_) => 28,
        IpAddr::V6(_) => 48,
    }
}

/// An ICMP error in words (RFC 792, RFC 1812 section 5.2.7.1; RFC 4443 section 3).
fn said(error: &IcmpError) -> String {
    let what = match (error.kind, error.code) {
        (1, 0) if error.from.is_ipv6() => "network unreachable",
        (1, 1 | 5 | 6) if error.from.is_ipv6() => "forbidden",
        (1, 3) if error.from.is_ipv6() => "host unreachable",
        (1, _) if error.from.is_ipv6() => "unreachable",
        (2, _) if error.from.is_ipv6() => "too long to go on in one piece",
        (3, _) if error.from.is_ipv6() => "its hop limit ended",
        (3, 0) => "network unreachable",
        (3, 1) => "host unreachable",
        (3, 2) => "protocol unreachable",
        (3, 4) => "too long to go on in one piece",
        (3, 9 | 10 | 13) => "forbidden",
        (3, _) => "unreachable",
        (11, _) => "its time to live ended",
        _ => "an error",
    };
    format!("{} says: {what}", error.from)
}

/// Searches for the path MTU to the last hop, and for who limits it.
fn path_mtu(agent: &mut Agent, way: &Way, from: &str) -> Result<PathMtu> {
    let Some(target) = way.hops.last() else {
        return Err(Error::failed("there is nobody to ping"));
    };
    let mut search = Search::new(headers(target.address) + SMALL, way.mtu);
    let mut told: Vec<IcmpError> = Vec::new();
    let mut last = Pinged::default();
    while let Some(size) = search.next() {
        let pinged = probe(agent, target.address, size)?;
        let too_long = pinged.errors.iter().filter(|error| error.mtu.is_some());
        told.extend(too_long.clone().cloned());
        let outcome = match pinged.replies.is_empty() {
            false => Outcome::Fits,
            true => Outcome::Exceeds(too_long.filter_map(|error| error.mtu).min()),
        };
        search.learn(outcome);
        if outcome != Outcome::Fits {
            last = pinged;
        }
    }
    let mtu_bytes = search.fits();
    let says_so = |error: &&IcmpError| error.mtu == Some(mtu_bytes);
    // The pod's own kernel may say it, too, and not only refuse.
    let own = |error: &IcmpError| error.from == way.source;
    let by_router = told.iter().filter(says_so).rfind(|error| !own(error));
    let is_refused = last.refused.iter().any(|refused| refused.is_too_long());
    let limit = match by_router {
        Some(error) => {
            let hop = way.hops.iter().find(|hop| hop.address == error.from);
            let name = hop.map_or_else(|| error.from.to_string(), name_of);
            format!("{name} says that no more fits what is behind it")
        }
        None if is_refused || last.errors.iter().any(own) => match mtu_bytes >= way.mtu {
            true => format!("the {} of pod {from} takes no more", way.limits),
            false => format!("the kernel of pod {from} knows that no more fits the way"),
        },
        None => silent_limit(agent, way, from, mtu_bytes)?,
    };
    Ok(PathMtu { mtu_bytes, limit })
}

/// Between whom longer packets are lost without a word.
fn silent_limit(agent: &mut Agent, way: &Way, from: &str, fits: u16) -> Result<String> {
    let mut before = format!("pod {from}");
    for hop in &way.hops {
        let longer = fits.saturating_add(1);
        if probe(agent, hop.address, longer)?.replies.is_empty() {
            return Ok(format!(
                "longer packets are lost between {before} and {}, and nobody says why",
                name_of(hop)
            ));
        }
        before = name_of(hop);
    }
    Ok("longer packets were lost just now, and are not any more".to_owned())
}

fn name_of(hop: &Hop) -> String {
    format!("{} ({})", hop.name, hop.address)
}

/// Packets of so many bytes that nobody may fragment.
fn probe(agent: &mut Agent, to: IpAddr, size: u16) -> Result<Pinged> {
    agent.ping(&Ping {
        count: TRIES,
        size: size.saturating_sub(headers(to)).into(),
        dont_fragment: true,
        timeout_ms: PATIENCE.as_millis() as u64,
        ..Ping::new(to)
    })
}
