//! The schemas in `docs/schema` are those of the types that nodes and commands print.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use muslin_stack::api::control::{
    Attached, Drop, Dropped, Flow, Group, Lease, Neighbour, Peer, Pod, Route, Status,
};
use muslin_stack::api::events::Event;
use muslin_stack::api::live::LiveReport;
use muslin_stack::api::ping::PingReport;
use muslin_stack::api::trace::Journey;
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;

/// With this variable the files are written.
const WRITE: &str = "MUSLIN_WRITE_SCHEMAS";

fn schema<T: JsonSchema>() -> String {
    let settings = SchemaSettings::draft2020_12().for_serialize();
    let schema = settings.into_generator().into_root_schema_for::<T>();
    serde_json::to_string_pretty(&schema).unwrap() + "\n"
}

/// What each command prints with `--json`.
fn schemas() -> [(&'static str, String); 15] {
    [
        ("attach", schema::<Attached>()),
        ("drops", schema::<Vec<Drop>>()),
        ("events", schema::<Vec<Event>>()),
        ("flows", schema::<Vec<Flow>>()),
        ("groups", schema::<Vec<Group>>()),
        ("lease-drop", schema::<Dropped>()),
        ("leases", schema::<Vec<Lease>>()),
        ("neighbours", schema::<Vec<Neighbour>>()),
        ("peers", schema::<Vec<Peer>>()),
        ("ping", schema::<PingReport>()),
        ("pods", schema::<Vec<Pod>>()),
        ("routes", schema::<Vec<Route>>()),
        ("status", schema::<Status>()),
        ("trace", schema::<Journey>()),
        ("trace-live", schema::<LiveReport>()),
    ]
}

#[test]
fn the_files_are_what_the_types_say() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/schema");
    let mut names = BTreeSet::new();
    for (name, schema) in schemas() {
        let name = format!("{name}.json");
        let path = directory.join(&name);
        if std::env::var_os(WRITE).is_some() {
            fs::create_dir_all(&directory).unwrap();
            fs::write(&path, &schema).unwrap();
        }
        let written = fs::read_to_string(&path).unwrap_or_default();
        assert!(
            written == schema,
            "{name} is out of date: {WRITE}=1 cargo test -p muslin-stack --test schema"
        );
        names.insert(name);
    }
    let files = fs::read_dir(&directory).unwrap();
    let files = files.map(|file| file.unwrap().file_name().into_string().unwrap());
    assert_eq!(files.collect::<BTreeSet<_>>(), names);
}
