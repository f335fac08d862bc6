//! How fast the page is with 1,000 nodes: `cargo bench --bench page`.

#![allow(clippy::unwrap_used, reason = "a benchmark may")]

#[allow(dead_code, reason = "tests do more with it")]
#[path = "../tests/page/browser.rs"]
mod browser;
#[path = "../tests/page/many.rs"]
mod many;

use std::time::Duration;

use many::{Many, NODES, PODS};
use muslin_lab::poll_until;

/// Times that the page is opened.
const OPENED: usize = 9;
/// Updates during which frames are measured.
const UPDATES: u64 = 20;

fn main() {
    let mut many = Many::new();
    println!("{NODES} nodes with {PODS} pods each, in ms");
    let mut first: Vec<f64> = (0..OPENED).map(|_| many.first_render()).collect();
    first.sort_by(f64::total_cmp);
    println!(
        "first render: median {:.0}, longest {:.0}, of {OPENED}",
        first[OPENED / 2],
        first[OPENED - 1]
    );
    frames(&mut many, "nobody does anything", "");
    let scrolls =
        "for (const id of ['picture', 'table']) document.getElementById(id).scrollTop += 30;";
    frames(&mut many, "picture and table are scrolled", scrolls);
    assert_eq!(many.browser.errors, Vec::<String>::new());
}

/// Frames during some updates, while `each` is done in each.
fn frames(many: &mut Many, what: &str, each: &str) {
    many.first_render();
    let watch = format!("window.watchFrames(() => {{ {each} }})");
    many.browser.value(&watch);
    let end = many.views() + UPDATES;
    poll_until(Duration::from_secs(300), "the updates", || {
        (many.views() >= end).then_some(())
    });
    // The last update, too.
    many.browser
        .value("new Promise((done) => setTimeout(done, 1000))");
    let value = many.browser.value("[watched.frames, watched.tasks]");
    let numbers = |at: usize| -> Vec<f64> {
        let mut numbers: Vec<_> = value[at]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|it| it.as_f64())
            .collect();
        numbers.sort_by(f64::total_cmp);
        numbers
    };
    let (frames, tasks) = (numbers(0), numbers(1));
    let share = |part: f64| frames[((frames.len() - 1) as f64 * part) as usize];
    println!(
        "{what}, {UPDATES} updates: frame median {:.1}, p99 {:.1}, longest {:.1}, of {}; tasks above 50 ms: {}, longest {:.0}",
        share(0.5),
        share(0.99),
        share(1.0),
        frames.len(),
        tasks.len(),
        tasks.last().copied().unwrap_or_default()
    );
}
