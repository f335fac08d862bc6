//! The heads of messages that pass the proxy: where a request leads, what of a head concerns one
//! connection only, and who may ask (RFC 9110 sections 7.6 and 11.7).

use std::net::Ipv6Addr;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Request, Response, Uri};
use thiserror::Error;

use super::Credentials;
use super::wire::{self, Host, Target, host_name};

/// The longest head in bytes.
pub(super) const MAX_LEN: usize = 16 << 10;
/// The most fields of a head.
pub(super) const MAX_FIELDS: usize = 100;

/// Why a message is not passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(super) enum Fault {
    /// A request to the proxy itself.
    #[error("this is a proxy: name a whole address, http://HOST/PATH, or use CONNECT")]
    Form,
    /// A `CONNECT` to anything else.
    #[error("a CONNECT names HOST:PORT and no more")]
    Tunnel,
    /// An address of what cannot be a host.
    #[error("the address has {0}")]
    Host(wire::Fault),
    /// None or zero, too large, or no number.
    #[error("the address has no valid port")]
    Port,
}

/// Where a `CONNECT` leads.
///
/// # Errors
/// Why it leads nowhere.
pub(super) fn tunnel<B>(request: &Request<B>) -> Result<Target, Fault> {
    let uri = request.uri();
    let authority = uri.authority().filter(|_| uri.scheme().is_none());
    let authority = authority.ok_or(Fault::Tunnel)?.as_str();
    if authority.contains('@') {
        return Err(Fault::Tunnel);
    }
    target(authority, None)
}

/// Where a plain request leads; its head becomes what is passed on.
///
/// # Errors
/// Why it leads nowhere.
pub(super) fn forward<B>(request: &mut Request<B>) -> Result<Target, Fault> {
    let uri = request.uri();
    let authority = uri.authority().filter(|_| uri.scheme_str() == Some("http"));
    let authority = authority.ok_or(Fault::Form)?.as_str();
    // The user is for the proxy, at most (RFC 9110 section 4.2.4).
    let place = authority.rsplit_once('@').map_or(authority, |(_, it)| it);
    let target = target(place, Some(80))?;
    let host = HeaderValue::from_str(place).map_err(|_| Fault::Host(wire::Fault::Name))?;
    let path = request.uri().path_and_query().cloned();
    *request.uri_mut() = path.map_or_else(|| Uri::from_static("/"), Uri::from);
    strip(request.headers_mut());
    request.headers_mut().insert(header::HOST, host);
    Ok(target)
}

/// The head of a response becomes what is passed on.
pub(super) fn answer<B>(response: &mut Response<B>) {
    strip(response.headers_mut());
}

/// Whether a client has told the credentials that are wanted (RFC 7617).
pub(super) fn is_authorized(headers: &HeaderMap, credentials: &Credentials) -> bool {
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

/// Removes what concerns this connection only.
fn strip(headers: &mut HeaderMap) {
    let named = items(headers, &header::CONNECTION);
    let named: Vec<_> = named
        .filter_map(|name| HeaderName::from_bytes(name).ok())
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
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
        answer(&mut response);
        assert_eq!(fields(response.headers()), kept);
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
