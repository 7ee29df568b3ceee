//! Payloads with places for each subscription's own data: `{{name}}`, or `{{name|stranger}}` with a default for
//! subscriptions whose metadata has no such value. A backslash before the braces makes them plain text: `\{{name}}`.

use std::collections::BTreeSet;
use std::fmt::Write;

use serde_json::Value;

/// A payload that is cut at its places.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Template {
    parts: Vec<TemplatePart>,
    /// Whether values are escaped as in a JSON string.
    is_json: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum TemplatePart {
    Text(String),
    Place { name: String, default: Option<String> },
}

/// The result of reading a payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Parsed {
    /// A payload without places: the text, without the backslashes before braces.
    Plain(Vec<u8>),
    /// A payload with places.
    Template(Template),
}

impl Template {
    /// Reads a payload; returns `None` when it has no places.
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        match Self::read(payload) {
            Parsed::Plain(_) => None,
            Parsed::Template(template) => Some(template),
        }
    }

    /// Reads a payload.
    pub(crate) fn read(payload: &[u8]) -> Parsed {
        let Ok(text) = std::str::from_utf8(payload) else { return Parsed::Plain(payload.to_vec()) };
        let is_json = matches!(
            serde_json::from_slice(payload),
            Ok(Value::Object(_) | Value::Array(_) | Value::String(_))
        );
        // In JSON, one backslash is written as two.
        let escape = if is_json { r"\\" } else { r"\" };
        let mut parts = Vec::new();
        let mut rest = text;
        let mut plain = String::new();
        while let Some(at) = rest.find("{{") {
            let (before, opened) = rest.split_at(at);
            if let Some(before) = before.strip_suffix(escape) {
                plain.push_str(before);
                plain.push_str("{{");
                rest = &opened[2..];
                continue;
            }
            plain.push_str(before);
            match place(opened, is_json) {
                Some((part, length)) => {
                    parts.push(TemplatePart::Text(std::mem::take(&mut plain)));
                    parts.push(part);
                    rest = &opened[length..];
                }
                None => {
                    plain.push_str("{{");
                    rest = &opened[2..];
                }
            }
        }
        plain.push_str(rest);
        if parts.is_empty() {
            return Parsed::Plain(plain.into_bytes());
        }
        parts.push(TemplatePart::Text(plain));
        Parsed::Template(Self { parts, is_json })
    }

    /// The names of the values that have no default: a subscription without one of them gets nothing.
    pub(crate) fn needed(&self) -> BTreeSet<&str> {
        let needed = self.parts.iter().filter_map(|part| match part {
            TemplatePart::Place { name, default: None } => Some(name.as_str()),
            TemplatePart::Place { default: Some(_), .. } | TemplatePart::Text(_) => None,
        });
        needed.collect()
    }

    /// The payload for a subscription with this metadata, which is a JSON object.
    ///
    /// # Errors
    /// The name of a value that is missing.
    pub(crate) fn render(&self, metadata: Option<&str>) -> Result<String, String> {
        let metadata: Value = metadata.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
        let mut text = String::new();
        for part in &self.parts {
            match part {
                TemplatePart::Text(plain) => text.push_str(plain),
                TemplatePart::Place { name, default } => {
                    let value = match (&metadata[name.as_str()], default) {
                        (Value::Null, Some(default)) => default.clone(),
                        (Value::Null, None) => return Err(name.clone()),
                        (Value::String(value), _) => value.clone(),
                        (value, _) => value.to_string(),
                    };
                    self.write(&mut text, &value);
                }
            }
        }
        Ok(text)
    }

    fn write(&self, text: &mut String, value: &str) {
        if self.is_json {
            let quoted = Value::from(value).to_string();
            text.push_str(&quoted[1..quoted.len() - 1]);
        } else {
            let _ = text.write_str(value);
        }
    }
}

/// Reads a place at the beginning of `text`, and returns it with its length in bytes. Anything else between braces is
/// left as it is.
fn place(text: &str, is_json: bool) -> Option<(TemplatePart, usize)> {
    let end = text.find("}}")?;
    let (name, default) = match text[2..end].split_once('|') {
        Some((name, default)) if is_json => {
            (name, Some(serde_json::from_str(&format!("\"{default}\"")).ok()?))
        }
        Some((name, default)) => (name, Some(default.to_owned())),
        None => (&text[2..end], None),
    };
    let name = name.trim();
    let known = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    let is_name = !name.is_empty() && name.chars().all(known);
    is_name.then(|| (TemplatePart::Place { name: name.to_owned(), default }, end + 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(payload: &str, metadata: &str) -> Result<String, String> {
        Template::parse(payload.as_bytes()).unwrap().render(Some(metadata))
    }

    #[test]
    fn places_take_values_and_defaults() {
        let text = "Hello {{name|stranger}}, {{count}} new";
        assert_eq!(render(text, r#"{"name":"Ada","count":3}"#), Ok("Hello Ada, 3 new".to_owned()));
        assert_eq!(render(text, r#"{"count":3}"#), Ok("Hello stranger, 3 new".to_owned()));
        assert_eq!(render(text, "{}"), Err("count".to_owned()));
        assert_eq!(Template::parse(text.as_bytes()).unwrap().render(None), Err("count".to_owned()));
    }

    #[test]
    fn a_value_cannot_break_out_of_a_json_text() {
        let json = r#"{"title":"Hello {{name}}"}"#;
        let rendered = render(json, r#"{"name":"\"},{\"x\":\"\n"}"#).unwrap();
        let read: Value = serde_json::from_str(&rendered).unwrap();
        assert_eq!(read["title"], "Hello \"},{\"x\":\"\n");
        assert_eq!(render("Hello {{name}}", r#"{"name":"\"A\""}"#), Ok("Hello \"A\"".to_owned()), "no JSON");
    }

    #[test]
    fn a_default_is_written_as_the_text_around_it() {
        let json = r#"{"title":"Hello {{name|\"you\"}}"}"#;
        let read: Value = serde_json::from_str(&render(json, "{}").unwrap()).unwrap();
        assert_eq!(read["title"], "Hello \"you\"");
    }

    #[test]
    fn a_backslash_makes_braces_plain() {
        let plain = |text: &str| match Template::read(text.as_bytes()) {
            Parsed::Plain(text) => String::from_utf8(text).unwrap(),
            Parsed::Template(template) => panic!("{template:?}"),
        };
        assert_eq!(plain(r"a \{{name}} b"), "a {{name}} b");
        assert_eq!(plain(r#"{"body":"${\\{{ secrets.TOKEN }}"}"#), r#"{"body":"${{{ secrets.TOKEN }}"}"#);
        assert_eq!(render(r"\{{a}} {{a}}", r#"{"a":1}"#), Ok("{{a}} 1".to_owned()));
        assert_eq!(plain(r"a \ b"), r"a \ b");
    }

    #[test]
    fn places_without_a_default_are_named() {
        let template = Template::parse(b"{{a}} {{b|x}} {{c}} {{a}}").unwrap();
        assert_eq!(template.needed().into_iter().collect::<Vec<_>>(), ["a", "c"]);
    }

    #[test]
    fn what_is_no_place_is_left_alone() {
        for text in ["no places", "{{", "{{}}", "{{ not a name }}", "{{a b}}", "}} {{", "{{é}}"] {
            assert_eq!(Template::parse(text.as_bytes()), None, "{text}");
        }
        assert_eq!(render("{{ {{a}} }}", r#"{"a":1}"#), Ok("{{ 1 }}".to_owned()));
    }
}
