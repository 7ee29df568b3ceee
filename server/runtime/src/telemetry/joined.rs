//! JSON log lines with the ids of the request and of the trace beside the message, as in the access log, whatever the
//! span of the event. A search for one id finds all lines that belong to it.

use std::fmt;

use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::{JsonFields, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

/// Fields that are copied from spans. Their values are digits, letters and hyphens.
const FIELDS: [&str; 2] = ["request_id", "trace_id"];

/// The format `F` of JSON lines, extended by the ids of the spans around each event.
#[derive(Debug)]
pub(super) struct Joined<F>(pub(super) F);

impl<S, F> FormatEvent<S, JsonFields> for Joined<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    F: FormatEvent<S, JsonFields>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, JsonFields>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut line = String::with_capacity(512);
        self.0.format_event(context, Writer::new(&mut line), event)?;
        let ids = ids(context);
        match line.trim_end().strip_suffix('}') {
            Some(object) if !ids.is_empty() => writeln!(writer, "{object}{ids}}}"),
            _ => writer.write_str(&line),
        }
    }
}

/// The text appended to a line: `,"request_id":"..","trace_id":".."`, with each id from the innermost span that has it.
fn ids<S>(context: &FmtContext<'_, S, JsonFields>) -> String
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let mut found: [Option<String>; FIELDS.len()] = [const { None }; FIELDS.len()];
    let Some(scope) = context.event_scope() else { return String::new() };
    for span in scope {
        let extensions = span.extensions();
        let Some(fields) = extensions.get::<FormattedFields<JsonFields>>() else { continue };
        for (name, found) in FIELDS.iter().zip(&mut found) {
            if found.is_none() {
                *found = field(&fields.fields, name).map(|value| format!(",\"{name}\":\"{value}\""));
            }
        }
    }
    found.into_iter().flatten().collect()
}

/// The value of a text field in a JSON object; `None` for a value with characters that may need escaping.
fn field<'a>(object: &'a str, name: &str) -> Option<&'a str> {
    let at = object.find(&format!("\"{name}\":\""))? + name.len() + 4;
    let value = &object[at..at + object[at..].find('"')?];
    value.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.:/+=".contains(&byte)).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_and_nothing_that_would_break_a_line() {
        let object = r#"{"kind":"push.deliver","trace_id":"4bf92f","request_id":"a\"b"}"#;
        assert_eq!(field(object, "trace_id"), Some("4bf92f"));
        assert_eq!(field(object, "request_id"), None);
        assert_eq!(field(object, "missing"), None);
    }
}
