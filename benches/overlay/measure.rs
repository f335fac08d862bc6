//! How a path is measured: a sink in one pod, a source in the other, and a window of time.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddrV4;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::Duration;

use clap::ValueEnum;
use serde::de::DeserializeOwned;

use crate::INSIDE;
use crate::figures::{Figure, Samples};
use crate::lab::Host;
use crate::load::{Count, Ready, RoundTrips};
use crate::machine::CpuTime;
use crate::stage::{Case, IdleNode, Route, Stage, UNDERLAY, Underlay};

/// Until a flow has its speed.
const WARM_UP: Duration = Duration::from_millis(300);
/// How much longer than its window a load lives by itself.
const RESERVE: Duration = Duration::from_secs(3);
/// Traffic to see how large frames of the underlay are.
const LOOK: Duration = Duration::from_millis(200);
/// What a wire carries: 1,500 bytes and an Ethernet header.
const LARGEST_FRAME: &str = "1514";
/// Between two loads, so that nothing of the first is under way.
const PAUSE: Duration = Duration::from_millis(50);
/// Pods of the idle node.
const IDLE_PODS: usize = 10;
/// Until a node that got pods is idle.
const REST: Duration = Duration::from_secs(1);
/// A share of lost requests that is still an answer.
const MAX_LOST: f64 = 0.01;

/// What is put on a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Load {
    /// One stream, and what it costs.
    TcpX1,
    /// Four streams.
    TcpX4,
    /// A request and its response after the other, on one connection.
    AskTcp,
    /// The same by datagrams.
    AskUdp,
    /// A flood of small datagrams.
    #[value(name = "udp-64")]
    Udp64,
    /// A flood of large ones.
    #[value(name = "udp-1400")]
    Udp1400,
}

impl Load {
    /// All, floods last: they leave full queues behind.
    pub(crate) const ALL: [Self; 6] = [
        Self::TcpX1,
        Self::TcpX4,
        Self::AskTcp,
        Self::AskUdp,
        Self::Udp64,
        Self::Udp1400,
    ];

    fn run(self, stage: &Stage, duration: Duration) -> Result<Vec<(Figure, f64)>, String> {
        match self {
            Self::TcpX1 => {
                let (rate, cpu) = streams(stage, 1, duration)?;
                let cost = (Figure::CpuPerGigabyte, cpu);
                Ok(vec![(Figure::TcpX1, rate), cost])
            }
            Self::TcpX4 => {
                let (rate, _) = streams(stage, 4, duration)?;
                Ok(vec![(Figure::TcpX4, rate)])
            }
            Self::AskTcp => {
                let trips = ask(stage, "tcp", duration)?;
                Ok(vec![
                    (Figure::AskTcpP50, trips.p50),
                    (Figure::AskTcpP99, trips.p99),
                ])
            }
            Self::AskUdp => {
                let trips = ask(stage, "udp", duration)?;
                Ok(vec![
                    (Figure::AskUdpP50, trips.p50),
                    (Figure::AskUdpP99, trips.p99),
                ])
            }
            Self::Udp64 => {
                let (rate, lost) = datagrams(stage, 64, duration)?;
                Ok(vec![(Figure::Udp64, rate), (Figure::Udp64Lost, lost)])
            }
            Self::Udp1400 => {
                let (rate, lost) = datagrams(stage, 1400, duration)?;
                Ok(vec![(Figure::Udp1400, rate), (Figure::Udp1400Lost, lost)])
            }
        }
    }
}

/// Sets a path up, measures it and takes it down; `false` where this machine has no labs.
pub(crate) fn case(case: Case, loads: &[Load], duration: Duration, samples: &mut Samples) -> bool {
    if case.route == Route::Memory {
        let Some(idle) = IdleNode::new(IDLE_PODS) else {
            return false;
        };
        std::thread::sleep(REST);
        keep(samples, case, Figure::Memory, idle.resident_megabytes());
        return true;
    }
    let Some(stage) = Stage::new(case) else {
        return false;
    };
    if let Err(why) = check(&stage, case) {
        fail(samples, case, &why);
        return true;
    }
    for load in loads {
        std::thread::sleep(PAUSE);
        match load.run(&stage, duration) {
            Ok(values) => {
                for (figure, value) in values {
                    keep(samples, case, figure, value);
                }
            }
            Err(why) => fail(samples, case, &format!("{load:?}: {why}")),
        }
    }
    true
}

fn keep(samples: &mut Samples, case: Case, figure: Figure, value: f64) {
    let (title, unit) = figure.title();
    eprint!(" {title} {} {unit};", figure.show(value));
    samples.add(case, figure, value);
}

fn fail(samples: &mut Samples, case: Case, why: &str) {
    eprint!(" FAILED, {why};");
    samples.fail(format!("{case}: {why}"));
}

/// Something that runs beside and is killed on drop.
struct Process {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Process {
    fn start(host: &Host, words: &[&str]) -> Self {
        let mut command = host.command(std::env::current_exe().unwrap());
        let mut child = command
            .arg(INSIDE)
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            input: child.stdin.take(),
            output: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    /// Its next line.
    fn hear<T: DeserializeOwned>(&mut self) -> Result<T, String> {
        let mut line = String::new();
        let read = self.output.read_line(&mut line);
        read.map_err(|error| error.to_string())?;
        serde_json::from_str(&line).map_err(|_| format!("a load said '{}'", line.trim()))
    }

    fn ask<T: DeserializeOwned>(&mut self) -> Result<T, String> {
        if let Some(input) = &mut self.input {
            input.write_all(b"\n").map_err(|error| error.to_string())?;
        }
        self.hear()
    }

    fn has_ended(&mut self) -> bool {
        self.child.try_wait().is_ok_and(|ended| ended.is_some())
    }

    /// Has it end and say its last.
    fn finish<T: DeserializeOwned>(&mut self) -> Result<T, String> {
        self.input = None;
        self.hear()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A sink, and how it is reached.
fn sink(stage: &Stage, kind: &str) -> Result<(Process, String), String> {
    let mut sink = Process::start(&stage.sink, &["sink", kind]);
    let ready: Ready = sink.hear()?;
    let address = SocketAddrV4::new(stage.address, ready.port);
    Ok((sink, address.to_string()))
}

/// What is counted within a window while the source sends.
struct Window {
    sink: Rate,
    /// Of a source that counts.
    source: Option<Rate>,
    /// The processors' time.
    busy: f64,
}

/// Units in so many seconds.
struct Rate {
    units: f64,
    seconds: f64,
}

impl Rate {
    fn between(first: Count, last: Count) -> Self {
        Self {
            units: (last.units - first.units) as f64,
            seconds: last.seconds - first.seconds,
        }
    }

    fn per_second(&self) -> f64 {
        self.units / self.seconds
    }
}

fn window(stage: &Stage, kind: &str, more: &str, duration: Duration) -> Result<Window, String> {
    let (mut sink, address) = sink(stage, kind)?;
    let life = (WARM_UP + duration + RESERVE).as_secs_f64().to_string();
    let mut source = Process::start(&stage.source, &[kind, &address, more, &life]);
    let counts = kind == "udp";
    let mut count = || {
        let (sunk, busy): (Count, _) = (sink.ask()?, CpuTime::now());
        let sent: Option<Count> = counts.then(|| source.ask()).transpose()?;
        Ok::<_, String>((sunk, sent, busy))
    };
    std::thread::sleep(WARM_UP);
    let (first, first_sent, start) = count()?;
    std::thread::sleep(duration);
    let (last, last_sent, end) = count()?;
    if source.has_ended() {
        return Err("the source ended before its time".to_owned());
    }
    drop(source);
    if last.wrong > 0 {
        return Err(format!("wrong content, {} times", last.wrong));
    }
    if last.repeated > 0 {
        return Err(format!("{} datagrams came twice", last.repeated));
    }
    if last.units == first.units {
        return Err("nothing arrived".to_owned());
    }
    let sent = first_sent.zip(last_sent);
    Ok(Window {
        sink: Rate::between(first, last),
        source: sent.map(|(first, last)| Rate::between(first, last)),
        busy: end.busy_since(start),
    })
}

/// Gigabits per second of payload, and seconds of processors per gigabyte.
fn streams(stage: &Stage, count: usize, duration: Duration) -> Result<(f64, f64), String> {
    let window = window(stage, "tcp", &count.to_string(), duration)?;
    let gigabits = window.sink.per_second() * 8.0 / 1e9;
    Ok((gigabits, window.busy / (window.sink.units / 1e9)))
}

/// Datagrams per second that arrived, and the share in percent of those sent that did not.
fn datagrams(stage: &Stage, size: usize, duration: Duration) -> Result<(f64, f64), String> {
    let window = window(stage, "udp", &size.to_string(), duration)?;
    let arrived = window.sink.per_second();
    let sent = window.source.ok_or("the source does not count")?;
    // The two count one after the other, and what waited in queues before arrives as well.
    let lost = (1.0 - arrived / sent.per_second()).max(0.0);
    Ok((arrived, lost * 100.0))
}

fn ask(stage: &Stage, kind: &str, duration: Duration) -> Result<RoundTrips, String> {
    let (_sink, address) = sink(stage, &format!("echo-{kind}"))?;
    let seconds = duration.as_secs_f64().to_string();
    let question = format!("ask-{kind}");
    let words = [question.as_str(), &address, &seconds];
    let trips: RoundTrips = Process::start(&stage.source, &words).hear()?;
    let asked = trips.count + trips.lost;
    if trips.count == 0 || trips.lost as f64 > asked as f64 * MAX_LOST {
        return Err(format!("{} of {asked} requests were lost", trips.lost));
    }
    Ok(trips)
}

/// Sends a little to warm up, and looks whether superpackets cross the underlay.
fn check(stage: &Stage, case: Case) -> Result<(), String> {
    let Some(underlay) = case.underlay else {
        return window(stage, "tcp", "1", LOOK).map(drop);
    };
    let words = ["count-giants", UNDERLAY, LARGEST_FRAME];
    let mut counter = Process::start(&stage.hosts[1], &words);
    let _: bool = counter.hear()?;
    window(stage, "tcp", "1", LOOK)?;
    let giants: u64 = counter.finish()?;
    match underlay {
        Underlay::DumbWire if giants > 0 => {
            Err(format!("{giants} frames above the MTU crossed the wire"))
        }
        // It is known for them: who sees none does not see any on the other underlay.
        Underlay::Veth if giants == 0 && case.route == Route::KernelVxlan => {
            Err("no frame above the MTU was seen where they must be".to_owned())
        }
        _ => Ok(()),
    }
}
