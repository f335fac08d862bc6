//! Checks of this machine's clock: whether it is set at all, and whether etcd's servers have
//! another.
//!
//! A node counts its lease by time that passes and is not harmed itself, but certificates, the
//! embedded store and whoever compares logs go by the date.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::join_all;
use httpdate::{fmt_http_date, parse_http_date};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::finding::{Finding, Verdict};
use crate::store::{self, EtcdOptions};
use crate::terminal::quantity::duration;

const CHECK: &str = "clock";
/// 2026-01-01: no clock that was ever set shows less.
const EARLIEST: Duration = Duration::from_secs(1_767_225_600);
/// 9999-01-01: dates of HTTP end with that year.
const LATEST: Duration = Duration::from_secs(253_370_764_800);
/// How far two clocks may be apart.
const TOLERANCE: Duration = Duration::from_secs(30);
/// Timeout for a server to report its time.
const PATIENCE: Duration = Duration::from_secs(2);
/// The longest head of an answer in bytes.
const MAX_HEAD: u64 = 8 << 10;
const SYNCHRONISE: &str = "have both set by time synchronisation (systemd-timesyncd, chrony): see \
                           'timedatectl'";

/// What a server's clock showed, and what ours did then.
struct Reading {
    server: String,
    theirs: SystemTime,
    ours: SystemTime,
}

/// How far a clock is from another, and which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Offset {
    Ahead(Duration),
    Behind(Duration),
}

impl Reading {
    fn offset(&self) -> Offset {
        match self.ours.duration_since(self.theirs) {
            Ok(ahead) => Offset::Ahead(ahead),
            Err(error) => Offset::Behind(error.duration()),
        }
    }
}

impl Offset {
    fn distance(self) -> Duration {
        match self {
            Self::Ahead(distance) | Self::Behind(distance) => distance,
        }
    }
}

/// Looks at the clock alone, and where the store at `url` has servers that tell their time, at
/// theirs too.
pub(super) async fn examine(url: Option<&OsStr>, options: &EtcdOptions) -> Finding {
    let now = SystemTime::now();
    if let Some(finding) = insane(now) {
        return finding;
    }
    let servers = url.map_or_else(Vec::new, |url| servers(url, options));
    if servers.is_empty() {
        return Finding::fine(CHECK, fmt_http_date(now));
    }
    let plain: Vec<_> = servers
        .iter()
        .filter_map(|server| server.strip_prefix("http://"))
        .collect();
    if plain.is_empty() {
        let detail = format!("{}; not compared: etcd has TLS only", fmt_http_date(now));
        return Finding::new(CHECK, Verdict::Unknown, detail);
    }
    compare(join_all(plain.into_iter().map(ask)).await)
}

/// Reports a clock that was never set.
fn insane(now: SystemTime) -> Option<Finding> {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    if (EARLIEST..LATEST).contains(&since) {
        return None;
    }
    let detail = if since < EARLIEST {
        format!("it is not {} yet", fmt_http_date(UNIX_EPOCH + since))
    } else {
        "it is set to a year after 9998".to_owned()
    };
    let advice = "set it, by time synchronisation (systemd-timesyncd, chrony) if you can: \
                  certificates and leases of the embedded store go by it";
    Some(Finding::wrong(CHECK, detail).advise(advice))
}

/// The servers of an etcd. What is wrong with its address is told elsewhere, and stores of other
/// kinds are not opened, because that can make them.
fn servers(url: &OsStr, options: &EtcdOptions) -> Vec<String> {
    if !url.as_bytes().starts_with(b"etcd") {
        return Vec::new();
    }
    store::open(url, options).map_or_else(|_| Vec::new(), |store| store.servers().to_vec())
}

/// The worst of what was read; the first error if nothing was.
fn compare(readings: Vec<Result<Reading, String>>) -> Finding {
    let mut why = None;
    let read = readings.into_iter().filter_map(|reading| match reading {
        Ok(reading) => Some(reading),
        Err(error) => {
            why.get_or_insert(error);
            None
        }
    });
    let worst = read.max_by_key(|reading| reading.offset().distance());
    let Some(worst) = worst else {
        let why = why.unwrap_or_default();
        return Finding::new(CHECK, Verdict::Unknown, format!("not compared: {why}"));
    };
    let (server, offset) = (&worst.server, worst.offset());
    if offset.distance() <= TOLERANCE {
        let seconds = TOLERANCE.as_secs();
        let detail = format!("within {seconds} s of that of etcd, {server}");
        return Finding::fine(CHECK, detail);
    }
    let far = duration(offset.distance().as_secs());
    let way = match offset {
        Offset::Ahead(_) => "ahead of",
        Offset::Behind(_) => "behind",
    };
    let detail = format!("{far} {way} that of etcd, {server}");
    Finding::new(CHECK, Verdict::Warning, detail).advise(SYNCHRONISE)
}

/// Asks a server at `HOST:PORT` what time it has.
async fn ask(place: &str) -> Result<Reading, String> {
    let server = format!("http://{place}");
    let head = match timeout(PATIENCE, head(place)).await {
        Ok(Ok(head)) => head,
        Ok(Err(error)) => return Err(format!("{server}: {error}")),
        Err(_) => {
            let seconds = PATIENCE.as_secs();
            return Err(format!("{server} does not answer within {seconds} s"));
        }
    };
    let ours = SystemTime::now();
    match date(&head) {
        Some(theirs) => Ok(Reading {
            server,
            theirs,
            ours,
        }),
        None => Err(format!("{server} does not report its time")),
    }
}

/// The beginning of a server's answer to a question that needs no rights.
async fn head(place: &str) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(place).await?;
    let request = format!("GET /version HTTP/1.1\r\nHost: {place}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = stream.take(MAX_HEAD);
    let mut head = Vec::new();
    // Not to the end: a server need not close.
    while !is_whole(&head) && answer.read_buf(&mut head).await? > 0 {}
    Ok(head)
}

fn is_whole(head: &[u8]) -> bool {
    head.windows(4).any(|end| end == b"\r\n\r\n")
}

/// The date in the head of an answer by HTTP/1.
fn date(answer: &[u8]) -> Option<SystemTime> {
    let text = String::from_utf8_lossy(answer);
    let mut lines = text.split("\r\n");
    lines.next().filter(|line| line.starts_with("HTTP/1."))?;
    let mut fields = lines.take_while(|line| !line.is_empty());
    fields.find_map(|field| {
        let (name, value) = field.split_once(':')?;
        let is_date = name.eq_ignore_ascii_case("date");
        is_date.then(|| parse_http_date(value.trim()).ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + EARLIEST + Duration::from_secs(seconds)
    }

    fn reading(server: &str, theirs: u64, ours: u64) -> Result<Reading, String> {
        Ok(Reading {
            server: format!("http://{server}"),
            theirs: at(theirs),
            ours: at(ours),
        })
    }

    fn told(readings: Vec<Result<Reading, String>>) -> (Verdict, String) {
        let finding = compare(readings);
        assert_eq!(
            finding.advice.is_some(),
            finding.verdict == Verdict::Warning
        );
        (finding.verdict, finding.detail)
    }

    #[test]
    fn the_date_of_an_answer_is_read_and_no_other() {
        let expected = Some(at(3661));
        for answer in [
            "HTTP/1.1 200 OK\r\nDate: Thu, 01 Jan 2026 01:01:01 GMT\r\n\r\n{}",
            "HTTP/1.0 404 No\r\nA: b\r\ndATE:Thu, 01 Jan 2026 01:01:01 GMT  \r\n\r\n",
            // Cut off after it.
            "HTTP/1.1 200 OK\r\nodd\r\nDate: Thu, 01 Jan 2026 01:01:01 GMT\r\nContent",
        ] {
            assert_eq!(date(answer.as_bytes()), expected, "{answer}");
        }
        for answer in [
            "",
            "HTTP/1.1 200 OK\r\n\r\n",
            "HTTP/1.1 200 OK\r\nDate: today\r\n\r\n",
            "HTTP/1.1 200 OK\r\nDate: Thu, 32 Jan 2026 01:01:01 GMT\r\n\r\n",
            "HTTP/1.1 200 OK\r\n\r\nDate: Thu, 01 Jan 2026 01:01:01 GMT\r\n",
            "HTTP/1.1 200 OK\r\nX-Date: Thu, 01 Jan 2026 01:01:01 GMT\r\n\r\n",
            "SSH-2.0\r\nDate: Thu, 01 Jan 2026 01:01:01 GMT\r\n\r\n",
        ] {
            assert_eq!(date(answer.as_bytes()), None, "{answer}");
        }
        assert_eq!(date(&[0xff; 100]), None);
    }

    #[test]
    fn a_clock_that_was_never_set_is_wrong() {
        for now in [
            UNIX_EPOCH,
            at(0) - Duration::from_secs(1),
            UNIX_EPOCH + LATEST,
        ] {
            let finding = insane(now).unwrap();
            assert_eq!(finding.verdict, Verdict::Wrong);
            assert!(finding.advice.unwrap().contains("chrony"));
        }
        let before = UNIX_EPOCH - Duration::from_secs(1);
        let finding = insane(before).unwrap();
        assert!(finding.detail.contains("1970"), "{}", finding.detail);
        assert_eq!(insane(at(0)), None);
        assert_eq!(insane(SystemTime::now()), None);
    }

    #[test]
    fn the_worst_server_counts_and_those_that_are_silent_do_not() {
        let dead = || Err("http://dead: refused".to_owned());
        let (verdict, detail) = told(vec![reading("a", 0, 30), dead(), reading("b", 30, 1)]);
        assert_eq!(verdict, Verdict::Fine, "{detail}");
        let (verdict, detail) = told(vec![reading("a", 0, 10), dead(), reading("b", 0, 300)]);
        assert_eq!(
            (verdict, detail.as_str()),
            (
                Verdict::Warning,
                "5 min 0 s ahead of that of etcd, http://b"
            )
        );
        let (_, detail) = told(vec![reading("a", 31, 0)]);
        assert_eq!(detail, "31 s behind that of etcd, http://a");
        let (verdict, detail) = told(vec![dead()]);
        assert_eq!(verdict, Verdict::Unknown);
        assert!(detail.contains("http://dead: refused"), "{detail}");
    }

    #[tokio::test]
    async fn only_servers_of_etcd_are_asked() {
        let options = EtcdOptions::default();
        for url in [
            None,
            Some("file:/nosuch"),
            Some("sqlite:/nosuch/x.db"),
            Some("etcd://:"),
        ] {
            let finding = examine(url.map(OsStr::new), &options).await;
            assert_eq!(finding.verdict, Verdict::Fine, "{finding:?}");
        }
        let finding = examine(Some(OsStr::new("etcds://localhost")), &options).await;
        assert_eq!(finding.verdict, Verdict::Unknown, "{finding:?}");
        assert!(finding.detail.contains("TLS only"), "{finding:?}");
    }
}
