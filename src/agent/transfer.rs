//! Transfers with contents that are compared.
//!
//! A connection's first byte says what it is for: [`SINK`] or [`ECHO`].

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{
    IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket,
};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::protocol::{Echoed, Exchanged, Listening, Opened, Sent};

/// The listener counts and digests what comes, and answers with both at its end.
const SINK: u8 = b'S';
/// The listener sends everything back.
const ECHO: u8 = b'E';
/// How long a connection may stand still.
const PATIENCE: Duration = Duration::from_secs(20);
/// Bytes written at once.
const CHUNK: usize = 64 << 10;
/// Bytes on their way through an echo.
const EXCHANGED: usize = 32 << 10;
/// Connections a listener serves, and connections an agent keeps.
const MAX_CONNECTIONS: usize = 64;
/// The most a datagram carries.
const MAX_DATAGRAM: usize = 65_507;

/// Pseudo-random bytes (`SplitMix64`): cheap, and a lost, repeated or moved piece shows.
pub(super) struct Generator(u64);

impl Generator {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    pub(super) fn fill(&mut self, bytes: &mut [u8]) {
        for piece in bytes.chunks_mut(8) {
            piece.copy_from_slice(&self.next().to_le_bytes()[..piece.len()]);
        }
    }
}

/// A digest of a stream, whatever pieces it comes in.
#[derive(Default)]
struct Digest {
    count: u64,
    state: u64,
    partial: [u8; 8],
}

impl Digest {
    fn update(&mut self, mut bytes: &[u8]) {
        let held = (self.count % 8) as usize;
        self.count += bytes.len() as u64;
        if held > 0 {
            let taken = bytes.len().min(8 - held);
            self.partial[held..held + taken].copy_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
            if held + taken < 8 {
                return;
            }
            self.mix(self.partial);
        }
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            self.mix(*word);
        }
        self.partial[..rest.len()].copy_from_slice(rest);
    }

    fn mix(&mut self, word: [u8; 8]) {
        let mixed = self.state.rotate_left(5) ^ u64::from_le_bytes(word);
        self.state = mixed.wrapping_mul(0x517c_c1b7_2722_0a95);
    }

    /// Count and digest, as a listener answers.
    fn finish(mut self) -> [u8; 16] {
        let held = (self.count % 8) as usize;
        self.partial[held..].fill(0);
        self.mix(self.partial);
        let mut answer = [0; 16];
        answer[..8].copy_from_slice(&self.count.to_be_bytes());
        answer[8..].copy_from_slice(&self.state.to_be_bytes());
        answer
    }
}

/// Serves TCP and UDP on a port of every address until the process ends.
pub(super) fn listen(port: u16) -> io::Result<Listening> {
    // The unspecified address of IPv6 stands for those of IPv4, too, where the system has both.
    let any = [Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()];
    let at = |port| any.map(|address: IpAddr| SocketAddr::new(address, port));
    let listener = TcpListener::bind(&at(port)[..])?;
    let port = listener.local_addr()?.port();
    let datagrams = UdpSocket::bind(&at(port)[..])?;
    std::thread::Builder::new().spawn(move || accept(&listener))?;
    std::thread::Builder::new().spawn(move || echo_datagrams(&datagrams))?;
    Ok(Listening { port })
}

fn accept(listener: &TcpListener) {
    let places = Arc::new(());
    for stream in listener.incoming() {
        let place = places.clone();
        // One more than there are connections: the listener's own.
        if Arc::strong_count(&places) > MAX_CONNECTIONS + 1 {
            continue;
        }
        let Ok(stream) = stream else {
            // Out of descriptors, perhaps: not for ever, but not to be hurried either.
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        // Where there is no thread the connection ends, which its other end sees.
        let _ = std::thread::Builder::new().spawn(move || {
            let _place = place;
            // The other end sees the connection's end and says what it lacks.
            let _ = answer(stream);
        });
    }
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    let mut mode = [0];
    stream.read_exact(&mut mode)?;
    let mut buffer = vec![0; CHUNK];
    let mut digest = Digest::default();
    stream.set_nodelay(true)?;
    loop {
        let len = stream.read(&mut buffer)?;
        match mode[0] {
            SINK if len == 0 => return stream.write_all(&digest.finish()),
            SINK => digest.update(&buffer[..len]),
            ECHO if len > 0 => stream.write_all(&buffer[..len])?,
            _ => return Ok(()),
        }
    }
}

fn echo_datagrams(socket: &UdpSocket) {
    let mut buffer = vec![0; MAX_DATAGRAM];
    loop {
        // Errors are of earlier answers, which found no receiver.
        if let Ok((len, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..len], from);
        }
    }
}

fn connect(to: SocketAddr, mode: u8) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(&[mode])?;
    Ok(stream)
}

pub(super) fn send(to: SocketAddr, bytes: u64, seed: u64) -> io::Result<Sent> {
    let mut stream = connect(to, SINK)?;
    let (mut generator, mut digest) = (Generator::new(seed), Digest::default());
    let mut buffer = vec![0; CHUNK];
    let start = Instant::now();
    let mut left = bytes;
    while left > 0 {
        let chunk = &mut buffer[..left.min(CHUNK as u64) as usize];
        generator.fill(chunk);
        digest.update(chunk);
        let sent = bytes - left;
        stream
            .write_all(chunk)
            .map_err(|error| explain(&error, sent))?;
        left -= chunk.len() as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut theirs = [0; 16];
    stream
        .read_exact(&mut theirs)
        .map_err(|error| explain(&error, bytes))?;
    let seconds = start.elapsed().as_secs_f64();
    let [c0, c1, c2, c3, c4, c5, c6, c7, ..] = theirs;
    Ok(Sent {
        bytes: u64::from_be_bytes([c0, c1, c2, c3, c4, c5, c6, c7]),
        seconds,
        intact: theirs == digest.finish(),
    })
}

fn explain(error: &io::Error, after: u64) -> io::Error {
    let what = match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            format!("no progress for {} s", PATIENCE.as_secs())
        }
        _ => error.to_string(),
    };
    io::Error::other(format!("{what}, with {after} bytes sent"))
}

/// Connections that stay.
#[derive(Default)]
pub(super) struct Connections {
    next: u64,
    open: BTreeMap<u64, TcpStream>,
}

impl Connections {
    pub(super) fn open(&mut self, to: SocketAddr) -> io::Result<Opened> {
        if self.open.len() >= MAX_CONNECTIONS {
            return Err(io::Error::other("too many open connections"));
        }
        let stream = connect(to, ECHO)?;
        let id = self.next;
        self.next += 1;
        self.open.insert(id, stream);
        Ok(Opened { id })
    }

    pub(super) fn exchange(&mut self, id: u64, bytes: u64, seed: u64) -> io::Result<Exchanged> {
        let stream = self.open.get_mut(&id).ok_or_else(unknown)?;
        let mut generator = Generator::new(seed);
        let mut buffer = vec![0; EXCHANGED];
        let mut echo = vec![0; EXCHANGED];
        let start = Instant::now();
        let mut intact = true;
        let mut done = 0;
        let (mut last, mut gap) = (start, Duration::ZERO);
        while done < bytes {
            let len = (bytes - done).min(EXCHANGED as u64) as usize;
            let (chunk, echo) = (&mut buffer[..len], &mut echo[..len]);
            generator.fill(chunk);
            stream
                .write_all(chunk)
                .map_err(|error| explain(&error, done))?;
            let mut came = 0;
            while came < len {
                let sent = done + len as u64;
                came += match stream.read(&mut echo[came..]) {
                    Ok(0) => return Err(explain(&io::ErrorKind::UnexpectedEof.into(), sent)),
                    Ok(more) => more,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => return Err(explain(&error, sent)),
                };
                let now = Instant::now();
                gap = gap.max(now - last);
                last = now;
            }
            intact &= chunk == echo;
            done += len as u64;
        }
        Ok(Exchanged {
            bytes: done,
            seconds: start.elapsed().as_secs_f64(),
            intact,
            gap_seconds: gap.as_secs_f64(),
        })
    }

    pub(super) fn close(&mut self, id: u64) -> io::Result<()> {
        self.open.remove(&id).map(drop).ok_or_else(unknown)
    }
}

fn unknown() -> io::Error {
    io::Error::other("no such connection")
}

pub(super) fn datagrams(
    to: SocketAddr,
    count: u32,
    size: usize,
    timeout_ms: u64,
) -> io::Result<Echoed> {
    if size > MAX_DATAGRAM {
        let text = format!("a datagram carries at most {MAX_DATAGRAM} bytes");
        return Err(io::Error::other(text));
    }
    let any: IpAddr = match to {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(to)?;
    let (mut datagram, mut echo) = (vec![0; size], vec![0; MAX_DATAGRAM]);
    let mut echoed = Echoed { sent: 0, intact: 0 };
    for seed in 0..count {
        Generator::new(seed.into()).fill(&mut datagram);
        socket.send(&datagram)?;
        echoed.sent += 1;
        let deadline = Instant::now() + Duration::from_millis(timeout_ms);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            socket.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            match socket.recv(&mut echo) {
                Ok(len) if echo[..len] == datagram => {
                    echoed.intact += 1;
                    break;
                }
                // Somebody else's, or late, or damaged.
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(echoed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_does_not_depend_on_the_pieces() {
        let mut bytes = vec![0; 1001];
        Generator::new(3).fill(&mut bytes);
        let digest = |pieces: &[&[u8]]| {
            let mut digest = Digest::default();
            for piece in pieces {
                digest.update(piece);
            }
            digest.finish()
        };
        let whole = digest(&[&bytes]);
        for cut in 0..bytes.len() {
            let (one, other) = bytes.split_at(cut);
            assert_eq!(digest(&[one, other]), whole, "cut at {cut}");
        }
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(digest(&single), whole);
        let triple: Vec<&[u8]> = bytes.chunks(3).collect();
        assert_eq!(digest(&triple), whole);
    }

    #[test]
    fn a_digest_sees_every_change() {
        let bytes: Vec<u8> = (0..40).collect();
        let digest = |bytes: &[u8]| {
            let mut digest = Digest::default();
            digest.update(bytes);
            digest.finish()
        };
        let whole = digest(&bytes);
        for index in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[index] ^= 1;
            assert_ne!(digest(&changed), whole, "byte {index}");
        }
        assert_ne!(digest(&bytes[..39]), whole);
        let mut swapped = bytes.clone();
        swapped.rotate_left(8);
        assert_ne!(digest(&swapped), whole);
        assert_ne!(digest(&[]), digest(&[0]));
    }
}
