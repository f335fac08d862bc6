//! Leases in a database file that the nodes of one machine share.
//!
//! Every operation is one transaction, which first deletes what has expired. Each change has a
//! revision of its own and a row in a log, from which watches read. SQLite has no messages between
//! processes; a watch asks ten times a second whether the file has changed, which costs a look at
//! shared memory. Keys end by a time that passes as the machine runs (`clock.rs`), and means the same
//! to all its processes.

mod clock;

use std::fs::{DirBuilder, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use clock::{Note, Reading};
use muslin_stack::control::lease::{Answer, Entry, Op, Revision, WatchEvent};
use nix::errno::Errno;
use nix::unistd::{AccessFlags, access};
use parking_lot::Mutex;
use rusqlite::config::DbConfig;
use rusqlite::{
    Connection, ErrorCode, OpenFlags, OptionalExtension, Transaction, TransactionBehavior, params,
};
use tokio::sync::mpsc;
use tracing::warn;

use super::{Store, StoreError, Watch, blocking};
use crate::error::{Error, Result};
use crate::state::with_way_out;

type StoreResult<T> = std::result::Result<T, StoreError>;

/// Changes that are kept for watches.
const LOG: Revision = 10_000;
/// How often a watch looks.
const POLL: Duration = Duration::from_millis(100);
/// How long an operation waits for others that write.
const PATIENCE: Duration = Duration::from_secs(5);
/// `Musl`: marks our databases.
const APPLICATION: i32 = 0x4d75_736c;
const VERSION: i32 = 1;
const SCHEMA: &str = "
    CREATE TABLE keys (
        key TEXT PRIMARY KEY, value TEXT NOT NULL, revision INTEGER NOT NULL, expires INTEGER
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE log (
        revision INTEGER PRIMARY KEY, key TEXT NOT NULL, value TEXT, expires INTEGER
    ) STRICT;
    CREATE TABLE counter (
        id INTEGER PRIMARY KEY CHECK (id = 0), revision INTEGER NOT NULL
    ) STRICT;
    INSERT INTO counter VALUES (0, 0);
";
/// Beside those, since it came later: a version that does not know it goes by the date.
const CLOCK: &str = "
    CREATE TABLE IF NOT EXISTS clock (
        id INTEGER PRIMARY KEY CHECK (id = 0), time INTEGER NOT NULL,
        start TEXT NOT NULL, since_start INTEGER NOT NULL, date INTEGER NOT NULL
    ) STRICT;
";

/// A database's identity, wherever it lies. It was added later, too.
const NAME: &str = "
    CREATE TABLE IF NOT EXISTS name (
        id INTEGER PRIMARY KEY CHECK (id = 0), name TEXT NOT NULL
    ) STRICT;
    INSERT OR IGNORE INTO name VALUES (0, lower(hex(randomblob(16))));
";

/// A store in a database file.
pub(super) struct SqliteStore {
    path: PathBuf,
    name: String,
    database: Arc<Mutex<Database>>,
}

impl SqliteStore {
    /// Opens the file, and makes it (mode 0600) and its directory (0700) where they are missing.
    ///
    /// # Errors
    /// A failure that names the file if it cannot be opened or is another kind of file.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let created = create_directory(path).and_then(|()| create(path));
        let created = created.map_err(|error| refused(path, error));
        let opened = created.and_then(|_| {
            let database = Database::open(path)?;
            Ok((database.name()?, database))
        });
        let failed = |error: StoreError| Error::failed(format!("cannot open the store: {error}"));
        let (name, database) = opened.map_err(failed)?;
        Ok(Self {
            path: path.to_path_buf(),
            name,
            database: Arc::new(Mutex::new(database)),
        })
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn execute(&self, op: Op) -> StoreResult<Answer> {
        let database = Arc::clone(&self.database);
        // The transaction ends on its thread, whether anybody waits for the answer or not.
        blocking(move || database.lock().execute(op)).await
    }

    async fn watch(&self, prefix: &str, from: Revision) -> StoreResult<Box<dyn Watch>> {
        let (database, prefix) = (Arc::clone(&self.database), prefix.to_owned());
        let follower = blocking(move || {
            let (path, file) = {
                let database = database.lock();
                (database.path.clone(), database.file)
            };
            let follower = Follower::open(&path, prefix, from)?;
            if follower.database.file != file {
                // Its revisions are not those that the caller knows.
                return Err(StoreError::Gap);
            }
            Ok(follower)
        })
        .await?;
        let (sender, batches) = mpsc::channel(1);
        std::thread::Builder::new()
            .name("lease-watch".to_owned())
            .spawn(move || follower.run(&sender))
            .map_err(|error| StoreError::Unavailable(format!("no thread to watch: {error}")))?;
        Ok(Box::new(SqliteWatch { batches }))
    }

    fn id(&self) -> Option<String> {
        Some(self.name.clone())
    }

    fn describe(&self) -> String {
        format!("sqlite:{}", self.path.display())
    }
}

struct SqliteWatch {
    batches: mpsc::Receiver<StoreResult<Vec<WatchEvent>>>,
}

#[async_trait]
impl Watch for SqliteWatch {
    async fn next(&mut self) -> StoreResult<Vec<WatchEvent>> {
        let ended = || StoreError::Unavailable("the watch has ended".to_owned());
        self.batches.recv().await.ok_or_else(ended)?
    }
}

/// Reads the log as it grows.
struct Follower {
    database: Database,
    prefix: String,
    from: Revision,
    /// SQLite's number of the file's state that was read last.
    version: Option<i64>,
    next_expiry: Option<i64>,
}

impl Follower {
    fn open(path: &Path, prefix: String, from: Revision) -> StoreResult<Self> {
        Ok(Self {
            database: Database::open(path)?,
            prefix,
            from,
            version: None,
            next_expiry: None,
        })
    }

    fn run(mut self, batches: &mpsc::Sender<StoreResult<Vec<WatchEvent>>>) {
        while !batches.is_closed() {
            let batch = self.poll();
            let ends = batch.is_err();
            let is_news = batch.as_ref().map_or(true, |events| !events.is_empty());
            if (is_news && batches.blocking_send(batch).is_err()) || ends {
                return;
            }
            std::thread::sleep(POLL);
        }
    }

    fn poll(&mut self) -> StoreResult<Vec<WatchEvent>> {
        if self.database.is_replaced() {
            let path = self.database.path.display();
            let replaced = format!("{path} was removed or replaced");
            return Err(StoreError::Unavailable(replaced));
        }
        if let Some(at) = self.next_expiry
            && at <= self.database.time()?
        {
            self.database.transaction(|_, _| Ok(()))?;
            // The number does not count what this connection writes.
            self.version = None;
        }
        let version = self.database.version()?;
        if self.version == Some(version) {
            return Ok(Vec::new());
        }
        let (revision, next_expiry, events) = self.database.changes(self.from)?;
        // A file may say anything.
        let next = revision.saturating_add(1);
        if self.from <= revision.saturating_sub(LOG) || self.from > next {
            return Err(StoreError::Gap);
        }
        self.version = Some(version);
        self.next_expiry = next_expiry;
        self.from = next;
        let has_prefix = |event: &WatchEvent| match event {
            WatchEvent::Put(Entry { key, .. }) | WatchEvent::Delete { key, .. } => {
                key.starts_with(&self.prefix)
            }
        };
        Ok(events.into_iter().filter(has_prefix).collect())
    }
}

/// A connection to the file.
struct Database {
    path: PathBuf,
    connection: Connection,
    /// Device and inode of what was opened.
    file: Option<(u64, u64)>,
    /// Whether something was wrong with it that cannot be mended under an open connection.
    is_unusable: bool,
}

impl Database {
    /// Opens a file that is there.
    fn open(path: &Path) -> StoreResult<Self> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Self::try_open(path) {
                // Switching to the write-ahead log waits for nobody, whatever the patience.
                Err(StoreError::Unavailable(_)) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                result => return result,
            }
        }
    }

    fn try_open(path: &Path) -> StoreResult<Self> {
        check_access(path)?;
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection =
            Connection::open_with_flags(path, flags).map_err(|error| explain(path, &error))?;
        let mut database = Self {
            path: path.to_path_buf(),
            connection,
            file: identity(path),
            is_unusable: false,
        };
        database.prepare()?;
        Ok(database)
    }

    /// Makes the tables in a new file, and refuses a file that is not ours.
    fn prepare(&mut self) -> StoreResult<()> {
        let path = self.path.clone();
        let explain = |error: rusqlite::Error| explain(&path, &error);
        self.connection.busy_timeout(PATIENCE).map_err(explain)?;
        // Whoever made the file may have put views and triggers in it.
        for (option, is_on) in [
            (DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false),
            (DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true),
        ] {
            let set = self.connection.set_db_config(option, is_on);
            set.map_err(explain)?;
        }
        let (application, version, objects) = self.kind().map_err(explain)?;
        self.check_kind(application, version, objects)?;
        self.connection
            .pragma_update_and_check(None, "journal_mode", "wal", |_| Ok(()))
            .and_then(|()| self.connection.pragma_update(None, "synchronous", "normal"))
            // Other directories than the database's are not in reach.
            .and_then(|()| self.connection.pragma_update(None, "temp_store", "memory"))
            .map_err(explain)?;
        if version == VERSION && self.is_complete().map_err(explain)? {
            return Ok(());
        }
        let transaction = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(explain)?;
        let is_new = transaction
            .pragma_query_value(None, "user_version", |row| row.get::<_, i32>(0))
            .map_err(explain)?
            == 0;
        if is_new {
            transaction
                .execute_batch(SCHEMA)
                .and_then(|()| transaction.pragma_update(None, "application_id", APPLICATION))
                .and_then(|()| transaction.pragma_update(None, "user_version", VERSION))
                .map_err(explain)?;
        }
        transaction
            .execute_batch(CLOCK)
            .and_then(|()| transaction.execute_batch(NAME))
            .map_err(explain)?;
        transaction.commit().map_err(explain)
    }

    /// Whether it has what came later.
    fn is_complete(&self) -> rusqlite::Result<bool> {
        let has = |table| self.connection.table_exists(None, table);
        Ok(has("clock")? && has("name")?)
    }

    fn name(&self) -> StoreResult<String> {
        let name = "SELECT name FROM name WHERE id = 0";
        let name = self.connection.query_row(name, [], |row| row.get(0));
        name.map_err(|error| explain(&self.path, &error))
    }

    /// The database's time.
    fn time(&self) -> StoreResult<i64> {
        let time = time(&self.connection);
        time.map_err(|error| explain(&self.path, &error))
    }

    /// Application, schema version and number of tables, of one moment.
    fn kind(&mut self) -> rusqlite::Result<(i32, i32, i64)> {
        let transaction = self.connection.transaction()?;
        Ok((
            transaction.pragma_query_value(None, "application_id", |row| row.get(0))?,
            transaction.pragma_query_value(None, "user_version", |row| row.get(0))?,
            transaction.query_row("SELECT count(*) FROM sqlite_master", [], |row| row.get(0))?,
        ))
    }

    fn check_kind(&self, application: i32, version: i32, objects: i64) -> StoreResult<()> {
        let path = self.path.display();
        match (application, version) {
            (0, 0) if objects == 0 => Ok(()),
            (APPLICATION, VERSION) => Ok(()),
            (APPLICATION, _) => Err(StoreError::Refused(format!(
                "{path} has the format {version} of another muslin, this one knows {VERSION}"
            ))),
            _ => Err(StoreError::Refused(format!(
                "{path} is a database of another program"
            ))),
        }
    }

    fn is_replaced(&self) -> bool {
        identity(&self.path) != self.file
    }

    /// Opens what is at the path now. A file that was removed is made anew, its directory is not:
    /// whoever removed that did not mean the file alone.
    fn open_again(&mut self) -> StoreResult<()> {
        let path = &self.path;
        if create(path).map_err(|error| refused(path, error))? {
            warn!("{} was removed: it is recreated", path.display());
        }
        *self = Self::open(path)?;
        Ok(())
    }

    fn execute(&mut self, op: Op) -> StoreResult<Answer> {
        if self.is_replaced() || self.is_unusable {
            self.open_again()?;
            if !matches!(op, Op::Get(_) | Op::List(_)) {
                // It was meant for what the other file had.
                return Ok(Answer::Conflict);
            }
        }
        self.transaction(|transaction, now| {
            let keys = Keys { transaction, now };
            match op {
                Op::Get(key) => Ok(Answer::Value(keys.get(&key)?)),
                Op::List(prefix) => Ok(Answer::Snapshot {
                    revision: keys.revision()?,
                    entries: keys.list(&prefix)?,
                }),
                Op::Create { key, value, ttl } => match keys.get(&key)? {
                    None => keys.put(&key, &value, ttl).map(Answer::Done),
                    Some(_) => Ok(Answer::Conflict),
                },
                Op::Claim {
                    key,
                    value,
                    ttl,
                    prefix,
                    seen,
                    replaces,
                } => {
                    let mut is_free = keys.get(&key)?.is_none();
                    is_free &= keys.list(&prefix)?.iter().all(|it| it.revision <= seen);
                    if let Some((old, expected)) = &replaces {
                        is_free &= keys.get(old)?.is_some_and(|it| it.revision == *expected);
                    }
                    if !is_free {
                        return Ok(Answer::Conflict);
                    }
                    if let Some((old, _)) = &replaces {
                        keys.delete(old)?;
                    }
                    keys.put(&key, &value, ttl).map(Answer::Done)
                }
                Op::CompareAndPut {
                    key,
                    value,
                    expected,
                    ttl,
                } => match keys.get(&key)? {
                    Some(entry) if entry.revision == expected => {
                        keys.put(&key, &value, ttl).map(Answer::Done)
                    }
                    Some(_) | None => Ok(Answer::Conflict),
                },
                Op::CompareAndDelete { key, expected } => match keys.get(&key)? {
                    Some(entry) if entry.revision == expected => {
                        keys.delete(&key).map(Answer::Done)
                    }
                    Some(_) | None => Ok(Answer::Conflict),
                },
            }
        })
    }

    /// One transaction, after everything that is due has expired.
    fn transaction<T>(
        &mut self,
        work: impl FnOnce(&Transaction<'_>, i64) -> rusqlite::Result<T>,
    ) -> StoreResult<T> {
        let run = |connection: &mut Connection| {
            let transaction =
                connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let now = tick(&transaction)?;
            Keys {
                transaction: &transaction,
                now,
            }
            .expire()?;
            let result = work(&transaction, now)?;
            transaction.commit()?;
            Ok(result)
        };
        let result = run(&mut self.connection).map_err(|error| explain(&self.path, &error));
        self.is_unusable |= matches!(result, Err(StoreError::Refused(_)));
        result
    }

    fn version(&self) -> StoreResult<i64> {
        self.connection
            .pragma_query_value(None, "data_version", |row| row.get(0))
            .map_err(|error| explain(&self.path, &error))
    }

    /// The revision, when the next key expires, and what the log has from `from` on.
    fn changes(&mut self, from: Revision) -> StoreResult<(Revision, Option<i64>, Vec<WatchEvent>)> {
        let read = |connection: &mut Connection| {
            let transaction = connection.transaction()?;
            let keys = Keys {
                transaction: &transaction,
                now: time(&transaction)?,
            };
            Ok((keys.revision()?, keys.next_expiry()?, keys.log(from)?))
        };
        read(&mut self.connection).map_err(|error| explain(&self.path, &error))
    }
}

/// The tables, within a transaction.
struct Keys<'a> {
    transaction: &'a Transaction<'a>,
    now: i64,
}

impl Keys<'_> {
    fn revision(&self) -> rusqlite::Result<Revision> {
        self.transaction
            .prepare_cached("SELECT revision FROM counter")?
            .query_row([], |row| row.get(0))
    }

    fn get(&self, key: &str) -> rusqlite::Result<Option<Entry>> {
        self.transaction
            .prepare_cached("SELECT key, value, revision, expires FROM keys WHERE key = ?1")?
            .query_row([key], |row| self.entry(row))
            .optional()
    }

    fn list(&self, prefix: &str) -> rusqlite::Result<Vec<Entry>> {
        self.transaction
            .prepare_cached(
                "SELECT key, value, revision, expires FROM keys
                 WHERE key >= ?1 AND substr(key, 1, length(?1)) = ?1 ORDER BY key",
            )?
            .query_map([prefix], |row| self.entry(row))?
            .collect()
    }

    fn put(&self, key: &str, value: &str, ttl: Option<Duration>) -> rusqlite::Result<Revision> {
        let millis = ttl.map(|ttl| i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX));
        let expires = millis.map(|millis| self.now.saturating_add(millis));
        let revision = self.record(key, Some(value), expires)?;
        self.transaction
            .prepare_cached("INSERT OR REPLACE INTO keys VALUES (?1, ?2, ?3, ?4)")?
            .execute(params![key, value, revision, expires])?;
        Ok(revision)
    }

    fn delete(&self, key: &str) -> rusqlite::Result<Revision> {
        self.transaction
            .prepare_cached("DELETE FROM keys WHERE key = ?1")?
            .execute([key])?;
        self.record(key, None, None)
    }

    /// Writes a change into the log under the next revision.
    fn record(
        &self,
        key: &str,
        value: Option<&str>,
        expires: Option<i64>,
    ) -> rusqlite::Result<Revision> {
        let revision: Revision = self
            .transaction
            .prepare_cached("UPDATE counter SET revision = revision + 1 RETURNING revision")?
            .query_row([], |row| row.get(0))?;
        self.transaction
            .prepare_cached("INSERT INTO log VALUES (?1, ?2, ?3, ?4)")?
            .execute(params![revision, key, value, expires])?;
        self.transaction
            .prepare_cached("DELETE FROM log WHERE revision <= ?1")?
            .execute([revision.saturating_sub(LOG)])?;
        Ok(revision)
    }

    fn expire(&self) -> rusqlite::Result<()> {
        let due: Vec<String> = self
            .transaction
            .prepare_cached("SELECT key FROM keys WHERE expires <= ?1 ORDER BY expires, key")?
            .query_map([self.now], |row| row.get(0))?
            .collect::<rusqlite::Result<_>>()?;
        due.iter().try_for_each(|key| self.delete(key).map(|_| ()))
    }

    fn next_expiry(&self) -> rusqlite::Result<Option<i64>> {
        self.transaction
            .prepare_cached("SELECT min(expires) FROM keys")?
            .query_row([], |row| row.get(0))
    }

    fn log(&self, from: Revision) -> rusqlite::Result<Vec<WatchEvent>> {
        self.transaction
            .prepare_cached(
                "SELECT key, value, revision, expires FROM log WHERE revision >= ?1
                 ORDER BY revision",
            )?
            .query_map([from], |row| match row.get::<_, Option<String>>(1)? {
                Some(_) => self.entry(row).map(WatchEvent::Put),
                None => Ok(WatchEvent::Delete {
                    key: row.get(0)?,
                    revision: row.get(2)?,
                }),
            })?
            .collect()
    }

    fn entry(&self, row: &rusqlite::Row<'_>) -> rusqlite::Result<Entry> {
        let left = |expires: i64| {
            let millis = expires.saturating_sub(self.now);
            Duration::from_millis(u64::try_from(millis).unwrap_or(0))
        };
        Ok(Entry {
            key: row.get(0)?,
            value: row.get(1)?,
            revision: row.get(2)?,
            created: 0,
            ttl: row.get::<_, Option<i64>>(3)?.map(left),
        })
    }
}

/// Makes the file's directory where it is missing, for this user only.
fn create_directory(path: &Path) -> std::io::Result<()> {
    let parent = path.parent();
    match parent.filter(|parent| !parent.as_os_str().is_empty()) {
        Some(directory) => DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory),
        None => Ok(()),
    }
}

/// Makes the file where it is missing, for this user only; whether it was. One that is there is not
/// opened: to close it would end the locks that this process has on it (fcntl(2)).
fn create(path: &Path) -> std::io::Result<bool> {
    let made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    match made {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// Says what SQLite would call a file that cannot be opened, whyever.
fn check_access(path: &Path) -> StoreResult<()> {
    match access(path, AccessFlags::R_OK | AccessFlags::W_OK) {
        Ok(()) if path.is_dir() => Err(refused(path, Errno::EISDIR.into())),
        Ok(()) => Ok(()),
        // What it had is to be read again.
        Err(Errno::ENOENT) => Err(StoreError::Gap),
        Err(error) => Err(refused(path, error.into())),
    }
}

fn refused(path: &Path, error: std::io::Error) -> StoreError {
    let error = with_way_out(&error, error.kind());
    StoreError::Refused(format!("{}: {error}", path.display()))
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// The database's time in milliseconds.
fn time(connection: &Connection) -> rusqlite::Result<i64> {
    let now = Reading::now();
    let note = Note::read(connection)?;
    Ok(note.unwrap_or_else(|| Note::first(now.clone())).time(&now))
}

/// The same, within a transaction that may write how the clocks are.
fn tick(transaction: &Transaction<'_>) -> rusqlite::Result<i64> {
    let now = Reading::now();
    let noted = Note::read(transaction)?;
    let is_first = noted.is_none();
    let note = noted.unwrap_or_else(|| Note::first(now.clone()));
    let renewed = note
        .renewed(&now)
        .or_else(|| is_first.then(|| note.clone()));
    renewed.map_or(Ok(()), |note| note.write(transaction))?;
    Ok(note.time(&now))
}

fn explain(path: &Path, error: &rusqlite::Error) -> StoreError {
    let path = path.display();
    match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => {
            StoreError::Refused(format!("{path} is not a database of leases"))
        }
        Some(ErrorCode::DatabaseCorrupt) => StoreError::Refused(format!(
            "{path} is damaged: remove it, and the nodes that use it write their leases again"
        )),
        Some(ErrorCode::PermissionDenied | ErrorCode::ReadOnly) => {
            let error = with_way_out(error, ErrorKind::PermissionDenied);
            StoreError::Refused(format!("{path} cannot be written: {error}"))
        }
        Some(ErrorCode::DiskFull) => {
            let error = with_way_out(error, ErrorKind::StorageFull);
            StoreError::Unavailable(format!("{path}: {error}"))
        }
        Some(_) => StoreError::Unavailable(format!("{path}: {error}")),
        // Columns that are missing or of another kind.
        None => StoreError::Refused(format!("{path} is not a database of leases: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::process::{Command, Stdio};

    use tempfile::TempDir;

    use super::super::suite::{self, Node, Place, settings, soon};
    use super::*;

    struct Directory(TempDir);

    impl Directory {
        fn new() -> Self {
            Self(TempDir::new().unwrap())
        }

        fn file(&self) -> PathBuf {
            self.0.path().join("state/leases.db")
        }
    }

    impl Place for Directory {
        fn open(&self) -> Arc<dyn Store> {
            Arc::new(SqliteStore::open(&self.file()).unwrap())
        }

        async fn compact(&self) {
            let mut database = Database::open(&self.file()).unwrap();
            let fill = |transaction: &Transaction<'_>, now| {
                let keys = Keys { transaction, now };
                (0..LOG).try_for_each(|_| keys.put("/filler", "", None).map(|_| ()))
            };
            database.transaction(fill).unwrap();
            let rows = |transaction: &Transaction<'_>, _| {
                transaction.query_row("SELECT count(*) FROM log", [], |row| row.get(0))
            };
            assert_eq!(database.transaction(rows), Ok(LOG), "the log is bounded");
        }
    }

    #[tokio::test]
    async fn it_is_a_store() {
        suite::run_all(&Directory::new()).await;
    }

    #[test]
    fn only_the_owner_can_read_it() {
        let directory = Directory::new();
        directory.open();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let file = directory.file();
        assert_eq!(mode(&file), 0o600);
        assert_eq!(mode(file.parent().unwrap()), 0o700);
        for entry in std::fs::read_dir(file.parent().unwrap()).unwrap() {
            assert_eq!(mode(&entry.unwrap().path()), 0o600);
        }
    }

    fn error(path: &Path) -> String {
        let error = SqliteStore::open(path).map(|_| ()).unwrap_err();
        assert_eq!(error.exit_code(), 1);
        let text = error.to_string();
        assert!(text.contains(&*path.to_string_lossy()), "{text}");
        assert!(!text.contains('\n'), "{text}");
        text
    }

    #[test]
    fn what_is_no_store_is_refused_and_left_alone() {
        let directory = TempDir::new().unwrap();
        let path = |name: &str| directory.path().join(name);

        let rubbish = "rubbish ".repeat(1000);
        std::fs::write(path("rubbish"), &rubbish).unwrap();
        assert!(error(&path("rubbish")).contains("not a database"));
        assert_eq!(std::fs::read_to_string(path("rubbish")).unwrap(), rubbish);

        let foreign = Connection::open(path("foreign")).unwrap();
        foreign.execute_batch("CREATE TABLE x (y)").unwrap();
        assert!(error(&path("foreign")).contains("another program"));

        SqliteStore::open(&path("newer")).unwrap();
        let newer = Connection::open(path("newer")).unwrap();
        newer.pragma_update(None, "user_version", 9).unwrap();
        assert!(error(&path("newer")).contains("format 9"));

        SqliteStore::open(&path("broken")).unwrap();
        let broken = Connection::open(path("broken")).unwrap();
        broken.execute_batch("DROP TABLE counter").unwrap();
        let store = SqliteStore::open(&path("broken")).unwrap();
        let answer = store.database.lock().execute(Op::List(String::new()));
        assert!(answer.is_err(), "{answer:?}");

        error(directory.path());
        std::fs::write(path("file"), "").unwrap();
        error(&path("file/below"));
    }

    #[test]
    fn a_file_that_others_made_is_not_trusted() {
        let directory = Directory::new();
        let store = SqliteStore::open(&directory.file()).unwrap();
        let database = store.database.lock();
        let is_on = |option| database.connection.db_config(option).unwrap();
        assert!(!is_on(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA));
        assert!(is_on(DbConfig::SQLITE_DBCONFIG_DEFENSIVE));
    }

    #[test]
    fn revisions_at_the_end_of_all_numbers_do_no_harm() {
        for revision in [i64::MAX, i64::MAX - 1, i64::MIN] {
            let directory = Directory::new();
            let store = SqliteStore::open(&directory.file()).unwrap();
            let mut database = store.database.lock();
            database
                .connection
                .execute("UPDATE counter SET revision = ?1", [revision])
                .unwrap();
            let create = |key: &str| Op::Create {
                key: key.to_owned(),
                value: String::new(),
                ttl: None,
            };
            for key in ["/p/one", "/p/two"] {
                let _ = database.execute(create(key));
            }
            let mut follower = Follower::open(&directory.file(), "/p".to_owned(), 1).unwrap();
            let _ = follower.poll();
        }
    }

    #[test]
    fn a_damaged_file_is_one_clear_error() {
        let directory = Directory::new();
        drop(directory.open());
        let mut bytes = std::fs::read(directory.file()).unwrap();
        for byte in &mut bytes[100..] {
            *byte = 0xa5;
        }
        std::fs::write(directory.file(), bytes).unwrap();
        let text = error(&directory.file());
        assert!(text.contains("is damaged"), "{text}");
    }

    #[tokio::test]
    async fn a_file_that_was_removed_is_made_again_and_filled() {
        let directory = Directory::new();
        let mut one = Node::start(directory.open(), settings("/p", 1));
        let first = one.subnet().await;
        let state = directory.file().parent().unwrap().to_path_buf();
        std::fs::rename(&state, state.with_extension("old")).unwrap();
        let mut two = Node::start(directory.open(), settings("/p", 2));
        let second = two.subnet().await;
        assert_ne!(first, second);
        two.sees(&first).await;
        one.sees(&second).await;
    }

    /// Whatever becomes of the file, a node that runs stays, and goes on when it is mended.
    #[tokio::test]
    async fn a_file_that_goes_wrong_is_waited_for() {
        let directory = Directory::new();
        let (file, spare) = (directory.file(), directory.0.path().join("spare"));
        let mut node = Node::start(directory.open(), settings("/p", 1));
        let subnet = node.subnet().await;
        let remove_log = || {
            for extra in ["-wal", "-shm"] {
                let _ = std::fs::remove_file(file.with_extension(format!("db{extra}")));
            }
        };
        let save = || {
            let connection = Connection::open(&file).unwrap();
            let _ = std::fs::remove_file(&spare);
            connection
                .execute("VACUUM INTO ?1", [spare.to_str().unwrap()])
                .unwrap();
        };
        let mend = || {
            remove_log();
            std::fs::rename(&spare, &file).unwrap();
        };
        let garbage = "garbage".repeat(3000);
        type Damage<'a> = &'a dyn Fn();
        let damages: [(&str, Damage<'_>); 3] = [
            ("not a database", &|| {
                std::fs::remove_file(&file).unwrap();
                // What is in the log would be a whole database.
                remove_log();
                std::fs::write(&file, &garbage).unwrap();
            }),
            ("Is a directory", &|| {
                std::fs::remove_file(&file).unwrap();
                std::fs::create_dir(&file).unwrap();
            }),
            ("No such file", &|| {
                std::fs::remove_dir_all(file.parent().unwrap()).unwrap();
            }),
        ];
        for (what, damage) in damages {
            save();
            damage();
            node.trouble(what).await;
            assert_eq!(node.peers(), 0, "{what}: nothing is lost");
            if file.is_dir() {
                std::fs::remove_dir(&file).unwrap();
            }
            create_directory(&file).unwrap();
            mend();
            node.recovery().await;
            // It hears of others, and others of it.
            let mut other = Node::start(directory.open(), settings("/p", 2));
            other.sees(&subnet).await;
            let theirs = other.subnet().await;
            node.sees(&theirs).await;
            other.leave().await;
            assert_eq!(node.peer().await, format!("{theirs} gone"));
        }
    }

    #[tokio::test]
    async fn a_directory_that_was_removed_is_not_made_anew() {
        let directory = Directory::new();
        let mut node = Node::start(directory.open(), settings("/p", 1));
        node.subnet().await;
        let state = directory.file().parent().unwrap().to_path_buf();
        std::fs::remove_dir_all(&state).unwrap();
        node.trouble("No such file").await;
        assert!(!state.exists());
        create_directory(&directory.file()).unwrap();
        node.recovery().await;
        assert!(directory.file().exists());
    }

    /// The test of the same name runs this in processes of their own.
    #[tokio::test]
    #[ignore = "one process of another test"]
    async fn process() {
        let path = std::env::var("LEASE_TEST_STORE").unwrap();
        let last = std::env::var("LEASE_TEST_NODE").unwrap().parse().unwrap();
        let store = Arc::new(SqliteStore::open(Path::new(&path)).unwrap());
        let mut settings = settings("/p", last);
        settings.random_seed = 1;
        let subnet = Node::start(store, settings).subnet().await;
        println!("subnet={subnet}");
    }

    #[tokio::test]
    async fn processes_that_race_get_different_subnets() {
        for count in [3, 10] {
            let directory = Directory::new();
            let processes: Vec<_> = (1..=count)
                .map(|last: u8| {
                    Command::new(std::env::current_exe().unwrap())
                        .args(["--exact", "store::sqlite::tests::process"])
                        .args(["--ignored", "--nocapture"])
                        .env("LEASE_TEST_STORE", directory.file())
                        .env("LEASE_TEST_NODE", last.to_string())
                        .stdout(Stdio::piped())
                        .spawn()
                        .unwrap()
                })
                .collect();
            let mut subnets = std::collections::BTreeSet::new();
            for process in processes {
                let output = super::blocking(move || Ok(process.wait_with_output().unwrap()));
                let output = soon("a process", output).await.unwrap();
                let text = String::from_utf8_lossy(&output.stdout);
                let subnet = text.split("subnet=").nth(1).unwrap();
                subnets.insert(subnet.split_whitespace().next().unwrap().to_owned());
            }
            assert_eq!(subnets.len(), usize::from(count), "{subnets:?}");
        }
    }
}
