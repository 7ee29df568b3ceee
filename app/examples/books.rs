//! An example application: books are listed, added and sold, and readers are told of a new one by web push, in the same
//! transaction. It runs on SQLite and on Postgres.
//!
//! `cargo run --example books`, then open the printed page to subscribe, and
//! `curl --json '{"title": "Momo", "price": "12.90"}' http://127.0.0.1:8080/books`.

use std::process::ExitCode;

use perennial::api::not_found;
use perennial::http::StatusCode;
use perennial::jiff::Timestamp;
use perennial::prelude::*;
use perennial::push::{Notification, Push, PushHandle};
use perennial::server::http::problem::Problem;
use perennial::sql::Decimal;
use perennial::{anyhow, uuid::Uuid};
use serde::{Deserialize, Serialize};

struct Books;

/// A book as it is stored and shown.
#[derive(FromRow, Serialize)]
struct Book {
    id: Uuid,
    title: String,
    price: Decimal,
    added_at: Timestamp,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewBook {
    title: String,
    price: Decimal,
}

/// What the handlers share. There is nothing of a request in it.
#[derive(Clone)]
struct Shop {
    store: Store,
    push: PushHandle,
}

impl Module for Books {
    const NAME: &'static str = "books";
    const NEEDS: &'static [Need] = &[Need::of::<Push>()];
    const MIGRATIONS: &'static [&'static str] = &[
        "CREATE TABLE books (id BLOB PRIMARY KEY, title TEXT NOT NULL UNIQUE, price TEXT NOT NULL, added_at TEXT NOT NULL)",
    ];
    const POSTGRES_MIGRATIONS: &'static [&'static str] = &[
        "CREATE TABLE books (id uuid PRIMARY KEY, title text NOT NULL UNIQUE, price numeric NOT NULL, added_at timestamptz NOT NULL)",
    ];

    fn configure(_: &mut Reader<'_>) -> Self {
        Self
    }

    async fn mount(self, host: &mut Host) -> anyhow::Result<()> {
        let shop = Shop { store: host.store.clone(), push: host.get::<Push>()? };
        let books = Router::new().route("/books", get(list).post(add)).route("/books/{id}", delete(sell));
        host.routes(books.with_state(shop));
        Ok(())
    }
}

async fn list(State(shop): State<Shop>) -> Result<Json<Vec<Book>>> {
    Ok(Json(shop.store.query_as("SELECT * FROM books ORDER BY added_at DESC LIMIT 100", values![]).await?))
}

async fn add(State(shop): State<Shop>, Json(new): Json<NewBook>) -> Result<(StatusCode, Json<Book>)> {
    let tx = shop.store.begin().await?;
    let sql = "INSERT INTO books (id, title, price, added_at) VALUES ($1, $2, $3, $4) RETURNING *";
    let book = match tx.query(sql, &values![Uuid::now_v7(), new.title, new.price, Timestamp::now()]).await {
        Err(error) if error.is_unique_violation() => {
            return Err(Problem::new(StatusCode::CONFLICT, "there is a book with this title").into());
        }
        rows => rows?[0].to::<Book>()?,
    };
    let news = Notification::new("A new book").body(&book.title).url("/books").to_all();
    shop.push.insert(&tx, news.idempotency(format!("book-{}", book.id))).await?;
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(book)))
}

async fn sell(State(shop): State<Shop>, Path(id): Path<Uuid>) -> Result<StatusCode> {
    match shop.store.execute("DELETE FROM books WHERE id = $1", values![id]).await? {
        0 => Err(not_found("book").into()),
        _ => Ok(StatusCode::NO_CONTENT),
    }
}

fn main() -> ExitCode {
    let shop = Perennial::new().name("bookshop").about("A shop for books.").env_prefix("BOOKSHOP");
    shop.default("push.contact", "mailto:shop@example.com").host::<Books>().host::<Push>().main()
}
