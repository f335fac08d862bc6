//! The other end of an agent's pipes.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;

use super::protocol::{
    Answer, Echoed, Exchanged, IcmpError, Interface, Listening, Opened, Ping, Pinged, Refused,
    Reply, Request, Sent,
};
use crate::error::{Context, Error, Result};

/// Time for what takes none.
const SOON: Duration = Duration::from_secs(15);
/// Time for a transfer; agents themselves give up when nothing moves.
const TRANSFER: Duration = Duration::from_secs(300);
/// How long an agent may take to end after its input has.
const END: Duration = Duration::from_secs(2);

/// A process whose standard input and output are an agent's; it is killed on drop.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    input: Option<ChildStdin>,
    lines: Receiver<std::io::Result<String>>,
}

impl Agent {
    /// Starts `command`, which must lead to `muslin agent` or `muslin-probe`, in whatever namespace.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(command: &mut Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("the agent cannot be started")?;
        let input = child.stdin.take();
        let (sender, lines) = sync_channel(1);
        if let Some(output) = child.stdout.take() {
            // Ends with the child's output, or when the receiver is gone.
            std::thread::spawn(move || {
                for line in BufReader::new(output).lines() {
                    if sender.send(line).is_err() {
                        return;
                    }
                }
            });
        }
        Ok(Self {
            child,
            input,
            lines,
        })
    }

    /// The process.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Asks, and waits so long for an answer.
    ///
    /// # Errors
    /// What the agent answers, or that it does not.
    pub fn request<T: DeserializeOwned>(
        &mut self,
        request: &Request,
        timeout: Duration,
    ) -> Result<T> {
        let input = self.input.as_mut();
        let input = input.ok_or_else(|| Error::failed("the agent has no input"))?;
        let mut line = serde_json::to_vec(request).context("a request for the agent")?;
        line.push(b'\n');
        input
            .write_all(&line)
            .context("the agent accepts no request")?;
        let answer = match self.lines.recv_timeout(timeout) {
            Ok(answer) => answer.context("the agent's output")?,
            Err(RecvTimeoutError::Timeout) => {
                return Err(Error::failed(format_args!(
                    "the agent has not answered within {} s",
                    timeout.as_secs()
                )));
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::failed("the agent has ended"));
            }
        };
        match serde_json::from_str(&answer).context("the agent's answer")? {
            Answer::Ok(value) => serde_json::from_value(value).context("the agent's answer"),
            Answer::Error(text) => Err(Error::failed(text)),
        }
    }

    /// Waits until the agent answers.
    ///
    /// # Errors
    /// If it does not within `timeout`.
    pub fn wait_ready(&mut self, timeout: Duration) -> Result<()> {
        self.request::<Vec<Interface>>(&Request::Interfaces {}, timeout)?;
        Ok(())
    }

    /// Sends echo requests and waits for what becomes of them.
    ///
    /// # Errors
    /// If none can be made, or the agent fails.
    pub fn ping(&mut self, ping: &Ping) -> Result<Pinged> {
        let sending = Duration::from_millis(ping.interval_ms) * u32::from(ping.count);
        let waiting = Duration::from_millis(ping.timeout_ms);
        self.request(&Request::Ping(ping.clone()), sending + waiting + SOON)
    }

    /// Listens on a port, 0 for any, and returns which.
    ///
    /// # Errors
    /// If the port is taken, or the agent fails.
    pub fn listen(&mut self, port: u16) -> Result<u16> {
        let listening: Listening = self.request(&Request::Listen { port }, SOON)?;
        Ok(listening.port)
    }

    /// Sends `bytes` bytes over a TCP connection of its own.
    ///
    /// # Errors
    /// If nothing moves for long, or the connection or the agent fails.
    pub fn send(&mut self, to: impl Into<SocketAddr>, bytes: u64, seed: u64) -> Result<Sent> {
        let to = to.into();
        self.request(&Request::Send { to, bytes, seed }, TRANSFER)
    }

    /// Opens a TCP connection that stays.
    ///
    /// # Errors
    /// If nothing listens there, or the agent fails.
    pub fn open(&mut self, to: impl Into<SocketAddr>) -> Result<u64> {
        let to = to.into();
        let opened: Opened = self.request(&Request::Open { to }, SOON)?;
        Ok(opened.id)
    }

    /// Sends `bytes` bytes there and back through an open connection.
    ///
    /// # Errors
    /// If nothing moves for long, or the connection or the agent fails.
    pub fn exchange(&mut self, id: u64, bytes: u64, seed: u64) -> Result<Exchanged> {
        self.request(&Request::Exchange { id, bytes, seed }, TRANSFER)
    }

    /// Closes a connection.
    ///
    /// # Errors
    /// If there is none of that number, or the agent fails.
    pub fn close(&mut self, id: u64) -> Result<()> {
        self.request(&Request::Close { id }, SOON)
    }

    /// Sends `count` datagrams of `size` bytes, one after the other, and waits for each echo.
    ///
    /// # Errors
    /// If none can be sent, or the agent fails.
    pub fn udp(&mut self, to: impl Into<SocketAddr>, count: u32, size: usize) -> Result<Echoed> {
        let request = Request::Udp {
            to: to.into(),
            count,
            size,
            timeout_ms: 5000,
        };
        self.request(&request, TRANSFER)
    }

    /// The network interfaces.
    ///
    /// # Errors
    /// If the agent fails.
    pub fn interfaces(&mut self) -> Result<Vec<Interface>> {
        self.request(&Request::Interfaces {}, SOON)
    }

    /// The first IPv4 address of an interface.
    ///
    /// # Errors
    /// If it has none, or the agent fails.
    pub fn address(&mut self, interface: &str) -> Result<Ipv4Addr> {
        self.addresses(interface)?
            .find_map(|address| match address {
                IpAddr::V4(address) => Some(address),
                IpAddr::V6(_) => None,
            })
            .ok_or_else(|| Error::failed(format_args!("{interface} has no IPv4 address")))
    }

    /// The first IPv6 address of an interface that is not link-local.
    ///
    /// # Errors
    /// If it has none, or the agent fails.
    pub fn address_v6(&mut self, interface: &str) -> Result<Ipv6Addr> {
        self.addresses(interface)?
            .find_map(|address| match address {
                IpAddr::V6(address) if !address.is_unicast_link_local() => Some(address),
                IpAddr::V4(_) | IpAddr::V6(_) => None,
            })
            .ok_or_else(|| Error::failed(format_args!("{interface} has no IPv6 address")))
    }

    fn addresses(&mut self, interface: &str) -> Result<impl Iterator<Item = IpAddr>> {
        let rows = self.interfaces()?.into_iter();
        Ok(rows
            .filter(move |row| row.name == interface)
            .filter_map(|row| row.address))
    }

    /// Sends Ethernet frames as they are.
    ///
    /// # Errors
    /// If the system refuses one, or the agent fails.
    pub fn inject(&mut self, interface: &str, frames: &[Vec<u8>]) -> Result<()> {
        let request = Request::Inject {
            interface: interface.to_owned(),
            frames: frames.iter().map(|frame| to_hex(frame)).collect(),
        };
        self.request(&request, SOON)
    }

    /// Starts to keep what arrives at an interface.
    ///
    /// # Errors
    /// If there is no such interface, or the agent fails.
    pub fn capture(&mut self, interface: &str) -> Result<()> {
        let request = Request::Capture {
            interface: interface.to_owned(),
        };
        self.request(&request, SOON)
    }

    /// Ends a capture and returns the frames.
    ///
    /// # Errors
    /// If there is none, or the agent fails.
    pub fn captured(&mut self) -> Result<Vec<Vec<u8>>> {
        let frames: Vec<String> = self.request(&Request::Captured {}, SOON)?;
        frames
            .iter()
            .map(|frame| from_hex(frame).ok_or_else(|| Error::failed("a frame is not hexadecimal")))
            .collect()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // At the end of its input an agent ends, and whatever it runs in.
        self.input = None;
        let deadline = Instant::now() + END;
        while Instant::now() < deadline {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(2)),
                Ok(Some(_)) | Err(_) => return,
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(super) fn to_hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

pub(super) fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let pairs = text.as_bytes().chunks(2);
    pairs
        .map(|pair| match *pair {
            [high, low] => u8::try_from(digit(high)? * 16 + digit(low)?).ok(),
            _ => None,
        })
        .collect()
}

impl Reply {
    /// The round trip.
    #[must_use]
    pub fn rtt(&self) -> Duration {
        Duration::from_micros(self.rtt_us)
    }
}

impl Sent {
    /// Throughput in bits per second.
    #[must_use]
    pub fn bits_per_second(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.seconds.max(f64::EPSILON)
    }
}

impl Exchanged {
    /// Throughput of each direction in bits per second.
    #[must_use]
    pub fn bits_per_second(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.seconds.max(f64::EPSILON)
    }
}

impl IcmpError {
    /// Whether a router says that the packet does not fit, with this MTU in bytes.
    #[must_use]
    pub fn is_fragmentation_needed(&self, mtu: u16) -> bool {
        let fragmentation_needed = match self.from {
            IpAddr::V4(_) => (3, 4),
            IpAddr::V6(_) => (2, 0),
        };
        (self.kind, self.code) == fragmentation_needed && self.mtu == Some(mtu)
    }

    /// Whether a router says that the packet's time to live ended.
    #[must_use]
    pub fn is_time_exceeded(&self) -> bool {
        let time_exceeded = match self.from {
            IpAddr::V4(_) => 11,
            IpAddr::V6(_) => 3,
        };
        (self.kind, self.code) == (time_exceeded, 0)
    }
}

impl Refused {
    /// Whether the packet does not fit this system's interface or the path it knows.
    #[must_use]
    pub fn is_too_long(&self) -> bool {
        self.error == "EMSGSIZE"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_digits_are_bytes() {
        assert_eq!(to_hex(&[0, 0x7f, 0xff]), "007fff");
        assert_eq!(from_hex("007FfF"), Some(vec![0, 0x7f, 0xff]));
        assert_eq!(from_hex(""), Some(vec![]));
        for wrong in ["0", "0g", "+1", "ä"] {
            assert_eq!(from_hex(wrong), None, "{wrong}");
        }
    }
}
