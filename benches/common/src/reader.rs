//! Who reads what a node serves by HTTP, as Prometheus and a browser do: again and again.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

/// Reads `path` from there once each `pause`, for ever. Nodes end a connection with their answer.
///
/// # Errors
/// If there is another answer than one with the status 200.
pub(crate) fn read(address: SocketAddr, path: &str, pause: Duration) -> io::Result<()> {
    let mut answer = Vec::new();
    loop {
        answer.clear();
        let mut stream = TcpStream::connect(address)?;
        write!(stream, "GET {path} HTTP/1.1\r\nhost: {address}\r\n\r\n")?;
        stream.read_to_end(&mut answer)?;
        if !answer.starts_with(b"HTTP/1.1 200 ") {
            return Err(io::Error::other(String::from_utf8_lossy(&answer)));
        }
        thread::sleep(pause);
    }
}
