//! The load, in the pods: sinks that count and check what arrives, and sources.
//!
//! A sink says its port in a line of JSON, and answers each line of its standard input with what
//! it has counted; so does the source of a flood. A sink ends with its standard input, a source when
//! its time is over.

use std::io::{self, BufRead as _, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::ValueEnum as _;
use ipnet::Ipv4Net;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};

use super::batch::Batch;
use super::flannel_udp::Proxy;
use super::floods::{self, Flood, Targets};
use super::reader;
use super::wire::{self, Way};

/// Bytes of one write or read of a stream.
const CHUNK: usize = 128 * 1024;
/// The pattern's length: a prime, so that no lost or repeated run of packets looks right.
const PERIOD: usize = 65_521;
/// What a datagram needs for its number.
const NUMBER_LEN: usize = 8;
/// Larger than every datagram that is sent.
const MAX_DATAGRAM: usize = 2048;
/// Datagrams that can be told apart; no more are sent in a minute.
const MAX_NUMBER: u64 = 1 << 30;
/// Asked of the kernel for datagrams that wait, the same on all paths.
const SOCKET_BUFFER: usize = 4 << 20;
/// How long a source tries to connect, and a reply may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two requests that are sent at their times, and when the last counts as lost.
const PACE: Duration = Duration::from_millis(5);
const LATEST: Duration = Duration::from_secs(2);
/// When a datagram's reply counts as lost.
const LOST: Duration = Duration::from_millis(200);
/// Requests before they are measured.
const WARM_UP: Duration = Duration::from_millis(100);

/// What a sink says first.
#[derive(Debug, Serialize, Deserialize)]
pub struct Ready {
    /// Its port.
    pub port: u16,
}

/// What a sink, or the source of a flood, has counted since it started.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Count {
    /// How long that is.
    pub seconds: f64,
    /// Bytes of streams, or different datagrams, that were as they were sent; of a source the
    /// datagrams that the kernel took from it.
    pub units: u64,
    /// Streams or datagrams whose content was wrong.
    pub wrong: u64,
    /// Datagrams that had come before.
    pub repeated: u64,
}

/// What a source of requests has seen, in microseconds.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct RoundTrips {
    /// Requests that were answered.
    pub count: usize,
    /// Requests that were not.
    pub lost: usize,
    /// The median.
    pub p50: f64,
    /// What 99 of 100 did not exceed.
    pub p99: f64,
}

impl RoundTrips {
    /// What these times in seconds say, of so many requests.
    fn of(mut times: Vec<f64>, asked: usize) -> Self {
        times.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let index = (times.len() as f64 * share) as usize;
            times.get(index).map_or(f64::NAN, |time| time * 1e6)
        };
        Self {
            count: times.len(),
            lost: asked - times.len(),
            p50: at(0.5),
            p99: at(0.99),
        }
    }
}

/// Runs a load by its command line.
pub fn inside(words: &[String]) -> ExitCode {
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["sink", kind] => sink(kind),
        ["tcp", to, streams, seconds] => send_streams(parse(to), parse(streams), time(seconds)),
        ["udp", to, size, seconds] => send_datagrams(parse(to), parse(size), time(seconds)),
        ["fetch", to, streams, seconds] => fetch(parse(to), parse(streams), time(seconds)),
        ["flows", to, threads, seconds] => short_flows(parse(to), parse(threads), time(seconds)),
        ["hold", to, flows] => hold(parse(to), parse(flows)),
        ["ask-tcp", to, seconds] => ask_stream(parse(to), time(seconds)),
        ["ask-udp", to, seconds] => ask_datagrams(parse(to), time(seconds)),
        ["pace-udp", to, seconds] => pace_datagrams(parse(to), time(seconds)),
        ["flood", ref of @ .., seconds] => flood(of, time(seconds)),
        ["count-giants", interface, way, above] => count_giants(interface, way, parse(above)),
        ["read", from, path, pause] => reader::read(parse(from), path, time(pause)),
        ["flannel-udp", own, subnet, peer] => flannel_udp(parse(own), parse(subnet), parse(peer)),
        _ => Err(io::Error::other("there is no such load")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {error}", words.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn parse<T: std::str::FromStr>(word: &str) -> T {
    word.parse().unwrap_or_else(|_| panic!("not valid: {word}"))
}

fn time(seconds: &str) -> Duration {
    Duration::from_secs_f64(parse(seconds))
}

fn say(value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    io::stdout().write_all(&line)
}

/// Bytes that look like no others, long enough to take a chunk from every place of the period.
struct Pattern(Vec<u8>);

impl Pattern {
    fn new() -> Self {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        };
        let period: Vec<_> = (0..PERIOD).map(|_| next()).collect();
        Self(period.into_iter().cycle().take(PERIOD + CHUNK).collect())
    }

    /// The bytes of a stream from there on.
    fn at(&self, position: u64, len: usize) -> &[u8] {
        let start = (position % PERIOD as u64) as usize;
        &self.0[start..start + len]
    }

    /// The bytes of a datagram behind its number.
    fn of_datagram(&self, number: u64, len: usize) -> &[u8] {
        self.at(number.wrapping_mul(31), len)
    }
}

#[derive(Default)]
struct Counters {
    units: AtomicU64,
    wrong: AtomicU64,
    repeated: AtomicU64,
}

impl Counters {
    /// Answers each line of the standard input.
    fn answer(&self, since: Instant) -> io::Result<()> {
        for line in io::stdin().lock().lines() {
            line?;
            say(&self.read(since))?;
        }
        Ok(())
    }

    fn read(&self, since: Instant) -> Count {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Count {
            seconds: since.elapsed().as_secs_f64(),
            units: load(&self.units),
            wrong: load(&self.wrong),
            repeated: load(&self.repeated),
        }
    }
}

fn sink(kind: &str) -> io::Result<()> {
    raise_descriptor_limit()?;
    let counters = Arc::new(Counters::default());
    let start = Instant::now();
    let port = match kind {
        "tcp" => listen(&counters, receive_stream)?,
        "echo-tcp" => listen(&counters, echo_stream)?,
        "serve-tcp" => listen(&counters, serve_stream)?,
        "answer-tcp" => listen(&counters, answer_once)?,
        "udp" => receive(&counters, receive_datagrams)?,
        "echo-udp" => receive(&counters, echo_datagrams)?,
        _ => return Err(io::Error::other("there is no such sink")),
    };
    say(&Ready { port })?;
    counters.answer(start)
}

/// What a sink does with a socket.
type Handle<S> = fn(S, &Counters) -> io::Result<()>;

/// Accepts connections, each with a thread.
fn listen(counters: &Arc<Counters>, handle: Handle<TcpStream>) -> io::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let port = listener.local_addr()?.port();
    let counters = counters.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let counters = counters.clone();
            // How a stream ends does not matter: sources are killed.
            std::thread::spawn(move || drop(handle(stream, &counters)));
        }
    });
    Ok(port)
}

fn receive(counters: &Arc<Counters>, handle: Handle<UdpSocket>) -> io::Result<u16> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket2::SockRef::from(&socket).set_recv_buffer_size(SOCKET_BUFFER)?;
    let port = socket.local_addr()?.port();
    let counters = counters.clone();
    std::thread::spawn(move || {
        if let Err(error) = handle(socket, &counters) {
            eprintln!("receiving: {error}");
        }
    });
    Ok(port)
}

fn receive_stream(mut stream: TcpStream, counters: &Counters) -> io::Result<()> {
    let pattern = Pattern::new();
    let mut buffer = vec![0; CHUNK];
    let mut position = 0;
    loop {
        let len = stream.read(&mut buffer)?;
        if len == 0 {
            return Ok(());
        }
        if buffer[..len] != *pattern.at(position, len) {
            counters.wrong.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        position += len as u64;
        counters.units.fetch_add(len as u64, Ordering::Relaxed);
    }
}

fn echo_stream(mut stream: TcpStream, _: &Counters) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = [0; NUMBER_LEN];
    loop {
        stream.read_exact(&mut buffer)?;
        stream.write_all(&buffer)?;
    }
}

/// Sends until nobody takes it any more.
fn serve_stream(mut stream: TcpStream, _: &Counters) -> io::Result<()> {
    let pattern = Pattern::new();
    let mut position = 0;
    loop {
        position += stream.write(pattern.at(position, CHUNK))? as u64;
    }
}

/// Answers one request, and ends.
fn answer_once(mut stream: TcpStream, _: &Counters) -> io::Result<()> {
    let mut buffer = [0; NUMBER_LEN];
    stream.read_exact(&mut buffer)?;
    stream.write_all(&buffer)
}

fn echo_datagrams(socket: UdpSocket, _: &Counters) -> io::Result<()> {
    let mut buffer = [0; NUMBER_LEN];
    loop {
        let (len, from) = socket.recv_from(&mut buffer)?;
        socket.send_to(&buffer[..len], from)?;
    }
}

/// Which numbers have come.
#[derive(Default)]
struct Seen(Vec<u64>);

impl Seen {
    /// Whether this one comes for the first time.
    fn insert(&mut self, number: u64) -> bool {
        let (word, bit) = ((number / 64) as usize, 1 << (number % 64));
        if word >= self.0.len() {
            self.0.resize((word + 1) * 2, 0);
        }
        let is_new = self.0[word] & bit == 0;
        self.0[word] |= bit;
        is_new
    }
}

fn receive_datagrams(socket: UdpSocket, counters: &Counters) -> io::Result<()> {
    let pattern = Pattern::new();
    let mut batch = Batch::new(MAX_DATAGRAM);
    let mut seen = Seen::default();
    // The first one says how long they are.
    let mut size = None;
    loop {
        let (mut units, mut wrong, mut repeated) = (0, 0, 0);
        for datagram in batch.receive(&socket)? {
            let size = *size.get_or_insert(datagram.len());
            match number(datagram, &pattern).filter(|_| datagram.len() == size) {
                None => wrong += 1,
                Some(number) if seen.insert(number) => units += 1,
                Some(_) => repeated += 1,
            }
        }
        counters.units.fetch_add(units, Ordering::Relaxed);
        counters.wrong.fetch_add(wrong, Ordering::Relaxed);
        counters.repeated.fetch_add(repeated, Ordering::Relaxed);
    }
}

/// A datagram's number, if the rest is as it should be.
fn number(datagram: &[u8], pattern: &Pattern) -> Option<u64> {
    let (number, rest) = datagram.split_first_chunk()?;
    let number = u64::from_be_bytes(*number);
    let is_right = number < MAX_NUMBER && rest == pattern.of_datagram(number, rest.len());
    is_right.then_some(number)
}

fn send_streams(to: SocketAddrV4, streams: usize, duration: Duration) -> io::Result<()> {
    let pattern = Pattern::new();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..streams)
            .map(|_| scope.spawn(|| send_stream(to, duration, &pattern)))
            .collect();
        let ends = threads.into_iter().map(|thread| thread.join().unwrap());
        ends.collect()
    })
}

fn send_stream(to: SocketAddrV4, duration: Duration, pattern: &Pattern) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&to.into(), PATIENCE)?;
    let end = Instant::now() + duration;
    let mut position = 0;
    while Instant::now() < end {
        position += stream.write(pattern.at(position, CHUNK))? as u64;
    }
    Ok(())
}

/// Has so many streams sent to it, and answers each line of the standard input with what came.
fn fetch(to: SocketAddrV4, streams: usize, duration: Duration) -> io::Result<()> {
    let counters = Arc::new(Counters::default());
    let start = Instant::now();
    for _ in 0..streams {
        let stream = TcpStream::connect_timeout(&to.into(), PATIENCE)?;
        let counters = counters.clone();
        std::thread::spawn(move || receive_stream(stream, &counters));
    }
    std::thread::spawn(move || counters.answer(start));
    std::thread::sleep(duration);
    Ok(())
}

/// Opens one connection after the other, each for one request, and says how many were answered.
fn short_flows(to: SocketAddrV4, threads: u64, duration: Duration) -> io::Result<()> {
    let start = Instant::now();
    let one_after_the_other = |thread: u64| {
        let mut flows = 0_u64;
        while start.elapsed() < duration {
            let request = (thread << 32 | flows).to_be_bytes();
            let mut stream = TcpStream::connect_timeout(&to.into(), PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(&request)?;
            let mut reply = Vec::new();
            stream.read_to_end(&mut reply)?;
            if reply != request {
                return Err(io::Error::other("a wrong reply"));
            }
            flows += 1;
        }
        Ok(flows)
    };
    let units = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads)
            .map(|thread| scope.spawn(move || one_after_the_other(thread)))
            .collect();
        let flows = threads.into_iter().map(|thread| thread.join().unwrap());
        flows.sum::<io::Result<u64>>()
    })?;
    say(&Count {
        seconds: start.elapsed().as_secs_f64(),
        units,
        wrong: 0,
        repeated: 0,
    })
}

/// Opens so many connections, asks on each, says so, and keeps them until the standard input ends;
/// asks on each again then.
fn hold(to: SocketAddrV4, flows: u64) -> io::Result<()> {
    raise_descriptor_limit()?;
    let ask = |stream: &mut TcpStream, number: u64| {
        let (request, mut reply) = (number.to_be_bytes(), [0; NUMBER_LEN]);
        stream.write_all(&request)?;
        stream.read_exact(&mut reply)?;
        let is_right = reply == request;
        is_right
            .then_some(())
            .ok_or(io::Error::other("a wrong reply"))
    };
    let mut streams = Vec::new();
    for number in 0..flows {
        let mut stream = TcpStream::connect_timeout(&to.into(), PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        ask(&mut stream, number)?;
        streams.push(stream);
    }
    say(&true)?;
    io::stdin().read_to_end(&mut Vec::new())?;
    for (stream, number) in streams.iter_mut().zip(flows..) {
        ask(stream, number)?;
    }
    say(&true)
}

/// Lets many connections be open at once.
fn raise_descriptor_limit() -> io::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}

fn connect_datagrams(to: SocketAddrV4) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect(to)?;
    Ok(socket)
}

/// Sends as fast as it goes.
fn send_datagrams(to: SocketAddrV4, size: usize, duration: Duration) -> io::Result<()> {
    let pattern = Pattern::new();
    let socket = connect_datagrams(to)?;
    let mut batch = Batch::new(size);
    let counters = Arc::new(Counters::default());
    let start = Instant::now();
    let answering = counters.clone();
    std::thread::spawn(move || answering.answer(start));
    let end = start + duration;
    let mut number = 0_u64;
    while Instant::now() < end && number < MAX_NUMBER {
        for (buffer, number) in batch.buffers().zip(number..) {
            let (head, rest) = buffer.split_at_mut(NUMBER_LEN);
            head.copy_from_slice(&number.to_be_bytes());
            rest.copy_from_slice(pattern.of_datagram(number, rest.len()));
        }
        match batch.send(&socket) {
            Ok(sent) => {
                number += sent as u64;
                counters.units.store(number, Ordering::Relaxed);
            }
            // A full queue is what a flood is about.
            Err(error) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn ask_stream(to: SocketAddrV4, duration: Duration) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&to.into(), PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    ask(duration, |request| {
        let mut reply = [0; NUMBER_LEN];
        stream.write_all(&request)?;
        stream.read_exact(&mut reply)?;
        Ok(Some(reply))
    })
}

fn ask_datagrams(to: SocketAddrV4, duration: Duration) -> io::Result<()> {
    let socket = connect_datagrams(to)?;
    socket.set_read_timeout(Some(LOST))?;
    ask(duration, |request| {
        let mut reply = [0; NUMBER_LEN];
        socket.send(&request)?;
        loop {
            match socket.recv(&mut reply) {
                // A late reply to an earlier one does not count.
                Ok(_) if reply < request => {}
                Ok(_) => return Ok(Some(reply)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    })
}

/// Sends requests at their times, whether the one before was answered or not, and says how long
/// replies took.
fn pace_datagrams(to: SocketAddrV4, duration: Duration) -> io::Result<()> {
    let socket = connect_datagrams(to)?;
    let reader = socket.try_clone()?;
    reader.set_read_timeout(Some(LATEST))?;
    let begin = Instant::now();
    let count = (duration.as_secs_f64() / PACE.as_secs_f64()) as u64;
    let times = std::thread::spawn(move || {
        let mut times = Vec::new();
        let mut reply = [0; NUMBER_LEN];
        while times.len() < count as usize && reader.recv(&mut reply).is_ok() {
            let asked = PACE.as_secs_f64() * u64::from_be_bytes(reply) as f64;
            times.push(begin.elapsed().as_secs_f64() - asked);
        }
        times
    });
    for number in 0..count {
        let due = begin + PACE.mul_f64(number as f64);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        // It may be lost here as well as elsewhere.
        let _ = socket.send(&number.to_be_bytes());
    }
    let times = times
        .join()
        .map_err(|_| io::Error::other("the reader failed"))?;
    say(&RoundTrips::of(times, count as usize))
}

/// Counts frames above this length until the standard input ends, and says how many there were.
fn count_giants(interface: &str, way: &str, above: u32) -> io::Result<()> {
    let way = Way::from_str(way, false).map_err(io::Error::other)?;
    say(&wire::count_giants(interface, way, above)?)
}

/// Floods as the words say, and says how many packets that were.
fn flood(words: &[&str], duration: Duration) -> io::Result<()> {
    let [kind, own, gateway, here, there, outside] = words else {
        return Err(io::Error::other("a flood has a kind and five addresses"));
    };
    let kind = Flood::from_str(kind, false).map_err(io::Error::other)?;
    let to = Targets {
        own: parse(own),
        gateway: parse(gateway),
        here: parse(here),
        there: parse(there),
        outside: parse(outside),
    };
    say(&floods::send(kind, to, duration)?)
}

/// Is the proxy of a host, and says so when its device is there.
fn flannel_udp(own: Ipv4Addr, subnet: Ipv4Net, peer: Ipv4Addr) -> io::Result<()> {
    let mut proxy = Proxy::open(own, subnet, peer)?;
    say(&true)?;
    proxy.run()
}

/// Asks one request after the other, and says how long replies took.
fn ask(
    duration: Duration,
    mut one: impl FnMut([u8; NUMBER_LEN]) -> io::Result<Option<[u8; NUMBER_LEN]>>,
) -> io::Result<()> {
    let begin = Instant::now();
    let mut times = Vec::new();
    let mut lost = 0;
    for number in 0_u64.. {
        let request = number.to_be_bytes();
        let asked = Instant::now();
        if asked - begin > WARM_UP + duration {
            break;
        }
        let reply = one(request)?;
        let took = asked.elapsed();
        match reply {
            Some(reply) if reply != request => return Err(io::Error::other("a wrong reply")),
            Some(_) if asked - begin > WARM_UP => times.push(took),
            Some(_) => {}
            None => lost += 1,
        }
    }
    let asked = times.len() + lost;
    let times = times.iter().map(Duration::as_secs_f64).collect();
    say(&RoundTrips::of(times, asked))
}
