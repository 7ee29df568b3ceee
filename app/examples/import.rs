//! An example application that imports a million rows in flat memory, and exports them likewise.
//!
//! `cargo run --example import --no-default-features`, then
//! `seq 1000000 | sed 's/.*/book &,9.90/' | curl -T - -X POST http://127.0.0.1:8080/books` and
//! `curl http://127.0.0.1:8080/books | wc -l`.

use std::process::ExitCode;
use std::time::Duration;

use perennial::anyhow;
use perennial::axum::body::{Body, Bytes};
use perennial::axum::response::IntoResponse;
use perennial::futures_util::{StreamExt, TryStreamExt};
use perennial::limits;
use perennial::prelude::*;
use perennial::server::http::problem::FieldError;
use perennial::tokio::io::AsyncBufReadExt;

/// Rows in one transaction. A larger number would make other writes wait for longer.
const BATCH: usize = 1000;
/// Longest import.
const MAX_BYTES: usize = 4 << 30;

struct Import;

impl Module for Import {
    const NAME: &'static str = "import";
    const MIGRATIONS: &'static [&'static str] =
        &["CREATE TABLE catalogue (title TEXT NOT NULL, cents INTEGER NOT NULL)"];
    const POSTGRES_MIGRATIONS: &'static [&'static str] =
        &["CREATE TABLE catalogue (title text NOT NULL, cents bigint NOT NULL)"];

    fn configure(_: &mut Reader<'_>) -> Self {
        Self
    }

    async fn mount(self, host: &mut Host) -> anyhow::Result<()> {
        let hour = Duration::from_secs(3600);
        let import = post(import).layer(limits::body(MAX_BYTES).within(hour)).layer(limits::time(hour));
        host.routes(Router::new().route("/books", import.get(export)).with_state(host.store.clone()));
        Ok(())
    }
}

/// Reads lines `title,price` while they come. A line that cannot be read ends the import with its number; the rows before it
/// stay, so that the rest can be sent again.
async fn import(State(store): State<Store>, body: Body) -> Result<Json<usize>> {
    let parts = body.into_data_stream().map_err(std::io::Error::other);
    let mut lines = perennial::tokio_util::io::StreamReader::new(parts).lines();
    let (mut batch, mut read) = (Vec::with_capacity(BATCH), 0);
    while let Some(line) = lines.next_line().await.map_err(anyhow::Error::from)? {
        read += 1;
        let row = parse(&line).ok_or_else(|| FieldError::new("line", "title,12.90").at(read))?;
        batch.push(row);
        if batch.len() == BATCH {
            write(&store, &mut batch).await?;
        }
    }
    write(&store, &mut batch).await?;
    Ok(Json(read))
}

fn parse(line: &str) -> Option<(String, i64)> {
    let (title, price) = line.rsplit_once(',')?;
    let (units, cents) = price.trim().split_once('.')?;
    let cents = cents.parse::<i64>().ok().filter(|_| cents.len() == 2)?;
    Some((title.to_owned(), units.parse::<i64>().ok()?.checked_mul(100)? + cents))
}

/// Writes a batch in one transaction.
async fn write(store: &Store, batch: &mut Vec<(String, i64)>) -> Result<()> {
    let tx = store.begin().await?;
    for (title, cents) in batch.drain(..) {
        tx.execute("INSERT INTO catalogue VALUES ($1, $2)", &values![title, cents]).await?;
    }
    Ok(tx.commit().await?)
}

/// Sends the rows while they are read: neither the store nor a slow client makes this process keep them.
async fn export(State(store): State<Store>) -> impl IntoResponse {
    let rows = store.stream("SELECT title, cents FROM catalogue", values![]).map(|row| {
        let (title, cents) = row?.to::<(String, i64)>()?;
        anyhow::Ok(Bytes::from(format!("{title},{}.{:02}\n", cents / 100, cents % 100)))
    });
    ([("content-type", "text/csv")], Body::from_stream(rows))
}

fn main() -> ExitCode {
    Perennial::new().name("import").host::<Import>().main()
}
