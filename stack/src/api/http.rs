//! The heads of messages that pass the proxy: where a request leads, what of a head concerns one
//! connection only, and who may ask (RFC 9110 sections 7.6 and 11.7).

use std::net::Ipv6Addr;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Request, Response, StatusCode, Uri, Version};
use thiserror::Error;

use super::credentials::Credentials;
use super::socks5::{self as wire, Host, Target, host_name};

/// The longest head in bytes.
pub const MAX_LEN: usize = 16 << 10;
/// The most fields of a head.
pub const MAX_FIELDS: usize = 100;

/// Why a message is not passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Fault {
    /// A request to the proxy itself.
    #[error("this is a proxy: use an absolute URL, http://HOST/PATH, or CONNECT")]
    Form,
    /// A `CONNECT` to anything else.
    #[error("the target of a CONNECT is HOST:PORT")]
    Tunnel,
    /// An address of what cannot be a host.
    #[error("the address has {0}")]
    Host(wire::Fault),
    /// None or zero, too large, or no number.
    #[error("the address has no valid port")]
    Port,
    /// A `CONNECT` with something to send to the proxy itself.
    #[error("a CONNECT has no content")]
    Content,
    /// Two lengths, or none that is a number.
    #[error("the content has no valid length")]
    Length,
    /// Something else than chunks.
    #[error("the transfer coding is not chunked")]
    Coding,
    /// A response that is none, or the end of HTTP, which nobody has asked for.
    #[error("it requests another protocol")]
    Switch,
}

impl Fault {
    /// What a client is told whose request has this.
    pub fn status(self) -> StatusCode {
        match self {
            // RFC 9112 section 6.1.
            Self::Coding => StatusCode::NOT_IMPLEMENTED,
            _ => StatusCode::BAD_REQUEST,
        }
    }
}

/// Where a `CONNECT` leads.
///
/// # Errors
/// Why it leads nowhere.
pub fn tunnel<B>(request: &Request<B>) -> Result<Target, Fault> {
    let uri = request.uri();
    let authority = uri.authority().filter(|_| uri.scheme().is_none());
    let authority = authority.ok_or(Fault::Tunnel)?.as_str();
    if authority.contains('@') {
        return Err(Fault::Tunnel);
    }
    match framing(request.headers())? {
        Framing::Length(0) | Framing::Untold => target(authority, None),
        _ => Err(Fault::Content),
    }
}

/// Whether a client waits until it is asked for the content of its request (RFC 9110 section 10.1.1).
pub fn waits_for_continue<B>(request: &Request<B>) -> bool {
    let has_content = !matches!(
        framing(request.headers()),
        Ok(Framing::Untold | Framing::Length(0))
    );
    let expected = request.headers().get_all(header::EXPECT).iter().next_back();
    // As hyper sees it, which is to pass on that the server asks.
    let is_told = expected.is_some_and(|it| it.as_bytes().eq_ignore_ascii_case(b"100-continue"));
    has_content && is_told && request.version() >= Version::HTTP_11
}

/// Where a plain request leads; its head becomes what is passed on.
///
/// # Errors
/// Why it leads nowhere.
pub fn forward<B>(request: &mut Request<B>) -> Result<Target, Fault> {
    let uri = request.uri();
    let authority = uri.authority().filter(|_| uri.scheme_str() == Some("http"));
    let authority = authority.ok_or(Fault::Form)?.as_str();
    // The user is for the proxy, at most (RFC 9110 section 4.2.4).
    let place = authority.rsplit_once('@').map_or(authority, |(_, it)| it);
    let target = target(place, Some(80))?;
    let framing = framing(request.headers())?;
    let host = HeaderValue::from_str(place).map_err(|_| Fault::Host(wire::Fault::Name))?;
    let path = uri.path_and_query().cloned().map(Uri::from);
    // Nothing is left of a host with a fragment behind it.
    let path = path.filter(|path| !path.path().is_empty());
    *request.uri_mut() = path.unwrap_or_else(|| Uri::from_static("/"));
    let is_old = request.version() < Version::HTTP_11;
    // RFC 9110 section 6.2: an intermediary sends its own.
    *request.version_mut() = Version::HTTP_11;
    let headers = request.headers_mut();
    if is_old {
        // It means nothing from there, and would here.
        headers.remove(header::EXPECT);
    }
    strip(headers);
    headers.insert(header::HOST, host);
    // Said aloud, because hyper takes it that a GET has no content.
    headers.extend(match framing {
        Framing::Chunked => Some((header::TRANSFER_ENCODING, CHUNKED)),
        Framing::Length(len) => Some((header::CONTENT_LENGTH, len.into())),
        Framing::Untold => None,
    });
    Ok(target)
}

/// The head of a response becomes what is passed on, but for a coding of the content: that is for
/// who sends it.
///
/// # Errors
/// Why there is nothing to pass on.
pub fn answer<B>(response: &mut Response<B>) -> Result<(), Fault> {
    if response.status().is_informational() {
        return Err(Fault::Switch);
    }
    *response.version_mut() = Version::HTTP_11;
    let headers = response.headers_mut();
    let framing = framing(headers)?;
    strip(headers);
    if let Framing::Length(len) = framing {
        headers.insert(header::CONTENT_LENGTH, len.into());
    }
    Ok(())
}

/// Whether a client has told the credentials that are wanted (RFC 7617).
pub fn is_authorized(headers: &HeaderMap, credentials: &Credentials) -> bool {
    let told = headers.get(header::PROXY_AUTHORIZATION);
    let told = told.and_then(|value| value.to_str().ok()?.split_once(' '));
    let Some((_, told)) = told.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("basic")) else {
        return false;
    };
    let told = STANDARD.decode(told.trim());
    told.is_ok_and(|told| {
        let end = told.iter().position(|byte| *byte == b':');
        end.is_some_and(|end| credentials.are(&told[..end], &told[end + 1..]))
    })
}

/// The host and port of an address without a user; `default` is the port where none is said (RFC
/// 3986 section 3.2). Nothing of it is left unread: servers read all of it as `Host`.
fn target(place: &str, default: Option<u16>) -> Result<Target, Fault> {
    let name = Fault::Host(wire::Fault::Name);
    let (host, rest) = match place.strip_prefix('[') {
        Some(literal) => {
            let (address, rest) = literal.split_once(']').ok_or(name)?;
            let address: Ipv6Addr = address.parse().map_err(|_| name)?;
            (Host::Ip(address.into()), rest)
        }
        None => {
            let (name, rest) = place.split_at(place.find(':').unwrap_or(place.len()));
            (host_name(name.as_bytes()).map_err(Fault::Host)?, rest)
        }
    };
    let port = match rest.strip_prefix(':') {
        Some("") => default,
        Some(digits) => number(digits),
        None => default.filter(|_| rest.is_empty()),
    };
    let port = port.filter(|port| *port > 0).ok_or(Fault::Port)?;
    Ok((host, port))
}

/// What is written in digits alone; std takes signs, too.
fn number<T: FromStr>(digits: &str) -> Option<T> {
    let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
    digits.parse().ok().filter(|_| plain)
}

/// How the end of a message's content is told (RFC 9112 section 6.3).
enum Framing {
    /// By the last of its chunks.
    Chunked,
    /// By its length in bytes.
    Length(u64),
    /// In a request there is none, a response ends with its connection.
    Untold,
}

const CHUNKED: HeaderValue = HeaderValue::from_static("chunked");

/// The one way to tell. Two that disagree would let others see two messages where there is one.
fn framing(headers: &HeaderMap) -> Result<Framing, Fault> {
    let mut codings = items(headers, &header::TRANSFER_ENCODING);
    match (codings.next(), codings.next()) {
        (None, _) => {}
        // It counts, and not a length beside it.
        (Some(one), None) if CHUNKED.as_bytes().eq_ignore_ascii_case(one) => {
            return Ok(Framing::Chunked);
        }
        // Nobody was told that such is understood.
        _ => return Err(Fault::Coding),
    }
    let mut told = None;
    for len in items(headers, &header::CONTENT_LENGTH) {
        let len: Option<u64> = str::from_utf8(len).ok().and_then(number);
        if len.is_none() || told.is_some() && told != len {
            return Err(Fault::Length);
        }
        told = len;
    }
    Ok(told.map_or(Framing::Untold, Framing::Length))
}

/// What concerns one connection and is not passed on.
const HOP_BY_HOP: [HeaderName; 10] = [
    header::CONNECTION,
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("keep-alive"),
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::PROXY_AUTHENTICATE,
    HeaderName::from_static("proxy-authentication-info"),
    header::PROXY_AUTHORIZATION,
];

/// Removes what concerns this connection only, and the length, which is said anew.
fn strip(headers: &mut HeaderMap) {
    let named = items(headers, &header::CONNECTION);
    let named: Vec<_> = named
        .filter_map(|name| HeaderName::from_bytes(name).ok())
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
    headers.remove(header::CONTENT_LENGTH);
}

/// What a field lists in all its values (RFC 9110 section 5.6.1).
fn items<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a [u8]> {
    let values = headers.get_all(name).into_iter();
    let items = values.flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    items.map(<[u8]>::trim_ascii)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(method: &str, uri: &str, fields: &[(&str, &[u8])]) -> Request<()> {
        let mut request = Request::builder().method(method).uri(uri);
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap()
    }

    fn fields(headers: &HeaderMap) -> Vec<(&str, &[u8])> {
        let mut all: Vec<_> = headers
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_bytes()))
            .collect();
        all.sort_by_key(|(name, _)| *name);
        all
    }

    fn name(name: &str) -> Host {
        Host::Name(name.to_owned())
    }

    #[test]
    fn a_request_leads_where_its_address_says() {
        for (uri, host, port) in [
            ("http://Web.muslin/a", name("web.muslin"), 80),
            ("http://web.muslin:8080", name("web.muslin"), 8080),
            ("http://web.muslin:/", name("web.muslin"), 80),
            ("http://me:owl@web.muslin/", name("web.muslin"), 80),
            ("http://10.244.1.2:1/", Host::Ip([10, 244, 1, 2].into()), 1),
            (
                "http://[::1]/",
                Host::Ip([0, 0, 0, 0, 0, 0, 0, 1].into()),
                80,
            ),
        ] {
            let led = forward(&mut request("GET", uri, &[]));
            assert_eq!(led, Ok((host, port)), "{uri}");
        }
        let led = tunnel(&request("CONNECT", "web.muslin:443", &[]));
        assert_eq!(led, Ok((name("web.muslin"), 443)));
        for (uri, fault) in [
            ("/a", Fault::Form),
            ("https://web.muslin/", Fault::Form),
            ("http://web.muslin:0/", Fault::Port),
            ("http://web..muslin/", Fault::Host(wire::Fault::Name)),
            ("http://:80/", Fault::Host(wire::Fault::Name)),
            ("http://web.muslin:65536/", Fault::Port),
            ("http://web.muslin:+80/", Fault::Port),
            ("http://web.muslin:x/", Fault::Port),
            ("http://[::1]80/", Fault::Port),
            ("http://[::1]web.muslin:80/", Fault::Port),
            ("http://[web.muslin]/", Fault::Host(wire::Fault::Name)),
            ("http://[10.244.1.2]/", Fault::Host(wire::Fault::Name)),
        ] {
            let led = forward(&mut request("GET", uri, &[]));
            assert_eq!(led, Err(fault), "{uri}");
        }
        for (uri, fault) in [
            ("/a", Fault::Tunnel),
            ("http://web.muslin:443/", Fault::Tunnel),
            ("me@web.muslin:443", Fault::Tunnel),
            ("web.muslin", Fault::Port),
            ("web.muslin:", Fault::Port),
            ("web.muslin:0", Fault::Port),
            ("web.muslin:65536", Fault::Port),
            ("[::1]80:443", Fault::Port),
        ] {
            let led = tunnel(&request("CONNECT", uri, &[]));
            assert_eq!(led, Err(fault), "{uri}");
        }
    }

    #[test]
    fn what_is_passed_on_names_the_host_that_is_dialled() {
        let sent: &[(&str, &[u8])] = &[("host", b"other"), ("host", b"another"), ("x", b"1")];
        let mut request = request("GET", "http://me@Web.muslin:8080/a?b=c", sent);
        forward(&mut request).unwrap();
        assert_eq!(request.uri(), "/a?b=c");
        let passed: &[(&str, &[u8])] = &[("host", b"Web.muslin:8080"), ("x", b"1")];
        assert_eq!(fields(request.headers()), passed);
    }

    #[test]
    fn a_path_is_passed_on_as_it_is() {
        for (uri, path) in [
            ("http://a", "/"),
            ("http://a?b", "/?b"),
            ("http://a#b", "/"),
            ("http://a/%2f//..?b?c#d", "/%2f//..?b?c"),
            ("http://a/\u{fc}", "/\u{fc}"),
        ] {
            let mut request = request("GET", uri, &[]);
            forward(&mut request).unwrap();
            assert_eq!(request.uri().to_string(), path, "{uri}");
        }
    }

    #[test]
    fn what_concerns_one_connection_is_not_passed_on() {
        let sent: &[(&str, &[u8])] = &[
            ("connection", b"close, X-Mine"),
            ("connection", b"x-other, \xff"),
            ("keep-alive", b"timeout=1"),
            ("proxy-authenticate", b"Basic"),
            ("proxy-authentication-info", b"a"),
            ("proxy-authorization", b"Basic bWU6b3ds"),
            ("proxy-connection", b"close"),
            ("te", b"trailers"),
            ("trailer", b"x"),
            ("upgrade", b"h2c"),
            ("x-kept", b"1"),
            ("x-kept", b"2"),
            ("x-mine", b"1"),
            ("x-other", b"1"),
        ];
        let kept: &[(&str, &[u8])] = &[("x-kept", b"1"), ("x-kept", b"2")];
        let mut request = request("GET", "http://a/", sent);
        forward(&mut request).unwrap();
        request.headers_mut().remove(header::HOST);
        assert_eq!(fields(request.headers()), kept);
        let mut response = Response::new(());
        *response.headers_mut() = self::request("GET", "/", sent).headers().clone();
        assert_eq!(answer(&mut response), Ok(()));
        assert_eq!(fields(response.headers()), kept);
    }

    #[test]
    fn the_end_of_content_is_told_in_one_way() {
        let length = ("content-length", &b"5"[..]);
        let two = ("content-length", &b"5, 05"[..]);
        let other = ("content-length", &b"6"[..]);
        let chunked = ("transfer-encoding", &b"Chunked"[..]);
        let told = ("transfer-encoding", &b"chunked"[..]);
        let named = ("connection", &b"content-length"[..]);
        // What is sent, and what requests and responses say instead.
        for (sent, asked, answered) in [
            (&[][..], &[][..], &[][..]),
            (&[length], &[length], &[length]),
            (&[length, two], &[length], &[length]),
            (&[named, length], &[length], &[length]),
            // The other side of the connection says how it sends a response's content.
            (&[chunked], &[told], &[]),
            (&[length, chunked], &[told], &[]),
        ] {
            let mut request = request("GET", "http://a/", sent);
            let mut response = Response::new(());
            *response.headers_mut() = request.headers().clone();
            assert!(forward(&mut request).is_ok(), "{sent:?}");
            request.headers_mut().remove(header::HOST);
            assert_eq!(fields(request.headers()), asked, "{sent:?}");
            assert_eq!(answer(&mut response), Ok(()), "{sent:?}");
            assert_eq!(fields(response.headers()), answered, "{sent:?}");
        }
        let with = |value: &'static [u8]| ("content-length", value);
        let gzip = ("transfer-encoding", &b"gzip"[..]);
        for (sent, fault) in [
            (&[length, other][..], Fault::Length),
            (&[with(b"5, 6")], Fault::Length),
            (&[with(b"+5")], Fault::Length),
            (&[with(b"-1")], Fault::Length),
            (&[with(b"")], Fault::Length),
            (&[with(b"18446744073709551616")], Fault::Length),
            (&[gzip], Fault::Coding),
            (&[gzip, chunked], Fault::Coding),
            (&[chunked, chunked], Fault::Coding),
            (&[("transfer-encoding", b"chunked,")], Fault::Coding),
        ] {
            let mut request = request("POST", "http://a/", sent);
            let mut response = Response::new(());
            *response.headers_mut() = request.headers().clone();
            assert_eq!(forward(&mut request), Err(fault), "{sent:?}");
            assert_eq!(answer(&mut response), Err(fault), "{sent:?}");
        }
    }

    #[test]
    fn a_client_waits_that_says_so_and_has_content() {
        let expect = |value: &'static [u8]| ("expect", value);
        let length = ("content-length", &b"5"[..]);
        let nothing = ("content-length", &b"0"[..]);
        let chunked = ("transfer-encoding", &b"chunked"[..]);
        for (sent, waits) in [
            (&[expect(b"100-continue"), length][..], true),
            (&[expect(b"100-Continue"), chunked], true),
            (&[expect(b"a, 100-continue"), length], false),
            (&[expect(b"100-continue")], false),
            (&[expect(b"100-continue"), nothing], false),
            (&[expect(b"100"), length], false),
            (&[length], false),
        ] {
            let mut request = request("POST", "http://a/", sent);
            assert_eq!(waits_for_continue(&request), waits, "{sent:?}");
            forward(&mut request).unwrap();
            let passed = request.headers().contains_key("expect");
            assert_eq!(passed, sent.iter().any(|(name, _)| *name == "expect"));
        }
        // From a client of HTTP/1.0 it means nothing (RFC 9110 section 10.1.1).
        let mut old = request("POST", "http://a/", &[expect(b"100-continue"), length]);
        *old.version_mut() = Version::HTTP_10;
        assert!(!waits_for_continue(&old));
        forward(&mut old).unwrap();
        assert!(!old.headers().contains_key("expect"));
    }

    #[test]
    fn a_tunnel_has_no_content_of_its_own() {
        let lead = |fields: &[(&str, &[u8])]| tunnel(&request("CONNECT", "a:1", fields));
        assert!(lead(&[("content-length", b"0")]).is_ok());
        for field in [
            ("content-length", &b"5"[..]),
            ("transfer-encoding", b"chunked"),
        ] {
            assert_eq!(lead(&[field]), Err(Fault::Content), "{field:?}");
        }
    }

    #[test]
    fn versions_are_the_proxys_own() {
        let mut request = request("GET", "http://a/", &[]);
        *request.version_mut() = Version::HTTP_10;
        forward(&mut request).unwrap();
        let mut response = Response::new(());
        *response.version_mut() = Version::HTTP_10;
        answer(&mut response).unwrap();
        let versions = (request.version(), response.version());
        assert_eq!(versions, (Version::HTTP_11, Version::HTTP_11));
    }

    #[test]
    fn no_server_makes_another_protocol_of_a_response() {
        let mut response = Response::new(());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        assert_eq!(answer(&mut response), Err(Fault::Switch));
    }

    #[test]
    fn credentials_are_compared_whole() {
        let credentials = Credentials {
            user: "me".to_owned(),
            password: "owl:s".to_owned(),
        };
        let tell = |value: &str| {
            let fields: &[(&str, &[u8])] = &[("proxy-authorization", value.as_bytes())];
            is_authorized(request("GET", "/", fields).headers(), &credentials)
        };
        for told in ["me:owl:s", "me:owl", "me:owl:sx", "m:owl:s", "", ":", "me"] {
            let told_right = told == "me:owl:s";
            let told = STANDARD.encode(told);
            assert_eq!(tell(&format!("Basic {told}")), told_right, "{told}");
            assert_eq!(tell(&format!("bAsic  {told}")), told_right, "{told}");
            assert!(!tell(&format!("Bearer {told}")), "{told}");
            assert!(!tell(&told), "{told}");
        }
        assert!(!is_authorized(&HeaderMap::new(), &credentials));
    }
}
