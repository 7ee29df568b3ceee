//! An example application that speaks something else than HTTP: it counts words, by lines on TCP and by datagrams in the
//! form of statsd. Both listeners have settings, limits, metrics and a place in `/connections`, and a new process takes
//! them over at SIGUSR2 without a refused connection.
//!
//! `cargo run --example lines --no-default-features`, then `printf 'add apples 3\nget apples\n' | nc -N 127.0.0.1 7000` and
//! `printf 'apples:2|c' | nc -u -w1 127.0.0.1 8125`.

use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use perennial::anyhow;
use perennial::listeners::{Datagram, Listener, Stream, TcpHandler, UdpHandler};
use perennial::prelude::*;
use perennial::table::Table;
use perennial::tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

/// How long a count is kept after its last change.
const KEPT: Duration = Duration::from_secs(3600);
/// Maximum number of counts: strangers choose the names.
const MOST: u64 = 10_000;
/// Maximum length of a line, in bytes.
const LINE: u64 = 256;

struct Lines;

impl Module for Lines {
    const NAME: &'static str = "lines";
    const LISTENERS: &'static [Listener] =
        &[Listener::tcp("lines", "127.0.0.1:7000"), Listener::udp("counts", "127.0.0.1:8125")];

    fn configure(_: &mut Reader<'_>) -> Self {
        Self
    }

    async fn mount(self, host: &mut Host) -> anyhow::Result<()> {
        let counts = Arc::new(Table::new(MOST));
        host.listen_tcp("lines", Counter(Arc::clone(&counts)));
        host.listen_udp("counts", Counter(counts));
        Ok(())
    }
}

struct Counter(Arc<Table<i64>>);

impl Counter {
    fn answer(&self, line: &str) -> String {
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["get", name] => self.0.get(name).map_or(0, |count| *count).to_string(),
            ["add", name, by] => match by.parse() {
                Ok(by) => self.0.add(name, by, KEPT).to_string(),
                Err(_) => format!("error: {by} is no whole number"),
            },
            _ => "error: wanted get NAME or add NAME NUMBER".to_owned(),
        }
    }
}

impl TcpHandler for Counter {
    async fn serve(&self, mut stream: Stream, drain: Drain) -> io::Result<()> {
        let (reader, mut writer) = perennial::tokio::io::split(&mut stream);
        let mut reader = BufReader::new(reader);
        let mut line = String::new();
        loop {
            line.clear();
            let mut limited = (&mut reader).take(LINE);
            let read = perennial::tokio::select! {
                read = limited.read_line(&mut line) => read?,
                // A client that is told can come back to another process.
                () = drain.soft() => return writer.write_all(b"goodbye\n").await,
            };
            if read == 0 || !line.ends_with('\n') {
                return Ok(());
            }
            writer.write_all(format!("{}\n", self.answer(&line)).as_bytes()).await?;
        }
    }
}

impl UdpHandler for Counter {
    async fn receive(&self, datagram: Datagram) -> io::Result<()> {
        let text = std::str::from_utf8(&datagram.bytes).map_err(io::Error::other)?;
        for (name, by) in text.lines().filter_map(|line| line.strip_suffix("|c")?.split_once(':')) {
            self.0.add(name, by.parse().map_err(io::Error::other)?, KEPT);
        }
        Ok(())
    }
}

fn main() -> ExitCode {
    Perennial::new().name("lines").about("Counts words.").host::<Lines>().main()
}
