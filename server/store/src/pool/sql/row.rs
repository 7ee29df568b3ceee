//! Rows, and how their values are read.

use std::fmt::Write as _;
use std::sync::Arc;

use jiff::{Timestamp, civil};
use rust_decimal::Decimal;
use rust_decimal::prelude::ToPrimitive;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::Result;
use super::error::{Error, Statement};
use super::value::{ArrayElement, AsJson, Value};
use crate::pool::unreadable::set_apart;

/// A type that a value of a row can be read as.
pub trait FromValue: Sized {
    /// Description of the type, for errors.
    const WANTED: &'static str;

    /// Converts the value; `None` when it is of another type.
    fn from_value(value: &Value) -> Option<Self>;
}

macro_rules! from_value {
    ($($to:ty, $wanted:literal: $($pattern:pat => $value:expr);+),* $(,)?) => {$(
        impl FromValue for $to {
            const WANTED: &'static str = $wanted;

            fn from_value(value: &Value) -> Option<Self> {
                match value {
                    $($pattern => $value,)+
                    _ => None,
                }
            }
        }
    )*};
}

from_value! {
    i64, "a whole number": Value::Integer(Some(value)) => Some(*value),
    i32, "a whole number of 32 bits": Value::Integer(Some(value)) => i32::try_from(*value).ok(),
    i16, "a whole number of 16 bits": Value::Integer(Some(value)) => i16::try_from(*value).ok(),
    u64, "a whole number from 0": Value::Integer(Some(value)) => u64::try_from(*value).ok(),
    u32, "a whole number from 0 to 4294967295": Value::Integer(Some(value)) => u32::try_from(*value).ok(),
    u16, "a whole number from 0 to 65535": Value::Integer(Some(value)) => u16::try_from(*value).ok(),
    usize, "a whole number from 0": Value::Integer(Some(value)) => usize::try_from(*value).ok(),
    f64, "a number":
        Value::Real(Some(value)) => Some(*value);
        Value::Integer(Some(value)) => value.to_f64();
        Value::Decimal(Some(value)) => value.to_f64(),
    Decimal, "a decimal number":
        Value::Decimal(Some(value)) => Some(*value);
        Value::Integer(Some(value)) => Some(Decimal::from(*value));
        Value::Real(Some(value)) => Decimal::try_from(*value).ok();
        Value::Text(Some(value)) => value.parse().ok(),
    bool, "true or false":
        Value::Bool(Some(value)) => Some(*value);
        Value::Integer(Some(value)) => Some(*value != 0),
    String, "a text in UTF-8": Value::Text(Some(value)) => Some(value.clone()),
    Vec<u8>, "bytes":
        Value::Blob(Some(value)) => Some(value.clone());
        Value::Uuid(Some(value)) => Some(value.as_bytes().to_vec()),
    Uuid, "16 bytes":
        Value::Uuid(Some(value)) => Some(*value);
        Value::Blob(Some(value)) => Uuid::from_slice(value).ok();
        Value::Text(Some(value)) => value.parse().ok(),
    Timestamp, "a moment":
        Value::Timestamp(Some(value)) => Some(*value);
        Value::Text(Some(value)) => value.parse().ok(),
    civil::DateTime, "a date and a time without a time zone":
        Value::DateTime(Some(value)) => Some(*value);
        Value::Text(Some(value)) => value.parse().ok(),
    civil::Date, "a date":
        Value::Date(Some(value)) => Some(*value);
        Value::Text(Some(value)) => value.parse().ok(),
    serde_json::Value, "JSON":
        Value::Json(Some(value)) => Some(value.clone());
        Value::Text(Some(value)) => serde_json::from_str(value).ok(),
}

impl<const N: usize> FromValue for [u8; N] {
    const WANTED: &'static str = "bytes of a certain length";

    fn from_value(value: &Value) -> Option<Self> {
        Vec::<u8>::from_value(value)?.try_into().ok()
    }
}

impl<T: FromValue> FromValue for Option<T> {
    const WANTED: &'static str = T::WANTED;

    fn from_value(value: &Value) -> Option<Self> {
        if value.is_null() { Some(None) } else { T::from_value(value).map(Some) }
    }
}

impl<T: DeserializeOwned> FromValue for AsJson<T> {
    const WANTED: &'static str = "JSON of a certain shape";

    fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::Json(Some(value)) => serde_json::from_value(value.clone()).ok(),
            Value::Text(Some(value)) => serde_json::from_str(value).ok(),
            value if value.is_null() => serde_json::from_value(serde_json::Value::Null).ok(),
            _ => None,
        }
        .map(AsJson)
    }
}

impl<T: FromValue + ArrayElement> FromValue for Vec<T> {
    const WANTED: &'static str = "a list";

    fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::Array(_, Some(values)) => values.iter().map(T::from_value).collect(),
            Value::Text(Some(list)) => {
                let list: Vec<serde_json::Value> = serde_json::from_str(list).ok()?;
                list.into_iter().map(|value| T::from_value(&of_list(value))).collect()
            }
            _ => None,
        }
    }
}

/// The element of a JSON list as a value of a row.
fn of_list(value: serde_json::Value) -> Value {
    match value {
        serde_json::Value::Null => Value::Integer(None),
        serde_json::Value::Bool(value) => Value::Bool(Some(value)),
        serde_json::Value::String(value) => Value::Text(Some(value)),
        serde_json::Value::Number(number) => match number.as_i64() {
            Some(number) => Value::Integer(Some(number)),
            None => Value::Real(number.as_f64()),
        },
        other => Value::Json(Some(other)),
    }
}

/// A row that a statement returned.
#[derive(Clone, Debug)]
pub struct Row {
    pub(super) columns: Arc<Columns>,
    pub(super) values: Vec<Value>,
}

/// What all rows of one answer share.
#[derive(Debug)]
pub(super) struct Columns {
    pub(super) names: Vec<String>,
    pub(super) statement: Statement,
}

impl Row {
    /// The value of a column.
    ///
    /// # Errors
    /// [`Error::Unreadable`] when there is no such column, or its value is of another kind.
    pub fn get<T: FromValue>(&self, column: &str) -> Result<T> {
        self.read(column, self.value(column))
    }

    /// The value of the first column.
    ///
    /// # Errors
    /// [`Error::Unreadable`] when it is of another kind.
    pub fn first<T: FromValue>(&self) -> Result<T> {
        self.at(0)
    }

    /// The value of a column by its number, from 0.
    ///
    /// # Errors
    /// [`Error::Unreadable`] when there is no such column, or its value is of another kind.
    pub fn at<T: FromValue>(&self, index: usize) -> Result<T> {
        let number = || (index + 1).to_string();
        let column = self.columns.names.get(index).cloned().unwrap_or_else(number);
        self.read(&column, self.values.get(index))
    }

    /// The row as a type with the derive macro [`FromRow`].
    ///
    /// # Errors
    /// [`Error::Unreadable`] names the first column that does not fit.
    pub fn to<T: FromRow>(&self) -> Result<T> {
        T::from_row(self)
    }

    fn read<T: FromValue>(&self, column: &str, value: Option<&Value>) -> Result<T> {
        value.and_then(T::from_value).ok_or_else(|| Error::Unreadable {
            column: column.to_owned(),
            wanted: T::WANTED,
            found: value.map_or_else(|| "not there".to_owned(), Value::describe),
            statement: Some(self.columns.statement.clone()),
        })
    }

    /// The value of a column as it is; `None` when there is no such column.
    pub fn value(&self, column: &str) -> Option<&Value> {
        self.values.get(self.columns.names.iter().position(|name| name == column)?)
    }

    /// The name of the row in the log: the value of its column `id`, in printable form.
    pub fn name(&self, id: &str) -> String {
        match self.value(id) {
            Some(Value::Integer(Some(number))) => number.to_string(),
            Some(Value::Text(Some(text))) => text.clone(),
            Some(Value::Uuid(Some(id))) => id.to_string(),
            Some(Value::Blob(Some(bytes)) | Value::Foreign { bytes, .. }) => {
                bytes.iter().take(16).fold(String::new(), |mut hex, byte| {
                    let _ = write!(hex, "{byte:02x}");
                    hex
                })
            }
            _ => "?".to_owned(),
        }
    }

    /// Approximate size of the values, in bytes.
    pub fn bytes(&self) -> usize {
        self.values.iter().map(Value::bytes).sum()
    }
}

/// A type that a whole row can be read as. `#[derive(FromRow)]` implements it for a struct: each field is the column
/// with its name.
///
/// ```
/// use perennial_store::pool::sql::{AsJson, FromRow};
///
/// #[derive(FromRow)]
/// #[row(crate = perennial_store::pool::sql)]
/// struct Book {
///     id: i64,
///     title: String,
///     #[row(rename = "published_at")]
///     published: Option<jiff::Timestamp>,
///     #[row(json)]
///     prices: std::collections::BTreeMap<String, u32>,
///     #[row(default)]
///     copies: i64,
/// }
/// ```
///
/// `rename` names another column, `json` reads any type of serde from a JSON column, `default` takes the default value
/// where the row has no such column or it is NULL.
pub trait FromRow: Sized {
    /// Reads the row.
    ///
    /// # Errors
    /// [`Error::Unreadable`] names the first column that does not fit.
    fn from_row(row: &Row) -> Result<Self>;
}

macro_rules! from_row_for_tuples {
    ($($name:ident $index:literal),*) => {
        impl<$($name: FromValue),*> FromRow for ($($name,)*) {
            fn from_row(row: &Row) -> Result<Self> {
                Ok(($(row.at::<$name>($index)?,)*))
            }
        }
    };
}

from_row_for_tuples!(A 0);
from_row_for_tuples!(A 0, B 1);
from_row_for_tuples!(A 0, B 1, C 2);
from_row_for_tuples!(A 0, B 1, C 2, D 3);
from_row_for_tuples!(A 0, B 1, C 2, D 3, E 4);
from_row_for_tuples!(A 0, B 1, C 2, D 3, E 4, F 5);

/// Reads rows one by one. A row that cannot be read is left out and reported under its `id`.
pub fn each<T>(rows: &[Row], what: &'static str, id: &str, read: impl Fn(&Row) -> Result<T>) -> Vec<T> {
    let read = |row: &Row| read(row).inspect_err(|error| set_apart(what, &row.name(id), error)).ok();
    rows.iter().filter_map(read).collect()
}
