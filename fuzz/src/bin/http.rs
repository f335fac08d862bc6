//! Heads of messages that pass the sidecar's HTTP proxy, against a plain reading of the same bytes:
//! where a request leads, who may ask, and what is passed on, which is written and read once more.
#![cfg_attr(fuzzing, no_main)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri};
use httparse::{EMPTY_HEADER, Status};
use muslin_fuzz::Seed;
use muslin_stack::api::credentials::Credentials;
use muslin_stack::api::http as head;
use muslin_stack::api::socks5::{Host, Target};

muslin_fuzz::target! {
    check: run,
    seeds: seeds,
    words: &[
        b"GET http://web.muslin/ HTTP/1.1\r\n",
        b"CONNECT web.muslin:443 HTTP/1.1\r\n",
        b"HTTP/1.1 200 OK\r\n",
        b"http://",
        b"[::1]",
        b"10.244.1.2",
        b":65536",
        b":00080",
        b"me@",
        b"\r\n",
        b"Host: ",
        b"Connection: ",
        b"Connection: host, content-length\r\n",
        b"Content-Length: ",
        b"Content-Length: 5, 5\r\n",
        b"Transfer-Encoding: ",
        b"Transfer-Encoding: chunked\r\n",
        b"gzip, ",
        b"TE: trailers\r\n",
        b"Upgrade: h2c\r\n",
        b"Keep-Alive: 5\r\n",
        b"Proxy-Connection: close\r\n",
        b"Proxy-Authorization: Basic ",
        b"Proxy-Authenticate: Basic\r\n",
        b"bWU6b3dsOnM=",
        b"me:owl:s",
        b"X-Mine: 1\r\n",
    ],
    inputs: 1_000_000,
    max_len: 800,
}

/// What the first byte chooses.
const REQUEST: u8 = 0;
const RESPONSE: u8 = 1;
const TOLD: u8 = 2;
const KINDS: u8 = 3;

/// What is not passed on: RFC 9110 sections 7.6.1 and 11.7, and what older programs say.
const HOP_BY_HOP: [&str; 10] = [
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authentication-info",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// The values of each field, in their order.
type Fields = BTreeMap<String, Vec<Vec<u8>>>;

/// The first byte chooses what the rest is.
fn run(data: &[u8]) {
    let Some((choice, bytes)) = data.split_first() else {
        return;
    };
    match choice % KINDS {
        REQUEST => {
            if let Some((read, target, fields)) = request(bytes) {
                check_authorized(read.headers(), &fields);
                match *read.method() {
                    Method::CONNECT => check_tunnel(&read, &target, &fields),
                    _ => check_forward(read, &target, fields),
                }
            }
        }
        RESPONSE => {
            if let Some((read, fields)) = response(bytes) {
                check_answer(read, fields);
            }
        }
        _ => check_told(bytes),
    }
}

/// A request as hyper reads it, the text of its target, and its fields.
fn request(bytes: &[u8]) -> Option<(Request<()>, String, Fields)> {
    // One field more is `Host`.
    let mut fields = [EMPTY_HEADER; head::MAX_FIELDS + 1];
    let mut parsed = httparse::Request::new(&mut fields);
    match parsed.parse(bytes) {
        Ok(Status::Complete(len)) if len <= head::MAX_LEN => {}
        _ => return None,
    }
    let target = parsed.path?.to_owned();
    let mut request = Request::new(());
    *request.method_mut() = Method::from_bytes(parsed.method?.as_bytes()).ok()?;
    *request.uri_mut() = Uri::try_from(target.as_str()).ok()?;
    let (headers, fields) = both(parsed.headers)?;
    *request.headers_mut() = headers;
    Some((request, target, fields))
}

/// A response as hyper reads it, and its fields.
fn response(bytes: &[u8]) -> Option<(Response<()>, Fields)> {
    let mut fields = [EMPTY_HEADER; head::MAX_FIELDS];
    let mut parsed = httparse::Response::new(&mut fields);
    match parsed.parse(bytes) {
        Ok(Status::Complete(len)) if len <= head::MAX_LEN => {}
        _ => return None,
    }
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::from_u16(parsed.code?).ok()?;
    let (headers, fields) = both(parsed.headers)?;
    *response.headers_mut() = headers;
    Some((response, fields))
}

/// Fields as hyper has them, and in a plain way.
fn both(parsed: &[httparse::Header<'_>]) -> Option<(HeaderMap, Fields)> {
    let (mut headers, mut fields) = (HeaderMap::new(), Fields::new());
    for field in parsed {
        let name = HeaderName::from_bytes(field.name.as_bytes()).ok()?;
        headers.append(name, HeaderValue::from_bytes(field.value).ok()?);
        let values = fields.entry(field.name.to_ascii_lowercase()).or_default();
        values.push(field.value.to_vec());
    }
    Some((headers, fields))
}

/// Who may ask has told the credentials, in the first of the fields for them, and nothing else.
fn check_authorized(headers: &HeaderMap, fields: &Fields) {
    let told = fields.get("proxy-authorization");
    let told = told.and_then(|values| String::from_utf8(values[0].clone()).ok());
    let is_right = told.is_some_and(|told| {
        let blank = |c| c == ' ' || c == '\t';
        let (scheme, told) = told.split_once(' ').unwrap_or_default();
        scheme.eq_ignore_ascii_case("basic") && told.trim_matches(blank) == "bWU6b3dsOnM="
    });
    assert_eq!(head::is_authorized(headers, &credentials()), is_right);
}

/// Nothing but the credentials lets anybody in.
fn check_told(told: &[u8]) {
    let field = format!("Basic {}", STANDARD.encode(told));
    let mut headers = HeaderMap::new();
    let name = http::header::PROXY_AUTHORIZATION;
    headers.insert(name, HeaderValue::try_from(field).expect("it is text"));
    let is_right = told == b"me:owl:s";
    assert_eq!(head::is_authorized(&headers, &credentials()), is_right);
}

fn credentials() -> Credentials {
    Credentials {
        user: "me".to_owned(),
        password: "owl:s".to_owned(),
    }
}

fn check_tunnel(request: &Request<()>, target: &str, fields: &Fields) {
    let is_empty = matches!(framing(fields), Some(Framing::Length(0) | Framing::Untold));
    let expected = place(target, None).filter(|_| is_empty && !target.contains("://"));
    let led = head::tunnel(request);
    assert_eq!(led.as_ref().ok(), expected.as_ref(), "{led:?}");
}

fn check_forward(mut request: Request<()>, target: &str, mut fields: Fields) {
    let method = request.method().clone();
    let absolute = target.split_at_checked("http://".len());
    let absolute = absolute.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("http://"));
    let expected = absolute.and_then(|(_, rest)| {
        let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
        let host = authority.rsplit('@').next()?;
        Some((host, place(host, Some(80))?, path, framing(&fields)?))
    });
    let led = head::forward(&mut request);
    let Some((host, leads, path, framing)) = expected else {
        assert!(led.is_err(), "{led:?}");
        return;
    };
    assert_eq!(led.as_ref(), Ok(&leads));

    remove(&mut fields);
    let one = |value: String| vec![value.into_bytes()];
    fields.insert("host".to_owned(), one(host.to_owned()));
    match framing {
        Framing::Chunked => {
            let name = "transfer-encoding".to_owned();
            fields.insert(name, one("chunked".to_owned()))
        }
        Framing::Length(len) => fields.insert("content-length".to_owned(), one(len.to_string())),
        Framing::Untold => None,
    };
    let path = path.split('#').next().unwrap_or_default();
    let slash = if path.starts_with('/') { "" } else { "/" };

    let (uri, version) = (request.uri(), request.version());
    let start = format!("{method} {uri} {version:?}\r\n");
    let written = write(start, request.headers());
    assert_eq!(written[written.len() - 4..], *b"\r\n\r\n");
    let (read, target, passed) = self::request(&written).expect("what is written is a head");
    assert_eq!((read.method(), target), (&method, format!("{slash}{path}")));
    assert_eq!(passed, fields);
    // The server takes it for the one it is, on the port that is dialled.
    assert_eq!(place(host, Some(80)), Some(leads));
    assert_eq!(request.version(), http::Version::HTTP_11);
}

fn check_answer(mut response: Response<()>, mut fields: Fields) {
    let status = response.status();
    let expected = framing(&fields).filter(|_| status.as_u16() >= 200);
    let done = head::answer(&mut response);
    let Some(framing) = expected else {
        assert!(done.is_err());
        return;
    };
    assert_eq!(done, Ok(()));
    remove(&mut fields);
    if let Framing::Length(len) = framing {
        let len = len.to_string().into_bytes();
        fields.insert("content-length".to_owned(), vec![len]);
    }
    let start = format!("{:?} {} \r\n", response.version(), status.as_u16());
    let (read, passed) = self::response(&write(start, response.headers())).expect("it is a head");
    assert_eq!((read.status(), passed), (status, fields));
    assert_eq!(response.version(), http::Version::HTTP_11);
}

/// The bytes of a head.
fn write(start: String, headers: &HeaderMap) -> Vec<u8> {
    let mut bytes = start.into_bytes();
    for (name, value) in headers {
        bytes.extend([name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"].concat());
    }
    bytes.extend(b"\r\n");
    bytes
}

/// Takes away what is not passed on, and what the proxy says itself.
fn remove(fields: &mut Fields) {
    let named = list(fields, "connection").into_iter().flatten();
    let named: BTreeSet<_> = named.map(|name| name.to_ascii_lowercase()).collect();
    fields.retain(|name, _| !named.contains(name) && !HOP_BY_HOP.contains(&name.as_str()));
    fields.remove("content-length");
}

/// The items of a field's values, all of which are one list.
fn list(fields: &Fields, name: &str) -> Option<Vec<String>> {
    let all = fields.get(name)?.join(&b","[..]);
    let items = String::from_utf8_lossy(&all).into_owned();
    let items = items.split(',').map(|item| item.trim_matches([' ', '\t']));
    Some(items.map(str::to_owned).collect())
}

/// How the end of the content is told.
enum Framing {
    Chunked,
    Length(u64),
    Untold,
}

/// RFC 9112 section 6.3, and nothing where a message is to be refused.
fn framing(fields: &Fields) -> Option<Framing> {
    if let Some(codings) = list(fields, "transfer-encoding") {
        let is_chunked = codings.concat().eq_ignore_ascii_case("chunked") && codings.len() == 1;
        return is_chunked.then_some(Framing::Chunked);
    }
    let Some(mut lengths) = list(fields, "content-length") else {
        return Some(Framing::Untold);
    };
    let digits = |len: &String| len.chars().all(|c| c.is_ascii_digit());
    let lengths = lengths
        .iter_mut()
        .map(|len| digits(len).then(|| len.parse().ok())?);
    let lengths: Option<BTreeSet<u64>> = lengths.collect();
    match *Vec::from_iter(lengths?) {
        [len] => Some(Framing::Length(len)),
        _ => None,
    }
}

/// Where a host and perhaps a port lead: an address as std reads it, or a name.
fn place(text: &str, port: Option<u16>) -> Option<Target> {
    let bare = match text.strip_suffix(':') {
        Some(bare) => Some(bare),
        None if !text.contains(':') || text.ends_with(']') => Some(text),
        None => None,
    };
    let whole = match bare {
        Some(bare) => format!("{bare}:{}", port?),
        None => text.to_owned(),
    };
    // `%` is std's of scopes.
    let address = whole.parse::<SocketAddr>().ok();
    let address = address.filter(|_| !text.contains('%'));
    let (host, port) = match address {
        Some(address) => (Host::Ip(address.ip()), address.port()),
        None => {
            let (name, digits) = whole.rsplit_once(':')?;
            let digits = digits
                .strip_prefix(|c: char| c.is_ascii_digit())
                .map(|_| digits)?;
            let name = name.to_ascii_lowercase();
            (
                Host::Name(is_name(&name).then_some(name)?),
                digits.parse().ok()?,
            )
        }
    };
    (port > 0).then_some((host, port))
}

fn is_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let short = name.split('.').all(|label| label.len() < 64);
    let is_whole = !name.is_empty() && !name.starts_with('.') && !name.contains("..");
    name.chars().all(plain) && name.len() <= 254 && short && is_whole
}

fn seeds() -> Vec<Seed> {
    let with = |choice: u8, text: &str| [&[choice], text.as_bytes()].concat();
    let request = |text: &str| with(REQUEST, text);
    let get =
        |target: &str, fields: &str| request(&format!("GET {target} HTTP/1.1\r\n{fields}\r\n"));
    let connect =
        |target: &str, fields: &str| request(&format!("CONNECT {target} HTTP/1.1\r\n{fields}\r\n"));
    let answer = |fields: &str| with(RESPONSE, &format!("HTTP/1.1 200 OK\r\n{fields}\r\n"));
    let hops = "Connection: close, X-Mine\r\nX-Mine: 1\r\nX-Kept: 2\r\nx-kept: 3\r\n\
                Keep-Alive: 5\r\nTE: trailers\r\nTrailer: X\r\nUpgrade: h2c\r\n\
                Proxy-Connection: close\r\nProxy-Authorization: Basic bWU6b3dsOnM=\r\n\
                Proxy-Authenticate: Basic\r\nProxy-Authentication-Info: a\r\n";
    let both = "Content-Length: 5\r\nTransfer-Encoding: Chunked\r\n";
    vec![
        (
            "forward",
            get(
                "http://me@Web.muslin:8080/a?b=c#d",
                "Host: other\r\nHost: x\r\n",
            ),
        ),
        ("forward-address", get("HTTP://10.244.1.2", "")),
        ("forward-ipv6", get("http://[::1]:00080?b", "X: 1\r\n")),
        ("forward-ipv6-and-more", get("http://[::1]x:80/", "")),
        ("forward-bracketed-name", get("http://[web.muslin]:80/", "")),
        ("forward-no-port", get("http://web.muslin:/", "")),
        (
            "forward-port-too-large",
            get("http://web.muslin:65536/", ""),
        ),
        ("forward-port-signed", get("http://web.muslin:+80/", "")),
        ("forward-hops", get("http://a/", hops)),
        (
            "forward-hops-in-bytes",
            connection(REQUEST, "GET http://a/ HTTP/1.1"),
        ),
        ("forward-old", request("GET http://a/ HTTP/1.0\r\n\r\n")),
        (
            "forward-length",
            request("POST http://a/ HTTP/1.1\r\nContent-Length: 5, 5\r\n\r\n"),
        ),
        (
            "forward-lengths",
            request("POST http://a/ HTTP/1.1\r\nContent-Length: 5, 6\r\n\r\n"),
        ),
        ("forward-chunked", get("http://a/", both)),
        (
            "forward-coding",
            get("http://a/", "Transfer-Encoding: gzip, chunked\r\n"),
        ),
        ("forward-origin", get("/a", "Host: a\r\n")),
        ("forward-https", get("https://a/", "")),
        (
            "tunnel",
            connect(
                "web.muslin:443",
                "Host: web.muslin\r\nContent-Length: 0\r\n",
            ),
        ),
        ("tunnel-ipv6", connect("[::1]:443", "")),
        ("tunnel-no-port", connect("web.muslin:", "")),
        ("tunnel-of-user", connect("me@web.muslin:443", "")),
        ("tunnel-of-scheme", connect("http://web.muslin:443", "")),
        (
            "tunnel-with-content",
            connect("web.muslin:443", "Content-Length: 5\r\n"),
        ),
        ("answer-hops", answer(hops)),
        (
            "answer-hops-in-bytes",
            connection(RESPONSE, "HTTP/1.1 200 OK"),
        ),
        ("answer-both", answer(both)),
        (
            "answer-length",
            answer("Content-Length: 5\r\nContent-Length: 05\r\n"),
        ),
        ("answer-old", with(RESPONSE, "HTTP/1.0 404 No\r\n\r\n")),
        (
            "answer-switch",
            with(RESPONSE, "HTTP/1.1 101 Yes\r\nUpgrade: h2c\r\n\r\n"),
        ),
        ("told", with(TOLD, "me:owl:s")),
        ("told-less", with(TOLD, "me:owl:")),
        ("told-more", with(TOLD, "me:owl:sx")),
        ("told-other", with(TOLD, "m:owl:s")),
    ]
}

/// A field is named beside what is not text.
fn connection(choice: u8, start: &str) -> Vec<u8> {
    let fields = b"\r\nConnection: x-mine, \xff\r\nX-Mine: 1\r\n\r\n";
    [&[choice], start.as_bytes(), fields].concat()
}
