//! Log lines on their way to standard error: they are gathered, and written by a thread of their own.
//!
//! A request never waits for the reader of the log. The waiting lines are bounded in bytes; a line beyond the bound is
//! dropped and counted, and so is a line that a full disk did not take. Gathering lines for some milliseconds turns
//! thousands of them into one system call.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use parking_lot::{Condvar, Mutex, MutexGuard};
use serde::Serialize;
use tracing_subscriber::fmt::MakeWriter;

/// Maximum number of bytes that wait for the reader of standard error.
const MOST: usize = 8 << 20;
/// Time for which lines are gathered before a write.
const GATHER: Duration = Duration::from_millis(10);
/// Time limit for writing the last lines at the end.
const LAST: Duration = Duration::from_secs(1);

/// The queue of lines for the writer. A cheap handle.
#[derive(Clone, Debug)]
pub(super) struct Lines(Arc<WriterQueue>);

#[derive(Debug, Default)]
struct WriterQueue {
    state: Mutex<WriterState>,
    came: Condvar,
    dropped: AtomicU64,
}

#[derive(Debug, Default)]
struct WriterState {
    waiting: Vec<u8>,
    closed: bool,
}

/// A direct writer of JSON lines. A line with fixed fields costs a tenth of a general tracing event. A cheap handle.
#[derive(Clone, Debug)]
pub struct JsonLines(Lines);

impl JsonLines {
    pub(super) fn new(lines: Lines) -> Self {
        Self(lines)
    }

    /// Writes one object as a line.
    pub fn write(&self, line: &impl Serialize) {
        self.0.append(|waiting| {
            let begin = waiting.len();
            match serde_json::to_writer(&mut *waiting, line) {
                Ok(()) => waiting.push(b'\n'),
                Err(_) => waiting.truncate(begin),
            }
        });
    }
}

/// The thread that writes the lines. Dropping this value writes out the lines logged before.
#[derive(Debug)]
pub(super) struct Writer {
    lines: Lines,
    ended: Mutex<Receiver<()>>,
}

impl Lines {
    /// Starts the thread that writes to `out`.
    pub(super) fn start(out: impl Write + Send + 'static) -> io::Result<(Self, Writer)> {
        let lines = Self(Arc::default());
        let (end, ended) = sync_channel(1);
        let to_write = lines.clone();
        std::thread::Builder::new().name("log-writer".to_owned()).spawn(move || {
            to_write.write_to(out);
            let _ = end.send(());
        })?;
        Ok((lines.clone(), Writer { lines, ended: Mutex::new(ended) }))
    }

    /// Appends a line if there is room for it. Escapes the control characters that the formatters let through, since
    /// terminals obey them.
    pub(super) fn append(&self, write: impl FnOnce(&mut Vec<u8>)) {
        let mut state = self.state();
        if state.waiting.len() >= MOST {
            self.0.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let first = state.waiting.is_empty();
        let before = state.waiting.len();
        write(&mut state.waiting);
        escape_c1(&mut state.waiting, before);
        if first {
            self.0.came.notify_one();
        }
    }

    /// Number of lines dropped so far.
    pub(super) fn dropped(&self) -> u64 {
        self.0.dropped.load(Ordering::Relaxed)
    }

    fn state(&self) -> MutexGuard<'_, WriterState> {
        self.0.state.lock()
    }

    fn write_to(&self, out: impl Write) {
        let mut out = Whole { out, is_cut: false };
        let mut writing = Vec::new();
        loop {
            let mut state = self.state();
            while state.waiting.is_empty() {
                if state.closed {
                    return;
                }
                self.0.came.wait(&mut state);
            }
            let closed = state.closed;
            drop(state);
            if !closed {
                std::thread::sleep(GATHER);
            }
            std::mem::swap(&mut self.state().waiting, &mut writing);
            let lost = out.write(&writing, || self.state().closed);
            self.0.dropped.fetch_add(lost, Ordering::Relaxed);
            writing.clear();
        }
    }
}

/// A writer that never joins two lines, even when a write stops in the middle of a line.
#[derive(Debug)]
struct Whole<W> {
    out: W,
    /// Whether the last line was cut off.
    is_cut: bool,
}

impl<W: Write> Whole<W> {
    /// Writes lines and returns the number of lost ones, including a line that was cut off. Waits for a full pipe,
    /// unless the process is ending, but not for a full disk.
    fn write(&mut self, lines: &[u8], is_ending: impl Fn() -> bool) -> u64 {
        if self.is_cut && self.write_part(b"\n", &is_ending) == 1 {
            self.is_cut = false;
        }
        let written = if self.is_cut { 0 } else { self.write_part(lines, &is_ending) };
        let (done, rest) = lines.split_at(written);
        if !rest.is_empty() {
            self.is_cut |= done.last().is_some_and(|byte| *byte != b'\n');
        }
        rest.iter().filter(|byte| **byte == b'\n').count() as u64
    }

    /// Writes as much of `bytes` as possible and returns the number of bytes written.
    fn write_part(&mut self, bytes: &[u8], is_ending: impl Fn() -> bool) -> usize {
        let mut written = 0;
        while written < bytes.len() {
            match self.out.write(&bytes[written..]) {
                Ok(0) => break,
                Ok(more) => written += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Standard error may be a pipe that another process has made non-blocking.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && !is_ending() => {
                    std::thread::sleep(GATHER);
                }
                Err(_) => break,
            }
        }
        written
    }
}

/// Escapes the control characters U+0080 to U+009F in the notation of JSON, also in text lines. After one of them, CSI,
/// a terminal takes the next characters for a command.
fn escape_c1(bytes: &mut Vec<u8>, from: usize) {
    let is_c1 = |pair: &[u8]| pair[0] == 0xc2 && (0x80..=0x9f).contains(&pair[1]);
    if !bytes[from..].windows(2).any(is_c1) {
        return;
    }
    let line = bytes.split_off(from);
    let mut rest = line.as_slice();
    while let Some(at) = rest.windows(2).position(is_c1) {
        bytes.extend_from_slice(&rest[..at]);
        bytes.extend_from_slice(format!("\\u{:04x}", rest[at + 1]).as_bytes());
        rest = &rest[at + 2..];
    }
    bytes.extend_from_slice(rest);
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.lines.state().closed = true;
        self.lines.0.came.notify_one();
        // A reader that has stopped reading must not keep the process from ending.
        let _ = self.ended.get_mut().recv_timeout(LAST);
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = LogLine<'a>;

    fn make_writer(&'a self) -> LogLine<'a> {
        LogLine(self)
    }
}

/// The writer for one event. The subscriber writes each event in one piece.
#[derive(Debug)]
pub(super) struct LogLine<'a>(&'a Lines);

impl Write for LogLine<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.append(|waiting| waiting.extend_from_slice(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn a_terminal_is_told_nothing_by_what_is_logged() {
        let mut bytes = b"before \xc2\x9b".to_vec();
        let before = bytes.len();
        bytes.extend_from_slice("naïve \u{80}\u{9b}31m café \u{a0}".as_bytes());
        escape_c1(&mut bytes, before);
        let line = String::from_utf8(bytes[before..].to_vec()).unwrap();
        assert_eq!(line, "naïve \\u0080\\u009b31m café \u{a0}");
    }

    /// A standard error whose first write blocks until the test passes the barrier.
    #[derive(Clone, Default)]
    struct Out {
        written: Arc<Mutex<Vec<u8>>>,
        gate: Option<Arc<Barrier>>,
    }

    impl Write for Out {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if let Some(gate) = self.gate.take() {
                gate.wait();
            }
            self.written.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Takes `room` bytes, then fails with the next of `steps`, which also sets the next `room`.
    struct Short {
        written: Arc<Mutex<Vec<u8>>>,
        room: usize,
        steps: std::vec::IntoIter<(io::ErrorKind, usize)>,
    }

    impl Write for Short {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.room == 0 {
                let Some((kind, room)) = self.steps.next() else { return Err(io::ErrorKind::Other.into()) };
                self.room = room;
                return Err(kind.into());
            }
            let length = bytes.len().min(self.room);
            self.room -= length;
            self.written.lock().extend_from_slice(&bytes[..length]);
            Ok(length)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn short(room: usize, steps: Vec<(io::ErrorKind, usize)>) -> (Whole<Short>, Arc<Mutex<Vec<u8>>>) {
        let written = Arc::default();
        let out = Short { written: Arc::clone(&written), room, steps: steps.into_iter() };
        (Whole { out, is_cut: false }, written)
    }

    #[test]
    fn a_full_pipe_is_waited_for_and_loses_nothing() {
        let (mut out, written) =
            short(3, vec![(io::ErrorKind::WouldBlock, 2), (io::ErrorKind::WouldBlock, 100)]);
        assert_eq!(out.write(b"one\ntwo\nthree\n", || false), 0);
        assert_eq!(written.lock().as_slice(), b"one\ntwo\nthree\n");
        let (mut out, _) = short(3, vec![(io::ErrorKind::WouldBlock, 100)]);
        assert_eq!(out.write(b"one\ntwo\n", || true), 2, "but not at the end");
    }

    #[test]
    fn lines_that_a_full_disk_takes_are_counted_and_the_next_one_stands_alone() {
        let full = io::ErrorKind::StorageFull;
        let (mut out, written) = short(6, vec![(full, 0), (full, 100)]);
        assert_eq!(out.write(b"one\ntwo\nthree\n", || false), 2, "one was cut off, one never begun");
        assert_eq!(out.write(b"four\n", || false), 1, "the disk is full still");
        assert_eq!(out.write(b"five\n", || false), 0);
        assert_eq!(written.lock().as_slice(), b"one\ntw\nfive\n");
    }

    #[test]
    fn every_line_is_written_whole_and_in_order_before_the_end() {
        let out = Out::default();
        let (lines, writer) = Lines::start(out.clone()).unwrap();
        for number in 0..10_000 {
            lines.append(|waiting| waiting.extend(format!("{number}\n").bytes()));
        }
        drop(writer);
        let written = String::from_utf8(out.written.lock().clone()).unwrap();
        assert!(written.lines().map(|line| line.parse::<usize>().unwrap()).eq(0..10_000));
        assert_eq!(lines.dropped(), 0);
    }

    #[test]
    fn a_reader_that_does_not_read_costs_lines_and_nobody_any_time() {
        let gate = Arc::new(Barrier::new(2));
        let out = Out { gate: Some(Arc::clone(&gate)), ..Out::default() };
        let (lines, writer) = Lines::start(out.clone()).unwrap();
        let line = vec![b'x'; 1 << 10];
        // One part is being written, one part waits, and the rest finds no room.
        for _ in 0..(3 * MOST / line.len()) {
            lines.append(|waiting| waiting.extend(&line));
        }
        assert!(lines.dropped() > 0);
        gate.wait();
        drop(writer);
        let written = out.written.lock().len() / line.len();
        assert_eq!(u64::try_from(written).unwrap() + lines.dropped(), 3 * (MOST / line.len()) as u64);
    }
}
