//! The audience of a notification, and its translation to SQL.

use perennial_store::pool::sql::{Dialect, Value};
use serde::{Deserialize, Serialize};

use crate::model::tags::TagExpression;

/// The audience of a notification, as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Audience {
    /// Every subscription of the site.
    All,
    /// The subscriptions of one user.
    User(String),
    /// The subscriptions of several users.
    Users(Vec<String>),
    /// The subscriptions whose tags match an expression.
    Tags(String),
    /// The subscriptions with these ids.
    Subscriptions(Vec<i64>),
    /// Subscriptions that came with the notification and are stored with it.
    Inline,
}

/// The selected rows of `subscriptions`, as the parts of a statement.
#[derive(Clone, Debug)]
pub(crate) struct Selection {
    pub(crate) from: &'static str,
    pub(crate) condition: String,
    /// Column that orders the rows of `from`.
    pub(crate) id: &'static str,
    pub(crate) parameters: Vec<Value>,
}

impl Audience {
    /// Selects the members in one site with `after < id <= upto`.
    pub(crate) fn select(&self, dialect: Dialect, site: i64, after: i64, upto: i64) -> Selection {
        if let Self::Tags(text) = self
            && let Ok(expression) = TagExpression::parse(text)
            && let Some(tag) = expression.needed()
        {
            // Only rows with this tag are read, however many others there are.
            let mut parameters = vec![site.into(), tag.into(), after.into(), upto.into()];
            let mut condition =
                "needed.site = ? AND needed.tag = ? AND needed.subscription > ? AND needed.subscription <= ?"
                    .to_owned();
            if dialect == Dialect::Postgres {
                // Postgres does not conclude this from the join, and its merge join would read all earlier rows.
                condition.push_str(" AND subscriptions.id > ? AND subscriptions.id <= ?");
                parameters.extend([after.into(), upto.into()]);
            }
            if !matches!(expression, TagExpression::Tag(_)) {
                condition.push_str(" AND ");
                condition.push_str(&expression.to_sql(&mut parameters));
            }
            let from = match dialect {
                // CROSS JOIN fixes the order of the tables, whatever the statistics say.
                Dialect::Sqlite => {
                    "subscription_tags AS needed CROSS JOIN subscriptions ON subscriptions.id = needed.subscription"
                }
                Dialect::Postgres => {
                    "subscription_tags AS needed JOIN subscriptions ON subscriptions.id = needed.subscription"
                }
            };
            return Selection { from, condition, id: "needed.subscription", parameters };
        }
        let mut parameters = vec![site.into(), after.into(), upto.into()];
        let filter = self.filter(dialect, site, &mut parameters);
        let condition = format!("site = ? AND id > ? AND id <= ? AND {filter}");
        Selection { from: "subscriptions", condition, id: "id", parameters }
    }

    /// Returns a condition on the `subscriptions` of one site; its parameters are appended to `parameters`.
    fn filter(&self, dialect: Dialect, site: i64, parameters: &mut Vec<Value>) -> String {
        match self {
            Self::All => "TRUE".to_owned(),
            Self::User(user) => {
                parameters.push(Value::from(user));
                r#""user" = ?"#.to_owned()
            }
            Self::Users(users) => {
                parameters.extend([Value::from(site), json(users)]);
                // The subquery uses the index on users; with the index on ids, every row would be read.
                let users = dialect.texts_in("?");
                format!(r#"id IN (SELECT id FROM subscriptions WHERE site = ? AND "user" IN ({users}))"#)
            }
            // The expression was parsed when the notification was accepted.
            Self::Tags(text) => TagExpression::parse(text)
                .map_or_else(|_| "FALSE".to_owned(), |expression| expression.to_sql(parameters)),
            Self::Subscriptions(ids) => {
                parameters.push(json(ids));
                format!("id IN ({})", dialect.numbers_in("?"))
            }
            // Inline subscriptions are in another table.
            Self::Inline => "FALSE".to_owned(),
        }
    }
}

fn json(list: &impl Serialize) -> Value {
    Value::from(serde_json::to_string(list).unwrap_or_else(|_| "[]".to_owned()))
}
