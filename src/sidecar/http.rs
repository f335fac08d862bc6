//! An HTTP proxy into the overlay: `CONNECT`, and plain requests that name an `http://` address
//! (RFC 9110 sections 7.6 and 9.3.6).

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::server::conn::http1 as server;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tracing::debug;

use super::dial::{DialError, Dialler};
use super::socks5::Credentials;
use super::socks5::wire::{Target, host_name};

/// How long a client may take for the head of a request.
const HEAD_PATIENCE: Duration = Duration::from_secs(10);
/// The longest head in bytes.
const HEAD_LEN: usize = 16 << 10;
/// The most header fields.
const FIELDS: usize = 100;

/// What concerns one connection and is not passed on (RFC 9110 section 7.6.1).
const HOP_BY_HOP: [HeaderName; 8] = [
    header::CONNECTION,
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("keep-alive"),
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::PROXY_AUTHORIZATION,
];

type Body = BoxBody<Bytes, hyper::Error>;

/// Why a request is not served: a status, and one line.
type Refusal = (StatusCode, String);

/// The tunnel that a connection has become, if it has.
type Tunnel = Mutex<Option<JoinHandle<()>>>;

/// Serves one client to its end, and to that of its tunnel.
pub(super) async fn serve(
    client: TcpStream,
    dialler: Arc<Dialler>,
    credentials: Option<Arc<Credentials>>,
) -> Result<(), hyper::Error> {
    let tunnel = Arc::new(Tunnel::default());
    let service = service_fn(|request| {
        let (dialler, credentials) = (dialler.clone(), credentials.clone());
        let tunnel = tunnel.clone();
        async move {
            let answered = respond(request, &dialler, credentials.as_deref(), &tunnel).await;
            Ok::<_, Infallible>(answered.unwrap_or_else(refuse))
        }
    });
    server::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_PATIENCE)
        .max_buf_size(HEAD_LEN)
        .max_headers(FIELDS)
        .half_close(true)
        .serve_connection(TokioIo::new(client), service)
        .with_upgrades()
        .await?;
    let tunnel = tunnel.lock().take();
    if let Some(tunnel) = tunnel {
        // It says itself what went wrong.
        let _ = tunnel.await;
    }
    Ok(())
}

async fn respond(
    request: Request<Incoming>,
    dialler: &Dialler,
    credentials: Option<&Credentials>,
    tunnel: &Tunnel,
) -> Result<Response<Body>, Refusal> {
    if credentials.is_some_and(|credentials| !is_authorized(request.headers(), credentials)) {
        return Err((
            StatusCode::PROXY_AUTHENTICATION_REQUIRED,
            "this proxy wants a user's name and password".to_owned(),
        ));
    }
    match *request.method() {
        Method::CONNECT => connect(request, dialler, tunnel).await,
        _ => forward(request, dialler).await,
    }
}

/// Opens a tunnel.
async fn connect(
    request: Request<Incoming>,
    dialler: &Dialler,
    tunnel: &Tunnel,
) -> Result<Response<Body>, Refusal> {
    let target = target(request.uri(), None)?;
    let mut stream = dialler.connect(&target).await.map_err(unreached)?;
    let opened = tokio::spawn(async move {
        let upgraded = match hyper::upgrade::on(request).await {
            Ok(upgraded) => upgraded,
            Err(error) => return debug!("HTTP proxy: no tunnel: {error}"),
        };
        let mut client = TokioIo::new(upgraded);
        let copied = tokio::io::copy_bidirectional(&mut client, &mut stream).await;
        if let Err(error) = copied {
            debug!("HTTP proxy: a tunnel ended: {error}");
        }
    });
    *tunnel.lock() = Some(opened);
    Ok(Response::new(empty()))
}

/// Passes a plain request on.
async fn forward(
    mut request: Request<Incoming>,
    dialler: &Dialler,
) -> Result<Response<Body>, Refusal> {
    if request.uri().scheme_str() != Some("http") {
        return Err(bad(
            "this is a proxy: name a whole address, http://HOST/PATH, or use CONNECT",
        ));
    }
    let target = target(request.uri(), Some(80))?;
    let authority = request.uri().authority().map(ToString::to_string);
    let host = authority.unwrap_or_default();
    let host = host.rsplit('@').next().unwrap_or_default();
    let host = HeaderValue::from_str(host).map_err(|_| bad("the address has no host"))?;
    let path = request.uri().path_and_query().cloned();
    let path = path.map_or_else(|| Ok(Uri::from_static("/")), Uri::try_from);
    *request.uri_mut() = path.map_err(|_| bad("the address has no path"))?;
    strip(request.headers_mut());
    request.headers_mut().insert(header::HOST, host);

    let stream = dialler.connect(&target).await.map_err(unreached)?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(failed)?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            debug!("HTTP proxy: a server's connection ended: {error}");
        }
    });
    let mut response = sender.send_request(request).await.map_err(failed)?;
    strip(response.headers_mut());
    Ok(response.map(BodyExt::boxed))
}

/// The host and port of an address.
fn target(uri: &Uri, port: Option<u16>) -> Result<Target, Refusal> {
    let authority = uri.authority();
    let authority = authority.ok_or_else(|| bad("the address has no host"))?;
    let port = authority.port_u16().or(port).filter(|port| *port > 0);
    let port = port.ok_or_else(|| bad("the address has no port"))?;
    let name = authority.host();
    let plain = name.strip_prefix('[').and_then(|it| it.strip_suffix(']'));
    let host = host_name(plain.unwrap_or(name).as_bytes());
    let host = host.map_err(|fault| bad(&format!("the address has {fault}")))?;
    Ok((host, port))
}

/// Removes what concerns this connection only.
fn strip(headers: &mut HeaderMap) {
    let named = headers.get_all(header::CONNECTION).into_iter();
    let named = named.filter_map(|value| value.to_str().ok());
    let named = named.flat_map(|value| value.split(','));
    let named: Vec<_> = named
        .filter_map(|name| name.trim().parse::<HeaderName>().ok())
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

fn is_authorized(headers: &HeaderMap, credentials: &Credentials) -> bool {
    use base64::Engine as _;
    let told = headers.get(header::PROXY_AUTHORIZATION);
    let told = told.and_then(|value| value.to_str().ok()?.split_once(' '));
    let Some((_, told)) = told.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("basic")) else {
        return false;
    };
    let told = base64::engine::general_purpose::STANDARD.decode(told.trim());
    told.is_ok_and(|told| {
        let end = told.iter().position(|byte| *byte == b':');
        end.is_some_and(|end| credentials.are(&told[..end], &told[end + 1..]))
    })
}

fn bad(why: &str) -> Refusal {
    (StatusCode::BAD_REQUEST, why.to_owned())
}

fn failed(error: hyper::Error) -> Refusal {
    (StatusCode::BAD_GATEWAY, format!("the server: {error}"))
}

fn unreached(error: DialError) -> Refusal {
    let status = match &error {
        DialError::Connect(_, error) => match error.kind() {
            io::ErrorKind::PermissionDenied => StatusCode::FORBIDDEN,
            io::ErrorKind::TimedOut => StatusCode::GATEWAY_TIMEOUT,
            _ => StatusCode::BAD_GATEWAY,
        },
        DialError::NoName(_) | DialError::Resolver(_) | DialError::Ipv6(_) => {
            StatusCode::BAD_GATEWAY
        }
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
