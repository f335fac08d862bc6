//! The page: the nodes of this machine in a browser, read-only.
//!
//! Everything comes from here: the page needs nothing from elsewhere, and its content security policy
//! allows nothing else. What it shows it asks the nodes by their control sockets, as commands do.

pub(crate) mod journey;
mod view;

use std::net::SocketAddr;
use std::sync::Arc;

use form_urlencoded::parse;
use hyper::header::{AUTHORIZATION, HOST, HeaderMap, HeaderName, HeaderValue};
use hyper::http::request;
use hyper::{Method, StatusCode};
use muslin_stack::api::credentials::is_same;
use muslin_stack::api::trace::{Beginning, Journey, Protocol};
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::Mutex;
use tokio::time::{Duration, Instant};
pub(crate) use view::Nodes;
use view::{Rows, View};

use crate::error::{Error, Result};
use crate::http::server::{self, Answer};
use crate::random::random;

/// What a browser may do with the page: use what is from here, and nothing from elsewhere (Content Security
/// Policy level 3).
const POLICY: &str = include_str!("assets/policy.txt").trim_ascii();
const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";
const JSON: &str = "application/json";
/// The files of the page, by their paths.
const FILES: [(&str, &str, &str); 6] = [
    ("/", HTML, include_str!("assets/index.html")),
    ("/page.css", STYLE, include_str!("assets/page.css")),
    ("/page.js", SCRIPT, include_str!("assets/page.js")),
    ("/make.js", SCRIPT, include_str!("assets/make.js")),
    ("/map.js", SCRIPT, include_str!("assets/map.js")),
    ("/table.js", SCRIPT, include_str!("assets/table.js")),
];
/// How long a view is good for others who ask.
const FRESH: Duration = Duration::from_millis(900);

/// What is served.
#[derive(Debug, Clone)]
pub(crate) struct Page {
    nodes: Nodes,
    /// What a client must have, unless only this machine can ask.
    token: Option<Arc<str>>,
    /// Where it is served.
    address: SocketAddr,
    last: Arc<Mutex<Option<(Instant, String)>>>,
}

impl Page {
    /// A page of these nodes, for a listener at that address.
    ///
    /// # Errors
    /// If there is no randomness for a token.
    pub(crate) fn new(nodes: Nodes, address: SocketAddr) -> Result<Self> {
        let token = match address.ip().is_loopback() {
            true => None,
            false => {
                let bytes: [u8; 16] = random()?;
                Some(format!("{:032x}", u128::from_ne_bytes(bytes)).into())
            }
        };
        Ok(Self {
            nodes,
            token,
            address,
            last: Arc::default(),
        })
    }

    /// Where a browser finds it.
    pub(crate) fn url(&self) -> String {
        match &self.token {
            // What is behind # a browser keeps to itself.
            Some(token) => format!("http://{}/#{token}", self.address),
            None => format!("http://{}/", self.address),
        }
    }

    /// Answers for ever.
    pub(crate) async fn serve(self, listener: TcpListener) {
        server::serve(listener, move |request| {
            let (page, (head, _)) = (self.clone(), request.into_parts());
            async move { page.respond(&head).await }
        })
        .await;
    }

    async fn respond(&self, head: &request::Parts) -> Answer {
        let mut answer = self.answer(head).await;
        let headers = [
            ("content-security-policy", POLICY),
            ("x-content-type-options", "nosniff"),
            ("referrer-policy", "no-referrer"),
            ("cross-origin-resource-policy", "same-origin"),
            ("cache-control", "no-store"),
        ];
        for (name, value) in headers {
            let name = HeaderName::from_static(name);
            answer
                .headers_mut()
                .insert(name, HeaderValue::from_static(value));
        }
        answer
    }

    async fn answer(&self, head: &request::Parts) -> Answer {
        if !server::is_allowed(&head.method) {
            return server::not_allowed();
        }
        if !self.is_named(&head.headers) {
            // Else a name that anybody gives this address would be as good (DNS rebinding).
            return server::plain(StatusCode::FORBIDDEN, "use the address, not a name\n");
        }
        let ok = StatusCode::OK;
        let path = head.uri.path();
        if let Some((_, kind, file)) = FILES.iter().find(|(name, ..)| *name == path) {
            return server::answer(ok, kind, *file);
        }
        match path.strip_prefix("/api/") {
            None => server::not_found(),
            Some(_) if !self.is_trusted(&head.headers) => {
                server::plain(StatusCode::UNAUTHORIZED, "the token is missing or wrong\n")
            }
            Some(_) if head.method == Method::HEAD => server::answer(ok, JSON, ""),
            Some(name) => self.data(name, head.uri.query().unwrap_or_default()).await,
        }
    }

    /// Whether a client calls this page by an address or as this machine itself.
    fn is_named(&self, headers: &HeaderMap) -> bool {
        let host = headers.get(HOST).and_then(|host| host.to_str().ok());
        host.is_some_and(|host| {
            let local = format!("localhost:{}", self.address.port());
            host == local || host.parse::<SocketAddr>().is_ok()
        })
    }

    fn is_trusted(&self, headers: &HeaderMap) -> bool {
        let Some(token) = &self.token else {
            return true;
        };
        let given = headers.get(AUTHORIZATION).map(HeaderValue::as_bytes);
        let given = given.and_then(|given| given.strip_prefix(b"Bearer "));
        given.is_some_and(|given| is_same(token.as_bytes(), given))
    }

    async fn data(&self, name: &str, query: &str) -> Answer {
        match name {
            "view" => self.view().await,
            "trace" => match trace_of(query) {
                Ok(beginning) => json(self.trace(&beginning).await),
                Err(error) => failed(&error),
            },
            table => match search_of(query) {
                Ok(letters) => match Rows::take(&self.nodes, table, &letters).await {
                    Some(rows) => json(rows),
                    None => server::not_found(),
                },
                Err(error) => failed(&error),
            },
        }
    }

    /// One at a time; who has waited gets what the one before got.
    async fn view(&self) -> Answer {
        let mut last = self.last.lock().await;
        if let Some((when, text)) = &*last
            && when.elapsed() < FRESH
        {
            return server::answer(StatusCode::OK, JSON, text.clone());
        }
        match serde_json::to_string(&View::take(&self.nodes).await) {
            Ok(text) => {
                *last = Some((Instant::now(), text.clone()));
                server::answer(StatusCode::OK, JSON, text)
            }
            Err(error) => failed(&Error::failed(error)),
        }
    }

    async fn trace(&self, beginning: &Beginning) -> Result<Journey> {
        let nodes = journey::reach(&self.nodes.sockets()).await?;
        journey::follow(&nodes, &nodes, beginning).await
    }
}

/// What a query looks for in a table, in lower case.
fn search_of(query: &str) -> Result<String> {
    let mut letters = String::new();
    for (name, value) in parse(query.as_bytes()) {
        match &*name {
            "search" => letters = value.to_lowercase(),
            _ => return Err(Error::usage(format!("there is no '{name}'"))),
        }
    }
    Ok(letters)
}

/// The packet that a query describes.
fn trace_of(query: &str) -> Result<Beginning> {
    let mut beginning = Beginning {
        from: String::new(),
        to: String::new(),
        protocol: Protocol::Tcp,
        source_port: 40_000,
        destination_port: 80,
        size: 0,
        ttl: 64,
        dont_fragment: false,
        version: None,
        has_mark: false,
    };
    for (name, value) in parse(query.as_bytes()) {
        let wrong = || Error::usage(format!("'{value}' is no {name}"));
        match &*name {
            "from" => beginning.from = value.into_owned(),
            "to" => beginning.to = value.into_owned(),
            "proto" => {
                beginning.protocol = match &*value {
                    "tcp" => Protocol::Tcp,
                    "udp" => Protocol::Udp,
                    "icmp" => Protocol::Icmp,
                    _ => return Err(wrong()),
                };
            }
            "dport" => beginning.destination_port = value.parse().map_err(|_| wrong())?,
            "size" => beginning.size = value.parse().map_err(|_| wrong())?,
            "df" => beginning.dont_fragment = value == "1",
            _ => return Err(Error::usage(format!("there is no '{name}'"))),
        }
    }
    Ok(beginning)
}

fn json(value: Result<impl Serialize>) -> Answer {
    let written = value.and_then(|value| serde_json::to_string(&value).map_err(Error::failed));
    match written {
        Ok(text) => server::answer(StatusCode::OK, JSON, text),
        Err(error) => failed(&error),
    }
}

/// An error in one line, for the page to show.
fn failed(error: &Error) -> Answer {
    let status = match error.exit_code() {
        2 => StatusCode::BAD_REQUEST,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    };
    server::plain(status, format!("{error}\n"))
}

/// Takes the address.
///
/// # Errors
/// If it cannot be had.
pub(crate) async fn listen(address: SocketAddr, flag: &str) -> Result<TcpListener> {
    server::listen(address, "the page", flag).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_asked_for_where_others_may_come() {
        let nodes = || Nodes::At("/nowhere".into());
        let local = Page::new(nodes(), "127.0.0.1:8484".parse().unwrap()).unwrap();
        assert_eq!(local.url(), "http://127.0.0.1:8484/");
        assert!(local.is_trusted(&HeaderMap::new()));

        let open = Page::new(nodes(), "0.0.0.0:8484".parse().unwrap()).unwrap();
        let token = open.token.clone().unwrap();
        assert_eq!(open.url(), format!("http://0.0.0.0:8484/#{token}"));
        let given = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(AUTHORIZATION, value.parse().unwrap());
            open.is_trusted(&headers)
        };
        assert!(given(&format!("Bearer {token}")));
        for wrong in [
            "",
            "Bearer ",
            "Basic x",
            &format!("Bearer {token}0"),
            &token[..],
        ] {
            assert!(!given(wrong), "{wrong}");
        }
        assert!(!open.is_trusted(&HeaderMap::new()));
    }

    #[test]
    fn a_page_is_called_by_its_address() {
        let page = Page::new(Nodes::At("/x".into()), "127.0.0.1:8484".parse().unwrap()).unwrap();
        let named = |host: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(HOST, host.parse().unwrap());
            page.is_named(&headers)
        };
        assert!(named("127.0.0.1:8484") && named("localhost:8484") && named("[::1]:8484"));
        assert!(!named("evil.example:8484") && !named("localhost") && !named(""));
    }

    #[test]
    fn a_query_is_a_packet() {
        let read = trace_of("from=web&to=db.n2&proto=udp&dport=53&size=100&df=1").unwrap();
        assert_eq!((&*read.from, &*read.to), ("web", "db.n2"));
        assert_eq!(read.protocol, Protocol::Udp);
        assert_eq!(
            (read.destination_port, read.size, read.dont_fragment),
            (53, 100, true)
        );
        for wrong in [
            "proto=ip",
            "dport=x",
            "dport=70000",
            "size=-1",
            "colour=red",
        ] {
            assert_eq!(trace_of(wrong).unwrap_err().exit_code(), 2, "{wrong}");
        }
    }
}
