//! Bytes between a client and the overlay.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes};
use tokio::net::TcpStream;

/// What is read at once, in bytes.
const BUFFER_LEN: usize = 64 << 10;

/// Copies both ways until both ends have ended; each sees the other's end. A reset is passed on.
pub(super) async fn relay(
    mut client: TcpStream,
    mut other: impl AsyncRead + AsyncWrite + Unpin,
) -> io::Result<()> {
    // What the pod sends goes on at once; waiting for more is for its own system.
    client.set_nodelay(true)?;
    let copied =
        copy_bidirectional_with_sizes(&mut client, &mut other, BUFFER_LEN, BUFFER_LEN).await;
    if copied.is_err() {
        // Closing sends a reset then; where it cannot be set, the end is an ordinary one.
        let _ = socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO));
    }
    copied.map(|_| ())
}
