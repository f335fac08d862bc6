//! Two ends of a path, a load between them, and a window of time in which it is counted.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use muslin_lab::Host;
use serde::de::DeserializeOwned;

use super::load::{Count, Ready};
use super::machine::CpuTime;
use super::supervise::INSIDE;

/// Until a flow has its speed.
const WARM_UP: Duration = Duration::from_millis(300);
/// How much longer than its window a load lives by itself.
const RESERVE: Duration = Duration::from_secs(3);

/// Who connects, and to whom.
pub struct Ends {
    pub source: Host,
    pub sink: Host,
    /// The sink's address, as the source calls it.
    pub address: Ipv4Addr,
}

/// Something that runs beside and is killed on drop.
pub struct Process {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Process {
    /// A load of the benchmark's own.
    pub fn start(host: &Host, words: &[&str]) -> Self {
        let mut command = host.command(std::env::current_exe().unwrap());
        command.arg(INSIDE).args(words);
        Self::of(command)
    }

    pub(crate) fn of(mut command: Command) -> Self {
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        Self {
            input: child.stdin.take(),
            output: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    /// Its next line, as a value.
    pub fn hear<T: DeserializeOwned>(&mut self) -> Result<T, String> {
        let line = self.line()?;
        serde_json::from_str(&line).map_err(|_| format!("a load said '{}'", line.trim()))
    }

    /// Its next line; an error at the end.
    pub(crate) fn line(&mut self) -> Result<String, String> {
        let mut line = String::new();
        match self.output.read_line(&mut line) {
            Ok(0) => Err("a load ended and said nothing".to_owned()),
            Ok(_) => Ok(line),
            Err(error) => Err(error.to_string()),
        }
    }

    pub fn ask<T: DeserializeOwned>(&mut self) -> Result<T, String> {
        if let Some(input) = &mut self.input {
            input.write_all(b"\n").map_err(|error| error.to_string())?;
        }
        self.hear()
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().is_ok_and(|ended| ended.is_some())
    }

    /// Has it end and say its last.
    pub fn finish<T: DeserializeOwned>(&mut self) -> Result<T, String> {
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
pub fn sink(ends: &Ends, kind: &str) -> Result<(Process, String), String> {
    let mut sink = Process::start(&ends.sink, &["sink", kind]);
    let ready: Ready = sink.hear()?;
    let address = SocketAddrV4::new(ends.address, ready.port);
    Ok((sink, address.to_string()))
}

/// What is counted within a window while the source sends.
pub struct Window {
    pub sink: Rate,
    /// Of a source that counts.
    pub source: Option<Rate>,
    /// The processors' time.
    pub busy: f64,
}

/// Units in so many seconds.
pub struct Rate {
    pub units: f64,
    seconds: f64,
}

impl Rate {
    fn between(first: Count, last: Count) -> Self {
        Self {
            units: (last.units - first.units) as f64,
            seconds: last.seconds - first.seconds,
        }
    }

    pub fn per_second(&self) -> f64 {
        self.units / self.seconds
    }
}

/// Has the source send to the sink, and counts there.
pub fn window(ends: &Ends, kind: &str, more: &str, duration: Duration) -> Result<Window, String> {
    let (mut sink, address) = sink(ends, kind)?;
    let mut source = Process::start(&ends.source, &[kind, &address, more, &life(duration)]);
    count(&mut sink, &mut source, kind == "udp", duration)
}

/// Has the source ask for streams, which the sink sends, and counts what comes back.
fn window_back(ends: &Ends, streams: usize, duration: Duration) -> Result<Window, String> {
    let (mut server, address) = sink(ends, "serve-tcp")?;
    let words = ["fetch", &address, &streams.to_string(), &life(duration)];
    let mut client = Process::start(&ends.source, &words);
    count(&mut client, &mut server, false, duration)
}

/// Seconds for which a load lives by itself.
fn life(duration: Duration) -> String {
    (WARM_UP + duration + RESERVE).as_secs_f64().to_string()
}

/// Counts what `taker` gets in a window of time, and what `giver` sends if it counts that.
fn count(
    taker: &mut Process,
    giver: &mut Process,
    gives_counts: bool,
    duration: Duration,
) -> Result<Window, String> {
    let mut count = || {
        let (sunk, busy): (Count, _) = (taker.ask()?, CpuTime::now());
        let sent: Option<Count> = gives_counts.then(|| giver.ask()).transpose()?;
        Ok::<_, String>((sunk, sent, busy))
    };
    std::thread::sleep(WARM_UP);
    let (first, first_sent, start) = count()?;
    std::thread::sleep(duration);
    let (last, last_sent, end) = count()?;
    if giver.has_ended() || taker.has_ended() {
        return Err("a load ended before its time".to_owned());
    }
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
pub fn streams(ends: &Ends, count: usize, duration: Duration) -> Result<(f64, f64), String> {
    Ok(rates(&window(ends, "tcp", &count.to_string(), duration)?))
}

/// The same from the sink to the source, which connects nevertheless.
pub fn streams_back(ends: &Ends, count: usize, duration: Duration) -> Result<(f64, f64), String> {
    Ok(rates(&window_back(ends, count, duration)?))
}

fn rates(window: &Window) -> (f64, f64) {
    let gigabits = window.sink.per_second() * 8.0 / 1e9;
    (gigabits, window.busy / (window.sink.units / 1e9))
}
