//! SQL as an application uses it: the same code on both stores.

use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use jiff::{Timestamp, civil};
use perennial::sql::{AsJson, Decimal, Error, FromRow, Store, Tx};
use perennial::values;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use support::backend::sqlite_config;
use support::postgres::Database;
use tempfile::TempDir;
use uuid::Uuid;

/// Keeps what a store is made of.
#[derive(Debug)]
pub(crate) enum Kept {
    File { _directory: TempDir },
    Server { _database: Box<Database> },
}

/// Both stores, empty.
pub(crate) async fn stores() -> [(Store, Kept); 2] {
    let directory = TempDir::new().unwrap();
    let sqlite =
        perennial::store::pool::sqlite::Sqlite::open(sqlite_config(directory.path().join("books.db")));
    let database = Box::new(Database::new().await);
    let postgres = database.connect().await;
    [
        (
            Store::Sqlite(sqlite.await.unwrap().with_statement_timeout(Duration::from_secs(2))),
            Kept::File { _directory: directory },
        ),
        (Store::Postgres(postgres), Kept::Server { _database: database }),
    ]
}

/// Creates a table. `TYPE[postgres|sqlite]` stands for a type that differs.
async fn create(store: &Store, sql: &str) {
    let pick = usize::from(matches!(store, Store::Sqlite(_)));
    let mut parts = sql.split(['[', ']']);
    let mut written = parts.next().unwrap().to_owned();
    while let (Some(choice), Some(rest)) = (parts.next(), parts.next()) {
        written += choice.split('|').nth(pick).unwrap();
        written += rest;
    }
    store.execute(written, values![]).await.unwrap();
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Prices {
    eur: u32,
}

#[derive(Debug, PartialEq, FromRow)]
struct Book {
    id: Uuid,
    title: String,
    pages: i16,
    weight: f64,
    price: Decimal,
    is_new: bool,
    added_at: Timestamp,
    opens: civil::DateTime,
    #[row(rename = "published_on")]
    published: civil::Date,
    about: Value,
    #[row(json)]
    prices: Prices,
    cover: Vec<u8>,
    tags: Vec<String>,
    ratings: Vec<i64>,
    editions: Vec<Uuid>,
    subtitle: Option<String>,
    sold_at: Option<Timestamp>,
    discount: Option<Decimal>,
    series: Option<Uuid>,
    notes: Option<Value>,
    awards: Option<Vec<String>>,
    #[row(default)]
    copies: i64,
}

fn book() -> Book {
    Book {
        id: Uuid::now_v7(),
        title: "What? A $1 \"book\"".to_owned(),
        pages: 320,
        weight: 0.25,
        price: "12.90".parse().unwrap(),
        is_new: true,
        added_at: "2026-11-28T02:24:12.123456Z".parse().unwrap(),
        opens: "2026-12-01T09:00:00".parse().unwrap(),
        published: civil::date(1999, 12, 31),
        about: json!({ "language": "de", "question?": ["?"] }),
        prices: Prices { eur: 1290 },
        cover: vec![0, 255, 7],
        tags: vec!["new".to_owned(), "it's \"quoted\", {so}".to_owned()],
        ratings: vec![5, -1],
        editions: vec![Uuid::nil(), Uuid::max()],
        subtitle: None,
        sold_at: None,
        discount: None,
        series: None,
        notes: None,
        awards: None,
        copies: 0,
    }
}

const BOOKS: &str = "CREATE TABLE books (
    id [uuid|BLOB] PRIMARY KEY, title [text|TEXT] NOT NULL, pages [smallint|INTEGER] NOT NULL,
    weight [double precision|REAL] NOT NULL, price [numeric|TEXT] NOT NULL, is_new [boolean|INTEGER] NOT NULL,
    added_at [timestamptz|TEXT] NOT NULL, opens [timestamp|TEXT] NOT NULL, published_on [date|TEXT] NOT NULL,
    about [jsonb|TEXT] NOT NULL, prices [json|TEXT] NOT NULL, cover [bytea|BLOB] NOT NULL,
    tags [text[]|TEXT] NOT NULL, ratings [bigint[]|TEXT] NOT NULL, editions [uuid[]|TEXT] NOT NULL,
    subtitle [varchar|TEXT], sold_at [timestamptz|TEXT], discount [numeric|TEXT], series [uuid|BLOB],
    notes [jsonb|TEXT], awards [text[]|TEXT], copies [integer|INTEGER])";

#[tokio::test]
async fn everyday_types_are_read_as_they_were_written() {
    for (store, _kept) in stores().await {
        // The brackets of array types are not those of a choice.
        let arrays = ["text", "bigint", "uuid"].iter().fold(BOOKS.to_owned(), |sql, of| {
            sql.replace(&format!("[{of}[]|TEXT]"), &format!("[_{of}|TEXT]"))
        });
        create(&store, &arrays.replace("_bigint", "_int8")).await;
        let book = book();
        let sql = "INSERT INTO books VALUES
            ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22)";
        let values = values![
            book.id,
            &book.title,
            book.pages,
            book.weight,
            book.price,
            book.is_new,
            book.added_at,
            book.opens,
            book.published,
            &book.about,
            AsJson(&book.prices),
            &book.cover,
            &book.tags,
            &book.ratings,
            &book.editions,
            &book.subtitle,
            book.sold_at,
            book.discount,
            book.series,
            &book.notes,
            &book.awards,
            None::<i64>
        ];
        store.execute(sql, values).await.unwrap();
        let sql = "SELECT * FROM books WHERE id = ? AND added_at > ? AND opens < ? AND published_on = ? AND price = ?";
        let values = values![
            book.id,
            book.added_at - Duration::from_secs(1),
            civil::date(2100, 1, 1).at(0, 0, 0, 0),
            book.published,
            book.price
        ];
        let found: Option<Book> = store.first_as(sql, values).await.unwrap();
        assert_eq!(found.as_ref(), Some(&book));
        let pair: Vec<(String, i32)> =
            store.query_as("SELECT title, pages FROM books", values![]).await.unwrap();
        assert_eq!(pair, [(book.title, 320)]);
    }
}

#[tokio::test]
async fn an_error_names_the_column_what_was_found_and_the_statement() {
    for (store, _kept) in stores().await {
        create(&store, "CREATE TABLE shelves (id [bigint|INTEGER] PRIMARY KEY, name [text|TEXT])").await;
        store.execute("INSERT INTO shelves VALUES (1, 'two')", values![]).await.unwrap();
        let unreadable = store.query_as::<(i64, i64)>("SELECT id,\n  name FROM shelves", values![]).await;
        assert_eq!(
            unreadable.unwrap_err().to_string(),
            "the column name is a text of 3 bytes, and a whole number is wanted, in `SELECT id, name FROM shelves`"
        );
        let twice = store.execute("INSERT INTO shelves VALUES (1, 'x')", values![]).await.unwrap_err();
        assert!(twice.is_unique_violation() && !twice.is_passing(), "{twice:?}");
        assert!(twice.to_string().ends_with("`INSERT INTO shelves VALUES (1, 'x')`"), "{twice}");
        let wrong = store.query("SELECT colour FROM shelves", values![]).await.unwrap_err();
        assert!(!wrong.is_unique_violation() && wrong.to_string().contains("SELECT colour"), "{wrong}");
        let unwritable = values![1, AsJson(std::collections::BTreeMap::from([((1, 2), 3)]))];
        assert!(store.execute("INSERT INTO shelves VALUES ($1, $2)", unwritable).await.is_err());
    }
}

#[tokio::test]
async fn a_write_returns_its_rows() {
    for (store, _kept) in stores().await {
        create(&store, "CREATE TABLE orders (id [bigint|INTEGER] PRIMARY KEY, state [text|TEXT])").await;
        let sql = "INSERT INTO orders VALUES (?, 'new'), (?, 'new') RETURNING id, state";
        let rows = store.execute_returning(sql, values![1, 2]).await.unwrap();
        assert_eq!(rows.len(), 2);
        let sql = "DELETE FROM orders WHERE id = ? RETURNING state";
        let gone = store.execute_returning(sql, values![2]).await.unwrap();
        assert_eq!(gone[0].first::<String>().unwrap(), "new");
        assert_eq!(store.value::<i64>("SELECT count(*) FROM orders", values![]).await.unwrap(), 1);
    }
}

#[derive(Debug, thiserror::Error)]
enum OrderError {
    #[error("sold out: {0}")]
    SoldOut(String),
    #[error(transparent)]
    Store(#[from] Error),
}

/// Places orders in one transaction.
async fn order(store: &Store, ids: &[i64], state: &str, is_sold_out: bool) -> Result<i64, OrderError> {
    let tx = store.begin().await?;
    for id in ids {
        tx.execute("INSERT INTO orders VALUES ($1, $2)", &values![*id, state]).await?;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    if is_sold_out {
        return Err(OrderError::SoldOut(state.to_owned()));
    }
    let rows = tx.query("SELECT count(*) FROM orders", &values![]).await?;
    tx.commit().await?;
    Ok(rows[0].first()?)
}

#[tokio::test]
async fn a_transaction_borrows_waits_and_rolls_back_on_an_error_of_its_own() {
    for (store, _kept) in stores().await {
        create(&store, "CREATE TABLE orders (id [bigint|INTEGER] PRIMARY KEY, state [text|TEXT])").await;
        // A handler runs as a task that moves between threads.
        let mut task = tokio::task::JoinSet::new();
        task.spawn(async move {
            let ids = vec![1, 2];
            let sold_out = order(&store, &ids, "new", true).await;
            assert!(matches!(sold_out, Err(OrderError::SoldOut(why)) if why == "new"));
            assert_eq!(order(&store, &ids, "new", false).await.unwrap(), 2);
            let twice = order(&store, &ids, "new", false).await;
            assert!(matches!(twice, Err(OrderError::Store(error)) if error.is_unique_violation()));
            // Also connections that were in such a transaction serve others.
            for _ in 0..20 {
                assert_eq!(store.value::<i64>("SELECT count(*) FROM orders", values![]).await.unwrap(), 2);
            }
        });
        task.join_next().await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn transactions_of_many_tasks_take_turns() {
    for (store, _kept) in stores().await {
        create(&store, "CREATE TABLE orders (id [bigint|INTEGER] PRIMARY KEY, state [text|TEXT])").await;
        let placed = futures_util::future::join_all((0..50).map(|n| {
            let store = store.clone();
            async move {
                let half_of_them_roll_back = n % 2 == 0;
                order(&store, &[2 * n, 2 * n + 1], "new", half_of_them_roll_back).await
            }
        }));
        let placed = placed.await.into_iter().filter(Result::is_ok).count();
        assert_eq!(placed, 25);
        assert_eq!(store.value::<i64>("SELECT count(*) FROM orders", values![]).await.unwrap(), 50);
    }
}

#[tokio::test]
async fn a_commit_after_a_failed_statement_is_no_success_on_postgres() {
    let [_, (store, _kept)] = stores().await;
    create(&store, "CREATE TABLE orders (id [bigint|INTEGER] PRIMARY KEY)").await;
    let tx = store.begin().await.unwrap();
    tx.execute("INSERT INTO orders VALUES (1)", &values![]).await.unwrap();
    assert!(tx.execute("INSERT INTO orders VALUES (1)", &values![]).await.is_err());
    assert!(tx.commit().await.is_err());
    assert_eq!(store.value::<i64>("SELECT count(*) FROM orders", values![]).await.unwrap(), 0);
}

/// A full disk has this effect on SQLite: the statement undoes the whole transaction.
#[tokio::test]
async fn what_comes_after_a_statement_that_ended_its_transaction_is_not_kept() {
    for (store, _kept) in stores().await {
        create(&store, "CREATE TABLE orders (id [bigint|INTEGER] PRIMARY KEY)").await;
        let tx = store.begin().await.unwrap();
        tx.execute("INSERT INTO orders VALUES (1)", &values![]).await.unwrap();
        let rollback = if matches!(store, Store::Sqlite(_)) { "ROLLBACK" } else { "SELECT 1 / 0" };
        let _ = tx.execute(rollback, &values![]).await;
        assert!(tx.execute("INSERT INTO orders VALUES (2)", &values![]).await.is_err());
        assert!(tx.commit().await.is_err());
        assert_eq!(store.value::<i64>("SELECT count(*) FROM orders", values![]).await.unwrap(), 0);
        store.execute("INSERT INTO orders VALUES (3)", values![]).await.unwrap();
    }
}

#[derive(Debug, PartialEq, FromRow)]
struct Shelf {
    #[row(json)]
    books: Option<Vec<String>>,
}

#[tokio::test]
async fn null_is_no_json_and_a_number_that_is_too_large_is_refused() {
    for (store, _kept) in stores().await {
        create(&store, "CREATE TABLE shelves (id [bigint|INTEGER] PRIMARY KEY, books [jsonb|TEXT])").await;
        store.execute("INSERT INTO shelves VALUES (1, NULL)", values![]).await.unwrap();
        let none: Option<Shelf> = store.first_as("SELECT books FROM shelves", values![]).await.unwrap();
        assert_eq!(none, Some(Shelf { books: None }));
        let books = AsJson(Some(vec!["Momo"]));
        store.execute("UPDATE shelves SET books = $1", values![books]).await.unwrap();
        let some: Option<Shelf> = store.first_as("SELECT books FROM shelves", values![]).await.unwrap();
        assert_eq!(some, Some(Shelf { books: Some(vec!["Momo".to_owned()]) }));
        let most = i64::MAX as u64;
        store.execute("INSERT INTO shelves VALUES ($1, NULL)", values![most]).await.unwrap();
        assert!(store.execute("INSERT INTO shelves VALUES ($1, NULL)", values![most + 1]).await.is_err());
    }
}

#[tokio::test]
async fn a_transaction_that_is_dropped_leaves_nothing_and_blocks_nobody() {
    for (store, _kept) in stores().await {
        create(&store, "CREATE TABLE orders (id [bigint|INTEGER] PRIMARY KEY)").await;
        let tx = store.begin().await.unwrap();
        tx.execute("INSERT INTO orders VALUES (1)", &values![]).await.unwrap();
        drop(tx);
        store.execute("INSERT INTO orders VALUES (1)", values![]).await.unwrap();
    }
}

#[tokio::test]
async fn a_transaction_that_waits_for_its_own_store_is_rolled_back_in_the_end() {
    let [(store, _kept), _] = stores().await;
    create(&store, "CREATE TABLE orders (id [bigint|INTEGER] PRIMARY KEY)").await;
    let tx = store.begin().await.unwrap();
    tx.execute("INSERT INTO orders VALUES (1)", &values![]).await.unwrap();
    let beside = store.execute("INSERT INTO orders VALUES (2)", values![]).await;
    assert!(beside.is_ok() || beside.unwrap_err().is_passing());
    let late = tx.commit().await.unwrap_err();
    assert!(late.is_late(), "{late:?}");
    store.execute("INSERT INTO orders VALUES (1)", values![]).await.unwrap();
}

/// Resident memory of this process, in bytes.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[tokio::test]
async fn a_million_rows_are_streamed_in_flat_memory() {
    for (store, _kept) in stores().await {
        let is_postgres = matches!(store, Store::Postgres(_));
        let sql = if is_postgres {
            "SELECT n, repeat('x', 100) AS text FROM generate_series(1::bigint, $1) AS n"
        } else {
            "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < $1)
             SELECT n, printf('%.100c', 'x') AS text FROM numbers"
        };
        let before = resident();
        let (mut sum, mut most) = (0, 0);
        let mut rows = store.stream(sql, values![1_000_000]);
        while let Some(row) = rows.try_next().await.unwrap() {
            let n: i64 = row.get("n").unwrap();
            sum += n;
            if n % 100_000 == 0 {
                most = most.max(resident().saturating_sub(before));
            }
        }
        assert_eq!(sum, 500_000_500_000);
        // All rows together have more than 100 MB.
        assert!(most < 30 << 20, "{most} bytes");
        let mut part = store.stream(sql, values![1_000_000]);
        part.next().await.unwrap().unwrap();
        drop(part);
        let mut wrong = store.stream("SELECT colour FROM nothing", values![]);
        assert!(wrong.next().await.unwrap().is_err());
        assert!(wrong.next().await.is_none());
        // What was dropped in the middle holds no connection.
        for _ in 0..20 {
            store.query("SELECT 1", values![]).await.unwrap();
        }
    }
}
