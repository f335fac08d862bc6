//! An HTTP proxy into the overlay: `CONNECT`, and plain requests that name an `http://` address
//! (RFC 9110 sections 7.6 and 9.3.6).

mod client;
mod content;
mod server;

use std::convert::Infallible;
use std::fmt::Display;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use client::Client;
use content::{Answer, Gate, Gated};
use head::Fault;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{self, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use muslin_stack::api::credentials::Credentials;
use muslin_stack::api::http as head;
use parking_lot::Mutex;
use server::Server;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tracing::debug;

use super::dial::{DialError, Dialler};
use super::relay;
use crate::clients::Place;

/// How long a server may take to ask for content, if its client waits for that in silence.
const CONTINUE_PATIENCE: Duration = Duration::from_secs(5);
/// How long a client may take for the head of a request.
const HEAD_PATIENCE: Duration = Duration::from_secs(10);

type Body = BoxBody<Bytes, hyper::Error>;

/// Why a request is not served: a status, and one line.
type Refusal = (StatusCode, String);

/// The tunnel that a connection has become, if it has.
type Tunnel = Mutex<Option<JoinHandle<()>>>;

/// Serves one client to its end, and to that of its tunnel.
pub(super) async fn serve(
    client: TcpStream,
    place: Place,
    dialler: Arc<Dialler>,
    credentials: Option<Arc<Credentials>>,
) -> Result<(), hyper::Error> {
    let client = Client::new(client);
    let tunnel = Arc::new(Tunnel::default());
    let place = Arc::new(place);
    let service = service_fn(|request| {
        let (dialler, credentials) = (dialler.clone(), credentials.clone());
        let (client, tunnel, place) = (client.clone(), tunnel.clone(), place.clone());
        async move {
            let answered = match check(&request, credentials.as_deref()) {
                Ok(()) => {
                    place.keep();
                    respond(request, &client, &dialler, &tunnel).await
                }
                Err(refusal) => Err(refusal),
            };
            Ok::<_, Infallible>(answered.unwrap_or_else(refuse))
        }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_PATIENCE)
        .max_buf_size(head::MAX_LEN)
        .max_headers(head::MAX_FIELDS)
        .half_close(true)
        .serve_connection(TokioIo::new(client.clone()), service)
        .with_upgrades()
        .await;
    let tunnel = tunnel.lock().take();
    match tunnel {
        // It says itself what went wrong.
        Some(tunnel) => drop(tunnel.await),
        None => client.end().await,
    }
    served
}

fn check(request: &Request<Incoming>, credentials: Option<&Credentials>) -> Result<(), Refusal> {
    if credentials.is_some_and(|credentials| !head::is_authorized(request.headers(), credentials)) {
        return Err((
            StatusCode::PROXY_AUTHENTICATION_REQUIRED,
            "this proxy requires a user name and a password".to_owned(),
        ));
    }
    Ok(())
}

async fn respond(
    request: Request<Incoming>,
    client: &Client,
    dialler: &Dialler,
    tunnel: &Tunnel,
) -> Result<Response<Body>, Refusal> {
    match *request.method() {
        Method::CONNECT => connect(request, dialler, tunnel).await,
        _ => forward(request, client, dialler).await,
    }
}

/// Opens a tunnel.
async fn connect(
    request: Request<Incoming>,
    dialler: &Dialler,
    tunnel: &Tunnel,
) -> Result<Response<Body>, Refusal> {
    let target = head::tunnel(&request).map_err(faulty)?;
    let (stream, _) = dialler.connect(&target).await.map_err(unreached)?;
    let opened = tokio::spawn(async move {
        let upgraded = match hyper::upgrade::on(request).await {
            Ok(upgraded) => upgraded,
            Err(error) => return debug!("HTTP proxy: no tunnel: {error}"),
        };
        if let Err(error) = relay::copy_both(TokioIo::new(upgraded), stream).await {
            debug!("HTTP proxy: a tunnel ended: {error}");
        }
    });
    *tunnel.lock() = Some(opened);
    Ok(Response::new(empty()))
}

/// Passes a plain request on.
async fn forward(
    mut request: Request<Incoming>,
    client: &Client,
    dialler: &Dialler,
) -> Result<Response<Body>, Refusal> {
    let waits = head::waits_for_continue(&request);
    let target = head::forward(&mut request).map_err(faulty)?;
    let (stream, _) = dialler.connect(&target).await.map_err(unreached)?;
    let stream = Server::new(stream);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(failed)?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            debug!("HTTP proxy: a server's connection ended: {error}");
        }
    });
    let gate = Gate::new(waits);
    let mut request = request.map(|content| Gated::new(content, gate.clone()));
    let asked = gate.clone();
    hyper::ext::on_informational(&mut request, move |answer| {
        if answer.status() == StatusCode::CONTINUE {
            asked.open();
        }
    });
    let mut answer = pin!(sender.send_request(request));
    let answered = tokio::select! {
        biased;
        answered = &mut answer => answered,
        // Neither does the proxy wait then, nor for ever for a server that does not know how to ask.
        _ = timeout(CONTINUE_PATIENCE, client.sends()), if waits => {
            gate.open();
            answer.await
        }
    };
    let mut response = answered.map_err(failed)?;
    head::answer(&mut response).map_err(failed)?;
    Ok(response.map(|content| Answer::new(content, gate).boxed()))
}

fn faulty(fault: Fault) -> Refusal {
    (fault.status(), fault.to_string())
}

fn failed(error: impl Display) -> Refusal {
    (StatusCode::BAD_GATEWAY, format!("the server: {error}"))
}

fn unreached(error: DialError) -> Refusal {
    let status = match &error {
        DialError::Connect(_, error) => match error.kind() {
            io::ErrorKind::PermissionDenied => StatusCode::FORBIDDEN,
            io::ErrorKind::TimedOut => StatusCode::GATEWAY_TIMEOUT,
            _ => StatusCode::BAD_GATEWAY,
        },
        DialError::Resolve(_) | DialError::Version(_) => StatusCode::BAD_GATEWAY,
    };
    (status, error.to_string())
}

fn refuse((status, why): Refusal) -> Response<Body> {
    debug!("HTTP proxy: {status}: {why}");
    let text = Full::from(format!("muslin: {why}\n"));
    let mut response = Response::new(text.map_err(|never| match never {}).boxed());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    headers.insert(header::CONTENT_TYPE, plain);
    if status == StatusCode::PROXY_AUTHENTICATION_REQUIRED {
        let basic = HeaderValue::from_static("Basic realm=\"muslin\"");
        headers.insert(header::PROXY_AUTHENTICATE, basic);
    }
    response
}

fn empty() -> Body {
    let nothing = http_body_util::Empty::new();
    nothing.map_err(|never| match never {}).boxed()
}
