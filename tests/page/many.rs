//! The page with many nodes that there are not: its own files, and answers as those of `muslin page`.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::json;
use tempfile::TempDir;

use crate::browser::Browser;

pub(crate) const NODES: usize = 1000;
pub(crate) const PODS: usize = 30;
/// Rows that are given of a table.
pub(crate) const MAX_ROWS: usize = 5000;
/// Peers of each node but the first, which has all: with all of all there were a million tunnels.
const PEERS: usize = 8;

/// What measures the page, from within: when it was first drawn, how long frames took, and which tasks were
/// longer than 50 ms, as Chromium has them.
const WATCH: &str = r"
    window.watched = { first: null, frames: [], tasks: [] };
    new PerformanceObserver((list) => list.getEntries().forEach((it) => watched.tasks.push(it.duration)))
      .observe({ type: 'longtask', buffered: true });
    const observer = new MutationObserver(() => {
      if (!document.getElementById('summary')?.textContent.includes('nodes here')) return;
      observer.disconnect();
      // Behind the frame in which it is drawn.
      requestAnimationFrame(() => setTimeout(() => { watched.first = performance.now(); }));
    });
    observer.observe(document, { childList: true, subtree: true, characterData: true });
    window.watchFrames = (each) => {
      watched.frames = [];
      watched.tasks = [];
      let last = performance.now();
      const next = (now) => {
        watched.frames.push(now - last);
        last = now;
        each();
        requestAnimationFrame(next);
      };
      requestAnimationFrame(next);
    };";

/// A server of such a page, and a browser.
pub(crate) struct Many {
    pub(crate) browser: Browser,
    pub(crate) url: String,
    /// Views that were asked for.
    views: Arc<AtomicU64>,
    _profile: TempDir,
}

impl Many {
    pub(crate) fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let views = Arc::new(AtomicU64::new(0));
        let counted = views.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let views = counted.clone();
                // A browser that is gone is no error.
                std::thread::spawn(move || answer(stream, &views));
            }
        });
        let profile = tempfile::tempdir().unwrap();
        let mut browser = Browser::start(Command::new("sh"), profile.path(), (1280, 900));
        browser.call(
            "Page.addScriptToEvaluateOnNewDocument",
            json!({"source": WATCH}),
        );
        Self {
            browser,
            url,
            views,
            _profile: profile,
        }
    }

    /// Opens the page; milliseconds from then until it was drawn with all nodes.
    pub(crate) fn first_render(&mut self) -> f64 {
        self.browser.open("about:blank");
        self.browser.open(&self.url.clone());
        self.browser.wait("window.watched?.first > 0");
        self.browser.value("watched.first").as_f64().unwrap()
    }

    pub(crate) fn views(&self) -> u64 {
        self.views.load(Ordering::Relaxed)
    }
}

fn answer(mut stream: TcpStream, views: &AtomicU64) -> std::io::Result<()> {
    let mut question = String::new();
    let mut reader = BufReader::new(stream.try_clone()?);
    reader.read_line(&mut question)?;
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let path = question.split(' ').nth(1).unwrap_or_default();
    let (kind, body) = match path {
        "/api/view" => {
            let number = views.fetch_add(1, Ordering::Relaxed);
            ("application/json", view(number))
        }
        _ if path.starts_with("/api/pods?search=") => {
            let letters = &path["/api/pods?search=".len()..];
            (
                "application/json",
                pods(letters, views.load(Ordering::Relaxed)),
            )
        }
        "/" => ("text/html", file("/index.html")),
        _ if path.ends_with(".css") => ("text/css", file(path)),
        _ => ("text/javascript", file(path)),
    };
    let policy = file("/policy.txt");
    let len = body.len();
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: {kind}; charset=utf-8\r\ncontent-length: {len}\r\n\
         content-security-policy: {}\r\nconnection: close\r\n\r\n",
        policy.trim()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())
}

/// One of the page's own files.
fn file(path: &str) -> String {
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/page/assets");
    std::fs::read_to_string(assets.join(&path[1..])).unwrap()
}

fn outer(node: usize) -> String {
    format!("10.9.{}.{}", node / 250, node % 250 + 1)
}

fn subnet(node: usize) -> String {
    format!("10.{}.{}", 128 + node / 250, node % 250)
}

/// The nodes, between which more bytes have passed than in the view before this one. It is written as text,
/// since making values of it takes long without optimisation.
pub(crate) fn view(number: u64) -> String {
    let nodes = (0..NODES).map(|node| {
        let pods = (0..PODS).map(|pod| format!(r#"["{}","{}"]"#, name(node, pod), inner(node, pod)));
        let peers = match node {
            0 => NODES - 1,
            _ => PEERS,
        };
        let peers = (1..=peers).map(|step| {
            let peer = (node + step) % NODES;
            let (ip, net, bytes) = (outer(peer), subnet(peer), 50_000 * number * step as u64);
            format!(
                r#"{{"node":"node-{peer}","public_ip":"{ip}","subnet":"{net}.0/24","state":"alive","path":"vxlan","bytes":{bytes}}}"#
            )
        });
        let (ip, net, pods, peers) = (outer(node), subnet(node), list(pods), list(peers));
        format!(
            r#"{{"node":"node-{node}","trouble":null,"public_ip":"{ip}","subnet":"{net}.0/24","pods":{pods},"peers":{peers}}}"#
        )
    });
    format!(r#"{{"nodes":{}}}"#, list(nodes))
}

/// Rows of pods whose names have these letters, and at most as many as the page is given.
fn pods(letters: &str, number: u64) -> String {
    let all = (0..NODES).flat_map(|node| (0..PODS).map(move |pod| (node, pod)));
    let mut found = all.filter(|(node, pod)| name(*node, *pod).contains(letters));
    let rows = found.by_ref().take(MAX_ROWS).map(|(node, pod)| {
        let (name, address, bytes) = (name(node, pod), inner(node, pod), 1_000 * number);
        let traffic = format!(r#"{{"packets":{number},"bytes":{bytes}}}"#);
        format!(
            r#"["node-{node}",{{"pod":"{name}","address":"{address}","mac":"02:00:00:00:00:{pod:02x}","port":{pod},"persistent":false,"offload":true,"published":[],"attached_seconds":{number},"received":{traffic},"sent":{traffic}}}]"#
        )
    });
    let rows = list(rows);
    let more = found.next().is_some();
    format!(r#"{{"rows":{rows},"more":{more}}}"#)
}

fn name(node: usize, pod: usize) -> String {
    format!("pod-{node}-{pod}")
}

fn inner(node: usize, pod: usize) -> String {
    format!("{}.{}", subnet(node), pod + 2)
}

fn list(values: impl Iterator<Item = String>) -> String {
    let mut list = String::from("[");
    for value in values {
        if list.len() > 1 {
            list.push(',');
        }
        list.push_str(&value);
    }
    list + "]"
}
