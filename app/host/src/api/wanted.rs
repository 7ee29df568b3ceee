//! Translates errors of the deserializer into words of the interface, since they name types of the program.

/// How a time is written (RFC 3339).
const TIME: &str = "a time such as 2027-01-31T12:00:00Z";

/// How an id is written (RFC 9562).
const ID: &str = "an id such as 01890a5d-ac96-774b-bcce-b302099a8057";

/// Translates a message of the deserializer, such as `invalid type: string "x", expected f64`.
pub(crate) fn wanted(message: &str) -> String {
    let message = message.lines().next().unwrap_or_default();
    let message = message.split(" at line ").next().unwrap_or_default();
    if let Some(field) = message.strip_prefix("missing field ") {
        return format!("the field {}, which is missing", field.trim_matches('`'));
    }
    if let Some(rest) = message.strip_prefix("unknown variant ") {
        let (given, known) = rest.split_once(", expected ").unwrap_or((rest, ""));
        return format!("{}, not {}", list(known), given.trim_matches('`'));
    }
    if let Some(rest) = message.strip_prefix("unknown field ") {
        let (given, known) = rest.split_once(", ").unwrap_or((rest, ""));
        let known = known.strip_prefix("expected ").unwrap_or_default();
        return format!("{}; there is no {}", fields(known), given.trim_matches('`'));
    }
    if let Some(field) = message.strip_prefix("duplicate field ") {
        return format!("the field {} once, not twice", field.trim_matches('`'));
    }
    let found = message.split_once(", expected ").and_then(|(given, expected)| {
        let kind = kind(expected)?;
        Some(match given.split_once(": ") {
            Some((_, given)) => format!("{kind}, not {}", value(given)),
            None => kind,
        })
    });
    found.or_else(|| of_text(message)).unwrap_or_else(|| message.to_owned())
}

/// Translates a type of the program into the value that a caller writes.
fn kind(expected: &str) -> Option<String> {
    let words = match expected {
        "f64" | "f32" => "a number",
        "u8" => "a whole number from 0 to 255",
        "i8" => "a whole number from -128 to 127",
        "u16" => "a whole number from 0 to 65535",
        "i16" => "a whole number from -32768 to 32767",
        "u32" => "a whole number from 0 to 4294967295",
        "i32" => "a whole number from -2147483648 to 2147483647",
        "u64" | "usize" | "u128" | "a nonzero u32" | "a nonzero u64" => "a whole number, 0 or more",
        "i64" | "isize" | "i128" => "a whole number",
        "a string" | "a borrowed string" | "a character" => "text",
        "a boolean" => "true or false",
        "a sequence" => "a list",
        "a map" => "an object",
        "unit" => "null",
        "option" => "a value or null",
        _ if expected.contains("timestamp") || expected.contains("datetime") => TIME,
        "a UUID" | "a formatted UUID string" => ID,
        _ if expected.starts_with("struct ") || expected.contains("enum ") => "an object",
        _ if expected.starts_with("a tuple") || expected.starts_with("tuple ") => "a list",
        // The message comes from a custom deserializer.
        _ if expected.starts_with("a ") || expected.starts_with("an ") => expected,
        _ => return None,
    };
    Some(words.to_owned())
}

/// Translates a given value into the form in which a caller would write it.
fn value(given: &str) -> String {
    let words = match given {
        "map" => "an object",
        "sequence" => "a list",
        "unit value" | "Option value" => "null",
        _ => {
            let plain = ["string ", "integer ", "floating point ", "boolean ", "character "]
                .iter()
                .find_map(|kind| given.strip_prefix(kind));
            return plain.unwrap_or(given).trim_matches('`').to_owned();
        }
    };
    words.to_owned()
}

/// Translates messages of text parsers, which read parameters of a query, for example.
fn of_text(message: &str) -> Option<String> {
    let words = match message {
        "invalid digit found in string" | "cannot parse integer from empty string" => "a whole number",
        "number too large to fit in target type" | "number too small to fit in target type" => {
            "a number that is not so large"
        }
        "invalid float literal" | "cannot parse float from empty string" => "a number",
        "provided string was not `true` or `false`" => "true or false",
        _ if message.starts_with("UUID parsing failed")
            || message.starts_with("invalid length: expected length 32") =>
        {
            ID
        }
        _ if message.starts_with("failed to parse")
            || message.contains("timestamp")
            || message.contains("datetime") =>
        {
            TIME
        }
        _ => return None,
    };
    Some(words.to_owned())
}

/// Translates the list of known fields, such as "one of `to`, `title`".
fn fields(known: &str) -> String {
    match known.strip_prefix("one of ") {
        Some(several) => format!("one of the fields {}", several.replace('`', "")),
        None if known.starts_with('`') => format!("no field but {}", known.replace('`', "")),
        None => "no fields".to_owned(),
    }
}

fn list(known: &str) -> String {
    let known = known.replace('`', "");
    if known.starts_with("there are no") { "nothing".to_owned() } else { known }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum Word {
        One,
        Two,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only parsing is of interest")]
    struct Inner {
        number: u8,
    }

    #[derive(Debug, Deserialize)]
    #[expect(dead_code, reason = "only parsing is of interest")]
    struct Outer {
        #[serde(default)]
        rate: Option<f64>,
        #[serde(default)]
        inner: Option<Inner>,
        #[serde(default)]
        list: Vec<String>,
        #[serde(default)]
        word: Option<Word>,
        #[serde(default)]
        yes: bool,
        #[serde(default)]
        id: Option<uuid::Uuid>,
        #[serde(default)]
        pair: Option<(u8, u8)>,
        #[serde(default)]
        any: Option<std::collections::BTreeMap<String, i64>>,
        #[serde(default)]
        at: Option<jiff::Timestamp>,
    }

    #[test]
    fn nothing_of_the_program_is_in_what_callers_read() {
        for (given, words) in [
            (r#"{"rate": "fast"}"#, "a number, not \"fast\""),
            (r#"{"rate": {}}"#, "a number, not an object"),
            (r#"{"inner": "x"}"#, "an object, not \"x\""),
            (r#"{"inner": 5}"#, "an object, not 5"),
            (r#"{"inner": {"number": 300}}"#, "a whole number from 0 to 255, not 300"),
            (r#"{"inner": {"number": 1.5}}"#, "a whole number from 0 to 255, not 1.5"),
            (r#"{"inner": {"number": null}}"#, "a whole number from 0 to 255, not null"),
            (r#"{"inner": {}}"#, "the field number, which is missing"),
            (r#"{"inner": {"numbr": 1}}"#, "no field but number; there is no numbr"),
            (r#"{"inner": {"number": 1, "number": 2}}"#, "the field number once, not twice"),
            (r#"{"at": "tomorrow"}"#, TIME),
            (r#"{"at": 5}"#, "a time such as 2027-01-31T12:00:00Z, not 5"),
            (r#"{"list": "a"}"#, "a list, not \"a\""),
            (r#"{"list": [true]}"#, "text, not true"),
            (r#"{"word": "three"}"#, "one or two, not three"),
            (r#"{"yes": 1}"#, "true or false, not 1"),
            (r#"{"id": "x"}"#, "an id such as 01890a5d-ac96-774b-bcce-b302099a8057"),
            (r#"{"pair": 1}"#, "a list, not 1"),
            (r#"{"any": []}"#, "an object, not a list"),
            (r#"{"inner": []}"#, "an object"),
        ] {
            let error = serde_json::from_str::<Outer>(given).unwrap_err().to_string();
            let translated = wanted(&error);
            assert!(translated.starts_with(words), "{given}: {translated} ({error})");
            for word in ["struct", "f64", "u8", "i64", "Inner", "enum", "tuple", "at line"] {
                assert!(!translated.contains(word), "{given}: {translated}");
            }
        }
    }
}
