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

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use muslin_stack::sim::{Failure, Plan, Scale, Summary, run, shrink};

/// How to run a seed again.
const COMMAND: &str = "cargo run --release -p muslin-stack --features sim --example simulate --";

/// Simulates clusters of nodes. A run follows from its seed to the byte.
#[derive(Debug, Parser)]
#[command(name = "simulate")]
struct Options {
    /// Run this seed, and show its plan and what came of it.
    #[arg(long, conflicts_with = "seeds")]
    seed: Option<u64>,
    /// Run the seeds from FIRST up to, but not including, END (FIRST..END), and stop at the first that fails.
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
    #[arg(long, value_name = "NODES", conflicts_with_all = ["seeds", "only", "log"], value_parser = nodes)]
    scale: Option<usize>,
    /// Pods of each of its nodes.
    #[arg(long, default_value_t = 10)]
    pods: usize,
}

fn range(text: &str) -> Result<Range<u64>, String> {
    let parts = text.split_once("..");
    let (first, end) = parts.ok_or("it is not FIRST..END, such as 0..20000")?;
    let number = |text: &str| text.parse().map_err(|error| format!("'{text}': {error}"));
    let range = number(first)?..number(end)?;
    if range.is_empty() {
        return Err("it has no seed: END must be larger than FIRST".to_owned());
    }
    Ok(range)
}

fn nodes(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("a cluster has at least 1 node".to_owned()),
        Ok(nodes) => Ok(nodes),
        Err(error) => Err(format!("{error}")),
    }
}

/// The seed's plan, or the part of it that is asked for.
fn plan(seed: u64, only: Option<&[usize]>) -> Result<Plan, String> {
    let plan = Plan::new(seed);
    let Some(numbers) = only else {
        return Ok(plan);
    };
    let is_step = |number: &&usize| plan.steps.iter().any(|step| step.number == **number);
    let unknown: Vec<_> = numbers
        .iter()
        .filter(|number| !is_step(number))
        .map(ToString::to_string)
        .collect();
    if unknown.is_empty() {
        return Ok(plan.only(numbers));
    }
    Err(format!(
        "the plan of seed {seed} has no step {}: its steps are 0 to {}",
        unknown.join(", "),
        plan.steps
            .iter()
            .map(|step| step.number)
            .max()
            .unwrap_or_default()
    ))
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
    let plan = match plan(seed, options.only.as_deref()) {
        Ok(plan) => plan,
        Err(error) => Options::command()
            .error(ErrorKind::ValueValidation, format!("--only: {error}"))
            .exit(),
    };
    println!("seed {seed}: {plan}");
    match run(&plan, options.log) {
        Ok(summary) => {
            if options.log {
                print_log(&summary.log);
            }
            println!("{}", words(&summary));
            true
        }
        Err(failure) => {
            report(&plan, failure, options.no_shrink || options.only.is_some());
            false
        }
    }
}

fn print_log(lines: &[String]) {
    println!("the last of what happened:");
    for line in lines {
        println!("{line}");
    }
}

fn words(summary: &Summary) -> String {
    let figures = &summary.figures;
    format!(
        "well: hash {:016x}, tables right {} ms after everything was mended; {} steps, {} requests \
         to the store, {} events from it, {} datagrams, {} frames, {} flows that left the overlay, \
         {} TCP connections, {} pings and datagrams answered, {} clients of published ports served",
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
        figures.visits,
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
    print_log(&failure.log);
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may")]

    use super::*;

    #[test]
    fn only_steps_that_the_plan_has_are_taken() {
        let whole = plan(77, None).unwrap();
        assert_eq!(plan(77, Some(&[0, 2])).unwrap().steps.len(), 2);
        let error = plan(77, Some(&[0, 9999])).unwrap_err();
        let last = whole.steps.len() - 1;
        assert!(error.contains("no step 9999") && error.contains(&format!("0 to {last}")));
        let log = run(&plan(77, Some(&[0])).unwrap(), true).unwrap().log;
        assert!(!log.is_empty());
    }

    #[test]
    fn nonsense_on_the_command_line_is_refused() {
        let parse = |words: &[&str]| Options::try_parse_from([&["simulate"], words].concat());
        for words in [
            &["--seeds", "5..5"][..],
            &["--seeds", "9..3"],
            &["--seeds", "9"],
            &["--seeds", "..3"],
            &["--seed", "1", "--seeds", "0..3"],
            &["--only", "3"],
            &["--log"],
            &["--scale", "0"],
            &["--scale", "3", "--log"],
        ] {
            assert!(parse(words).is_err(), "{words:?}");
        }
        assert_eq!(parse(&["--seeds", "3..9"]).unwrap().seeds, 3..9);
        assert!(parse(&["--seed", "77", "--only", "1,2", "--log"]).is_ok());
    }
}
