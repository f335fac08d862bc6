//! Runs the cluster simulator: seeds, one seed or a part of it, or a large cluster.
//!
//! ```text
//! cargo run --release -p muslin-stack --features sim --example simulate -- --seeds 0..20000
//! ```

use std::collections::BTreeMap;
use std::ops::Range;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use muslin_stack::sim::{Failure, Plan, Scale, Summary, run, shrink};

/// How to run a seed again.
const COMMAND: &str = "cargo run --release -p muslin-stack --features sim --example simulate --";

/// Simulates clusters of nodes. A run follows from its seed to the byte.
#[derive(Debug, Parser)]
#[command(name = "simulate")]
struct Options {
    /// Run this seed, and show its plan and what came of it.
    #[arg(long)]
    seed: Option<u64>,
    /// Run these seeds, FIRST..END, and stop at the first that fails.
    #[arg(long, value_parser = range, default_value = "0..200")]
    seeds: Range<u64>,
    /// Run all seeds, even if some fail.
    #[arg(long)]
    keep_going: bool,
    /// Of the seed's plan, take only the steps with these numbers.
    #[arg(long, value_delimiter = ',', requires = "seed")]
    only: Option<Vec<usize>>,
    /// Show what happened at the end of the seed's run.
    #[arg(long, requires = "seed")]
    log: bool,
    /// Do not make a failing plan smaller.
    #[arg(long)]
    no_shrink: bool,
    /// End after so many minutes, however many seeds are left.
    #[arg(long)]
    minutes: Option<u64>,
    /// Seeds that run at once.
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// Simulate one cluster of so many nodes instead: a join storm, churn and a partition.
    #[arg(long, value_name = "NODES", conflicts_with = "seeds")]
    scale: Option<usize>,
    /// Pods of each of its nodes.
    #[arg(long, default_value_t = 10)]
    pods: usize,
}

fn range(text: &str) -> Result<Range<u64>, String> {
    let parts = text.split_once("..");
    let (first, end) = parts.ok_or("it is not FIRST..END, such as 0..20000")?;
    let number = |text: &str| text.parse().map_err(|error| format!("{text}: {error}"));
    Ok(number(first)?..number(end)?)
}

fn main() -> ExitCode {
    let options = Options::parse();
    let is_well = match (options.scale, options.seed) {
        (Some(nodes), seed) => scale(seed.unwrap_or_default(), nodes, options.pods),
        (None, Some(seed)) => one(seed, &options),
        (None, None) => many(&options),
    };
    if is_well {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn one(seed: u64, options: &Options) -> bool {
    let mut plan = Plan::new(seed);
    if let Some(numbers) = &options.only {
        plan = plan.only(numbers);
    }
    println!("seed {seed}: {plan}");
    match run(&plan, options.log) {
        Ok(summary) => {
            println!("{}", words(&summary));
            true
        }
        Err(failure) => {
            report(&plan, failure, options.no_shrink || options.only.is_some());
            false
        }
    }
}

fn words(summary: &Summary) -> String {
    let figures = &summary.figures;
    format!(
        "well: hash {:016x}, tables right {} ms after everything was mended; {} steps, {} requests \
         to the store, {} events from it, {} datagrams, {} frames, {} flows that left the overlay, \
         {} TCP connections, {} pings and datagrams answered",
        summary.hash,
        summary.convergence,
        figures.steps,
        figures.requests,
        figures.events,
        figures.datagrams,
        figures.frames,
        figures.flows,
        figures.talks,
        figures.answers,
    )
}

fn many(options: &Options) -> bool {
    let began = Instant::now();
    let limit = options
        .minutes
        .map(|minutes| Duration::from_secs(60 * minutes));
    let next = AtomicU64::new(options.seeds.start);
    let stops = AtomicBool::new(false);
    let failures = Mutex::new(BTreeMap::new());
    let done = AtomicU64::new(0);
    let work = || {
        while !stops.load(Ordering::Relaxed) && limit.is_none_or(|limit| began.elapsed() < limit) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if !options.seeds.contains(&seed) {
                break;
            }
            if let Err(failure) = run(&Plan::new(seed), false) {
                println!("seed {seed}: {}", failure.violation);
                stops.fetch_or(!options.keep_going, Ordering::Relaxed);
                if let Ok(mut failures) = failures.lock() {
                    failures.insert(seed, failure);
                }
            }
            let done = done.fetch_add(1, Ordering::Relaxed) + 1;
            if done.is_multiple_of(1000) {
                eprintln!("{done} seeds in {} s", began.elapsed().as_secs());
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..options.jobs.max(1) {
            scope.spawn(work);
        }
    });
    let failures = failures.into_inner().unwrap_or_default();
    println!(
        "{} seeds in {:.1} s, {} failed",
        done.into_inner(),
        began.elapsed().as_secs_f64(),
        failures.len()
    );
    let is_well = failures.is_empty();
    if let Some((seed, failure)) = failures.into_iter().next() {
        println!("seed {seed}");
        report(&Plan::new(seed), failure, options.no_shrink);
    }
    is_well
}

/// Says what went wrong, with as few events as it takes, and how to see it again.
fn report(plan: &Plan, failure: Failure, is_small: bool) {
    let all = plan.steps.len();
    let plan = if is_small {
        plan.clone()
    } else {
        shrink(plan, failure).0
    };
    println!(
        "\n{} of {all} events are enough:\n{plan}\n",
        plan.steps.len()
    );
    let Err(failure) = run(&plan, true) else {
        println!("it does not fail again: something besides the seed decides");
        return;
    };
    println!("the last of what happened:");
    for line in failure.log {
        println!("{line}");
    }
    println!("\ntables:\n{}", failure.tables);
    println!("wrong: {}\n", failure.violation);
    let numbers = plan.steps.iter().map(|step| step.number.to_string());
    let numbers = numbers.collect::<Vec<_>>().join(",");
    println!("{COMMAND} --seed {} --only {numbers} --log", plan.seed);
}

fn scale(seed: u64, nodes: usize, pods: usize) -> bool {
    let began = Instant::now();
    let before = memory();
    let mut cluster = Scale::new(seed, nodes, pods);
    println!("{nodes} nodes with {pods} pods each\n");
    println!(
        "| what | until tables are right | requests to the store | events told to watches | \
         datagrams | routes | wall clock | memory per node |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    type Part = fn(&mut Scale) -> Result<muslin_stack::sim::Phase, Failure>;
    let parts: [Part; 8] = [
        Scale::join,
        Scale::settle,
        Scale::talk,
        Scale::go_out,
        Scale::churn,
        Scale::part,
        Scale::talk,
        Scale::churn,
    ];
    for part in parts {
        let start = Instant::now();
        match part(&mut cluster) {
            Ok(phase) => {
                let per_node = memory().zip(before).map(|((now, _), (then, _))| {
                    format!("{} KB", now.saturating_sub(then) / nodes as u64)
                });
                println!(
                    "{phase} {:.1} s | {} |",
                    start.elapsed().as_secs_f64(),
                    per_node.unwrap_or_default()
                );
            }
            Err(failure) => {
                println!("wrong: {}", failure.violation);
                return false;
            }
        }
    }
    let peak = memory().map(|(_, peak)| format!(", {} MB at most", peak / 1024));
    println!(
        "\n{:.1} s{}",
        began.elapsed().as_secs_f64(),
        peak.unwrap_or_default()
    );
    true
}

/// Memory that the process has and had at most, in KB, where the system tells.
fn memory() -> Option<(u64, u64)> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().trim_end_matches(" kB").parse().ok()
    };
    Some((field("VmRSS:")?, field("VmHWM:")?))
}
