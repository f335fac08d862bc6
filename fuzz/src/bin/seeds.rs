//! Writes the seeds into `seeds/`, beside those that crashes have left there.

use std::path::Path;

fn main() -> std::io::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds");
    for (target, seeds) in muslin_fuzz::seeds::all() {
        std::fs::create_dir_all(folder.join(target))?;
        for (name, bytes) in seeds {
            std::fs::write(folder.join(target).join(name), bytes)?;
        }
    }
    Ok(())
}
