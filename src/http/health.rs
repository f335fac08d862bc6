//! `/healthz` and `/readyz` over HTTP, in flannel's words.
//!
//! Anybody may ask, so that nobody may hold much: few clients at a time, each for a short time,
//! with a small buffer. Where there are more, those go who have been silent for longest: a probe is
//! answered whoever else is connected.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::debug;

use crate::clients::Clients;
use crate::condition::State;
use crate::error::{Error, Result};

/// Clients served at once.
const CLIENTS: usize = 128;
/// How long a client may take for its question and our answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// What is read of a question: the least that hyper allows.
const QUESTION: usize = 8192;
/// How long to leave a system alone that has no descriptors left.
const REST: Duration = Duration::from_millis(100);

/// Takes the address.
///
/// # Errors
/// If it cannot be had.
pub(crate) async fn listen(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| {
        Error::failed(match error.kind() {
            io::ErrorKind::AddrInUse => format!(
                "TCP port {} of {} is in use: choose another --healthz-port",
                address.port(),
                address.ip()
            ),
            _ => format!("cannot serve health at {address}: {error}"),
        })
    })
}

/// Answers for ever.
pub(crate) async fn serve(listener: TcpListener, condition: watch::Receiver<State>) {
    let mut clients = Clients::new(CLIENTS);
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // Nobody is kept, so there is room.
                if let Some(room) = clients.make_room().await {
                    let condition = condition.clone();
                    clients.serve(room, |place| async move {
                        converse(stream, condition).await;
                        drop(place);
                    });
                }
            }
            Err(error) => {
                debug!("cannot accept health requests: {error}");
                sleep(REST).await;
            }
        }
    }
}

async fn converse(stream: TcpStream, condition: watch::Receiver<State>) {
    let service = service_fn(|request: hyper::Request<hyper::body::Incoming>| {
        let response = respond(request.method(), request.uri().path(), &condition.borrow());
        std::future::ready(Ok::<_, Infallible>(response))
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .max_buf_size(QUESTION)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(PATIENCE, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!("a health request failed: {error}"),
        Err(_) => debug!("a health request took too long"),
    }
}

fn respond(method: &Method, path: &str, state: &State) -> Response<Full<Bytes>> {
    let (status, text) = match path {
        "/healthz" if state.is_alive() => (StatusCode::OK, "flanneld is running".to_owned()),
        "/healthz" => (StatusCode::SERVICE_UNAVAILABLE, unready(state)),
        "/readyz" if state.is_ready && state.is_alive() => {
            (StatusCode::OK, "flanneld is ready".to_owned())
        }
        "/readyz" => (StatusCode::SERVICE_UNAVAILABLE, unready(state)),
        _ => (StatusCode::NOT_FOUND, "404 page not found\n".to_owned()),
    };
    let is_known = status != StatusCode::NOT_FOUND;
    let (status, text) = match *method {
        Method::GET | Method::HEAD => (status, text),
        _ if is_known => {
            let text = "use GET or HEAD\n".to_owned();
            (StatusCode::METHOD_NOT_ALLOWED, text)
        }
        _ => (status, text),
    };
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(
        CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    if status == StatusCode::METHOD_NOT_ALLOWED {
        headers.insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    response
}

/// flannel's words, and what the node waits for.
fn unready(state: &State) -> String {
    let text = "flanneld is not ready yet";
    match state.trouble() {
        Some(trouble) => format!("{text}: {trouble}"),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::condition::{Condition, Need};

    async fn start() -> (SocketAddr, Condition) {
        let listener = listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let condition = Condition::new();
        tokio::spawn(serve(listener, condition.subscribe()));
        (address, condition)
    }

    /// The answer to these bytes, all of it.
    async fn ask(address: SocketAddr, question: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(question.as_bytes()).await.unwrap();
        let mut answer = String::new();
        let read = stream.read_to_string(&mut answer);
        timeout(Duration::from_secs(20), read).await.unwrap().ok();
        answer
    }

    async fn request(address: SocketAddr, method: &str, path: &str) -> (u16, String) {
        let question = format!("{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n");
        let answer = ask(address, &question).await;
        let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        (status, body.to_owned())
    }

    #[tokio::test]
    async fn answers_are_flannels() {
        let (address, condition) = start().await;
        let get = async |path| request(address, "GET", path).await;
        let answer = |status, body: &str| (status, body.to_owned());
        assert_eq!(get("/healthz").await, answer(200, "flanneld is running"));
        let not_yet = answer(503, "flanneld is not ready yet");
        assert_eq!(get("/readyz").await, not_yet);
        condition.lack(Need::Store, "the store is unreachable");
        let why = answer(503, "flanneld is not ready yet: the store is unreachable");
        assert_eq!(get("/readyz").await, why);
        condition.serve("node n".to_owned(), true);
        // What is lacking later does not end what pods have.
        assert_eq!(get("/readyz").await, answer(200, "flanneld is ready"));
        assert_eq!(get("/readyz?x=1").await, answer(200, "flanneld is ready"));
        for path in ["/", "/healthz/", "/metrics"] {
            assert_eq!(get(path).await.0, 404, "{path}");
        }
        condition.have(Need::Store);
        condition.lack(Need::DataPath, "worker-0 hangs");
        let why = answer(503, "flanneld is not ready yet: worker-0 hangs");
        assert_eq!(get("/healthz").await, why);
        assert_eq!(get("/readyz").await, why);
        condition.have(Need::DataPath);
        condition.end();
        assert_eq!(get("/readyz").await, not_yet);
        assert_eq!(request(address, "HEAD", "/readyz").await, answer(503, ""));
        assert_eq!(request(address, "HEAD", "/healthz").await, answer(200, ""));
        assert_eq!(request(address, "POST", "/healthz").await.0, 405);
        assert_eq!(request(address, "POST", "/nothing").await.0, 404);
    }

    #[tokio::test]
    async fn what_is_no_question_is_cut_off() {
        let (address, _ready) = start().await;
        let long = format!("GET /{} HTTP/1.1\r\n", "x".repeat(2 * QUESTION));
        for question in ["\0\0\0\r\n\r\n", "GET\r\n\r\n", &long] {
            let answer = ask(address, question).await;
            let status = answer.split(' ').nth(1).unwrap_or("");
            assert!(status.is_empty() || status.starts_with('4'), "{answer}");
        }
        assert_eq!(request(address, "GET", "/healthz").await.0, 200);
    }

    #[tokio::test]
    async fn silent_clients_hold_nobody_up() {
        let (address, _ready) = start().await;
        let mut silent = Vec::new();
        for _ in 0..2 * CLIENTS {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        assert_eq!(request(address, "GET", "/healthz").await.0, 200);
        // The first have made room, long before their time is over.
        let mut byte = [0];
        let ended = timeout(PATIENCE / 3, silent[0].read(&mut byte));
        assert!(matches!(ended.await.unwrap(), Ok(0) | Err(_)));
        let last = silent.last_mut().unwrap();
        assert!(timeout(PATIENCE / 30, last.read(&mut byte)).await.is_err());
    }

    #[tokio::test]
    async fn a_taken_port_is_named() {
        let (address, _ready) = start().await;
        let error = listen(address).await.unwrap_err();
        assert_eq!(error.exit_code(), 1);
        let text = error.to_string();
        assert!(text.contains(&address.port().to_string()), "{text}");
        assert!(text.contains("--healthz-port"), "{text}");
    }
}
