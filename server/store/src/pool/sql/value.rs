//! Values: the parameters of a statement, and what its rows have.
//!
//! | Rust | Postgres | SQLite |
//! |---|---|---|
//! | `i16`, `i32`, `i64`, `u32`, and `u64`, `usize` up to the largest `i64` | `bigint`, and by assignment `smallint`, `integer`, `numeric` | INTEGER |
//! | `f32`, `f64` | `double precision` | REAL |
//! | [`Decimal`] | `numeric` | TEXT, which is compared and sorted as a text |
//! | `bool` | `boolean` | INTEGER, 0 or 1 |
//! | `String`, `&str` | `text` | TEXT |
//! | `Vec<u8>`, `&[u8]` | `bytea` | BLOB |
//! | [`Uuid`] | `uuid` or `bytea`, whichever the column is | BLOB of 16 bytes |
//! | [`Timestamp`] | `timestamptz` | TEXT such as `2026-11-28T02:24:12.000000Z`, which sorts by time |
//! | [`civil::DateTime`], [`civil::Date`] | `timestamp`, `date` | TEXT, which sorts by time |
//! | [`serde_json::Value`], [`AsJson`] | `jsonb`, and by assignment `json` | TEXT |
//! | `Vec` of these, without bytes | an array | TEXT, a JSON list |
//!
//! An `Option` of any of them may be NULL.

use bytes::BytesMut;
use jiff::{Timestamp, civil};
use rusqlite::types::ToSqlOutput;
use rust_decimal::Decimal;
use serde::Serialize;
use tokio_postgres::types::{IsNull, ToSql, Type};
use uuid::Uuid;

use super::postgres::Parameter;

type Unwritable = Box<dyn std::error::Error + Send + Sync>;

/// A parameter, or a value of a row.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A whole number.
    Integer(Option<i64>),
    /// A floating-point number.
    Real(Option<f64>),
    /// A decimal number.
    Decimal(Option<Decimal>),
    /// A text.
    Text(Option<String>),
    /// Bytes.
    Blob(Option<Vec<u8>>),
    /// True or false; a number on SQLite.
    Bool(Option<bool>),
    /// A UUID.
    Uuid(Option<Uuid>),
    /// A moment.
    Timestamp(Option<Timestamp>),
    /// A date and a time of day, without a time zone.
    DateTime(Option<civil::DateTime>),
    /// A date.
    Date(Option<civil::Date>),
    /// JSON.
    Json(Option<serde_json::Value>),
    /// A list of values of one type.
    Array(Element, Option<Vec<Value>>),
    /// A parameter that cannot be stored, and the reason.
    Unwritable(String),
    /// A value that no row of this program has: a text that is not UTF-8, or a value of a type that is not read.
    Foreign {
        /// Description of its type.
        kind: &'static str,
        /// Its bytes, as far as they are known.
        bytes: Vec<u8>,
    },
}

/// Type of the elements of an array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// Whole numbers: `bigint[]`.
    Integer,
    /// Floating-point numbers: `double precision[]`.
    Real,
    /// Decimal numbers: `numeric[]`.
    Decimal,
    /// Texts: `text[]`.
    Text,
    /// `boolean[]`.
    Bool,
    /// `uuid[]`.
    Uuid,
    /// Moments: `timestamptz[]`.
    Timestamp,
    /// Dates: `date[]`.
    Date,
}

/// A value that is stored as JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AsJson<T>(pub T);

/// A type that a parameter can have, and that can be NULL.
pub trait Bind: Into<Value> {
    /// NULL of this type.
    const NULL: Value;
}

/// A type that the elements of an array can have.
pub trait ArrayElement: Into<Value> {
    /// The type.
    const ELEMENT: Element;
}

macro_rules! bind {
    ($($from:ty => $variant:ident($convert:expr)),* $(,)?) => {$(
        impl From<$from> for Value {
            fn from(value: $from) -> Self {
                let convert: fn($from) -> _ = $convert;
                Self::$variant(Some(convert(value)))
            }
        }

        impl Bind for $from {
            const NULL: Value = Value::$variant(None);
        }
    )*};
}

bind! {
    i64 => Integer(|value| value),
    i32 => Integer(i64::from),
    i16 => Integer(i64::from),
    u32 => Integer(i64::from),
    f64 => Real(|value| value),
    f32 => Real(f64::from),
    Decimal => Decimal(|value| value),
    bool => Bool(|value| value),
    &str => Text(str::to_owned),
    &String => Text(String::clone),
    String => Text(|value| value),
    &[u8] => Blob(<[u8]>::to_vec),
    Vec<u8> => Blob(|value| value),
    &Vec<u8> => Blob(Vec::clone),
    Uuid => Uuid(|value| value),
    &Uuid => Uuid(|value| *value),
    Timestamp => Timestamp(|value| value),
    civil::DateTime => DateTime(|value| value),
    civil::Date => Date(|value| value),
    serde_json::Value => Json(|value| value),
    &serde_json::Value => Json(serde_json::Value::clone),
}

macro_rules! bind_unsigned {
    ($($from:ty),*) => {$(
        impl From<$from> for Value {
            fn from(value: $from) -> Self {
                match i64::try_from(value) {
                    Ok(value) => Self::Integer(Some(value)),
                    Err(_) => Self::Unwritable(format!("{value} is more than {}", i64::MAX)),
                }
            }
        }

        impl Bind for $from {
            const NULL: Value = Value::Integer(None);
        }
    )*};
}

bind_unsigned!(u64, usize);

macro_rules! elements {
    ($($from:ty => $element:ident),* $(,)?) => {$(
        impl ArrayElement for $from {
            const ELEMENT: Element = Element::$element;
        }
    )*};
}

elements! {
    i64 => Integer,
    i32 => Integer,
    i16 => Integer,
    u32 => Integer,
    u64 => Integer,
    f64 => Real,
    f32 => Real,
    Decimal => Decimal,
    bool => Bool,
    &str => Text,
    &String => Text,
    String => Text,
    Uuid => Uuid,
    Timestamp => Timestamp,
    civil::Date => Date,
}

impl<const N: usize> From<[u8; N]> for Value {
    fn from(value: [u8; N]) -> Self {
        Self::Blob(Some(value.to_vec()))
    }
}

impl<const N: usize> Bind for [u8; N] {
    const NULL: Value = Value::Blob(None);
}

impl<const N: usize> From<&[u8; N]> for Value {
    fn from(value: &[u8; N]) -> Self {
        Self::Blob(Some(value.to_vec()))
    }
}

impl<T: Bind> From<Option<T>> for Value {
    fn from(value: Option<T>) -> Self {
        value.map_or(T::NULL, T::into)
    }
}

impl<T: Bind + Clone> From<&Option<T>> for Value {
    fn from(value: &Option<T>) -> Self {
        value.clone().into()
    }
}

impl<T: ArrayElement> From<Vec<T>> for Value {
    fn from(values: Vec<T>) -> Self {
        Self::Array(T::ELEMENT, Some(values.into_iter().map(T::into).collect()))
    }
}

impl<T: ArrayElement> Bind for Vec<T> {
    const NULL: Value = Value::Array(T::ELEMENT, None);
}

impl<T: ArrayElement + Clone> From<&Vec<T>> for Value {
    fn from(values: &Vec<T>) -> Self {
        values.clone().into()
    }
}

impl<T: ArrayElement + Clone> From<&[T]> for Value {
    fn from(values: &[T]) -> Self {
        values.to_vec().into()
    }
}

impl<T: Serialize> From<AsJson<T>> for Value {
    fn from(AsJson(value): AsJson<T>) -> Self {
        match serde_json::to_value(value) {
            Ok(json) => Self::Json(Some(json)),
            Err(error) => Self::Unwritable(format!("JSON: {error}")),
        }
    }
}

impl<T: Serialize> Bind for AsJson<T> {
    const NULL: Value = Value::Json(None);
}

impl Element {
    fn array(self) -> Type {
        match self {
            Self::Integer => Type::INT8_ARRAY,
            Self::Real => Type::FLOAT8_ARRAY,
            Self::Decimal => Type::NUMERIC_ARRAY,
            Self::Text => Type::TEXT_ARRAY,
            Self::Bool => Type::BOOL_ARRAY,
            Self::Uuid => Type::UUID_ARRAY,
            Self::Timestamp => Type::TIMESTAMPTZ_ARRAY,
            Self::Date => Type::DATE_ARRAY,
        }
    }
}

/// A moment as SQLite stores it: all of them have the same length, so that their order is that of time.
fn moment(value: Timestamp) -> String {
    format!("{value:.6}")
}

impl rusqlite::ToSql for Value {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        use rusqlite::types::Value as Owned;
        use rusqlite::types::ValueRef;
        let borrowed = |value| Ok(ToSqlOutput::Borrowed(value));
        let text = |text: String| Ok(ToSqlOutput::Owned(Owned::Text(text)));
        match self {
            Self::Integer(Some(value)) => borrowed(ValueRef::Integer(*value)),
            Self::Real(Some(value)) => borrowed(ValueRef::Real(*value)),
            Self::Bool(Some(value)) => borrowed(ValueRef::Integer(i64::from(*value))),
            Self::Text(Some(value)) => borrowed(ValueRef::Text(value.as_bytes())),
            Self::Blob(Some(value)) | Self::Foreign { bytes: value, .. } => borrowed(ValueRef::Blob(value)),
            Self::Uuid(Some(value)) => borrowed(ValueRef::Blob(value.as_bytes())),
            Self::Decimal(Some(value)) => text(value.to_string()),
            Self::Timestamp(Some(value)) => text(moment(*value)),
            Self::DateTime(Some(value)) => text(format!("{value:.6}")),
            Self::Date(Some(value)) => text(value.to_string()),
            Self::Json(Some(value)) => text(value.to_string()),
            Self::Array(_, Some(values)) => {
                text(serde_json::Value::from_iter(values.iter().map(Self::in_list)).to_string())
            }
            Self::Unwritable(why) => Err(rusqlite::Error::ToSqlConversionFailure(why.clone().into())),
            Self::Integer(None)
            | Self::Real(None)
            | Self::Decimal(None)
            | Self::Text(None)
            | Self::Blob(None)
            | Self::Bool(None)
            | Self::Uuid(None)
            | Self::Timestamp(None)
            | Self::DateTime(None)
            | Self::Date(None)
            | Self::Json(None)
            | Self::Array(_, None) => borrowed(ValueRef::Null),
        }
    }
}

impl ToSql for Value {
    fn to_sql(&self, kind: &Type, out: &mut BytesMut) -> Result<IsNull, Unwritable> {
        match self {
            Self::Integer(value) => value.to_sql(kind, out),
            Self::Real(value) => value.to_sql(kind, out),
            Self::Decimal(value) => value.to_sql(kind, out),
            Self::Text(value) => value.to_sql(kind, out),
            Self::Blob(value) => value.to_sql(kind, out),
            Self::Bool(value) => value.to_sql(kind, out),
            // The same bytes for `uuid` and `bytea`.
            Self::Uuid(value) => {
                value.as_ref().map(Uuid::as_bytes).map(<[u8; 16]>::as_slice).to_sql(kind, out)
            }
            Self::Timestamp(value) => value.to_sql(kind, out),
            Self::DateTime(value) => value.to_sql(kind, out),
            Self::Date(value) => value.to_sql(kind, out),
            Self::Json(value) => value.to_sql(kind, out),
            Self::Array(_, values) => values.to_sql(kind, out),
            Self::Foreign { bytes, .. } => bytes.to_sql(kind, out),
            Self::Unwritable(why) => Err(why.clone().into()),
        }
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    tokio_postgres::types::to_sql_checked!();
}

impl Value {
    pub(super) fn parameter(&self) -> Parameter<'_> {
        let kind = match self {
            Self::Integer(_) => Type::INT8,
            Self::Real(_) => Type::FLOAT8,
            Self::Decimal(_) => Type::NUMERIC,
            Self::Text(_) => Type::TEXT,
            Self::Blob(_) | Self::Foreign { .. } | Self::Unwritable(_) => Type::BYTEA,
            Self::Bool(_) => Type::BOOL,
            // The server takes the type of the column.
            Self::Uuid(_) => Type::UNKNOWN,
            Self::Timestamp(_) => Type::TIMESTAMPTZ,
            Self::DateTime(_) => Type::TIMESTAMP,
            Self::Date(_) => Type::DATE,
            Self::Json(_) => Type::JSONB,
            Self::Array(element, _) => element.array(),
        };
        (self, kind)
    }

    /// Returns true for NULL.
    pub fn is_null(&self) -> bool {
        match self {
            Self::Integer(value) => value.is_none(),
            Self::Real(value) => value.is_none(),
            Self::Decimal(value) => value.is_none(),
            Self::Text(value) => value.is_none(),
            Self::Blob(value) => value.is_none(),
            Self::Bool(value) => value.is_none(),
            Self::Uuid(value) => value.is_none(),
            Self::Timestamp(value) => value.is_none(),
            Self::DateTime(value) => value.is_none(),
            Self::Date(value) => value.is_none(),
            Self::Json(value) => value.is_none(),
            Self::Array(_, values) => values.is_none(),
            Self::Unwritable(_) | Self::Foreign { .. } => false,
        }
    }

    /// The value as an element of a JSON list.
    fn in_list(&self) -> serde_json::Value {
        match self {
            Self::Integer(value) => (*value).into(),
            Self::Real(value) => (*value).into(),
            Self::Bool(value) => (*value).into(),
            Self::Text(value) => value.clone().into(),
            Self::Decimal(value) => value.map(|value| value.to_string()).into(),
            Self::Uuid(value) => value.map(|value| value.to_string()).into(),
            Self::Timestamp(value) => value.map(moment).into(),
            Self::DateTime(value) => value.map(|value| format!("{value:.6}")).into(),
            Self::Date(value) => value.map(|value| value.to_string()).into(),
            Self::Json(value) => value.clone().unwrap_or_default(),
            // No array has such elements.
            Self::Blob(_) | Self::Array(..) | Self::Unwritable(_) | Self::Foreign { .. } => {
                serde_json::Value::Null
            }
        }
    }

    /// Approximate size, in bytes.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Text(Some(text)) => text.len(),
            Self::Blob(Some(bytes)) | Self::Foreign { bytes, .. } => bytes.len(),
            Self::Json(Some(json)) => json.to_string().len(),
            Self::Array(_, Some(values)) => values.iter().map(Self::bytes).sum(),
            _ => size_of::<i64>(),
        }
    }

    /// Description of the value, for errors.
    pub(super) fn describe(&self) -> String {
        let found = match self {
            _ if self.is_null() => Some("NULL".to_owned()),
            Self::Integer(value) => value.map(|number| format!("the whole number {number}")),
            Self::Real(value) => value.map(|number| format!("the floating-point number {number}")),
            Self::Decimal(value) => value.map(|number| format!("the decimal number {number}")),
            Self::Text(value) => value.as_ref().map(|text| format!("a text of {} bytes", text.len())),
            Self::Blob(value) => value.as_ref().map(|bytes| format!("{} bytes", bytes.len())),
            Self::Bool(value) => value.map(|value| value.to_string()),
            Self::Uuid(_) => Some("a UUID".to_owned()),
            Self::Timestamp(_) => Some("a moment".to_owned()),
            Self::DateTime(_) => Some("a date and a time without a time zone".to_owned()),
            Self::Date(_) => Some("a date".to_owned()),
            Self::Json(_) => Some("JSON".to_owned()),
            Self::Array(..) => Some("an array".to_owned()),
            Self::Unwritable(why) => Some(why.clone()),
            Self::Foreign { kind, .. } => Some((*kind).to_owned()),
        };
        found.unwrap_or_default()
    }
}
