//! The references of the settings and of the HTTP interface in docs/ are made from the program. `just references` writes them.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use serde_json::Value;
use support::process::Setup;

/// The files with the settings, and what each is about.
const FILES: [(&str, &str, &str); 8] = [
    ("default.toml", "The host", include_str!("../../config/default.toml")),
    ("push.toml", "Web push", include_str!("../../config/push.toml")),
    ("database.toml", "A database that a module names", include_str!("../../config/database.toml")),
    ("redis.toml", "A Redis server that a module names", include_str!("../../config/redis.toml")),
    ("target.toml", "A server that a module calls", include_str!("../../config/target.toml")),
    ("targets.toml", "Servers whose URLs others choose", include_str!("../../config/targets.toml")),
    ("tcp.toml", "A listener of a module", include_str!("../../config/tcp.toml")),
    ("udp.toml", "A listener of a module for datagrams", include_str!("../../config/udp.toml")),
];

/// Variable with which the pages are written instead of compared.
const WRITE: &str = "PERENNIAL_WRITE_REFERENCES";

/// Compares a page with the one in docs/, or writes it.
fn is_page(name: &str, text: &str) {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name);
    if std::env::var_os(WRITE).is_some() {
        return std::fs::write(page, text).unwrap();
    }
    let there = std::fs::read_to_string(page).unwrap_or_default();
    assert!(there == text, "docs/{name} is not that of the program: run `just references`");
}

#[test]
fn the_reference_of_the_settings_is_that_of_the_program() {
    let mut page = "# Reference of the settings\n\nMade from the commented defaults by `just references`. [Settings](settings.md) has the layers, and the forms of values.\n".to_owned();
    for (file, title, text) in FILES {
        write!(page, "\n## {title}\n\n[config/{file}](../config/{file})\n").unwrap();
        page.push_str(&settings(text));
    }
    is_page("settings-reference.md", &page);
}

/// The tables of the settings of a file, one for each section. A comment belongs to the keys below it, up to the next
/// comment or an empty line.
fn settings(text: &str) -> String {
    let (mut tables, mut comment, mut is_used, mut rows) = (String::new(), String::new(), false, 0);
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if let Some(more) = line.strip_prefix('#') {
            if is_used {
                (comment, is_used) = (String::new(), false);
            }
            comment.push_str(more.trim_end());
        } else if line.starts_with('[') {
            write!(tables, "\n### `{line}`\n").unwrap();
            if !comment.is_empty() && !is_used {
                write!(tables, "\n{}\n", comment.trim()).unwrap();
            }
            (comment, rows) = (String::new(), 0);
        } else if let Some((key, default)) = line.split_once(" = ") {
            if rows == 0 {
                tables.push_str("\n| key | default | what |\n|---|---|---|\n");
            }
            // A list may have several lines.
            let default = match default {
                "[" => {
                    let items = lines.by_ref().take_while(|line| *line != "]").map(str::trim);
                    format!("[{}]", items.collect::<Vec<_>>().join(" ").trim_end_matches(','))
                }
                default => default.to_owned(),
            };
            let what = if is_used { "see above".to_owned() } else { cell(&comment) };
            writeln!(tables, "| `{key}` | `{default}` | {what} |").unwrap();
            (is_used, rows) = (true, rows + 1);
        } else if line.is_empty() && !is_used && rows == 0 && tables.is_empty() {
            // The head of a file is about the file.
            comment.clear();
        }
    }
    tables
}

/// A text in a cell of a table.
fn cell(text: &str) -> String {
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    words.replace('|', "\\|").replace('<', "&lt;").replace('*', "\\*")
}

#[tokio::test]
async fn the_reference_of_the_interface_is_that_of_the_program() {
    let perennial = Setup::new().start().await;
    let description = perennial.client().get("/openapi.json").await.json();
    let mut page = "# Reference of the HTTP interface\n\nMade from `GET /openapi.json` by `just references`; `GET /reference` shows the same with examples. [The interface](interface.md) is the overview. Errors are problems (RFC 9457).\n".to_owned();
    let mut operations = BTreeMap::new();
    for (path, item) in description["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            operations.insert((path, method), operation);
        }
    }
    for ((path, method), operation) in operations {
        page.push_str(&operation_of(&description, path, method, operation));
    }
    is_page("http-reference.md", &page);
}

/// The part of the page about one operation.
fn operation_of(description: &Value, path: &str, method: &str, operation: &Value) -> String {
    let mut part = format!(
        "\n## `{} {path}`\n\n{}.",
        method.to_uppercase(),
        operation["summary"].as_str().unwrap_or_default()
    );
    if let Some(text) = operation["description"].as_str() {
        write!(part, " {}", text.split_whitespace().collect::<Vec<_>>().join(" ")).unwrap();
    }
    part.push('\n');
    let parameters = operation["parameters"].as_array().into_iter().flatten();
    let parameters: Vec<String> = parameters
        .map(|parameter| {
            let (name, place) = (parameter["name"].as_str().unwrap(), parameter["in"].as_str().unwrap());
            let what = cell(parameter["description"].as_str().unwrap_or_default());
            format!("| `{name}` | {place} | {what} |")
        })
        .collect();
    if !parameters.is_empty() {
        write!(part, "\n| parameter | in | what |\n|---|---|---|\n{}\n", parameters.join("\n")).unwrap();
    }
    let bodies = operation["requestBody"]["content"].as_object().into_iter().flatten();
    for (media_type, body) in bodies {
        let fields = fields(description, &body["schema"]);
        if !fields.is_empty() {
            write!(part, "\nBody, `{media_type}`:\n\n| field | what |\n|---|---|\n{fields}").unwrap();
        }
    }
    let statuses = operation["responses"].as_object().into_iter().flatten();
    let statuses: Vec<String> = statuses.map(|(status, _)| status.clone()).collect();
    write!(part, "\nAnswers: {}.\n", statuses.join(", ")).unwrap();
    part
}

/// The rows of the fields of a schema. A required field is marked with a star.
fn fields(description: &Value, schema: &Value) -> String {
    let schema = match schema["$ref"].as_str().and_then(|path| path.rsplit('/').next()) {
        Some(name) => &description["components"]["schemas"][name],
        None => schema,
    };
    let parts = ["allOf", "oneOf", "anyOf"].into_iter().filter_map(|of| schema[of].as_array()).flatten();
    let mut rows: String = parts.map(|part| fields(description, part)).collect();
    let required: Vec<&str> =
        schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let star = if required.contains(&name.as_str()) { " \\*" } else { "" };
        let what = cell(field["description"].as_str().unwrap_or_default());
        writeln!(rows, "| `{name}`{star} | {what} |").unwrap();
    }
    rows
}
