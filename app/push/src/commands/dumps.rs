//! Reads dumps of other senders' subscriptions, row by row, as lines of an import.
//!
//! The fields are found by their names in any dump: most of these tables have grown out of each other.
//!
//! | here | elsewhere |
//! |---|---|
//! | `endpoint` | `registration_id` (django-push-notifications), `identifier` (OneSignal) |
//! | `keys.p256dh` | `p256dh`, `public_key` (Laravel), `publicKey` (web-push-php), `web_p256` (OneSignal) |
//! | `keys.auth` | `auth`, `auth_token`, `authToken`, `web_auth` |
//! | `user` | `subscribable_id` (Laravel), `user_id`, `external_user_id` (OneSignal) |

use std::collections::BTreeMap;
use std::io::BufRead;

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use perennial_webpush::decode_base64;
use serde_json::{Map, Value, json};

use crate::model::tags::is_tag;

/// The sender that wrote a dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DumpFormat {
    /// Dump of web-push-libs/web-push-php: the JSON objects that its users keep, in an array or one per line
    WebPushPhp,
    /// Dump of laravel-notification-channels/webpush: the table push_subscriptions, as CSV, TSV or JSON
    Laravel,
    /// Dump of django-webpush or django-push-notifications: dumpdata, or their tables as CSV or TSV
    Django,
    /// Dump of pywebpush or the npm package web-push: PushSubscription objects, in an array or one per line
    Pywebpush,
    /// Dump of OneSignal: the CSV export, with the columns web_auth and web_p256
    Onesignal,
    /// Any JSON or CSV with an endpoint and its keys
    Json,
}

/// One row of a dump.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct DumpRow {
    /// Number of the line in the file; in a JSON document, the position in its list, from 1.
    pub(crate) number: u64,
    /// A line of an import, or the reason why there is none.
    pub(crate) read: Result<Value, Unusable>,
}

/// Reason why a row is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Unusable {
    /// The dump says that the subscription is not active: it has unsubscribed, or its endpoint has ended.
    Inactive,
    /// The subscription cannot be sent to, for this reason.
    Bad(String),
}

type Rows<'a> = Box<dyn Iterator<Item = DumpRow> + 'a>;

/// Reads a dump.
///
/// # Errors
/// When the file as a whole cannot be read.
pub(crate) fn read<'a>(format: DumpFormat, mut input: impl BufRead + 'a) -> anyhow::Result<Rows<'a>> {
    skip_byte_order_mark(&mut input)?;
    let beginning = input.fill_buf().context("the file cannot be read")?;
    refuse_foreign(beginning)?;
    let values: Rows<'_> = match shape(beginning) {
        Shape::Separated => return separated(format, input),
        Shape::Lines => lines(input),
        Shape::Document => document(input)?,
    };
    if format == DumpFormat::Django {
        return Ok(Box::new(join(values.collect()).into_iter()));
    }
    Ok(Box::new(
        values.map(move |row| DumpRow { read: row.read.and_then(|value| line(format, &value)), ..row }),
    ))
}

/// Skips the byte order mark that some editors put in front of UTF-8.
///
/// # Errors
/// When the file cannot be read.
pub(crate) fn skip_byte_order_mark(input: &mut impl BufRead) -> anyhow::Result<()> {
    const MARK: &[u8] = "\u{feff}".as_bytes();
    if input.fill_buf().context("the file cannot be read")?.starts_with(MARK) {
        input.consume(MARK.len());
    }
    Ok(())
}

/// The layout of the rows in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    /// One JSON document.
    Document,
    /// One JSON object per line.
    Lines,
    /// Values that are separated by commas or tabs.
    Separated,
}

/// Finds the layout by the first lines. A broken line does not decide, so that only this line is lost.
fn shape(beginning: &[u8]) -> Shape {
    let lines =
        || beginning.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty());
    let is_object = |line: &[u8]| line.starts_with(b"{") && serde_json::from_slice::<Value>(line).is_ok();
    // The last line may be incomplete.
    let complete = lines().count().saturating_sub(1).max(1);
    let has_object = || lines().take(complete).any(is_object);
    let first = lines().next().unwrap_or_default();
    if String::from_utf8_lossy(&first[..first.len().min(64)]).contains("\"subscriptions\"") {
        return Shape::Document;
    }
    match first.first() {
        // An object that is longer than the part that was read, or is broken, has others below it.
        Some(b'{') if has_object() || lines().skip(1).any(|line| line.starts_with(b"{\"")) => Shape::Lines,
        Some(b'{') if beginning.len() >= LONG_LINE && lines().count() == 1 => Shape::Lines,
        Some(b'{' | b'[') => Shape::Document,
        _ if has_object() => Shape::Lines,
        _ => Shape::Separated,
    }
}

/// Length in bytes from which on a single line is not the beginning of a document over several lines.
const LONG_LINE: usize = 64 << 10;

/// Refuses formats that cannot be read. The error says what to do instead.
fn refuse_foreign(beginning: &[u8]) -> anyhow::Result<()> {
    let text = String::from_utf8_lossy(&beginning[..beginning.len().min(4096)]);
    if beginning.starts_with(&[0xff, 0xfe]) || beginning.starts_with(&[0xfe, 0xff]) {
        bail!("the file is UTF-16: save it as UTF-8 first (iconv -f UTF-16 -t UTF-8)");
    }
    if beginning.starts_with(&[0x1f, 0x8b]) {
        bail!("the file is compressed: gunzip it first");
    }
    let is_sql = text.starts_with("-- ") || text.starts_with("/*!") || text.contains("INSERT INTO");
    if is_sql || text.starts_with("PGDMP") {
        bail!(
            "the file is a dump of SQL: export the table as CSV, TSV or JSON instead (docs/moving-in.md says how)"
        );
    }
    Ok(())
}

/// Reads one JSON value per line. An invalid line does not stop the others.
fn lines<'a>(input: impl BufRead + 'a) -> Rows<'a> {
    let rows = (1..).zip(input.split(b'\n')).filter_map(|(number, line)| {
        let line = match line {
            Ok(line) if line.trim_ascii().is_empty() => return None,
            Ok(line) => line,
            Err(error) => return Some(DumpRow { number, read: Err(Unusable::Bad(error.to_string())) }),
        };
        let read = serde_json::from_slice(&line);
        Some(DumpRow { number, read: read.map_err(|error| Unusable::Bad(format!("it is no JSON: {error}"))) })
    });
    Box::new(rows)
}

/// Reads a list of values, or one value. phpMyAdmin puts the rows of a table into an entry of a list.
fn document<'a>(input: impl BufRead) -> anyhow::Result<Rows<'a>> {
    let value: Value = serde_json::from_reader(input).context("the file is no JSON")?;
    let is_table = |entry: &Value| entry["data"].is_array() && entry["type"].is_string();
    let rows = match value {
        Value::Array(entries) if entries.iter().any(is_table) => {
            let tables = entries.into_iter().filter(is_table);
            tables
                .flat_map(|mut table| table["data"].as_array_mut().map(std::mem::take).unwrap_or_default())
                .collect()
        }
        Value::Array(rows) => rows,
        mut one => match one["subscriptions"].as_array_mut() {
            Some(rows) => std::mem::take(rows),
            None => vec![one],
        },
    };
    Ok(Box::new((1..).zip(rows).map(|(number, value)| DumpRow { number, read: Ok(value) })))
}

/// Reads values that are separated by commas, semicolons or tabs, with or without a row of names in front.
fn separated<'a>(format: DumpFormat, mut input: impl BufRead + 'a) -> anyhow::Result<Rows<'a>> {
    let beginning = input.fill_buf()?;
    let first = beginning.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let count = |separator| first.iter().filter(|byte| **byte == separator).count();
    let separator = [b'\t', b';', b','].into_iter().max_by_key(|separator| count(*separator)).unwrap_or(b',');
    let reader = csv::ReaderBuilder::new()
        .delimiter(separator)
        // Files with tabs escape their values, and do not quote them.
        .quoting(separator != b'\t')
        .has_headers(false)
        .flexible(true)
        .from_reader(input);
    let mut records = reader.into_byte_records_lossy();
    let Some(first) = records.next() else { return Ok(Box::new(std::iter::empty())) };
    let names: Vec<String> = first.cells.iter().map(|cell| cell.trim().to_ascii_lowercase()).collect();
    let is_header = names.iter().any(|name| ENDPOINT.contains(&name.as_str()));
    if is_header && format == DumpFormat::Onesignal && !names.iter().any(|name| name == "web_p256") {
        bail!(
            "the export has no columns web_auth and web_p256, without which nothing can be encrypted: ask for them with extra_fields (docs/moving-in.md says how)"
        );
    }
    let rest = records.map(move |record| (record, is_header.then(|| names.clone())));
    let first = (!is_header).then_some((first, None));
    Ok(Box::new(first.into_iter().chain(rest).map(move |(record, names)| {
        let fields = match names {
            Some(names) => named(&names, record.cells),
            None => unnamed(format, &record.cells),
        };
        DumpRow { number: record.line, read: line(format, &Value::Object(fields)) }
    })))
}

/// One record of separated values.
struct DumpRecord {
    line: u64,
    cells: Vec<String>,
}

/// Reads records with any bytes in them.
trait Lossy<'a> {
    fn into_byte_records_lossy(self) -> Box<dyn Iterator<Item = DumpRecord> + 'a>;
}

impl<'a, R: BufRead + 'a> Lossy<'a> for csv::Reader<R> {
    fn into_byte_records_lossy(self) -> Box<dyn Iterator<Item = DumpRecord> + 'a> {
        let text = |cell: &[u8]| String::from_utf8_lossy(cell).into_owned();
        Box::new(self.into_byte_records().map_while(Result::ok).map(move |record| DumpRecord {
            line: record.position().map_or(0, csv::Position::line),
            cells: record.iter().map(text).collect(),
        }))
    }
}

/// Returns true when a cell has a text that databases write for a missing value.
fn is_null(cell: &str) -> bool {
    matches!(cell, "" | "NULL" | "\\N")
}

fn named(names: &[String], cells: Vec<String>) -> Map<String, Value> {
    let pairs = names.iter().zip(cells).filter(|(_, cell)| !is_null(cell));
    pairs.map(|(name, cell)| (name.clone(), Value::String(cell))).collect()
}

/// Finds the fields of a row without names by their values: there is one URL, one key of 65 bytes, and one secret
/// of 16.
fn unnamed(format: DumpFormat, cells: &[String]) -> Map<String, Value> {
    let mut fields = Map::new();
    let length = |cell: &String| decode_base64(cell).map_or(0, |bytes| bytes.len());
    let find = |fits: &dyn Fn(&String) -> bool| cells.iter().find(|cell| fits(cell)).cloned();
    let found = [
        ("endpoint", find(&|cell| cell.starts_with("https://"))),
        ("p256dh", find(&|cell| length(cell) == 65)),
        ("auth", find(&|cell| length(cell) == 16)),
        // id, subscribable_type, subscribable_id
        ("user", cells.get(2).filter(|cell| format == DumpFormat::Laravel && !is_null(cell)).cloned()),
    ];
    fields.extend(found.into_iter().filter_map(|(name, cell)| Some((name.to_owned(), cell?.into()))));
    fields
}

const ENDPOINT: [&str; 3] = ["endpoint", "registration_id", "identifier"];
const P256DH: [&str; 4] = ["p256dh", "public_key", "publicKey", "web_p256"];
const AUTH: [&str; 4] = ["auth", "auth_token", "authToken", "web_auth"];
const USER: [&str; 5] = ["user", "user_id", "userId", "subscribable_id", "external_user_id"];
const WRAPPERS: [&str; 3] = ["subscription", "subscription_info", "push_subscription"];

/// Makes a line of an import from one row.
fn line(format: DumpFormat, row: &Value) -> Result<Value, Unusable> {
    let bad = |why: &str| Unusable::Bad(why.to_owned());
    let Value::Object(outer) = row else { return Err(bad("it is no object")) };
    let is = |name: &str, words: &[&str]| match &outer.get(name) {
        Some(Value::Bool(value)) => words.contains(&if *value { "t" } else { "f" }),
        Some(Value::Number(number)) => words.contains(&number.to_string().as_str()),
        Some(Value::String(text)) => words.contains(&text.to_ascii_lowercase().as_str()),
        _ => false,
    };
    if is("active", &["f", "false", "0"]) || is("invalid_identifier", &["t", "true", "1"]) {
        return Err(Unusable::Inactive);
    }
    let wrapped = WRAPPERS.iter().find_map(|name| outer.get(*name));
    // A text column may contain the subscription as JSON.
    let parsed: Option<Value> =
        wrapped.and_then(Value::as_str).and_then(|text| serde_json::from_str(text).ok());
    let inner = parsed.as_ref().or(wrapped).and_then(Value::as_object).unwrap_or(outer);
    let text = |fields: &Map<String, Value>, names: &[&str]| {
        names
            .iter()
            .find_map(|name| fields.get(*name).and_then(Value::as_str))
            .map(str::trim)
            .map(str::to_owned)
    };
    let endpoint = text(inner, &ENDPOINT).filter(|endpoint| !endpoint.is_empty());
    let endpoint = endpoint.ok_or_else(|| bad("endpoint: it is missing"))?;
    if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
        return Err(bad("endpoint: it is no URL, but the token of another kind of push"));
    }
    let keys = inner.get("keys").and_then(Value::as_object).unwrap_or(inner);
    let (Some(p256dh), Some(auth)) = (text(keys, &P256DH), text(keys, &AUTH)) else {
        return Err(bad("keys: they are missing, and without them nothing can be encrypted"));
    };
    let mut subscription = json!({ "endpoint": endpoint, "keys": { "p256dh": p256dh, "auth": auth } });
    match inner.get("expirationTime") {
        None | Some(Value::Null) => {}
        Some(Value::Number(time)) => subscription["expirationTime"] = json!(time),
        Some(_) => return Err(bad("expirationTime: wanted milliseconds since 1970, or null")),
    }
    let mut line = json!({ "subscription": subscription });
    if let Some(user) = USER.iter().find_map(|name| as_user(outer.get(*name)?)) {
        line["user"] = user.into();
    }
    if let Some(Value::Number(_) | Value::Bool(_)) = outer.get("tags") {
        return Err(bad("tags: wanted a list of words"));
    }
    let tags = tags(outer);
    if !tags.is_empty() {
        line["tags"] = tags.into();
    }
    if let Some(key) = text(outer, &["key"]) {
        line["key"] = key.into();
    }
    if format != DumpFormat::Onesignal
        && outer.get("metadata").is_some_and(|metadata| !metadata.is_object() && !metadata.is_null())
    {
        return Err(bad("metadata: wanted an object"));
    }
    if let Some(metadata) = metadata(format, outer) {
        line["metadata"] = metadata;
    }
    Ok(line)
}

/// Reads a user from a number or a text; Django writes natural keys as lists.
fn as_user(value: &Value) -> Option<String> {
    match value {
        Value::Number(number) => Some(number.to_string()),
        Value::String(text) if !text.is_empty() => Some(text.clone()),
        Value::Array(parts) if parts.len() == 1 => as_user(&parts[0]),
        _ => None,
    }
}

/// Reads tags from groups and lists of words, and leaves out words that cannot be tags.
fn tags(row: &Map<String, Value>) -> Vec<String> {
    let words = |value: &Value| match value {
        Value::String(text) => vec![text.clone()],
        Value::Array(items) => items.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        _ => Vec::new(),
    };
    let lists = [row.get("group"), row.get("groups"), row.get("tags").filter(|tags| tags.is_array())];
    lists.into_iter().flatten().flat_map(words).filter(|word| is_tag(word)).collect()
}

/// Reads the metadata. OneSignal's tags are names with values, which fill the places in templates here.
fn metadata(format: DumpFormat, row: &Map<String, Value>) -> Option<Value> {
    let found = match row.get("metadata") {
        Some(metadata) => metadata.clone(),
        None if format == DumpFormat::Onesignal => serde_json::from_str(row.get("tags")?.as_str()?).ok()?,
        None => return None,
    };
    found.as_object().is_some_and(|fields| !fields.is_empty()).then_some(found)
}

/// Joins tables that Django keeps apart: subscriptions, and their users and groups.
fn join(rows: Vec<DumpRow>) -> Vec<DumpRow> {
    let mut groups = BTreeMap::new();
    let mut owners = BTreeMap::<String, Vec<Value>>::new();
    let mut subscriptions = Vec::new();
    for row in rows {
        let value = match row.read {
            Ok(value) => value,
            Err(why) => {
                subscriptions.push(DumpRow { number: row.number, read: Err(why) });
                continue;
            }
        };
        match value["model"].as_str() {
            Some("webpush.group") => {
                _ = groups.insert(value["pk"].to_string(), value["fields"]["name"].clone());
            }
            Some("webpush.pushinformation") => {
                let fields = value["fields"].clone();
                owners.entry(fields["subscription"].to_string()).or_default().push(fields);
            }
            Some("webpush.subscriptioninfo" | "push_notifications.webpushdevice") | None => {
                subscriptions.push(DumpRow { number: row.number, read: Ok(value) });
            }
            // The model belongs to another application.
            Some(_) => {}
        }
    }
    for row in &mut subscriptions {
        let Ok(value) = &row.read else { continue };
        let mut fields = if value["model"].is_string() { value["fields"].clone() } else { value.clone() };
        let owned = owners.get(&value["pk"].to_string()).map(Vec::as_slice).unwrap_or_default();
        if value["model"] == "webpush.subscriptioninfo" {
            let user = owned.iter().find_map(|owner| as_user(&owner["user"]));
            let name = |owner: &Value| groups.get(&owner["group"].to_string()).cloned();
            fields["groups"] = owned.iter().filter_map(name).collect();
            if let Some(user) = user {
                fields["user"] = user.into();
            }
        }
        row.read = line(DumpFormat::Django, &fields);
    }
    subscriptions
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::BufReader;

    use super::*;

    fn rows(format: DumpFormat, name: &str) -> anyhow::Result<Vec<DumpRow>> {
        let file = format!("{}/../../tests/fixtures/dumps/{name}", env!("CARGO_MANIFEST_DIR"));
        let file = File::open(&file).unwrap_or_else(|error| panic!("{file}: {error}"));
        Ok(read(format, BufReader::new(file))?.collect())
    }

    /// Returns for each row whether it has an endpoint and valid keys.
    fn usable(rows: &[DumpRow]) -> Vec<bool> {
        let is_usable = |row: &DumpRow| {
            row.read.as_ref().is_ok_and(|line| {
                let keys = &line["subscription"]["keys"];
                let (p256dh, auth) = (keys["p256dh"].as_str().unwrap(), keys["auth"].as_str().unwrap());
                perennial_webpush::Keys::parse(p256dh, auth).is_ok()
            })
        };
        rows.iter().map(is_usable).collect()
    }

    fn users(rows: &[DumpRow]) -> Vec<Option<&str>> {
        rows.iter().filter_map(|row| row.read.as_ref().ok()).map(|line| line["user"].as_str()).collect()
    }

    #[test]
    fn the_table_of_laravel_is_read_as_every_tool_writes_it() {
        for name in [
            "laravel.batch.tsv",
            "laravel.batch-raw.tsv",
            "laravel.outfile.tsv",
            "laravel.mysqldump-tab.txt",
            "laravel.outfile.csv",
            "laravel.phpmyadmin.csv",
            "laravel.phpmyadmin-noheader.csv",
            "laravel.phpmyadmin.json",
            "laravel.tinker.json",
            "laravel.fputcsv.csv",
        ] {
            let rows = rows(DumpFormat::Laravel, name).unwrap();
            assert_eq!(usable(&rows), [true, true, true, false, false], "{name}: {rows:#?}");
            assert_eq!(users(&rows)[..3], [Some("17"), Some("17"), Some("342")], "{name}");
        }
        let error = rows(DumpFormat::Laravel, "laravel.mysqldump.sql").unwrap_err().to_string();
        assert!(error.contains("a dump of SQL"), "{error}");
    }

    #[test]
    fn both_shapes_of_web_push_php_are_read() {
        for name in ["web-push-php.json", "web-push-php.jsonl"] {
            let rows = rows(DumpFormat::WebPushPhp, name).unwrap();
            // The encoding of the last row does not exist, which does not matter: it is not the encoding that we
            // send with.
            assert_eq!(usable(&rows), [true, true, true, false, true], "{name}: {rows:#?}");
        }
    }

    #[test]
    fn what_django_keeps_apart_is_joined() {
        for name in [
            "django-webpush.dumpdata.json",
            "django-webpush.dumpdata-oneline.json",
            "django-webpush.dumpdata.jsonl",
        ] {
            let rows = rows(DumpFormat::Django, name).unwrap();
            assert_eq!(usable(&rows), [true, true, true, false, false], "{name}: {rows:#?}");
            assert_eq!(users(&rows)[..3], [Some("1"), Some("2"), None], "{name}");
            assert_eq!(rows[2].read.as_ref().unwrap()["tags"], json!(["news"]), "{name}");
        }
        let joined = rows(DumpFormat::Django, "django-webpush.joined.csv").unwrap();
        assert_eq!(usable(&joined), [true, true, true, true, false, false], "{joined:#?}");
        assert_eq!(joined[1].read.as_ref().unwrap()["tags"], json!(["news"]));
        assert_eq!(users(&joined)[..2], [Some("1"), Some("2")]);
        let table = rows(DumpFormat::Django, "django-webpush.subscriptioninfo.csv").unwrap();
        assert_eq!(usable(&table), [true, true, true, false, false], "{table:#?}");
    }

    #[test]
    fn devices_of_django_push_notifications_that_are_not_active_are_left_out() {
        for name in ["django-push-notifications.dumpdata.json", "django-push-notifications.csv"] {
            let rows = rows(DumpFormat::Django, name).unwrap();
            assert_eq!(usable(&rows), [true, true, true, false, false], "{name}: {rows:#?}");
            assert_eq!(rows[3].read, Err(Unusable::Inactive), "{name}");
            assert!(matches!(&rows[4].read, Err(Unusable::Bad(why)) if why.contains("no URL")), "{name}");
            assert_eq!(users(&rows), [Some("1"), Some("2"), None], "{name}");
        }
        // Without a row of names, inactive rows cannot be told apart.
        let rows = rows(DumpFormat::Django, "django-push-notifications.copy.tsv").unwrap();
        assert_eq!(usable(&rows), [true, true, true, true, false], "{rows:#?}");
    }

    #[test]
    fn objects_of_browsers_are_read_bare_and_wrapped() {
        for name in ["pywebpush.json", "pywebpush.jsonl"] {
            let rows = rows(DumpFormat::Pywebpush, name).unwrap();
            assert_eq!(usable(&rows), [true, true, true, false, false], "{name}: {rows:#?}");
            let windows = &rows[2].read.as_ref().unwrap()["subscription"];
            assert!(windows["endpoint"].as_str().unwrap().contains("%2b"), "byte for byte: {windows}");
            assert_eq!(windows["expirationTime"], 1_893_456_000_000.0);
            assert_eq!(rows[4].number, 5);
        }
        assert_eq!(
            usable(&rows(DumpFormat::Pywebpush, "pywebpush.single-subscription-info.json").unwrap()),
            [true]
        );
        let wrapped = rows(DumpFormat::Json, "pywebpush.wrapped.jsonl").unwrap();
        assert_eq!(usable(&wrapped), [true, true, true], "{wrapped:#?}");
        assert_eq!(users(&wrapped), [Some("17"), Some("18"), Some("19")]);
    }

    #[test]
    fn onesignal_needs_the_columns_of_keys() {
        let rows_of = rows(DumpFormat::Onesignal, "onesignal.csv").unwrap();
        assert_eq!(usable(&rows_of), [true, true, true, false, false, false], "{rows_of:#?}");
        assert_eq!(rows_of[3].read, Err(Unusable::Inactive));
        let first = rows_of[0].read.as_ref().unwrap();
        assert_eq!((&first["user"], &first["metadata"]["plan"]), (&json!("user_17"), &json!("pro")));
        let error = rows(DumpFormat::Onesignal, "onesignal-default-columns.csv").unwrap_err().to_string();
        assert!(error.contains("web_p256"), "{error}");
        let error = rows(DumpFormat::Onesignal, "onesignal.csv.gz").unwrap_err().to_string();
        assert!(error.contains("gunzip"), "{error}");
    }

    #[test]
    fn a_first_line_that_is_broken_costs_itself_alone() {
        let good = r#"{"endpoint":"https://fcm.googleapis.com/x","keys":{"p256dh":"BA","auth":"AA"}}"#;
        let long =
            format!(r#"{{"endpoint":"https://fcm.googleapis.com/x","more":"{}"}}"#, "x".repeat(200 << 10));
        for (first, usable) in [
            ("exported 2 rows", 2),
            ("1", 2),
            (r#"{"endpoint":"https://fcm"#, 2),
            ("\u{feff}", 2),
            (&format!("\u{feff}{good}"), 3),
            (&long, 2),
            (&"junk ".repeat(20_000), 2),
        ] {
            for format in [DumpFormat::Pywebpush, DumpFormat::Json] {
                let text = format!("{first}\n{good}\n{good}\n");
                let input = BufReader::with_capacity(1 << 20, text.as_bytes());
                let rows: Vec<DumpRow> = read(format, input).unwrap().collect();
                let found = rows.iter().filter(|row| row.read.is_ok()).count();
                assert_eq!(found, usable, "{}: {rows:?}", &first[..first.len().min(40)]);
            }
        }
        let utf16 = read(DumpFormat::Json, &[0xff, 0xfe, b'[', 0][..]).map(drop).unwrap_err();
        assert!(utf16.to_string().contains("UTF-16"), "{utf16}");
    }

    #[test]
    fn fields_that_do_not_fit_are_named() {
        for (field, wanted) in [
            (r#""tags": 5"#, "tags: "),
            (r#""metadata": "x""#, "metadata: "),
            (r#""expirationTime": "soon""#, "expirationTime: "),
        ] {
            let text = format!(
                r#"[{{"endpoint":"https://fcm.googleapis.com/x","keys":{{"p256dh":"BA","auth":"AA"}},{field}}}]"#
            );
            let rows: Vec<DumpRow> = read(DumpFormat::Json, text.as_bytes()).unwrap().collect();
            assert!(matches!(&rows[0].read, Err(Unusable::Bad(why)) if why.starts_with(wanted)), "{rows:?}");
        }
    }

    #[test]
    fn nothing_is_nothing() {
        assert!(read(DumpFormat::Json, &b""[..]).unwrap().next().is_none());
        assert!(read(DumpFormat::Json, &b"[]"[..]).unwrap().next().is_none());
        assert!(read(DumpFormat::Json, &b"[1"[..]).is_err());
    }
}
