//! Output of commands: tables for people, JSON for programs, and one form of times.

use std::fmt;
use std::io::{IsTerminal, Write};
use std::os::unix::fs::MetadataExt;

use jiff::Timestamp;
use rustix::fs::FileType;
use serde_json::Value;

/// Prints a line. A closed pipe is not an error.
#[macro_export]
macro_rules! say {
    ($($text:tt)*) => { $crate::command::output::line(format_args!($($text)*)) };
}
pub use say;

/// Prints a line for [`say`].
pub fn line(text: fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Text of an empty cell of a table.
pub const NONE: &str = "-";

/// Formats a table whose columns are as wide as their widest cell.
pub fn table<const N: usize>(titles: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let rows: Vec<[String; N]> = std::iter::once(titles.map(str::to_owned)).chain(rows).collect();
    let widths: [usize; N] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0));
    let line = |row: &[String; N]| {
        let cells = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{}{}", cell, " ".repeat(width - cell.chars().count())));
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

/// Formats a list as one line of JSON per entry, for other programs.
pub fn json_lines(list: &[Value]) -> String {
    list.iter().map(|entry| format!("{entry}\n")).collect()
}

/// Prints a result: the object `answer` for programs, or `words` for people.
pub fn done(json: bool, answer: &Value, words: &str) -> anyhow::Result<()> {
    super::print(&if json { format!("{answer}\n") } else { words.to_owned() })
}

/// Returns true when standard output is `/dev/null`, as it is when it was closed before the start.
pub fn leads_nowhere() -> bool {
    let null = std::fs::metadata("/dev/null").map(|null| null.rdev());
    let out = rustix::fs::fstat(std::io::stdout());
    matches!((null, out), (Ok(null), Ok(out)) if out.st_rdev == null && FileType::from_raw_mode(out.st_mode).is_char_device())
}

/// Returns true when standard output is a terminal.
pub fn is_terminal() -> bool {
    std::io::stdout().is_terminal()
}

/// Formats a time of the interface as it is shown everywhere: in UTC, to the second.
pub fn utc(value: &Value) -> String {
    let time: Option<Timestamp> = value.as_str().and_then(|text| text.parse().ok());
    time.map_or_else(|| NONE.to_owned(), |time| time.strftime("%F %TZ").to_string())
}

/// Returns a text without the control characters that a terminal would obey.
pub fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| NONE.to_owned(), |text| text.chars().filter(|c| !c.is_control()).collect())
}

/// Shortens a text to `most` characters in one line.
pub fn clipped(text: &str, most: usize) -> String {
    let plain: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if plain.chars().count() <= most {
        return plain;
    }
    plain.chars().take(most.saturating_sub(1)).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest() {
        let rows = [["a", "bücher"], ["longer", "x"]].map(|row| row.map(str::to_owned));
        assert_eq!(table(["ONE", "TWO"], rows), "ONE     TWO\na       bücher\nlonger  x\n");
    }

    #[test]
    fn times_have_one_form() {
        assert_eq!(utc(&json!("2026-11-27T18:50:02.123456Z")), "2026-11-27 18:50:02Z");
        assert_eq!(utc(&json!("2026-11-27T19:50:02+01:00")), "2026-11-27 18:50:02Z");
        assert_eq!(utc(&Value::Null), "-");
    }

    #[test]
    fn terminals_are_told_nothing_and_long_texts_are_cut() {
        assert_eq!(text(&json!("a\u{1b}[31mb")), "a[31mb");
        assert_eq!(clipped("one\ntwo three", 8), "one two…");
    }
}
