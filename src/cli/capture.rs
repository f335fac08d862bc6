//! `muslin capture`: packets as a node sees them, as pcapng files or into a pipe.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use muslin_stack::api::capture::Capture;
use muslin_stack::api::pcapng::{self, Block};
use muslin_stack::control::ipam::PodName;
use nix::sys::signal::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep_until, timeout};

use super::NodeChoice;
use crate::control::Client;
use crate::error::{Context, Error, Result};
use crate::process::block_on;
use crate::signals::Listener;
use crate::terminal::quantity::count;

/// How long the node may take to finish.
const PATIENCE: Duration = Duration::from_secs(5);
const MEGABYTE: u64 = 1_000_000;
/// Bytes that are read at once, and longer than any block.
const ROOM: usize = 1 << 20;

#[derive(Debug, Args)]
#[command(after_help = "\
Hooks: from-pod, to-pod, from-tunnel, to-tunnel, from-uplink, to-uplink, from-host, to-host, \
from-egress, to-egress. Each is an interface of the file. The comment of a packet says what became of \
it: frame.comment contains \"dropped\". tcpdump reads a file if all hooks in it begin alike: with an \
Ethernet header do those of pods and of the uplink, and of the tunnel with VXLAN.")]
pub(super) struct Arguments {
    #[command(flatten)]
    node: NodeChoice,
    /// The file to write, in pcapng format; `-` is stdout
    #[arg(short, long, value_name = "FILE")]
    write: PathBuf,
    /// Where packets are seen; may be given several times [default: everywhere]
    #[arg(long = "hook", value_name = "HOOK", value_delimiter = ',')]
    hooks: Vec<String>,
    /// Packets that are lost, wherever they came in; without --hook no others
    #[arg(long)]
    dropped: bool,
    /// Only packets from or to this pod
    #[arg(long, value_name = "NAME")]
    pod: Option<PodName>,
    /// Only packets from or to this node
    #[arg(long, value_name = "NODE")]
    peer: Option<String>,
    /// Bytes that are copied of each packet [default: all]
    #[arg(
        short,
        long,
        value_name = "BYTES",
        default_value_t = 0,
        hide_default_value = true
    )]
    snap_len: u32,
    /// Write superpackets as the segments that they stand for, with finished checksums
    #[arg(long)]
    segments: bool,
    /// End after so many packets
    #[arg(short, long, value_name = "PACKETS")]
    count: Option<u64>,
    /// End after so many seconds
    #[arg(long, value_name = "SECONDS")]
    duration: Option<u64>,
    /// Begin another file when one has so many megabytes: FILE has a number then
    #[arg(long, value_name = "MB", value_parser = clap::value_parser!(u64).range(1..))]
    file_size: Option<u64>,
    /// With --file-size: keep only so many files
    #[arg(long, value_name = "FILES", requires = "file_size", value_parser = clap::value_parser!(u64).range(1..))]
    files: Option<u64>,
    /// Only packets of which this is true, in the words of pcap-filter(7)
    #[arg(value_name = "FILTER", trailing_var_arg = true)]
    filter: Vec<String>,
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let to_stdout = arguments.write == Path::new("-");
    if to_stdout && io::stdout().is_terminal() {
        return Err(Error::usage(
            "stdout is a terminal: write to a file, or pipe it into 'wireshark -k -i -' or 'tshark -i -'",
        ));
    }
    if to_stdout && arguments.file_size.is_some() {
        return Err(Error::usage("--file-size needs files, and '-' is stdout"));
    }
    let socket = arguments.node.socket()?;
    block_on(async {
        let client = Client::connect(&socket).await?;
        let (ours, theirs) = UnixStream::pair().context("cannot make a pair of sockets")?;
        let mut request = Capture::default();
        request.hooks.clone_from(&arguments.hooks);
        request.dropped = arguments.dropped;
        request.pod.clone_from(&arguments.pod);
        request.peer.clone_from(&arguments.peer);
        request.filter = arguments.filter.join(" ");
        request.snap_len = arguments.snap_len;
        request.segments = arguments.segments;
        client.capture(request, theirs.as_fd()).await?;
        drop(theirs);
        let blocks = Blocks::new(Output::open(arguments)?, arguments.count);
        let (totals, end) = copy(ours, blocks, Stop::new(arguments)?).await?;
        eprintln!(
            "{} captured, {} lost since they came faster than they were read",
            count(totals.packets, "packet"),
            totals.lost
        );
        match end {
            End::Wanted => Ok(()),
            End::Node => Err(Error::failed(
                "the node has ended, and the capture with it: what it had not handed over is missing",
            )),
        }
    })
}

/// What was captured.
#[derive(Debug, Default)]
struct Totals {
    packets: u64,
    lost: u64,
}

/// Why a capture is over.
#[derive(Debug)]
enum End {
    /// There is enough.
    Wanted,
    /// The node writes no more.
    Node,
}

/// Copies what the node writes until there is enough, and then what it still has.
async fn copy(mut stream: UnixStream, mut blocks: Blocks, mut stop: Stop) -> Result<(Totals, End)> {
    while !stop.is_over && !blocks.is_enough() {
        tokio::select! {
            read = stream.read_buf(&mut blocks.bytes) => {
                if read.context("cannot read from the node")? == 0 {
                    return Ok((blocks.totals, End::Node));
                }
                blocks = blocks.written(&mut stop).await?;
            }
            () = stop.heard() => stop.is_over = true,
        }
    }
    // The node finishes the file then.
    stop.is_over = true;
    let _ = stream.shutdown().await;
    let rest = async {
        while stream.read_buf(&mut blocks.bytes).await? > 0 {}
        io::Result::Ok(())
    };
    let rest = timeout(PATIENCE, rest).await;
    rest.map_err(|_| Error::failed("the node does not finish the capture"))?
        .context("cannot read from the node")?;
    Ok((blocks.written(&mut stop).await?.totals, End::Wanted))
}

/// When there is enough.
struct Stop {
    interrupt: Listener,
    terminate: Listener,
    until: Option<Instant>,
    /// Whether it has been heard: the next signal means at once.
    is_over: bool,
}

impl Stop {
    fn new(arguments: &Arguments) -> Result<Self> {
        let duration = arguments.duration.map(Duration::from_secs);
        Ok(Self {
            interrupt: Listener::new(Signal::SIGINT)?,
            terminate: Listener::new(Signal::SIGTERM)?,
            until: duration.and_then(|duration| Instant::now().checked_add(duration)),
            is_over: false,
        })
    }

    async fn heard(&mut self) {
        let until = self.until.filter(|_| !self.is_over);
        let due = async {
            match until {
                Some(until) => sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.interrupt.heard() => {}
            () = self.terminate.heard() => {}
            () = due => {}
        }
    }
}

/// What came of a file, as far as it is not written yet, and where it goes.
struct Blocks {
    bytes: Vec<u8>,
    output: Output,
    totals: Totals,
    /// Packets that are enough.
    most: u64,
}

impl Blocks {
    fn new(output: Output, most: Option<u64>) -> Self {
        Self {
            bytes: Vec::with_capacity(ROOM),
            output,
            totals: Totals::default(),
            most: most.unwrap_or(u64::MAX),
        }
    }

    fn is_enough(&self) -> bool {
        self.totals.packets >= self.most
    }

    /// Writes the blocks that are whole, on a thread beside this one, which hears signals meanwhile:
    /// whoever is to read a pipe may have stopped.
    async fn written(mut self, stop: &mut Stop) -> Result<Self> {
        let mut writing = spawn_blocking(move || self.write().map(|()| self));
        loop {
            tokio::select! {
                written = &mut writing => return written.context("cannot write")?,
                () = stop.heard() => {
                    if std::mem::replace(&mut stop.is_over, true) {
                        let message = "interrupted before all that was captured was written";
                        return Err(Error::failed(message));
                    }
                }
            }
        }
    }

    fn write(&mut self) -> Result<()> {
        let mut done = 0;
        while let Some((len, block)) = pcapng::next_block(&self.bytes[done..])
            && let Some(bytes) = self.bytes.get(done..done + len)
        {
            match block {
                Block::Packet if self.totals.packets >= self.most => {}
                Block::Packet => {
                    self.output.write(bytes)?;
                    self.totals.packets += 1;
                }
                Block::Head => self.output.begin(bytes)?,
                Block::Statistics(lost) => {
                    self.output.write(bytes)?;
                    self.totals.lost += lost;
                }
            }
            done += len;
        }
        self.bytes.drain(..done);
        if self.bytes.len() >= ROOM {
            return Err(Error::failed("what the node writes is no capture"));
        }
        self.output.flush()
    }
}

/// Where packets are written to: one file, or a number of them.
struct Output {
    path: PathBuf,
    file: Box<dyn Write + Send>,
    /// With what each file begins.
    head: Vec<u8>,
    written: u64,
    /// After how many bytes another file begins.
    most: Option<u64>,
    kept: Option<u64>,
    number: u64,
}

impl Output {
    fn open(arguments: &Arguments) -> Result<Self> {
        let path = arguments.write.clone();
        let most = arguments
            .file_size
            .map(|size| size.saturating_mul(MEGABYTE));
        let file: Box<dyn Write + Send> = match (path == Path::new("-"), most) {
            (true, _) => Box::new(BufWriter::new(io::stdout())),
            (false, None) => Box::new(create(&path)?),
            (false, Some(_)) => Box::new(create(&numbered(&path, 0))?),
        };
        Ok(Self {
            path,
            file,
            head: Vec::new(),
            written: 0,
            most,
            kept: arguments.files,
            number: 0,
        })
    }

    /// Writes a block with which every file begins.
    fn begin(&mut self, block: &[u8]) -> Result<()> {
        self.head.extend_from_slice(block);
        self.put(block)
    }

    fn write(&mut self, block: &[u8]) -> Result<()> {
        if self
            .most
            .is_some_and(|most| self.written + block.len() as u64 > most)
        {
            self.flush()?;
            self.number += 1;
            // The oldest is written anew.
            let number = self.kept.map_or(self.number, |kept| self.number % kept);
            self.file = Box::new(create(&numbered(&self.path, number))?);
            self.written = 0;
            let head = std::mem::take(&mut self.head);
            self.put(&head)?;
            self.head = head;
        }
        self.put(block)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.written += bytes.len() as u64;
        self.check(|file| file.write_all(bytes))
    }

    fn flush(&mut self) -> Result<()> {
        self.check(|file| file.flush())
    }

    fn check(&mut self, call: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
        match call(&mut *self.file) {
            // Whoever read has enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Error::Command(0)),
            done => done.context(format_args!("cannot write {}", self.path.display())),
        }
    }
}

fn create(path: &Path) -> Result<BufWriter<File>> {
    let file = File::create(path);
    file.map(BufWriter::new)
        .context(format_args!("cannot write {}", path.display()))
}

/// `web-3.pcapng` of `web.pcapng`.
fn numbered(path: &Path, number: u64) -> PathBuf {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let end = path
        .extension()
        .map_or_else(String::new, |end| format!(".{}", end.to_string_lossy()));
    path.with_file_name(format!("{stem}-{number}{end}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_in_front_of_the_ending() {
        for (path, expected) in [
            ("web.pcapng", "web-3.pcapng"),
            ("/tmp/a.b/web", "/tmp/a.b/web-3"),
            ("x.y.pcapng", "x.y-3.pcapng"),
        ] {
            assert_eq!(numbered(Path::new(path), 3), Path::new(expected));
        }
    }
}
