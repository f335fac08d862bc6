//! The broken lines of `mutations/` and of `stack/tests/mutants.sh` fit the project, so that these
//! can be broken.

use std::fs;
use std::path::Path;

/// What a patch's hunks take for what is there: the lines it keeps and those it removes.
fn expected(patch: &str) -> Vec<String> {
    let hunks = patch.split("\n@@ ").skip(1);
    let hunks = hunks.map(|hunk| {
        let lines = hunk.lines().skip(1);
        let lines =
            lines.take_while(|line| !line.starts_with("diff ") && !line.starts_with("--- "));
        let old = lines.filter(|line| !line.starts_with('+'));
        old.map(|line| format!("{}\n", line.get(1..).unwrap_or_default()))
            .collect()
    });
    hunks.collect()
}

#[test]
fn every_broken_line_is_there_and_somebody_is_to_notice() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let targets = fs::read_to_string(root.join("Cargo.toml")).expect("it can be read");
    let mut stale = Vec::new();
    for entry in fs::read_dir(root.join("mutations")).expect("it is there") {
        let path = entry.expect("it can be read").path();
        if path
            .extension()
            .is_none_or(|extension| extension != "patch")
        {
            continue;
        }
        let patch = fs::read_to_string(&path).expect("it is text");
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let file = patch.lines().find_map(|line| line.strip_prefix("--- a/"));
        let source = file.map(|file| fs::read_to_string(root.join("..").join(file)));
        let hunks = expected(&patch);
        let fits = source.is_some_and(|source| {
            source.is_ok_and(|source| hunks.iter().all(|hunk| source.contains(hunk)))
        });
        let finders: Vec<_> = patch
            .lines()
            .filter_map(|line| line.strip_prefix("Found by: "))
            .collect();
        let known = |kind: &str| {
            ["cargo test ", "simulate ", "fuzz "]
                .iter()
                .any(|it| kind.starts_with(it))
        };
        let target = name.split('-').next().unwrap_or_default();
        let is_target = targets.contains(&format!("name = \"{target}\""));
        let has_finder = if finders.is_empty() {
            is_target
        } else {
            finders.iter().all(|finder| known(finder))
        };
        if !fits || hunks.is_empty() || !has_finder {
            stale.push(name.into_owned());
        }
    }
    assert!(stale.is_empty(), "these do not fit any more: {stale:?}");
}

#[test]
fn every_line_that_the_simulator_must_notice_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let script = fs::read_to_string(root.join("stack/tests/mutants.sh")).expect("it is text");
    let list = script.split("<<'LIST'\n").nth(1);
    let list = list.and_then(|rest| rest.split("\nLIST\n").next());
    for line in list.expect("it has a list").lines() {
        let fields: Vec<_> = line.split(" @ ").collect();
        let [file, from, to, _] = fields[..] else {
            panic!("not four fields: {line}");
        };
        let source = fs::read_to_string(root.join(file)).unwrap_or_default();
        assert!(
            source.contains(from) && from != to,
            "{file} has not: {from}"
        );
    }
}
