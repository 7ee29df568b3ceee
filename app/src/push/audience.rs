//! Whom a notification is for.

use perennial_server::pool::sql::{Dialect, Value};
use serde::{Deserialize, Serialize};

use super::tags::Expression;

/// The audience of a notification, as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Audience {
    /// Every subscription of the site.
    All,
    /// Those of one user.
    User(String),
    /// Those of several users.
    Users(Vec<String>),
    /// Those whose tags make an expression true.
    Tags(String),
    /// Those with these ids.
    Subscriptions(Vec<i64>),
    /// Those that came with the notification, and are stored with it.
    Inline,
}

impl Audience {
    /// A condition on `subscriptions` of one site, its parameters appended to `parameters`.
    pub(crate) fn to_sql(&self, dialect: Dialect, site: i64, parameters: &mut Vec<Value>) -> String {
        match self {
            Self::All => "TRUE".to_owned(),
            Self::User(user) => {
                parameters.push(Value::from(user));
                r#""user" = ?"#.to_owned()
            }
            Self::Users(users) => {
                parameters.extend([Value::from(site), json(users)]);
                // Found by the index on users first: by that on ids, every row would be looked at.
                let users = dialect.texts_in("?");
                format!(r#"id IN (SELECT id FROM subscriptions WHERE site = ? AND "user" IN ({users}))"#)
            }
            // It was read when the notification was accepted.
            Self::Tags(text) => Expression::parse(text)
                .map_or_else(|_| "FALSE".to_owned(), |expression| expression.to_sql(parameters)),
            Self::Subscriptions(ids) => {
                parameters.push(json(ids));
                format!("id IN ({})", dialect.numbers_in("?"))
            }
            // They are in another table.
            Self::Inline => "FALSE".to_owned(),
        }
    }
}

fn json(list: &impl Serialize) -> Value {
    Value::from(serde_json::to_string(list).unwrap_or_else(|_| "[]".to_owned()))
}
