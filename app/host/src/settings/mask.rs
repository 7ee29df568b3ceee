//! Masks the parts of settings that may be secret. Of a URL, only harmless parts are shown: its scheme, host and port,
//! the name of a database, and options that are words of the protocol. Everything else may be a secret: a user and a
//! password, in front of the host or in the query, or the path of a webhook.

use toml::Value;

/// Replacement for a part that is not shown.
const HIDDEN: &str = "***";
/// Settings whose value is always treated as a URL.
const URLS: [&str; 4] = ["store.url", "store.read_url", "queue.url", "push.proxy"];
/// Sections of pools that modules name, whose `url` is such a setting, too.
const POOLS: [&str; 2] = ["databases.", "redis."];
/// Settings that end so are URLs, too.
const ENDS: [&str; 1] = [".proxy"];
/// Values of these settings that are not URLs.
const WORDS: [&str; 2] = ["", "store"];
/// Options of the URL of a database that are not secret.
const OPTIONS: [&str; 7] =
    ["application_name", "connect_timeout", "db", "host", "protocol", "sslmode", "target_session_attrs"];

/// Settings that are lists of tables. A text instead of a list may be anything.
const LISTS: [&str; 3] = [KEYS, "cron.schedules", ".webhooks"];
/// The list in whose place a key itself may be given.
const KEYS: &str = "access.keys";
/// Fields of these tables that may be shown.
const FIELDS: [&str; 20] = [
    "catch_up",
    "catch_up_within",
    "expression",
    "file",
    "from",
    "grace",
    "jitter",
    "job",
    "misfire",
    "name",
    "overlap",
    "paused",
    "per_minute",
    "pruned",
    "scopes",
    "secret_file",
    "site",
    "until",
    "url",
    "zone",
];

/// Masks a text that was given for a key, unless it looks like a key: it may be a whole setting, or a URL.
pub(super) fn key(given: String) -> String {
    let is_of_key = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    if given.len() <= 100 && given.chars().all(is_of_key) { given } else { HIDDEN.to_owned() }
}

/// Masks the words of a text of the command line that may be secret.
pub(crate) fn words(text: &str) -> String {
    let is_end = |c: char| c.is_whitespace() || "'\"`".contains(c);
    text.split_inclusive(is_end)
        .map(|word| match word.contains("://") {
            true => format!("{HIDDEN}{}", word.chars().next_back().filter(|c| is_end(*c)).unwrap_or(' ')),
            false => word.to_owned(),
        })
        .collect()
}

/// Masks a part of the value of a setting; `part` is its place in the value, such as `[0].name`.
pub(super) fn part(key: &str, part: &str, value: &Value) -> Value {
    match part.rsplit_once('.') {
        Some((_, field)) if is_list(key) && !FIELDS.contains(&field) => Value::String(HIDDEN.to_owned()),
        Some((_, field)) => self::value(field, value),
        None => self::value(key, value),
    }
}

fn is_url(key: &str) -> bool {
    URLS.contains(&key)
        || ENDS.iter().any(|end| key.ends_with(end))
        || (key.ends_with(".url") && POOLS.iter().any(|section| key.starts_with(section)))
}

fn is_list(key: &str) -> bool {
    LISTS.iter().any(|list| key.ends_with(list))
}

/// Masks the value of a setting.
pub(super) fn value(key: &str, value: &Value) -> Value {
    let is_list = is_list(key);
    match value {
        Value::String(text) if is_list && (key == KEYS || text.contains(['[', '{'])) && !text.is_empty() => {
            Value::String(HIDDEN.to_owned())
        }
        Value::String(text) => Value::String(match is_url(key) {
            true => of_url(text),
            // An origin is not a secret: the browser of a page sends it to every server.
            false if key.ends_with(".origins") && !text.contains('@') => text.clone(),
            false if key.ends_with("file") => of_file(text),
            false => of_text(text),
        }),
        Value::Array(items) => Value::Array(items.iter().map(|item| self::value(key, item)).collect()),
        Value::Table(table) => {
            let shown = |(name, item): (&String, &Value)| {
                let item = match !is_list || FIELDS.contains(&name.as_str()) {
                    true => self::value(name, item),
                    false => Value::String(HIDDEN.to_owned()),
                };
                (self::key(name.clone()), item)
            };
            Value::Table(table.iter().map(shown).collect())
        }
        other => other.clone(),
    }
}

/// Masks a text that does not look like the path of a file: it may be the content of the file.
fn of_file(text: &str) -> String {
    let is_path = ["/", "./", "../"].iter().any(|start| text.starts_with(start)) || text.contains('.');
    let is_shown = text.is_empty()
        || (is_path && !text.contains([':', '=', '@']) && !text.contains(char::is_whitespace));
    if is_shown { text.to_owned() } else { HIDDEN.to_owned() }
}

/// Masks a text that may be a URL.
fn of_text(text: &str) -> String {
    let lower = text.to_ascii_lowercase();
    if lower.contains("password") && lower.contains('=') {
        return HIDDEN.to_owned();
    }
    if text.contains("://") { of_url(text) } else { text.to_owned() }
}

/// Masks a text that should be a URL.
fn of_url(text: &str) -> String {
    if WORDS.contains(&text) {
        return text.to_owned();
    }
    if let Some(file) = text.strip_prefix("sqlite:") {
        let (file, query) = file.find('?').map_or((file, ""), |at| (&file[..at], "?***"));
        return format!("sqlite:{}{query}", if file.contains(['@', '=', ';']) { HIDDEN } else { file });
    }
    match text.split_once("://") {
        Some((scheme, rest)) if is_scheme(scheme) => format!("{scheme}://{}", of_rest(scheme, rest)),
        _ => HIDDEN.to_owned(),
    }
}

/// Returns true when a text may be a scheme (RFC 3986, section 3.1). Any other text may be a secret, as in
/// `host=db password=PASSWORD://`.
fn is_scheme(text: &str) -> bool {
    text.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
}

/// Masks the part of a URL after its scheme. A password may contain characters that should be encoded: where a
/// delimiter could be part of a password, nothing is shown.
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
        // The path of a webhook is all that is needed to call it.
        "http" | "https" if path.len() > 1 => "/***",
        // The name of a database, its number, or the path of a socket.
        _ if path.chars().all(|c| c.is_ascii_alphanumeric() || "/_.-%".contains(c)) => path,
        _ => "/***",
    };
    let options = query.trim_start_matches(['?', '#']).split('&').filter(|option| !option.is_empty());
    let options: Vec<String> = options.map(of_option).collect();
    let query = if options.is_empty() { String::new() } else { format!("?{}", options.join("&")) };
    format!("{user}{hosts}{path}{query}")
}

/// Masks a user and a password. The name is shown only if a colon separates it from the password.
fn of_user(user: &str) -> String {
    let is_of_name = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    match user.split_once(':') {
        Some((name, _)) if name.chars().all(is_of_name) => format!("{name}:{HIDDEN}@"),
        _ => format!("{HIDDEN}@"),
    }
}

/// Returns true for a name or an address with an optional numeric port. `*.example.com` is a pattern of origins.
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
            ("host=db password=s3cret://", "***"),
            ("redis://:s3cret@cache/0", "redis://:***@cache/0"),
            ("redis://[::1]:6379/1", "redis://[::1]:6379/1"),
            ("redis://s3cret:x", "redis://***"),
            ("sqlite:perennial.db", "sqlite:perennial.db"),
            ("store", "store"),
            ("postgres://h/db;password=s3cret", "postgres://h/***"),
            ("postgres://h/db password=s3cret", "postgres://h/***"),
            ("postgres://127.0.0.1:s3cret/x", "postgres://***"),
            ("sqlite:perennial.db?key=s3cret", "sqlite:perennial.db?***"),
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

    #[test]
    fn secrets_in_the_wrong_place_are_not_shown_either() {
        let table = |text: &str| Value::Array(vec![Value::Table(text.parse().unwrap())]);
        for (key, given) in [
            ("sites.default.webhooks", table("name = 'a'\nsecret = 's3cret'")),
            ("sites.default.webhooks", table("name = 'a'\nsecret_file = 'whsec_s3cret'")),
            ("sites.default.webhooks", "[{url='https://example.com/s3cret'".into()),
            ("access.keys", table("name = 'b'\nkey = 's3cret'")),
            ("access.keys", "s3cret".into()),
            ("cron.schedules", table("name = 'c'\npayload = { password = 's3cret' }")),
            ("push.proxy_credentials_file", "user:s3cret".into()),
            ("sites.default.origins", "https://u:s3cret@h".into()),
        ] {
            let shown = value(key, &given).to_string();
            assert!(!shown.contains("s3cret"), "{key}: {shown}");
        }
        assert_eq!(shown("push.proxy_credentials_file", "/run/secrets/proxy"), "/run/secrets/proxy");
        assert_eq!(key("postgres://u:s3cret@h/db".to_owned()), "***");
        assert_eq!(
            words("unexpected argument 'store.url=postgres://u:s3cret@h/db' found"),
            "unexpected argument '***' found"
        );
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
