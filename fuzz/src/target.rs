//! A target: its inputs on disk, and ways to run it without libFuzzer.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;
use std::{fs, io};

use crate::mutate::Mutator;

/// The name of a file, and what is in it.
pub type Seed = (&'static str, Vec<u8>);

/// A function and what to begin with to find an input that it does not bear.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name: that of its file.
    pub name: &'static str,
    /// Panics if something is wrong with what becomes of the input.
    pub check: fn(&[u8]),
    /// Small inputs, each of which goes where the fuzzer would be long in getting.
    pub seeds: fn() -> Vec<Seed>,
    /// Its dictionary: what the fuzzer would be long in guessing.
    pub words: &'static [&'static [u8]],
    /// How many mutations of seeds the tests try: about two seconds' worth.
    pub inputs: u64,
    /// Bytes of the longest mutation.
    pub max_len: usize,
}

/// Files of seeds that the generator does not write: inputs that once failed.
const CRASH: &str = "crash-";

/// The seed of the mutations that the tests try, so that they are the same every time.
const SEED: u64 = 1;

const USAGE: &str = "use: write | replay FILE... | mutate [COUNT [SEED]] | max-len";

impl Target {
    /// Runs every file of seeds.
    ///
    /// # Panics
    /// If one does not pass.
    pub fn replay_seeds(&self) {
        for (name, bytes) in self.files() {
            println!("{}/{name}", self.name);
            (self.check)(&bytes);
        }
    }

    /// Compares the files of seeds and the dictionary with what the generator writes.
    ///
    /// # Panics
    /// If they differ.
    pub fn compare_files(&self) {
        let hint = format!("run `cargo run --bin {} write` in fuzz/", self.name);
        let mut files = self.files();
        files.retain(|name, _| !name.starts_with(CRASH));
        let expected: BTreeMap<String, Vec<u8>> = (self.seeds)()
            .into_iter()
            .map(|(name, bytes)| (name.to_owned(), bytes))
            .collect();
        assert_eq!(files, expected, "{hint}");
        let dictionary = fs::read_to_string(self.dictionary_path()).unwrap_or_default();
        assert_eq!(dictionary, self.dictionary(), "{hint}");
        let manifest = fs::read_to_string(room().join("Cargo.toml")).expect("it can be read");
        let line = format!("name = \"{}\"", self.name);
        assert!(
            manifest.contains(&line),
            "Cargo.toml names it for `cargo fuzz list`"
        );
    }

    /// Tries as many mutations of the seeds as tests do, the same every time.
    ///
    /// # Panics
    /// If one does not pass; it is left in `artifacts/` then.
    pub fn try_some_mutations(&self) {
        self.try_mutations(self.inputs, SEED);
    }

    /// Tries so many mutations of the seeds, which follow from `seed`.
    fn try_mutations(&self, inputs: u64, seed: u64) {
        let seeds: Vec<_> = self.files().into_values().collect();
        let mut mutator = Mutator::new(seed, &seeds, self.words, self.max_len);
        for _ in 0..inputs {
            let input = mutator.next_input();
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (self.check)(&input))) {
                match self.keep(&input) {
                    Ok(path) => eprintln!("the input is in {}", path.display()),
                    Err(error) => eprintln!("the input is {input:?}, and not in a file: {error}"),
                }
                std::panic::resume_unwind(panic);
            }
        }
    }

    /// Does what the arguments of the target's command say.
    #[must_use]
    pub fn command(&self, mut arguments: impl Iterator<Item = String>) -> ExitCode {
        let done = match arguments.next().as_deref() {
            Some("write") => self.write_files(),
            Some("replay") => arguments.try_for_each(|path| {
                println!("{path}");
                fs::read(path).map(|bytes| (self.check)(&bytes))
            }),
            Some("mutate") => {
                let numbers: Result<Vec<u64>, _> = arguments.map(|it| it.parse()).collect();
                let chosen = match numbers.as_deref() {
                    Ok([]) => Ok((self.inputs, SEED)),
                    Ok([count]) => Ok((*count, SEED)),
                    Ok([count, seed]) => Ok((*count, *seed)),
                    Ok(_) | Err(_) => Err(io::Error::other(USAGE)),
                };
                chosen.map(|(count, seed)| self.measure(count, seed))
            }
            Some("max-len") => {
                println!("{}", self.max_len);
                Ok(())
            }
            _ => Err(io::Error::other(USAGE)),
        };
        match done {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{}: {error}", self.name);
                ExitCode::FAILURE
            }
        }
    }

    fn measure(&self, count: u64, seed: u64) {
        let begin = Instant::now();
        self.try_mutations(count, seed);
        let seconds = begin.elapsed().as_secs_f64();
        println!(
            "{count} inputs in {seconds:.1} s, {:.0} per second",
            count as f64 / seconds
        );
    }

    fn write_files(&self) -> io::Result<()> {
        let folder = self.seeds_folder();
        fs::create_dir_all(&folder)?;
        for name in self.files().into_keys() {
            if !name.starts_with(CRASH) {
                fs::remove_file(folder.join(name))?;
            }
        }
        for (name, bytes) in (self.seeds)() {
            fs::write(folder.join(name), bytes)?;
        }
        fs::write(self.dictionary_path(), self.dictionary())
    }

    fn keep(&self, input: &[u8]) -> io::Result<PathBuf> {
        let folder = room().join("artifacts").join(self.name);
        fs::create_dir_all(&folder)?;
        let path = folder.join("mutation");
        fs::write(&path, input)?;
        Ok(path)
    }

    fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let Ok(entries) = fs::read_dir(self.seeds_folder()) else {
            return BTreeMap::new();
        };
        entries
            .map(|entry| {
                let entry = entry.expect("it can be read");
                let name = entry.file_name().into_string().expect("it is text");
                (name, fs::read(entry.path()).expect("it can be read"))
            })
            .collect()
    }

    /// The dictionary as libFuzzer reads it.
    fn dictionary(&self) -> String {
        let mut text = String::new();
        for word in self.words {
            let escape = |text: &mut String, byte: &u8| match byte {
                b'"' | b'\\' => write!(text, "\\{}", char::from(*byte)),
                b' '..=b'~' => write!(text, "{}", char::from(*byte)),
                _ => write!(text, "\\x{byte:02x}"),
            };
            text.push('"');
            for byte in *word {
                escape(&mut text, byte).expect("text grows");
            }
            text.push_str("\"\n");
        }
        text
    }

    fn seeds_folder(&self) -> PathBuf {
        room().join("seeds").join(self.name)
    }

    fn dictionary_path(&self) -> PathBuf {
        room()
            .join("dictionaries")
            .join(format!("{}.dict", self.name))
    }
}

fn room() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
