//! What of a setting may be shown: of a URL only the parts that are known to be harmless, which are its scheme, host and
//! port, the name of a database, and options that are words of the protocol. Everything else may be a secret: a user
//! and a password, in front of the host or in the query, or the path of a webhook.

use toml::Value;

/// What stands for a part that is not shown.
const HIDDEN: &str = "***";
/// Settings whose value is a URL, whatever it looks like.
const URLS: [&str; 3] = ["store.url", "queue.url", "push.proxy"];
/// Values of these that are no URL.
const WORDS: [&str; 2] = ["", "store"];
/// Options of a database's URL that say nothing secret.
const OPTIONS: [&str; 7] =
    ["application_name", "connect_timeout", "db", "host", "protocol", "sslmode", "target_session_attrs"];

/// The value of a setting as it may be shown.
pub(super) fn value(key: &str, value: &Value) -> Value {
    match value {
        Value::String(text) => Value::String(match URLS.contains(&key) {
            true => of_url(text),
            // What pages send to everybody is no secret.
            false if key.ends_with(".origins") => text.clone(),
            false => of_text(text),
        }),
        Value::Array(items) => Value::Array(items.iter().map(|item| self::value(key, item)).collect()),
        Value::Table(table) => {
            Value::Table(table.iter().map(|(name, item)| (name.clone(), self::value(key, item))).collect())
        }
        other => other.clone(),
    }
}

/// A text that need not be a URL.
fn of_text(text: &str) -> String {
    let lower = text.to_ascii_lowercase();
    if lower.contains("password") && lower.contains('=') {
        return HIDDEN.to_owned();
    }
    if text.contains("://") { of_url(text) } else { text.to_owned() }
}

/// A text that should be a URL.
fn of_url(text: &str) -> String {
    if WORDS.contains(&text) {
        return text.to_owned();
    }
    if let Some(file) = text.strip_prefix("sqlite:") {
        return format!("sqlite:{}", if file.contains('@') { HIDDEN } else { file });
    }
    match text.split_once("://") {
        Some((scheme, rest)) => format!("{scheme}://{}", of_rest(scheme, rest)),
        None => HIDDEN.to_owned(),
    }
}

/// What comes after the scheme. A password may have characters in it that would have to be encoded: where a mark could be
/// part of one, nothing is shown.
fn of_rest(scheme: &str, rest: &str) -> String {
    let (base, query) = rest.find(['?', '#']).map_or((rest, ""), |at| rest.split_at(at));
    if query.contains('@') {
        return HIDDEN.to_owned();
    }
    let (user, place) =
        base.rsplit_once('@').map_or((String::new(), base), |(user, place)| (of_user(user), place));
    let (hosts, path) = place.find('/').map_or((place, ""), |at| place.split_at(at));
    if !hosts.split(',').all(is_host) {
        return HIDDEN.to_owned();
    }
    let path = match scheme {
        // Who knows the path of a webhook may call it.
        "http" | "https" if path.len() > 1 => "/***",
        // The name of a database, its number, or the path of a socket.
        _ => path,
    };
    let options = query.trim_start_matches(['?', '#']).split('&').filter(|option| !option.is_empty());
    let options: Vec<String> = options.map(of_option).collect();
    let query = if options.is_empty() { String::new() } else { format!("?{}", options.join("&")) };
    format!("{user}{hosts}{path}{query}")
}

/// The name of a user, if it is told apart from the password.
fn of_user(user: &str) -> String {
    let is_of_name = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    match user.split_once(':') {
        Some((name, _)) if name.chars().all(is_of_name) => format!("{name}:{HIDDEN}@"),
        _ => format!("{HIDDEN}@"),
    }
}

/// A name or an address, with a port that is a number. `*.example.com` is a pattern of origins.
fn is_host(text: &str) -> bool {
    let (name, port) = match text.rsplit_once(':') {
        Some((name, port)) if !port.contains(']') => (name, port),
        _ => (text, "0"),
    };
    let is_of_name = |c: char| c.is_ascii_alphanumeric() || "-._*".contains(c);
    let is_of_address = |c: char| c.is_ascii_hexdigit() || ":.".contains(c);
    let is_named = name.chars().all(is_of_name)
        || name
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
            .is_some_and(|address| address.chars().all(is_of_address));
    is_named && (port.is_empty() || port.parse::<u16>().is_ok())
}

fn of_option(option: &str) -> String {
    match option.split_once('=') {
        Some((name, _)) if OPTIONS.contains(&name) => option.to_owned(),
        Some((name, _)) if name.chars().all(|c| c.is_ascii_lowercase() || c == '_') => {
            format!("{name}={HIDDEN}")
        }
        _ => HIDDEN.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shown(key: &str, text: &str) -> String {
        value(key, &Value::String(text.to_owned())).as_str().unwrap().to_owned()
    }

    #[test]
    fn of_a_url_what_is_harmless_is_shown() {
        for (given, wanted) in [
            (
                "postgres://app:s3cret@db:5432/p?sslmode=require",
                "postgres://app:***@db:5432/p?sslmode=require",
            ),
            ("postgres://app:s3/c/ret@db/p", "postgres://app:***@db/p"),
            ("postgres://app:s3@cret@db/p", "postgres://app:***@db/p"),
            ("postgres://app:s3?cret@db/p", "postgres://***"),
            ("postgres://app:s3#cret@db/p", "postgres://***"),
            ("postgres://db/p?user=app&password=s3cret", "postgres://db/p?user=***&password=***"),
            (
                "postgres:///p?host=/run/sock&options=-csearch_path%3Dx",
                "postgres:///p?host=/run/sock&options=***",
            ),
            (
                "postgres://a@h1:5432,h2:5433/p?target_session_attrs=read-write",
                "postgres://***@h1:5432,h2:5433/p?target_session_attrs=read-write",
            ),
            ("host=db user=app password=s3cret", "***"),
            ("redis://:s3cret@cache/0", "redis://:***@cache/0"),
            ("redis://[::1]:6379/1", "redis://[::1]:6379/1"),
            ("redis://s3cret:x", "redis://***"),
            ("sqlite:perennial.db", "sqlite:perennial.db"),
            ("store", "store"),
        ] {
            assert_eq!(shown("store.url", given), wanted, "{given}");
        }
        for (given, wanted) in [
            ("https://hooks.example.com/T0/B0/s3cret", "https://hooks.example.com/***"),
            ("https://hooks.example.com?token=s3cret", "https://hooks.example.com?token=***"),
            ("https://www.example.com", "https://www.example.com"),
            ("https://*.example.com:8443", "https://*.example.com:8443"),
            ("host=db password=s3cret", "***"),
            ("mailto:a@example.com", "mailto:a@example.com"),
            ("127.0.0.1:8080", "127.0.0.1:8080"),
        ] {
            assert_eq!(shown("sites.default.webhooks", given), wanted, "{given}");
        }
        let hooks = Value::Array(vec![Value::Table(toml::toml! { url = "https://a:s3cret@example.com/x" })]);
        assert!(!value("sites.default.webhooks", &hooks).to_string().contains("s3cret"));
    }

    proptest! {
        #[test]
        fn no_password_is_ever_shown(password in "[a-z/@?#:&=%]{0,3}s3cret[a-z/@?#:&=%]{0,3}") {
            for url in [
                format!("postgres://app:{password}@db/p"),
                format!("postgres://app:{password}@db:5432/p?sslmode=require"),
                format!("postgres://db/p?password={password}"),
                format!("redis://:{password}@cache/0"),
                format!("host=db password={password}"),
            ] {
                prop_assert!(!shown("store.url", &url).contains("s3cret"), "{url}: {}", shown("store.url", &url));
            }
        }
    }
}
