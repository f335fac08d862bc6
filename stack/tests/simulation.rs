//! Clusters in the simulator: many seeds, and the events that once led to a defect.
#![allow(clippy::unwrap_used, reason = "a test may")]

use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use muslin_stack::Instant;
use muslin_stack::control::lease::{Backend, Ipv6Range, NetworkConfig, VxlanOptions};
use muslin_stack::sim::{
    Device, DeviceKind, Event, Failure, Forgery, Plan, Report, Scale, Sent, Setup, Summary,
    Violation, run, run_with, shrink, shrink_with,
};

/// Seeds that every run of the tests takes.
const SEEDS: u64 = 200;
/// Where a test's child process finds the seed whose hash it is to print.
const CHILD: &str = "MUSLIN_SIM_SEED";

/// Fails with what a person needs to see the same again.
fn explain(plan: &Plan, failure: Failure) -> ! {
    let (plan, failure) = shrink(plan, failure);
    let numbers: Vec<_> = plan
        .steps
        .iter()
        .map(|step| step.number.to_string())
        .collect();
    panic!(
        "seed {}: {}\n{plan}\n\n{}\n\ncargo run --release -p muslin-stack --features sim --example \
         simulate -- --seed {} --only {} --log",
        plan.seed,
        failure.violation,
        failure.tables,
        plan.seed,
        numbers.join(",")
    );
}

#[test]
fn many_seeds_are_well() {
    let next = AtomicU64::new(0);
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= SEEDS {
                break;
            }
            let plan = Plan::new(seed);
            if let Err(failure) = run(&plan, false) {
                explain(&plan, failure);
            }
        }
    };
    std::thread::scope(|scope| {
        let threads = [scope.spawn(work), scope.spawn(work)];
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

/// Runs of the same seed are the same, with and without a log, in this process and in another.
#[test]
fn a_seed_is_a_run_to_the_byte() {
    let hash = |seed, keeps_log| {
        let summary = run(&Plan::new(seed), keeps_log);
        summary.unwrap_or_else(|failure| explain(&Plan::new(seed), failure))
    };
    if let Ok(seed) = std::env::var(CHILD) {
        println!("hash {:016x}", hash(seed.parse().unwrap(), false).hash);
        return;
    }
    for seed in [3, 17] {
        let first = hash(seed, false);
        let mut logged = hash(seed, true);
        assert!(first.log.is_empty());
        assert!(!std::mem::take(&mut logged.log).is_empty());
        assert_eq!(logged, first);
        assert_ne!(hash(seed + 1, false).hash, first.hash);
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_seed_is_a_run_to_the_byte", "--nocapture"])
            .env(CHILD, seed.to_string())
            .output()
            .unwrap();
        let text = String::from_utf8(child.stdout).unwrap();
        let expected = format!("hash {:016x}", first.hash);
        assert!(text.contains(&expected), "{text}");
    }
}

/// A run does not depend on what is left out of its plan before it happens.
#[test]
fn a_part_of_a_plan_keeps_its_times() {
    let plan = Plan::new(5);
    let numbers: Vec<_> = plan.steps.iter().map(|step| step.number).collect();
    let some: Vec<_> = numbers.iter().copied().filter(|n| n % 3 != 1).collect();
    let part = plan.only(&some);
    let time = |plan: &Plan, number| -> u64 {
        let steps = plan.steps.iter().take_while(|step| step.number <= number);
        steps.map(|step| step.after).sum()
    };
    assert_eq!(part.steps.len(), some.len());
    for number in some {
        assert_eq!(time(&part, number), time(&plan, number));
    }
    assert!(
        plan.steps
            .iter()
            .any(|step| matches!(step.event, Event::Join(_)))
    );
}

/// A hundred nodes, as the front end does with a thousand.
#[test]
fn a_large_cluster_converges() {
    let mut scale = Scale::new(1, 100, 3);
    scale.join().unwrap();
    // Each node writes its record three times more, and once for those that came after it.
    let repeated = scale.settle().unwrap().figures.requests;
    assert!((300..=400).contains(&repeated), "{repeated} requests");
    for part in [
        Scale::talk,
        Scale::churn,
        Scale::part,
        Scale::talk,
        Scale::go_out,
    ] {
        let phase = part(&mut scale).unwrap();
        assert!(phase.millis < 30_000, "{phase}");
    }
}

/// Runs a plan of three machines: what happens, each so many milliseconds after the one before. The
/// seed decides what is lost.
fn play(seed: u64, events: &[(u64, Event)]) {
    play_with(Backend::Vxlan(VxlanOptions::default()), seed, events);
}

fn play_with(backend: Backend, seed: u64, events: &[(u64, Event)]) -> Summary {
    let network = "10.244.0.0/16".parse().unwrap();
    let mut setup = Setup::new(NetworkConfig::new(network, None, backend).unwrap(), 3);
    setup.is_configured = false;
    let plan = Plan::scripted(seed, setup, events.iter().cloned());
    run(&plan, false).unwrap_or_else(|failure| panic!("{}\n{}", failure.violation, failure.tables))
}

/// Of three nodes the last has no IPv6: leases of both kinds stand side by side, through all that
/// happens to the store, and no two share a subnet of either version.
#[test]
fn leases_with_and_without_ipv6_are_one_network() {
    let seeds = (0..100).filter(|seed| Plan::new(*seed).setup.config.ipv6.is_some());
    assert!(
        seeds.count() > 10,
        "plans of a seed have such networks, too"
    );
    for seed in 0..10 {
        let network = "10.244.0.0/16".parse().unwrap();
        // Three subnets of IPv6, which two nodes draw at once.
        let range = Ipv6Range::new("fd00:244::/62".parse().unwrap(), None).unwrap();
        let config = NetworkConfig::new(network, None, Backend::HostGw).unwrap();
        let setup = Setup::new(config.with_ipv6(range).unwrap(), 3);
        let plan = Plan::scripted(
            seed,
            setup,
            [
                (0, Event::Join(0)),
                (0, Event::Join(1)),
                (0, Event::Join(2)),
                (1_000, Event::Attach(0)),
                (0, Event::Attach(2)),
                (60_000, Event::Wipe),
                (3_600_000, Event::Crash(1)),
                (0, Event::Join(1)),
                (60_000, Event::DeleteAll),
                (60_000, Event::Move(0)),
            ],
        );
        let ran = run(&plan, false);
        ran.unwrap_or_else(|failure| panic!("{}\n{}", failure.violation, failure.tables));
    }
}

/// Pods with addresses of both versions talk, ask servers and are visited in IPv6, too, by a tunnel and
/// bare, beside a node and pods of IPv4 alone, whatever a rogue does.
#[test]
fn pods_of_both_versions_are_one_network() {
    for backend in [Backend::Vxlan(VxlanOptions::default()), Backend::HostGw] {
        let network = "10.244.0.0/16".parse().unwrap();
        let range = Ipv6Range::new("fd00:244::/60".parse().unwrap(), None).unwrap();
        let config = NetworkConfig::new(network, None, backend).unwrap();
        let mut setup = Setup::new(config.with_ipv6(range).unwrap(), 3);
        setup.workers = 2;
        let mut events = vec![
            (0, Event::Join(0)),
            (0, Event::Join(1)),
            (0, Event::Join(2)),
        ];
        events.extend([0, 0, 1, 2].map(|machine| (100, Event::Attach(machine))));
        for trick in 0..18 {
            events.push((1_000, Event::Misbehave { victim: 1, trick }));
            let (from, to) = (0, 2);
            let bytes = 20_000;
            events.push((0, Event::Talk { from, to, bytes }));
        }
        let plan = Plan::scripted(5, setup, events);
        let ran = run(&plan, false);
        let Summary { figures, .. } =
            ran.unwrap_or_else(|failure| panic!("{}\n{}", failure.violation, failure.tables));
        assert!(figures.frames_v6 > 500, "{figures:?}");
    }
}

/// Nodes that join together write within the milliseconds in which a node of flannel's has no watch.
#[test]
fn a_flannel_node_that_loses_changes_learns_of_all_that_join_at_once() {
    for seed in 0..20 {
        let events = [
            (0, Event::Flannel(200)),
            (1_000, Event::Join(0)),
            (0, Event::Join(1)),
            (0, Event::Join(2)),
            (3_600_000, Event::Wipe),
            (3_600_000, Event::DeleteAll),
            (3_600_000, Event::StoreDown),
            (0, Event::Move(0)),
            (0, Event::Move(1)),
            (60_000, Event::StoreUp),
        ];
        play(seed, &events);
    }
}

/// A node that starts anew gets bare packets before it has heard of its next hops.
#[test]
fn what_a_next_hop_sends_first_is_not_lost() {
    let mut events = vec![
        (0, Event::Join(0)),
        (100, Event::Join(1)),
        (100, Event::Attach(0)),
        (100, Event::Attach(1)),
    ];
    let talk = Event::Talk {
        from: 0,
        to: 1,
        bytes: 60_000,
    };
    for pause in [10, 400, 900, 1_700] {
        events.extend([
            (20_000, talk.clone()),
            (2, Event::Crash(1)),
            (pause, Event::Join(1)),
        ]);
    }
    for seed in 0..10 {
        let summary = play_with(Backend::HostGw, seed, &events);
        assert_eq!(summary.figures.unknown_hops, 0, "seed {seed}");
    }
}

#[test]
fn found_a_member_of_the_store_that_lags_is_not_asked_in_a_loop() {
    let events = [
        (0, Event::Join(0)),
        (5_000, Event::StoreLags),
        (10_000, Event::DeleteRecord(0)),
        (60_000, Event::EndWatches),
        (60_000, Event::StoreUp),
    ];
    play(1, &events);
}

#[test]
fn found_a_node_with_the_address_of_one_that_has_gone_sends_nothing_to_itself() {
    let events = [
        (0, Event::Join(0)),
        (2_000, Event::Join(2)),
        (1_000, Event::Crash(2)),
        (40_000, Event::Move(2)),
        (1_000, Event::Forget(2)),
        (10_000, Event::Inherit(0)),
    ];
    play(1, &events);
}

#[test]
fn a_reservation_stays_one_when_its_node_moves() {
    let what = Forgery::Reservation;
    let events = [
        (0, Event::Join(0)),
        (2_000, Event::Join(1)),
        (5_000, Event::Rewrite { machine: 0, what }),
        (10_000, Event::Move(0)),
        (10_000, Event::Crash(0)),
        (1_000, Event::Move(0)),
        (1_000, Event::Join(0)),
    ];
    play(1, &events);
}

#[test]
fn found_a_store_that_is_wiped_while_its_answers_are_lost_is_read_again() {
    let events = [
        (492, Event::Join(0)),
        (836, Event::Join(1)),
        (296, Event::Join(2)),
        (258, Event::StoreLoss(244)),
        (14_400_000, Event::DeleteAll),
        (27, Event::StoreCut(1)),
        (20_693, Event::Wipe),
        (8_411, Event::Leave(2)),
    ];
    play(14_676, &events);
}

#[test]
fn found_a_store_that_is_wiped_before_the_watch_is_open_is_read_again() {
    let events = [
        (1_991, Event::Join(1)),
        (427, Event::Join(2)),
        (28_902, Event::StoreSlow(1_281)),
        (24_797, Event::Wipe),
        (1_451, Event::Wipe),
    ];
    play(4_479, &events);
}

/// The card says nothing of itself, and packets from it come to some of the workers that send to it.
#[test]
fn found_another_network_card_is_noticed_by_all_workers() {
    let events = [
        (0, Event::Join(0)),
        (1_000, Event::Join(1)),
        (1_000, Event::Attach(0)),
        (100, Event::Attach(1)),
        (100, Event::Attach(1)),
        (10_000, Event::NewCard(0)),
    ];
    let network = "10.244.0.0/16".parse().unwrap();
    for seed in 0..10 {
        let config = NetworkConfig::new(network, None, Backend::HostGw).unwrap();
        let mut setup = Setup::new(config, 2);
        setup.workers = 3;
        let plan = Plan::scripted(seed, setup, events.iter().cloned());
        if let Err(failure) = run(&plan, false) {
            panic!("seed {seed}: {}\n{}", failure.violation, failure.tables);
        }
    }
}

/// Its datagrams have neither UDP nor a port, and come from the kernel with their outer header.
#[test]
fn pods_talk_through_ipip() {
    for direct_routing in [false, true] {
        let events = [
            (0, Event::Join(0)),
            (100, Event::Join(1)),
            (100, Event::Attach(0)),
            (100, Event::Attach(1)),
            (
                10_000,
                Event::Talk {
                    from: 0,
                    to: 1,
                    bytes: 60_000,
                },
            ),
            (10_000, Event::Move(1)),
            (
                10_000,
                Event::Ping {
                    from: 1,
                    to: 0,
                    bytes: 6_000,
                },
            ),
        ];
        for seed in 0..5 {
            let figures = play_with(Backend::Ipip { direct_routing }, seed, &events).figures;
            assert!(figures.talks > 0 && figures.answers > 0, "{figures:?}");
        }
    }
}

/// A device of one's own, which says that something is wrong as soon as it gets a frame.
struct Complainer(Vec<Report>);

impl Device for Complainer {
    fn receive(&mut self, _: Instant, _: &[u8]) {
        self.0.push(Report::Wrong("a frame has come".to_owned()));
    }

    fn poll(&mut self, _: Instant) -> Vec<Sent> {
        Vec::new()
    }

    fn poll_at(&mut self, _: Instant) -> Option<Instant> {
        None
    }

    fn reports(&mut self) -> Vec<Report> {
        std::mem::take(&mut self.0)
    }
}

#[test]
fn what_a_device_of_ones_own_finds_wrong_is_a_violation_and_shrinks() {
    let network = "10.244.0.0/16".parse().unwrap();
    let backend = Backend::Vxlan(VxlanOptions::default());
    let setup = Setup::new(NetworkConfig::new(network, None, backend).unwrap(), 2);
    let (machine, kind) = (0, 0);
    let attached = Event::AttachDevice { machine, kind };
    let events = [
        (0, Event::Join(0)),
        (0, Event::Join(1)),
        (100, Event::Attach(1)),
        (100, attached.clone()),
        (100, Event::Crash(1)),
        // A pod's first question to all is for its gateway.
        (1_000, Event::Attach(0)),
        (1_000, Event::Attach(0)),
    ];
    let plan = Plan::scripted(1, setup, events);
    // Of a kind that nobody knows there is none.
    run(&plan, false).unwrap();
    let kinds = [DeviceKind::new(|_| Complainer(Vec::new()))];
    let failure = run_with(&plan, &kinds, false).unwrap_err();
    assert_eq!(failure.violation, Violation("a frame has come".to_owned()));
    let (least, again) = shrink_with(&plan, &kinds, failure.clone());
    assert_eq!(again.violation, failure.violation);
    assert!(least.steps.len() < plan.steps.len());
    assert!(least.steps.iter().any(|step| step.event == attached));
}
