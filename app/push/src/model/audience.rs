//! Whom a notification is for.

use perennial_store::pool::sql::{Dialect, Value};
use serde::{Deserialize, Serialize};

use crate::model::tags::TagExpression;

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

/// Which rows of `subscriptions` are meant, as the parts of a statement.
#[derive(Clone, Debug)]
pub(crate) struct Selection {
    pub(crate) from: &'static str,
    pub(crate) condition: String,
    /// What `from` is read in the order of.
    pub(crate) id: &'static str,
    pub(crate) parameters: Vec<Value>,
}

impl Audience {
    /// Those of one site with `after < id <= upto`.
    pub(crate) fn select(&self, dialect: Dialect, site: i64, after: i64, upto: i64) -> Selection {
        if let Self::Tags(text) = self
            && let Ok(expression) = TagExpression::parse(text)
            && let Some(tag) = expression.needed()
        {
            // Only those with this tag are looked at, however many others there are.
            let mut parameters = vec![site.into(), tag.into(), after.into(), upto.into()];
            let mut condition =
                "needed.site = ? AND needed.tag = ? AND needed.subscription > ? AND needed.subscription <= ?"
                    .to_owned();
            if dialect == Dialect::Postgres {
                // It does not conclude this from the join, and would read all that comes before when it merges.
                condition.push_str(" AND subscriptions.id > ? AND subscriptions.id <= ?");
                parameters.extend([after.into(), upto.into()]);
            }
            if !matches!(expression, TagExpression::Tag(_)) {
                condition.push_str(" AND ");
                condition.push_str(&expression.to_sql(&mut parameters));
            }
            let from = match dialect {
                // In this order, whatever statistics say.
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

    /// A condition on `subscriptions` of one site, its parameters appended to `parameters`.
    fn filter(&self, dialect: Dialect, site: i64, parameters: &mut Vec<Value>) -> String {
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
            Self::Tags(text) => TagExpression::parse(text)
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
