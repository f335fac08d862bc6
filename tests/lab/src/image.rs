//! An image for containers, made here without a registry: busybox and nothing else.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

/// The type of a program header that names an interpreter (elf(5)).
const PT_INTERP: u32 = 3;

/// A program of busybox that needs no library, or why there is none.
pub(crate) fn busybox() -> Result<PathBuf, &'static str> {
    let missing = "a static 'busybox' is missing (Debian has it in busybox-static)";
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut candidates = std::env::split_paths(&path).map(|path| path.join("busybox"));
    let is_static = |path: &PathBuf| is_static(&fs::read(path).unwrap_or_default()) == Some(true);
    candidates.find(is_static).ok_or(missing)
}

/// Whether a program, an ELF file of 64 bits in this machine's byte order, needs no interpreter;
/// nothing if it is something else.
fn is_static(program: &[u8]) -> Option<bool> {
    let number = |at: usize| {
        let bytes = program.get(at..at + 2)?;
        Some(usize::from(u16::from_ne_bytes(bytes.try_into().ok()?)))
    };
    let table = u64::from_ne_bytes(program.get(32..40)?.try_into().ok()?);
    let (table, len, count) = (usize::try_from(table).ok()?, number(54)?, number(56)?);
    let mut is_static = program.starts_with(b"\x7fELF\x02");
    for index in 0..count {
        let at = table.checked_add(index * len)?;
        let kind = program.get(at..)?.first_chunk()?;
        is_static &= u32::from_ne_bytes(*kind) != PT_INTERP;
    }
    Some(is_static)
}

/// Writes an archive of an OCI image layout (image-spec 1.0) to a directory, with an image of this
/// name, and returns its path. Its command is to wait.
pub(crate) fn write(directory: &Path, name: &str, busybox: &Path) -> PathBuf {
    let (root, layout) = (directory.join("root"), directory.join("layout"));
    make_root(&root, busybox);
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let keep = |content: &[u8]| {
        let path = directory.join("blob");
        fs::write(&path, content).unwrap();
        let sum = run(Command::new("sha256sum").arg(&path));
        let sum = sum.split_whitespace().next().unwrap();
        fs::rename(&path, blobs.join(sum)).unwrap();
        (format!("sha256:{sum}"), content.len())
    };
    let described = |kind: &str, (digest, size): &(String, usize)| {
        json!({
            "mediaType": format!("application/vnd.oci.image.{kind}"),
            "digest": digest,
            "size": size,
        })
    };

    let layer = directory.join("layer");
    archive(&root, &layer);
    let layer = keep(&fs::read(&layer).unwrap());
    let config = json!({
        "architecture": architecture(),
        "os": "linux",
        "config": {"Cmd": ["sleep", "1000000"], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [layer.0]},
    });
    let config = keep(config.to_string().as_bytes());
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": described("config.v1+json", &config),
        "layers": [described("layer.v1.tar", &layer)],
    });
    let manifest = keep(manifest.to_string().as_bytes());
    let mut entry = described("manifest.v1+json", &manifest);
    entry["annotations"] = json!({"io.containerd.image.name": name});
    let write = |name: &str, value: Value| fs::write(layout.join(name), value.to_string()).unwrap();
    write(
        "index.json",
        json!({"schemaVersion": 2, "manifests": [entry]}),
    );
    write("oci-layout", json!({"imageLayoutVersion": "1.0.0"}));
    let image = directory.join("image.tar");
    archive(&layout, &image);
    image
}

fn make_root(root: &Path, busybox: &Path) {
    for directory in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    let bin = root.join("bin");
    fs::copy(busybox, bin.join("busybox")).unwrap();
    let names = run(Command::new(busybox).arg("--list"));
    for name in names.lines().filter(|name| *name != "busybox") {
        symlink("busybox", bin.join(name)).unwrap();
    }
}

/// An archive of all that is in a directory, owned by root.
fn archive(directory: &Path, to: &Path) {
    let mut command = Command::new("tar");
    command.args([
        "--numeric-owner",
        "--owner=0",
        "--group=0",
        "--create",
        "--file",
    ]);
    run(command.arg(to).arg("--directory").arg(directory).arg("."));
}

/// As Go calls it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}
