//! HTTP for anybody who asks, so that nobody may hold much: few clients at a time, each for a short
//! time, with a small buffer. Where there are more, those go who have been silent for longest: who
//! asks is answered whoever else is connected.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};
use tracing::debug;

use crate::clients::Clients;
use crate::error::{Error, Result};

/// Clients served at once.
pub(crate) const CLIENTS: usize = 128;
/// How long a client may take for its question and our answer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(3);
/// What is read of a question: the least that hyper allows.
pub(crate) const QUESTION: usize = 8192;
/// How long to leave a system alone that has no descriptors left.
const REST: Duration = Duration::from_millis(100);
/// What an answer in words is.
const PLAIN: &str = "text/plain; charset=utf-8";

/// The answer to a question.
pub(crate) type Answer = Response<Full<Bytes>>;

/// Takes an address for `what`, which the command line names by `flag`.
///
/// # Errors
/// If it cannot be had.
pub(crate) async fn listen(address: SocketAddr, what: &str, flag: &str) -> Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| {
        Error::failed(match error.kind() {
            io::ErrorKind::AddrInUse => format!(
                "TCP port {} of {} is in use: choose another {flag}",
                address.port(),
                address.ip()
            ),
            _ => format!("cannot serve {what} at {address}: {error}"),
        })
    })
}

/// Answers for ever, as `respond` says.
pub(crate) async fn serve<R, F>(listener: TcpListener, respond: R)
where
    R: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Answer> + Send + 'static,
{
    let mut clients = Clients::new(CLIENTS);
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // Nobody is kept, so there is room.
                if let Some(room) = clients.make_room().await {
                    let respond = respond.clone();
                    clients.serve(room, |place| async move {
                        converse(stream, respond).await;
                        drop(place);
                    });
                }
            }
            Err(error) => {
                debug!("cannot accept HTTP requests: {error}");
                sleep(REST).await;
            }
        }
    }
}

async fn converse<R, F>(stream: TcpStream, respond: R)
where
    R: Fn(Request<Incoming>) -> F,
    F: Future<Output = Answer>,
{
    let service = service_fn(|request| {
        let response = respond(request);
        async move { Ok::<_, Infallible>(response.await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .max_buf_size(QUESTION)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(PATIENCE, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!("an HTTP request failed: {error}"),
        Err(_) => debug!("an HTTP request took too long"),
    }
}

/// Whether a page may be asked for in this way.
pub(crate) fn is_allowed(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD)
}

/// An answer in words.
pub(crate) fn plain(status: StatusCode, text: impl Into<Bytes>) -> Answer {
    answer(status, PLAIN, text)
}

/// An answer of this type of content.
pub(crate) fn answer(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut response = Response::new(Full::from(body.into()));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static(kind);
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

/// There is no such page.
pub(crate) fn not_found() -> Answer {
    plain(StatusCode::NOT_FOUND, "404 page not found\n")
}

/// There is, and it cannot be asked for in this way.
pub(crate) fn not_allowed() -> Answer {
    let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "use GET or HEAD\n");
    let allowed = HeaderValue::from_static("GET, HEAD");
    response.headers_mut().insert(ALLOW, allowed);
    response
}

#[cfg(test)]
pub(crate) mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// The answer to these bytes, all of it.
    pub(crate) async fn ask(address: SocketAddr, question: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(question.as_bytes()).await.unwrap();
        let mut answer = String::new();
        let read = stream.read_to_string(&mut answer);
        timeout(Duration::from_secs(20), read).await.unwrap().ok();
        answer
    }

    /// The status and the body of an answer.
    pub(crate) async fn request(address: SocketAddr, method: &str, path: &str) -> (u16, String) {
        let question = format!("{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n");
        let answer = ask(address, &question).await;
        let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        (status, body.to_owned())
    }

    async fn start() -> SocketAddr {
        let listener = listen("127.0.0.1:0".parse().unwrap(), "words", "--words").await;
        let listener = listener.unwrap();
        let address = listener.local_addr().unwrap();
        let respond = |_| std::future::ready(plain(StatusCode::OK, "words"));
        tokio::spawn(serve(listener, respond));
        address
    }

    #[tokio::test]
    async fn what_is_no_question_is_cut_off() {
        let address = start().await;
        let long = format!("GET /{} HTTP/1.1\r\n", "x".repeat(2 * QUESTION));
        for question in ["\0\0\0\r\n\r\n", "GET\r\n\r\n", &long] {
            let answer = ask(address, question).await;
            let status = answer.split(' ').nth(1).unwrap_or("");
            assert!(status.is_empty() || status.starts_with('4'), "{answer}");
        }
        assert_eq!(request(address, "GET", "/").await.0, 200);
    }

    #[tokio::test]
    async fn silent_clients_hold_nobody_up() {
        let address = start().await;
        let mut silent = Vec::new();
        for _ in 0..2 * CLIENTS {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        assert_eq!(request(address, "GET", "/").await.0, 200);
        // The first have made room, long before their time is over.
        let mut byte = [0];
        let ended = timeout(PATIENCE / 3, silent[0].read(&mut byte));
        assert!(matches!(ended.await.unwrap(), Ok(0) | Err(_)));
        let last = silent.last_mut().unwrap();
        assert!(timeout(PATIENCE / 30, last.read(&mut byte)).await.is_err());
    }

    #[tokio::test]
    async fn a_taken_port_is_named() {
        let address = start().await;
        let error = listen(address, "words", "--words").await.unwrap_err();
        assert_eq!(error.exit_code(), 1);
        let text = error.to_string();
        assert!(text.contains(&address.port().to_string()), "{text}");
        assert!(text.contains("--words"), "{text}");
    }
}
