//! Every seed, and every input that once crashed a target, goes through its target.

use std::collections::BTreeMap;
use std::path::Path;

fn files(target: &str) -> BTreeMap<String, Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("seeds")
        .join(target);
    let entries = std::fs::read_dir(&folder).expect("there are seeds");
    entries
        .map(|entry| {
            let entry = entry.expect("it can be read");
            let name = entry.file_name().into_string().expect("it is text");
            (name, std::fs::read(entry.path()).expect("it can be read"))
        })
        .collect()
}

#[test]
fn every_seed_passes() {
    for (target, run) in [
        ("codecs", muslin_fuzz::codecs::run as fn(&[u8])),
        ("node", muslin_fuzz::node::run),
        ("segments", muslin_fuzz::segments::run),
    ] {
        for (name, bytes) in files(target) {
            println!("{target}/{name}");
            run(&bytes);
        }
    }
}

#[test]
fn the_seeds_are_what_the_generator_writes() {
    for (target, seeds) in muslin_fuzz::seeds::all() {
        let mut files = files(target);
        files.retain(|name, _| !name.starts_with("crash-"));
        let seeds: BTreeMap<_, _> = seeds
            .into_iter()
            .map(|(name, bytes)| (name.to_owned(), bytes))
            .collect();
        assert_eq!(files, seeds, "run `cargo run --bin seeds` in fuzz/");
    }
}
