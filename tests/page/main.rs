//! The page: what it serves to whom, and what a browser makes of it.

#![allow(clippy::unwrap_used, reason = "a test may")]

mod browser;
mod many;

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use browser::Browser;
use many::Many;
use muslin::agent::Agent;
use muslin_lab::skip::{skip, skip_for_lack_of_package};
use muslin_lab::{Host, Lab, Node, SOON, poll_until};
use serde_json::{Value, json};

/// Two nodes of one machine with two pods each, and the page of both.
struct Bed {
    nodes: [Node; 2],
    _pods: [Agent; 4],
    page: Child,
    url: String,
    lab: Lab,
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = self.page.kill();
        let _ = self.page.wait();
    }
}

impl Bed {
    fn new() -> Option<Self> {
        let lab = Lab::new()?;
        lab.limit(Duration::from_secs(180));
        let nodes = lab.two_nodes(|number, config| match number {
            1 => config.with("--admin", "10.9.0.1:8490"),
            _ => config,
        });
        let pods = [(0, "web"), (0, "api"), (1, "db"), (1, "cache")];
        let pods = pods.map(|(node, name): (usize, &str)| nodes[node].pod(name));
        let mut command = nodes[0].host().command(muslin_lab::muslin_bin());
        command.args(["page", "--listen", "127.0.0.1:0", "--state-dir"]);
        command.arg(nodes[0].state_dir()).stdout(Stdio::piped());
        let mut page = command.spawn().unwrap();
        let mut url = String::new();
        let mut output = BufReader::new(page.stdout.take().unwrap());
        output.read_line(&mut url).unwrap();
        let bed = Self {
            nodes,
            _pods: pods,
            page,
            url: url.trim_end().to_owned(),
            lab,
        };
        poll_until(SOON, "the names of the other node", || {
            let (status, _) = bed.get("api/trace?from=web&to=db", &[]);
            (status == 200).then_some(())
        });
        Some(bed)
    }

    fn host(&self) -> &Host {
        self.nodes[0].host()
    }

    /// The status of an answer, and what it says.
    fn get(&self, path: &str, flags: &[&str]) -> (u16, String) {
        ask(self.host(), &format!("{}{path}", self.url), flags)
    }

    fn json(&self, path: &str) -> Value {
        let (status, text) = self.get(path, &[]);
        assert_eq!(status, 200, "{path}: {text}");
        serde_json::from_str(&text).unwrap()
    }
}

fn ask(host: &Host, url: &str, flags: &[&str]) -> (u16, String) {
    let mut words = vec!["curl", "-s", "-m", "20", "-w", "\n%{http_code}", url];
    words.extend(flags);
    let output = host.output(&words);
    let text = String::from_utf8(output.stdout).unwrap();
    let (body, status) = text.rsplit_once('\n').unwrap();
    (status.parse().unwrap(), body.to_owned())
}

#[test]
fn it_shows_all_nodes_of_the_machine_and_follows_packets() {
    let Some(mut bed) = Bed::new() else { return };
    let view = bed.json("api/view");
    let nodes = view["nodes"].as_array().unwrap();
    let shown: Vec<_> = nodes
        .iter()
        .map(|it| (&it["node"], it["pods"].as_array().unwrap().len()))
        .collect();
    assert_eq!(shown, [(&Value::from("n1"), 2), (&Value::from("n2"), 2)]);
    // What the test of many nodes makes up has the same fields.
    let made: Value = serde_json::from_str(&many::view(1)).unwrap();
    let fields =
        |value: &Value| -> Vec<String> { value.as_object().unwrap().keys().cloned().collect() };
    assert_eq!(fields(&nodes[0]), fields(&made["nodes"][0]));
    let peer = |node: &Value| fields(&node["peers"][0]);
    assert_eq!(peer(&nodes[0]), peer(&made["nodes"][0]));
    assert_eq!(nodes[0]["pods"][0].as_array().map(Vec::len), Some(2));
    let way = bed.json("api/trace?from=web&to=db&proto=udp&dport=53");
    assert_eq!(way["parts"][1]["outcome"]["text"], "Delivered to pod db.");
    for (table, least) in [
        ("routes", 4),
        ("leases", 4),
        ("neighbours", 4),
        ("drops", 2),
        ("events", 4),
        ("flows", 0),
        ("pods", 4),
        ("peers", 2),
    ] {
        let rows = bed.json(&format!("api/{table}"));
        assert!(
            rows["rows"].as_array().unwrap().len() >= least,
            "{table}: {rows}"
        );
        assert_eq!(rows["more"], false);
    }
    for (path, flags, status) in [
        ("", &["-X", "POST"][..], 405),
        ("", &["-H", "Host: muslin.example:80"], 403),
        ("nothing", &[], 404),
        ("api/nothing", &[], 404),
        ("api/trace?from=web&to=nobody", &[], 503),
        ("api/trace?from=nobody&to=db", &[], 503),
        ("api/trace?colour=red", &[], 400),
        ("api/pods?colour=red", &[], 400),
    ] {
        assert_eq!(bed.get(path, flags).0, status, "{path} {flags:?}");
    }
    let (_, head) = bed.get("", &["-I"]);
    assert!(
        head.contains("content-security-policy: default-src 'none'; script-src 'self'"),
        "{head}"
    );

    let rows = bed.json("api/pods?search=Web");
    let rows = rows["rows"].as_array().unwrap();
    assert_eq!((rows.len(), &rows[0][1]["pod"]), (1, &"web".into()));

    // A node that is restarted comes back.
    bed.nodes[1].kill();
    poll_until(SOON, "the node's end", || {
        let view = bed.json("api/view");
        (view["nodes"].as_array().unwrap().len() == 1).then_some(())
    });
    bed.nodes[1].start_again();
    poll_until(SOON, "the node's return", || {
        let view = bed.json("api/view");
        (view["nodes"].as_array().unwrap().len() == 2).then_some(())
    });
}

#[test]
fn a_node_serves_its_own_page_to_who_has_the_token() {
    let Some(bed) = Bed::new() else { return };
    let log = bed.nodes[0].log();
    let url = log
        .split("the page is served at ")
        .nth(1)
        .unwrap()
        .lines()
        .next()
        .unwrap();
    let (address, token) = url.split_once('#').unwrap();
    assert_eq!(address, "http://10.9.0.1:8490/");
    let other = bed.nodes[1].host();
    assert_eq!(ask(other, address, &[]).0, 200);
    let view = format!("{address}api/view");
    assert_eq!(ask(other, &view, &[]).0, 401);
    assert_eq!(ask(other, &view, &["-H", "Authorization: Bearer 0"]).0, 401);
    let (status, text) = ask(
        other,
        &view,
        &["-H", &format!("Authorization: Bearer {token}")],
    );
    assert_eq!(status, 200);
    let view: Value = serde_json::from_str(&text).unwrap();
    let nodes = view["nodes"].as_array().unwrap();
    assert_eq!(nodes.len(), 1, "its own alone");
    assert_eq!(nodes[0]["node"], "n1");
}

/// What a person does: looks, clicks two pods, reads, uses the keyboard, searches a table.
#[test]
fn a_browser_shows_it_and_two_clicks_trace_a_packet() {
    let Some(mut bed) = Bed::new() else { return };
    if !bed.host().has("chromium", "chromium") {
        return;
    }
    let profile = bed.lab.directory().join("browser");
    let mut browser = Browser::start(bed.host().command("sh"), &profile, (1280, 900));
    browser.prefer("light", (1280, 900));
    browser.open(&bed.url);
    browser.wait("document.querySelectorAll('.pod').length === 4");
    browser
        .wait("document.getElementById('summary').textContent.startsWith('2 nodes here, 4 pods')");
    browser.wait("document.querySelectorAll('.tunnel').length === 1");

    browser.click(".pod[aria-label^='pod web ']");
    browser.click(".pod[aria-label^='pod db ']");
    browser.wait("document.getElementById('answer').textContent.includes('Delivered to pod db.')");
    browser.wait("document.querySelectorAll('.tunnel.path').length === 1");
    assert_eq!(
        browser.value("document.querySelectorAll('.pod[aria-pressed=true]').length"),
        2
    );
    let steps = "document.querySelectorAll('#answer dt').length > 10";
    assert_eq!(browser.value(steps), true);
    picture(&mut browser, "light");
    browser.prefer("dark", (1280, 900));
    picture(&mut browser, "dark");
    browser.prefer("light", (390, 844));
    let overflows = "document.documentElement.scrollWidth > innerWidth";
    assert_eq!(browser.value(overflows), false, "a narrow window");
    picture(&mut browser, "narrow");
    browser.prefer("light", (1280, 900));

    // The same by keyboard, and what is lost.
    browser.value("document.querySelector(\".pod[aria-label^='pod api ']\").focus()");
    browser.press("Enter");
    browser.wait("document.querySelectorAll('.pod[aria-pressed=true]').length === 1");
    browser.value(
        "(() => { const form = document.getElementById('question'); form.elements.to.value = '10.250.0.1'; \
         form.requestSubmit(); })()",
    );
    browser.wait("document.querySelector('#answer .outcome') !== null");

    browser.click("#tab-routes");
    browser.wait("document.querySelectorAll('#table tbody tr').length === 4");
    browser.value(
        "(() => { const it = document.getElementById('search'); it.value = 'n2'; \
         it.dispatchEvent(new Event('input')); })()",
    );
    browser.wait("document.querySelectorAll('#table tbody tr').length < 4");
    assert_eq!(browser.errors, Vec::<String>::new());

    // It survives a node's restart.
    bed.nodes[1].kill();
    browser.wait("document.getElementById('summary').textContent.startsWith('1 node here')");
    bed.nodes[1].start_again();
    browser.wait("document.getElementById('summary').textContent.startsWith('2 nodes here')");
    assert_eq!(browser.errors, Vec::<String>::new());
}

/// axe-core finds nothing that keeps people from using the page, in any of its views.
#[test]
fn axe_has_no_serious_finding() {
    let Some(axe) = axe() else { return };
    let Some(bed) = Bed::new() else { return };
    if !bed.host().has("chromium", "chromium") {
        return;
    }
    let profile = bed.lab.directory().join("browser");
    let mut browser = Browser::start(bed.host().command("sh"), &profile, (1280, 900));
    for (scheme, size) in [
        ("light", (1280, 900)),
        ("dark", (1280, 900)),
        ("light", (390, 844)),
    ] {
        browser.prefer(scheme, size);
        browser.open(&bed.url);
        browser.wait("document.querySelectorAll('.pod').length === 4");
        browser.wait("document.querySelectorAll('#table tbody tr').length === 4");
        // What it is given from outside the page's policy does not bind.
        browser.value(&format!("{axe}; true"));
        let place = format!("{scheme}, {} wide", size.0);
        finds_nothing(&mut browser, &format!("{place}, pods"));
        browser.click(".pod[aria-label^='pod web ']");
        browser.click(".pod[aria-label^='pod db ']");
        browser.wait("document.querySelectorAll('#answer dt').length > 10");
        finds_nothing(&mut browser, &format!("{place}, a trace"));
        browser.value(
            "(() => { const form = document.getElementById('question'); \
             form.elements.to.value = 'nobody'; form.requestSubmit(); })()",
        );
        browser.wait("document.querySelector('#answer .outcome.lost') !== null");
        finds_nothing(&mut browser, &format!("{place}, no trace"));
        for table in [
            "peers",
            "leases",
            "routes",
            "neighbours",
            "flows",
            "drops",
            "events",
        ] {
            browser.click(&format!("#tab-{table}"));
            let is_selected = format!("#tab-{table}[aria-selected=true]");
            browser.wait(&format!("document.querySelector('{is_selected}') !== null"));
            browser.wait("document.getElementById('table').textContent !== ''");
            finds_nothing(&mut browser, &format!("{place}, {table}"));
        }
    }
    // The browser notes an answer that says no.
    browser.errors.retain(|it| !it.contains("/api/trace?"));
    assert_eq!(browser.errors, Vec::<String>::new());
    // It does find what is wrong.
    browser.value("document.querySelector('main').append(document.createElement('img')), true");
    let found = browser.value(FINDINGS);
    assert!(
        found[1][0].as_str().unwrap().contains("image-alt"),
        "{found}"
    );
}

/// How many rules of axe-core are kept, and which that are serious are not.
const FINDINGS: &str = "axe.run(document).then((told) => [told.passes.length, told.violations \
    .filter((it) => ['serious', 'critical'].includes(it.impact)) \
    .map((it) => `${it.impact}: ${it.id}: ${it.nodes.map((node) => node.html).join(' ')}`)])";

fn finds_nothing(browser: &mut Browser, place: &str) {
    let told = browser.value(FINDINGS);
    assert_eq!(told[1], json!([]), "{place}");
    assert!(told[0].as_u64() > Some(10), "{place}: {told}");
}

/// The program of axe-core, where `.ci/need lab` has put it.
fn axe() -> Option<String> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/target/axe-core/axe.min.js");
    let axe = std::fs::read_to_string(path).ok();
    if axe.is_none() {
        skip_for_lack_of_package(
            "axe-core is missing ('.ci/need lab' fetches it, where there is npm)",
        );
    }
    axe
}

/// All of a thousand nodes are there, though few of them are in the document at a time. How long that takes
/// is for `cargo bench --bench page` to say.
#[test]
fn a_thousand_nodes_are_shown_as_they_are_scrolled_to() {
    if !has_chromium() {
        return;
    }
    let mut many = Many::new();
    many.first_render();
    let browser = &mut many.browser;
    let summary = browser.value("document.getElementById('summary').textContent");
    assert_eq!(summary, "1000 nodes here, 30000 pods, 0 more known");
    let elements = "document.getElementsByTagName('*').length";
    let has = |browser: &mut Browser, pod: &str| {
        browser.value(&format!(
            "document.querySelector(\".pod[aria-label^='pod {pod} ']\") !== null"
        ))
    };
    assert_eq!(has(browser, "pod-0-0"), true);
    assert_eq!(has(browser, "pod-500-0"), false);
    let few = browser.value(elements).as_u64().unwrap();
    assert!(few < 8000, "{few} elements");
    // All tunnels of the first node.
    let tunnels = browser.value("document.querySelectorAll('.tunnel').length");
    assert!(tunnels.as_u64().unwrap() >= 999, "{tunnels}");

    // What is scrolled to is drawn, and what is gone from sight is not, with those tunnels.
    let scroll = "(() => { const it = document.getElementById('picture'); it.scrollTop = it.scrollHeight; })()";
    browser.value(scroll);
    browser.wait("document.querySelector(\".pod[aria-label^='pod pod-999-0 ']\") !== null");
    browser.wait("document.querySelector(\".pod[aria-label^='pod pod-0-0 ']\") === null");
    assert!(browser.value(elements).as_u64().unwrap() < 8000);

    // So are rows, of which the table says how many there are.
    let count = |browser: &mut Browser, count: usize| {
        let attribute = "document.querySelector('table')?.getAttribute('aria-rowcount')";
        browser.wait(&format!("{attribute} === '{}'", count + 1));
    };
    count(browser, many::MAX_ROWS);
    browser.value("(() => { const it = document.getElementById('table'); it.scrollTop = it.scrollHeight; })()");
    let last = format!("'{}'", many::MAX_ROWS + 1);
    browser.wait(&format!(
        "document.querySelector('tbody tr:last-child').getAttribute('aria-rowindex') === {last}"
    ));
    let more = browser.value("document.getElementById('table').textContent.includes('more rows')");
    assert_eq!(more, true);
    let rows = browser.value("document.querySelectorAll('tbody tr').length");
    assert!((20..200).contains(&rows.as_u64().unwrap()), "{rows}");
    browser.value(
        "(() => { const it = document.getElementById('search'); it.value = 'pod-77-'; \
         it.dispatchEvent(new Event('input')); })()",
    );
    count(browser, many::PODS);

    // The next view changes what is another, and leaves the elements.
    browser.value("window.kept = document.querySelector('.pod')");
    let before = many.views();
    let seconds = "document.querySelector('tbody tr').textContent";
    let text = many.browser.value(seconds);
    poll_until(SOON, "the next view", || {
        (many.browser.value(seconds) != text).then_some(())
    });
    assert!(many.views() > before);
    assert_eq!(many.browser.value("window.kept.isConnected"), true);
    assert_eq!(many.browser.errors, Vec::<String>::new());
}

fn has_chromium() -> bool {
    let found = Command::new("chromium").arg("--version").output();
    let is_there = found.is_ok_and(|output| output.status.success());
    if !is_there {
        skip("'chromium' is missing (Debian has it in chromium)");
    }
    is_there
}

/// Keeps a picture where `MUSLIN_PICTURES` says, in base64.
fn picture(browser: &mut Browser, name: &str) {
    if let Some(directory) = std::env::var_os("MUSLIN_PICTURES") {
        let path = std::path::Path::new(&directory).join(format!("page-{name}.png.base64"));
        std::fs::write(path, browser.picture()).unwrap();
    }
}
