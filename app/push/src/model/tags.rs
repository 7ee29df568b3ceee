//! Tags, and expressions over them: `news and fr and not muted`.
//!
//! ```text
//! expression = and { "or" and }
//! and        = not { "and" not }
//! not        = "not" not | "(" expression ")" | tag
//! ```

use perennial_store::pool::sql::Value;

/// The longest tag, in characters.
const MAX_TAG: usize = 64;
/// The longest expression, in characters.
const MAX_EXPRESSION: usize = 1000;
/// The most tags in one expression: each is a lookup for every subscription.
const MAX_TERMS: usize = 32;
/// How deep parentheses and `not` may be nested.
const MAX_DEPTH: usize = 32;

/// Description of a valid tag, for error messages.
pub(crate) const TAG_WANTED: &str =
    "a tag: 1 to 64 letters, digits and _ - . : / and not one of and, or, not";

/// Returns true for a valid tag.
pub(crate) fn is_tag(text: &str) -> bool {
    let known = |c: char| c.is_ascii_alphanumeric() || "_-.:/".contains(c);
    !text.is_empty()
        && text.len() <= MAX_TAG
        && text.chars().all(known)
        && !["and", "or", "not"].contains(&text)
}

/// An expression that selects subscriptions by their tags.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TagExpression {
    Tag(String),
    Not(Box<Self>),
    And(Box<Self>, Box<Self>),
    Or(Box<Self>, Box<Self>),
}

/// The error for a text that is no expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SyntaxError {
    /// Index of the character at which the error is, from 0.
    pub(crate) position: usize,
    /// Description of the text that is expected there.
    pub(crate) wanted: String,
}

impl TagExpression {
    /// Parses an expression.
    pub(crate) fn parse(text: &str) -> Result<Self, SyntaxError> {
        let length = text.chars().count();
        if length > MAX_EXPRESSION {
            let wanted = format!("at most {MAX_EXPRESSION} characters");
            return Err(SyntaxError { position: MAX_EXPRESSION, wanted });
        }
        let mut parser = Parser { tokens: tokens(text), next: 0, terms: 0, end: length };
        let expression = parser.expression(0)?;
        match parser.peek() {
            None => Ok(expression),
            Some(_) => Err(parser.wanted("and, or, or the end")),
        }
    }

    /// A tag that every selected subscription has, if there is one.
    pub(crate) fn needed(&self) -> Option<&str> {
        match self {
            Self::Tag(tag) => Some(tag),
            Self::And(left, right) => left.needed().or_else(|| right.needed()),
            Self::Not(_) | Self::Or(..) => None,
        }
    }

    /// Returns a condition on `subscriptions`; its parameters are appended to `parameters`.
    pub(crate) fn to_sql(&self, parameters: &mut Vec<Value>) -> String {
        match self {
            Self::Tag(tag) => {
                parameters.push(Value::from(tag));
                "EXISTS (SELECT 1 FROM subscription_tags WHERE subscription_tags.site = subscriptions.site
                 AND tag = ? AND subscription = subscriptions.id)"
                    .to_owned()
            }
            Self::Not(inner) => format!("NOT {}", inner.to_sql(parameters)),
            Self::And(left, right) => {
                format!("({} AND {})", left.to_sql(parameters), right.to_sql(parameters))
            }
            Self::Or(left, right) => format!("({} OR {})", left.to_sql(parameters), right.to_sql(parameters)),
        }
    }
}

/// A word or a parenthesis, and the index of its first character.
#[derive(Debug)]
struct TagToken<'a> {
    text: &'a str,
    position: usize,
}

fn tokens(text: &str) -> Vec<TagToken<'_>> {
    let mut tokens = Vec::new();
    let mut rest = text.char_indices().enumerate().peekable();
    while let Some((position, (start, c))) = rest.next() {
        if c.is_whitespace() {
            continue;
        }
        let mut end = start + c.len_utf8();
        if c != '(' && c != ')' {
            while let Some((_, (at, c))) =
                rest.next_if(|(_, (_, c))| !c.is_whitespace() && *c != '(' && *c != ')')
            {
                end = at + c.len_utf8();
            }
        }
        tokens.push(TagToken { text: &text[start..end], position });
    }
    tokens
}

struct Parser<'a> {
    tokens: Vec<TagToken<'a>>,
    next: usize,
    terms: usize,
    end: usize,
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Option<&'a str> {
        self.tokens.get(self.next).map(|token| token.text)
    }

    fn take(&mut self, text: &str) -> bool {
        let found = self.peek() == Some(text);
        self.next += usize::from(found);
        found
    }

    fn wanted(&self, wanted: &str) -> SyntaxError {
        let position = self.tokens.get(self.next).map_or(self.end, |token| token.position);
        SyntaxError { position, wanted: wanted.to_owned() }
    }

    fn expression(&mut self, depth: usize) -> Result<TagExpression, SyntaxError> {
        let mut left = self.and(depth)?;
        while self.take("or") {
            left = TagExpression::Or(Box::new(left), Box::new(self.and(depth)?));
        }
        Ok(left)
    }

    fn and(&mut self, depth: usize) -> Result<TagExpression, SyntaxError> {
        let mut left = self.not(depth)?;
        while self.take("and") {
            left = TagExpression::And(Box::new(left), Box::new(self.not(depth)?));
        }
        Ok(left)
    }

    fn not(&mut self, depth: usize) -> Result<TagExpression, SyntaxError> {
        if depth > MAX_DEPTH {
            return Err(self.wanted("less nesting"));
        }
        if self.take("not") {
            return Ok(TagExpression::Not(Box::new(self.not(depth + 1)?)));
        }
        if self.take("(") {
            let inner = self.expression(depth + 1)?;
            return if self.take(")") { Ok(inner) } else { Err(self.wanted("and, or, or )")) };
        }
        let tag = self.peek().filter(|text| is_tag(text)).ok_or_else(|| self.wanted("a tag, not, or ("))?;
        self.terms += 1;
        if self.terms > MAX_TERMS {
            return Err(self.wanted(&format!("at most {MAX_TERMS} tags")));
        }
        self.next += 1;
        Ok(TagExpression::Tag(tag.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(text: &str) -> String {
        fn shape(expression: &TagExpression) -> String {
            match expression {
                TagExpression::Tag(tag) => tag.clone(),
                TagExpression::Not(inner) => format!("!{}", shape(inner)),
                TagExpression::And(left, right) => format!("({}&{})", shape(left), shape(right)),
                TagExpression::Or(left, right) => format!("({}|{})", shape(left), shape(right)),
            }
        }
        shape(&TagExpression::parse(text).unwrap())
    }

    #[test]
    fn not_binds_before_and_and_before_or() {
        assert_eq!(shape("news and fr and not muted"), "((news&fr)&!muted)");
        assert_eq!(shape("a or b and c"), "(a|(b&c))");
        assert_eq!(shape("(a or b) and not (c or not d)"), "((a|b)&!(c|!d))");
        assert_eq!(shape(" lang:fr "), "lang:fr");
        assert_eq!(shape("not not(a)"), "!!a");
    }

    #[test]
    fn what_everybody_has_is_found() {
        let needed = |text: &str| TagExpression::parse(text).unwrap().needed().map(str::to_owned);
        assert_eq!(needed("not a and (b or c) and d").as_deref(), Some("d"));
        assert_eq!(needed("news").as_deref(), Some("news"));
        assert_eq!(needed("a or b"), None);
        assert_eq!(needed("not a"), None);
    }

    #[test]
    fn an_error_names_its_place() {
        let deep = format!("{}a", "not ".repeat(40));
        let long = "a".repeat(1001);
        let many = ["a"; 33].join(" or ");
        for (text, position, wanted) in [
            ("", 0, "a tag, not, or ("),
            ("   ", 3, "a tag, not, or ("),
            ("news and", 8, "a tag, not, or ("),
            ("news fr", 5, "and, or, or the end"),
            ("and news", 0, "a tag, not, or ("),
            ("é and (b", 8, "and, or, or )"),
            ("(a or b", 7, "and, or, or )"),
            ("a)", 1, "and, or, or the end"),
            ("a and b!", 6, "a tag, not, or ("),
            (&deep, 132, "less nesting"),
            (&long, 1000, "at most 1000 characters"),
            (&many, 160, "at most 32 tags"),
        ] {
            if text.starts_with('é') {
                assert_eq!(TagExpression::parse(text).unwrap_err().position, 0, "é is no tag");
                continue;
            }
            let error = TagExpression::parse(text).unwrap_err();
            assert_eq!((error.position, error.wanted.as_str()), (position, wanted), "{text:?}");
        }
    }

    #[test]
    fn positions_count_characters_not_bytes() {
        assert_eq!(TagExpression::parse("news\u{a0}and ü").unwrap_err().position, 9);
    }
}
