//! The page with many nodes that there are not: its own files, and answers as those of `muslin page`.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::browser::Browser;

pub(crate) const NODES: usize = 1000;
pub(crate) const PODS: usize = 30;
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
        _ if path.starts_with("/api/") => ("application/json", rows()),
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

/// The nodes, whose counters have gone on since the view before this one. It is written as text, since
/// making values of it takes a second without optimisation.
pub(crate) fn view(number: u64) -> String {
    let mut out = String::with_capacity(12_000_000);
    out.push_str(r#"{"nodes":["#);
    for node in 0..NODES {
        let comma = if node == 0 { "" } else { "," };
        let (name, ip, subnet) = (format!("node-{node}"), outer(node), subnet(node));
        let status = status(&name, &ip, &subnet);
        let _ = write!(
            out,
            r#"{comma}{{"node":"{name}","trouble":null,"status":{status},"pods":["#
        );
        for pod in 0..PODS {
            let comma = if pod == 0 { "" } else { "," };
            let bytes = 1_000 * (number + 1) * (pod as u64 + 1);
            let _ = write!(
                out,
                r#"{comma}{{"pod":"pod-{node}-{pod}","address":"{subnet}.{}","mac":"02:00:00:00:00:{pod:02x}","port":{pod},"persistent":false,"offload":true,"published":[],"attached_seconds":{number},"received":{{"packets":{number},"bytes":{bytes}}},"sent":{{"packets":{number},"bytes":{bytes}}}}}"#,
                pod + 2
            );
        }
        out.push_str(r#"],"peers":["#);
        let peers = if node == 0 { NODES - 1 } else { PEERS };
        for step in 1..=peers {
            let comma = if step == 1 { "" } else { "," };
            let peer = (node + step) % NODES;
            let (ip, net) = (outer(peer), self::subnet(peer));
            let bytes = 50_000 * number * step as u64;
            let _ = write!(
                out,
                r#"{comma}{{"node":"node-{peer}","subnet":"{net}.0/24","public_ip":"{ip}","backend":"vxlan","vtep_mac":"02:00:00:00:01:00","state":"alive","usable":true,"heard_seconds":1,"path":"vxlan","mtu":1450,"partial_checksums":true,"received":{{"packets":{number},"bytes":{bytes}}},"sent":{{"packets":{number},"bytes":{bytes}}}}}"#
            );
        }
        out.push_str("]}");
    }
    out.push_str("]}");
    out
}

fn status(name: &str, ip: &str, subnet: &str) -> String {
    format!(
        r#"{{"node":"{name}","version":"0.1.0","pid":1,"uptime_seconds":9,"network":"10.128.0.0/9","subnet":"{subnet}.0/24","gateway":"{subnet}.1","public_ip":"{ip}","tunnel_ip":"{ip}","interface":"eth0","backend":"vxlan","port":8472,"vni":1,"vtep_mac":"02:00:00:00:01:00","mtu":1450,"device":"tap","workers":2,"offload":"all","trouble":null,"pods":{PODS},"peers":{PEERS}}}"#
    )
}

/// Any other table: what the nodes have lost.
fn rows() -> String {
    let row =
        |node: usize| json!([format!("node-{node}"), {"reason": "ttl-exceeded", "packets": node}]);
    let rows: Vec<Value> = (0..NODES).map(row).collect();
    json!({"rows": rows, "more": false}).to_string()
}
