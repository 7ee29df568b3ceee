//! An example application with a second database: a report reads it row by row, while the browser downloads it.
//!
//! `cargo run --example report --no-default-features -- serve --set databases.warehouse.url=postgres://localhost/warehouse`,
//! then `curl http://127.0.0.1:8080/report.csv`. Without the setting, the warehouse is a file beside the store.

use std::process::ExitCode;

use perennial::anyhow;
use perennial::axum::body::{Body, Bytes};
use perennial::axum::response::IntoResponse;
use perennial::futures_util::{StreamExt, stream};
use perennial::pools::Pool;
use perennial::prelude::*;

struct SalesReport;

/// A row of the report.
#[derive(FromRow)]
struct Sales {
    month: String,
    books: i64,
    cents: i64,
}

impl Module for SalesReport {
    const NAME: &'static str = "report";
    const POOLS: &'static [Pool] = &[Pool::database("warehouse")];

    fn configure(_: &mut Reader<'_>) -> Self {
        Self
    }

    async fn mount(self, host: &mut Host) -> anyhow::Result<()> {
        let warehouse = host.database("warehouse")?;
        host.routes(Router::new().route("/report.csv", get(report)).with_state(warehouse));
        Ok(())
    }
}

/// Streams the report. When the client leaves, the statement is cancelled. While the warehouse is away, the answer is 503,
/// and `/readyz` names it; the rest of the program goes on.
async fn report(State(warehouse): State<Store>) -> Result<impl IntoResponse> {
    let sql = "SELECT month, count(*) AS books, CAST(sum(cents) AS bigint) AS cents FROM sales GROUP BY month ORDER BY month";
    let mut rows = Box::pin(warehouse.stream(sql, values![]).map(|row| row?.to::<Sales>()));
    // The first row decides the status of the answer: an error after it can only break the answer off.
    let first = rows.next().await.transpose()?;
    let head = stream::iter([Ok(Bytes::from("month,books,sales\n"))]);
    let lines = stream::iter(first).map(Ok).chain(rows).map(|row| {
        let Sales { month, books, cents } = row?;
        anyhow::Ok(Bytes::from(format!("{month},{books},{}.{:02}\n", cents / 100, cents % 100)))
    });
    let headers = [("content-type", "text/csv"), ("content-disposition", "attachment; filename=report.csv")];
    Ok((headers, Body::from_stream(head.chain(lines))))
}

fn main() -> ExitCode {
    Perennial::new().name("report").host::<SalesReport>().main()
}
