//! Conversion of the placeholders of a statement, `?`, `?1` or `$1`, to those of the store: `$1` for Postgres, `?1` for
//! SQLite. One statement has either question marks or dollar signs.
//!
//! A question mark in a string, a quoted name, a comment or a dollar quote is text (PostgreSQL, 4.1: lexical
//! structure). A question mark between two operands is an operator of Postgres, as in `tags ? 'news'`; so are `?|`,
//! `?&` and `@?`.

/// Words after which an expression begins, and no operator can stand.
const BEFORE_OPERAND: [&str; 45] = [
    "ALL",
    "AND",
    "ANY",
    "ARRAY",
    "AS",
    "BETWEEN",
    "BY",
    "CALL",
    "CASE",
    "DISTINCT",
    "ELSE",
    "ESCAPE",
    "EXCEPT",
    "EXECUTE",
    "EXISTS",
    "FETCH",
    "FIRST",
    "FOR",
    "FROM",
    "HAVING",
    "ILIKE",
    "IN",
    "INTERSECT",
    "IS",
    "LIKE",
    "LIMIT",
    "NEXT",
    "NOT",
    "OFFSET",
    "ON",
    "OR",
    "PLACING",
    "RETURNING",
    "SELECT",
    "SET",
    "SIMILAR",
    "SOME",
    "THEN",
    "TO",
    "UNION",
    "USING",
    "VALUES",
    "WHEN",
    "WHERE",
    "ZONE",
];

/// The kind of the previous token, which decides what a question mark is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Before {
    /// A token that an operator may follow: a name, a value, a closing bracket.
    Operand,
    /// Any other token.
    Other,
}

/// The statement with its placeholders numbered, each after the mark that the store wants: `$` for Postgres, `?` for
/// SQLite.
pub(super) fn numbered(sql: &str, mark: char) -> String {
    let mut scanner = Scanner { sql, at: 0, before: Before::Other };
    let mut written = String::with_capacity(sql.len() + 16);
    let mut count = 0;
    while scanner.at < sql.len() {
        let from = scanner.at;
        if scanner.next() {
            written.push(mark);
            let digits = &sql[from + 1..scanner.at];
            if digits.is_empty() {
                count += 1;
                written.push_str(&count.to_string());
            } else {
                written.push_str(digits);
            }
        } else {
            written.push_str(&sql[from..scanner.at]);
        }
    }
    written
}

struct Scanner<'a> {
    sql: &'a str,
    at: usize,
    before: Before,
}

impl Scanner<'_> {
    /// Moves past the next token. Returns true when it is a placeholder.
    fn next(&mut self) -> bool {
        let rest = &self.sql[self.at..];
        let first = rest.chars().next().unwrap_or(' ');
        let (length, before) = match first {
            c if c.is_whitespace() => (c.len_utf8(), self.before),
            '-' if rest.starts_with("--") => (rest.find('\n').unwrap_or(rest.len()), self.before),
            '/' if rest.starts_with("/*") => (comment(rest), self.before),
            '\'' => (quoted(rest, '\'', false), Before::Operand),
            '"' => (quoted(rest, '"', false), Before::Operand),
            'e' | 'E' if rest[1..].starts_with('\'') => (1 + quoted(&rest[1..], '\'', true), Before::Operand),
            '$' => match dollar_quoted(rest) {
                Some(length) => (length, Before::Operand),
                None => return self.dollar(rest),
            },
            '?' => return self.question_mark(rest),
            c if c.is_alphanumeric() || c == '_' => {
                let ends = |c: char| !(c.is_alphanumeric() || c == '_' || c == '$');
                let word = &rest[..rest.find(ends).unwrap_or(rest.len())];
                let is_before_operand = BEFORE_OPERAND.iter().any(|known| known.eq_ignore_ascii_case(word));
                (word.len(), if is_before_operand { Before::Other } else { Before::Operand })
            }
            ')' | ']' => (1, Before::Operand),
            c => (c.len_utf8(), Before::Other),
        };
        self.at += length;
        self.before = before;
        false
    }

    /// Moves past `$1`, or past a dollar sign that is nothing.
    fn dollar(&mut self, rest: &str) -> bool {
        let digits = digits_after_mark(rest);
        self.at += 1 + digits;
        self.before = Before::Operand;
        digits > 0
    }

    fn question_mark(&mut self, rest: &str) -> bool {
        let digits = digits_after_mark(rest);
        let is_placeholder = digits > 0
            || !(self.before == Before::Operand
                || rest[1..].starts_with(['|', '&', '?'])
                || self.sql[..self.at].ends_with('@'));
        if is_placeholder {
            self.at += 1 + digits;
            self.before = Before::Operand;
        } else {
            self.at += 1;
            self.before = Before::Other;
        }
        is_placeholder
    }
}

fn digits_after_mark(rest: &str) -> usize {
    rest[1..].find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len() - 1)
}

/// The length of a text or a name in quotes. A doubled quote stands for one quote in it. In a text of the form `E'..'`,
/// a backslash escapes the next character.
fn quoted(text: &str, quote: char, escapes: bool) -> usize {
    let mut characters = text.char_indices().skip(1).peekable();
    while let Some((at, c)) = characters.next() {
        if escapes && c == '\\' {
            characters.next();
        } else if c == quote && characters.next_if(|(_, next)| *next == quote).is_none() {
            return at + 1;
        }
    }
    text.len()
}

/// The length of a comment, which may contain other comments.
fn comment(text: &str) -> usize {
    let (mut depth, mut at) = (0_usize, 0);
    while at < text.len() {
        let rest = &text[at..];
        if rest.starts_with("/*") {
            depth += 1;
            at += 2;
        } else if rest.starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += rest.chars().next().map_or(1, char::len_utf8);
        }
    }
    text.len()
}

/// The length of a dollar quote (`$$..$$` or `$tag$..$tag$`), if the text begins with one.
fn dollar_quoted(text: &str) -> Option<usize> {
    let tag = text[1..].find('$')? + 1;
    let name = &text[1..tag];
    let is_name = name.chars().all(|c| c.is_alphanumeric() || c == '_')
        && !name.starts_with(|c: char| c.is_ascii_digit());
    if !is_name {
        return None;
    }
    let delimiter = &text[..=tag];
    let ends = text[delimiter.len()..].find(delimiter);
    Some(ends.map_or(text.len(), |ends| delimiter.len() * 2 + ends))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sqlparser::dialect::PostgreSqlDialect;
    use sqlparser::tokenizer::{Token, Tokenizer};

    fn numbered(sql: &str) -> String {
        super::numbered(sql, '$')
    }

    #[test]
    fn dollar_signs_are_placeholders_on_both_stores() {
        let sql = "SELECT '$1', $$ $1 $$, a$1 FROM t WHERE a = $2 AND b = $1 AND tags ? $3 -- $4";
        assert_eq!(numbered(sql), sql);
        let of_sqlite = "SELECT '$1', $$ $1 $$, a$1 FROM t WHERE a = ?2 AND b = ?1 AND tags ? ?3 -- $4";
        assert_eq!(super::numbered(sql, '?'), of_sqlite);
    }

    #[test]
    fn placeholders_are_numbered_in_their_order_or_as_they_say() {
        assert_eq!(numbered("SELECT ? WHERE a = ? AND b = ?"), "SELECT $1 WHERE a = $2 AND b = $3");
        assert_eq!(numbered("a = ?2 OR b = ?1 OR c = ?2"), "a = $2 OR b = $1 OR c = $2");
        assert_eq!(numbered("VALUES (?,?),(?, ?::text)"), "VALUES ($1,$2),($3, $4::text)");
        assert_eq!(numbered("CASE WHEN ?1 THEN ? ELSE ? END"), "CASE WHEN $1 THEN $1 ELSE $2 END");
        assert_eq!(
            numbered("x IS DISTINCT FROM ? LIMIT ? OFFSET ?"),
            "x IS DISTINCT FROM $1 LIMIT $2 OFFSET $3"
        );
        assert_eq!(numbered("a+? - ? || ?"), "a+$1 - $2 || $3");
    }

    #[test]
    fn a_question_mark_in_a_text_is_text() {
        for sql in [
            "SELECT 'Why?'",
            "SELECT 'it''s ?' AS \"who?\"",
            r"SELECT E'it\'s ?'",
            "SELECT 1 -- why?\n + 1",
            "SELECT /* why? /* because? */ ? */ 1",
            "SELECT $$ ? $$, $body$ ? $$ ? $body$",
            "SELECT a$b, c$d$e FROM t",
        ] {
            assert_eq!(numbered(sql), sql);
        }
        assert_eq!(numbered("SELECT 'Why?', ?"), "SELECT 'Why?', $1");
    }

    #[test]
    fn a_question_mark_between_operands_is_an_operator() {
        for sql in [
            "SELECT tags ? 'news' FROM t",
            "SELECT (tags -> 'a') ? 'news'",
            "SELECT tags::jsonb ? 'a'",
            "SELECT tags ?| array['a'] OR tags ?& array['b']",
            "SELECT tags @? '$.a[*]'",
            "SELECT \"tags\" ? 'a', a[1] ? 'b', '{}'::jsonb ? 'c'",
        ] {
            assert_eq!(numbered(sql), sql);
        }
        assert_eq!(numbered("WHERE tags ? ? AND b = ?"), "WHERE tags ? $1 AND b = $2");
        assert_eq!(numbered("WHERE ?1::jsonb ? ?2"), "WHERE $1::jsonb ? $2");
    }

    #[test]
    fn nothing_is_lost_of_what_is_no_sql() {
        for sql in ["'", "\"", "$", "$$", "$a$ x", "/*", "E'\\", "?", "é?", "--", "$1$ ? $1$"] {
            let without = |text: &str| text.replace(|c: char| c == '?' || c == '$' || c.is_ascii_digit(), "");
            assert_eq!(without(&numbered(sql)), without(sql), "{sql}");
        }
    }

    /// Parts of statements: texts, names, comments and placeholders.
    fn part() -> impl Strategy<Value = String> {
        let text = "[a-z?' \\$/*-]{0,12}";
        prop_oneof![
            text.prop_map(|text| format!("'{}'", text.replace('\'', "''"))),
            text.prop_map(|text| format!("\"x{}\"", text.replace('"', ""))),
            "[a-z? ]{0,8}".prop_map(|text| format!("$q$ {text} $q$")),
            "[a-z? ]{0,8}".prop_map(|text| format!("/* {text} */ 7")),
            "[a-z? ]{0,8}".prop_map(|text| format!("8 -- {text}\n")),
            "[a-z]{2,6}".prop_map(|name| format!("x_{name}")),
            Just("?".to_owned()),
            Just("(1)".to_owned()),
        ]
    }

    proptest! {
        /// A parser sees the same texts, names and comments before and after, and a placeholder for each `?` that was
        /// put in.
        #[test]
        fn a_parser_sees_the_same_statement(parts in prop::collection::vec(part(), 1..12)) {
            let sql = format!("SELECT {}", parts.join(" + "));
            let wanted = parts.iter().filter(|part| *part == "?").count();
            let tokens = |sql: &str| Tokenizer::new(&PostgreSqlDialect {}, sql).tokenize().unwrap();
            let written = numbered(&sql);
            let placeholders: Vec<String> = tokens(&written)
                .into_iter()
                .filter_map(|token| match token { Token::Placeholder(name) => Some(name), _ => None })
                .collect();
            let expected: Vec<String> = (1..=wanted).map(|number| format!("${number}")).collect();
            prop_assert_eq!(placeholders, expected);
            let others = |sql: &str| -> Vec<Token> {
                let is_other = |token: &Token| !matches!(token, Token::Placeholder(_) | Token::Question);
                tokens(sql).into_iter().filter(is_other).collect()
            };
            prop_assert_eq!(others(&written), others(&sql));
        }
    }
}
