//! The model and what is drawn of it.

use std::time::Duration;

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::style::Color;
use serde_json::{Value, json};

use super::draw::{Theme, draw};
use super::model::{Model, News, Tables};
use super::table::Kind;

/// What a node tells after so many seconds in which so many packets of 1,000 bytes have come from `web`,
/// and half as many have gone to it.
fn tables(seconds: u64, packets: u64) -> Tables {
    let traffic = |packets: u64| json!({"packets": packets, "bytes": packets * 1000});
    let pod = |name: &str, offset: u32, received: u64, sent: u64| {
        json!({
            "pod": name, "address": format!("10.244.1.{offset}"), "mac": "", "port": offset,
            "persistent": false, "offload": true, "attached_seconds": seconds,
            "received": traffic(received), "sent": traffic(sent),
        })
    };
    let status: Value = json!({
        "node": "n1", "version": "0.1.0", "pid": 7, "uptime_seconds": seconds,
        "network": "10.244.0.0/16", "subnet": "10.244.1.0/24", "gateway": "10.244.1.1",
        "public_ip": "10.9.0.1", "tunnel_ip": "10.9.0.1", "interface": "eth0",
        "backend": "vxlan", "port": 8472, "vni": 1, "vtep_mac": null, "uplink": null,
        "mtu": 1450, "device": "tap", "workers": 2, "offload": "tap", "store": "s",
        "lease_confirmed_seconds": 1, "egress": null,
        "dns": {"resolvers": [], "queries": 0, "answered": 0, "forwarded": 0, "failed": 0},
        "published": {"ports": 0, "flows": 0}, "pods": 2, "peers": 1,
        "packets": {
            "received": packets, "originated": 0, "delivered": packets / 2, "sent": packets / 4,
            "flooded": 0, "consumed": 0, "dropped": packets / 10,
        },
    });
    let flow = json!({
        "protocol": "tcp", "pod": "web", "direction": "out", "local": "10.244.1.2:40000",
        "remote": "192.0.2.1:443", "state": "open", "age_seconds": seconds, "idle_seconds": 0,
        "sent_bytes": packets * 100, "received_bytes": packets * 200,
    });
    let drop = |reason: &str, packets: u64| json!({"reason": reason, "packets": packets, "description": "It was lost in a test."});
    fn read<T: serde::de::DeserializeOwned>(value: Value) -> T {
        serde_json::from_value(value).unwrap()
    }
    Tables {
        status: read(status),
        pods: read(json!([
            pod("db", 3, 10, 5),
            pod("web", 2, packets, packets / 2)
        ])),
        flows: read(json!([flow])),
        drops: read(json!([
            drop("no-route", 1000),
            drop("storm", packets / 10),
            drop("unknown-vni", 0)
        ])),
    }
}

fn peers(packets: u64) -> News {
    let traffic = json!({"packets": packets, "bytes": packets * 500});
    News::Peers(
        serde_json::from_value(json!([{
            "node": "n2", "subnet": "10.244.2.0/24", "public_ip": "10.9.0.2", "backend": "vxlan",
            "vtep_mac": null, "state": "silent", "path": "vxlan", "mtu": 1450,
            "received": traffic, "sent": traffic,
        }]))
        .unwrap(),
    )
}

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// A model after two looks, two seconds after each other.
fn model() -> Model {
    let mut model = Model::new(at(60), tables(60, 1000));
    model.learn(at(60), peers(0));
    model.learn(at(62), News::Tables(Box::new(tables(62, 5000))));
    model.learn(at(61), peers(100));
    model
}

fn press(model: &mut Model, keys: &str) -> bool {
    keys.chars().all(|key| {
        let code = match key {
            '\t' => KeyCode::Tab,
            '\n' => KeyCode::Enter,
            '\x1b' => KeyCode::Esc,
            '\x08' => KeyCode::Backspace,
            '↓' => KeyCode::Down,
            '↑' => KeyCode::Up,
            letter => KeyCode::Char(letter),
        };
        model.press(KeyEvent::new(code, KeyModifiers::NONE))
    })
}

/// The first cells of a table.
fn names(model: &Model, kind: Kind, column: usize) -> Vec<String> {
    let rows = model.rows(kind);
    rows.iter()
        .map(|row| row.cells[column].text.clone())
        .collect()
}

fn terminal(
    model: &Model,
    (columns, lines): (u16, u16),
    has_colours: bool,
) -> Terminal<TestBackend> {
    let mut terminal = Terminal::new(TestBackend::new(columns, lines)).unwrap();
    let theme = Theme { has_colours };
    terminal.draw(|frame| draw(frame, model, theme)).unwrap();
    terminal
}

/// The lines of the screen.
fn screen(model: &Model, size: (u16, u16)) -> Vec<String> {
    let terminal = terminal(model, size, false);
    let buffer = terminal.backend().buffer();
    let lines = buffer.content().chunks(size.0.into());
    let text = |line: &[ratatui::buffer::Cell]| {
        let symbols: String = line.iter().map(ratatui::buffer::Cell::symbol).collect();
        symbols.trim_end().to_owned()
    };
    lines.map(text).collect()
}

#[test]
fn rates_are_those_of_the_counters() {
    let mut model = model();
    assert_eq!(model.packet_rates(), Some([2000.0, 1000.0, 500.0, 200.0]));
    let rows = model.rows(Kind::Pods);
    let cells: Vec<_> = rows[0]
        .cells
        .iter()
        .map(|cell| cell.text.as_str())
        .collect();
    let expected = [
        "web",
        "10.244.1.2",
        "2.0 k",
        "16.0 M",
        "1.0 k",
        "8.0 M",
        "5.0 MB",
        "2.5 MB",
        "1 min 2 s",
    ];
    assert_eq!(cells, expected);
    assert_eq!(names(&model, Kind::Flows, 5), ["1.6 M"]);
    assert_eq!(names(&model, Kind::Peers, 3), ["100"]);
    // The same node in another process has other counters.
    let mut anew = tables(1, 6000);
    anew.status.pid = 8;
    model.learn(at(64), News::Tables(Box::new(anew)));
    assert_eq!(model.packet_rates(), None);
}

#[test]
fn what_grows_has_an_arrow_and_comes_first() {
    let mut model = model();
    assert_eq!(names(&model, Kind::Drops, 1), ["storm", "no-route"]);
    assert_eq!(names(&model, Kind::Drops, 0), ["▲", ""]);
    model.learn(at(64), News::Tables(Box::new(tables(64, 5000))));
    assert_eq!(names(&model, Kind::Drops, 1), ["no-route", "storm"]);
    assert_eq!(names(&model, Kind::Drops, 0), ["", ""]);
}

#[test]
fn keys_sort_filter_and_go_to_other_tables() {
    let mut model = model();
    assert_eq!(names(&model, Kind::Pods, 0), ["web", "db"]);
    assert!(press(&mut model, "r"));
    assert_eq!(names(&model, Kind::Pods, 0), ["db", "web"]);
    assert!(press(&mut model, "rs"), "by name");
    assert_eq!(names(&model, Kind::Pods, 0), ["db", "web"]);
    assert!(press(&mut model, "ss"), "by packets from it");
    assert_eq!(names(&model, Kind::Pods, 0), ["web", "db"]);
    assert!(press(&mut model, "sssssss"), "by traffic again");
    assert_eq!(model.shown(Kind::Pods).sort, None);

    assert!(press(&mut model, "/dX\x08\n"));
    assert_eq!(names(&model, Kind::Pods, 0), ["db"]);
    assert!(press(&mut model, "/q"), "a letter is no command there");
    assert_eq!(names(&model, Kind::Pods, 0), [""; 0]);
    assert!(press(&mut model, "\x1b"), "all again");
    assert_eq!(model.rows(Kind::Pods).len(), 2);
    assert!(
        press(&mut model, "/WEB\n\x1b"),
        "in either case, and all again"
    );
    assert_eq!(model.rows(Kind::Pods).len(), 2);

    assert!(press(&mut model, "↓↓↓"));
    assert_eq!(model.shown(Kind::Pods).marked, 1);
    assert!(press(&mut model, "↑↑"));
    assert_eq!(model.shown(Kind::Pods).marked, 0);
    for kind in [Kind::Peers, Kind::Flows, Kind::Drops, Kind::Pods] {
        assert!(press(&mut model, "\t"));
        assert_eq!(model.kind, kind);
    }
    assert!(press(&mut model, "?q"), "any key closes the help");
    for end in ["q", "\x1b"] {
        assert!(!press(&mut model, end));
    }
    assert!(press(&mut model, "/"));
    let interrupt = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    assert!(!model.press(interrupt), "whatever is typed");
}

#[test]
fn a_small_screen_has_one_table() {
    let mut model = model();
    assert_eq!(
        screen(&model, (60, 15)),
        [
            "muslin n1  10.244.1.0/24  vxlan  MTU 1450  10.9.0.1  up 1 mi",
            "packets/s  200 lost  2.0 k received  1.0 k delivered  500 se",
            " Pods 2   Peers 1   Flows 1   Drops 2",
            "POD  ADDRESS     FROM PKT/S  FROM BIT/S  TO PKT/S  TO BIT/S",
            "web  10.244.1.2       2.0 k      16.0 M     1.0 k     8.0 M",
            "db   10.244.1.3           0           0         0         0",
            "",
            "",
            "",
            "",
            "",
            "",
            "",
            "",
            "q quit  Tab table  s sort  r reverse  / filter  ? help",
        ]
    );
    assert!(press(&mut model, "\t\t\tss/o"));
    assert_eq!(
        screen(&model, (60, 8))[2..],
        [
            " Pods 2   Peers 1   Flows 1   Drops 2",
            "▲  REASON    PKT/S  PACKETS  WHAT HAPPENED",
            "   no-route      0     1000  It was lost in a test.",
            "▲  storm       200      500  It was lost in a test.",
            "",
            "/o▏ Enter: keep  Esc: all",
        ]
    );
    assert!(press(&mut model, "\nr"));
    let foot = &screen(&model, (90, 8))[7];
    assert!(
        foot.starts_with("filter: o  by REASON, reversed  q quit"),
        "{foot}"
    );
    assert!(press(&mut model, "/nothing\n"));
    let none = &screen(&model, (60, 8))[3];
    assert_eq!(none, "  no row has the letters of the filter");
}

#[test]
fn a_large_screen_has_all_tables() {
    let lines = screen(&model(), (200, 60));
    let below = |title: &str| {
        let at = lines.iter().position(|line| line.starts_with(title));
        lines[at.unwrap_or_else(|| panic!("no {title}: {lines:#?}")) + 1..][..2].to_vec()
    };
    assert_eq!(
        below(" Pods 2"),
        [
            "POD  ADDRESS     FROM PKT/S  FROM BIT/S  TO PKT/S  TO BIT/S  FROM IT   TO IT   ATTACHED",
            "web  10.244.1.2       2.0 k      16.0 M     1.0 k     8.0 M   5.0 MB  2.5 MB  1 min 2 s",
        ]
    );
    assert_eq!(
        below(" Peers 1"),
        [
            "NODE  SUBNET         STATE   FROM PKT/S  FROM BIT/S  TO PKT/S  TO BIT/S  FROM IT    TO IT  PATH",
            "n2    10.244.2.0/24  silent         100     400.0 k       100   400.0 k  50.0 kB  50.0 kB  vxlan, MTU 1450",
        ]
    );
    assert_eq!(
        below(" Flows 1"),
        [
            "PROTOCOL  POD  LOCAL             REMOTE            STATE  OUT BIT/S  IN BIT/S       OUT      IN        AGE",
            "tcp       web  10.244.1.2:40000  -> 192.0.2.1:443  open       1.6 M     3.2 M  500.0 kB  1.0 MB  1 min 2 s",
        ]
    );
    assert_eq!(
        below(" Drops 2"),
        [
            "▲  REASON    PKT/S  PACKETS  WHAT HAPPENED",
            "▲  storm       200      500  It was lost in a test.",
        ]
    );
}

#[test]
fn no_size_is_too_small() {
    let mut model = model();
    for keys in ["", "\t", "\t", "\t", "?"] {
        assert!(press(&mut model, keys));
        for columns in (1..130).chain([u16::MAX / 100]) {
            for lines in [1, 2, 3, 4, 5, 15, 43] {
                let shown = screen(&model, (columns, lines));
                assert_eq!(shown.len(), usize::from(lines));
            }
        }
    }
}

#[test]
fn the_marked_row_is_always_seen() {
    let mut tables = tables(60, 0);
    let pod = tables.pods[0].clone();
    tables.pods = (0..100)
        .map(|number| muslin_stack::api::control::Pod {
            pod: format!("pod-{number:02}").parse().unwrap(),
            port: number,
            ..pod.clone()
        })
        .collect();
    let mut model = Model::new(at(60), tables);
    for (keys, seen) in [
        ("", 0),
        ("↓↓↓", 3),
        (&"↓".repeat(60), 63),
        (&"↓".repeat(99), 99),
    ] {
        assert!(press(&mut model, keys));
        let lines = screen(&model, (60, 15));
        let name = format!("pod-{seen:02} ");
        assert!(
            lines.iter().any(|line| line.starts_with(&name)),
            "{lines:#?}"
        );
    }
}

#[test]
fn trouble_and_help_are_seen() {
    let mut model = model();
    let gone = "no node listens at \x1b[2J/run/node.sock";
    model.learn(at(64), News::Trouble(gone.to_owned()));
    let lines = screen(&model, (60, 15));
    assert_eq!(lines[2], r"no node listens at \u{1b}[2J/run/node.sock");
    assert!(
        lines[5].starts_with("web "),
        "what was known stays: {lines:#?}"
    );
    model.learn(at(66), News::Tables(Box::new(tables(66, 5000))));
    assert!(screen(&model, (60, 15))[2].starts_with(" Pods 2"));
    assert!(press(&mut model, "?"));
    let help = screen(&model, (60, 15)).join("\n");
    for words in [
        "muslin top",
        "FROM and TO",
        "only rows with these letters",
        "q Esc",
    ] {
        assert!(help.contains(words), "{words}:\n{help}");
    }
}

#[test]
fn colours_are_seen_only_where_they_may_be() {
    let mut model = model();
    assert!(press(&mut model, "\t\t\t"));
    for has_colours in [true, false] {
        let terminal = terminal(&model, (60, 15), has_colours);
        let cells = terminal.backend().buffer().content();
        let has = |colour| cells.iter().any(|cell| cell.fg == colour);
        assert_eq!([has(Color::Red), has(Color::Cyan)], [has_colours; 2]);
    }
}
