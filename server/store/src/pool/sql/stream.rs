//! Rows as a stream: a few at a time are in memory, however many there are.
//!
//! On Postgres a cursor in a transaction hands out pages; on SQLite a reader waits between two pages. Both are kept until
//! the stream has ended or is dropped, and both give up a stream from which nothing is taken for the time that a
//! statement may take.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::Stream;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::SendTimeoutError;

use super::postgres::{self, Parameter, Postgres, Session};
use super::sqlite::{self, Sqlite};
use super::{Dialect, Error, Result, Row, Store, Value, each_of_sqlite, read_rows};

/// Number of rows that are fetched at once.
const PAGE: usize = 500;

type Page = Result<Vec<Row>>;

/// The rows of [`Store::stream`], in their order. After an error the stream ends.
pub struct RowStream {
    /// Fetches the pages; `None` when it has ended. It runs within the stream, and is dropped with it.
    fetching: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    pages: mpsc::Receiver<Page>,
    page: VecDeque<Row>,
}

impl fmt::Debug for RowStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RowStream").field("buffered", &self.page.len()).finish_non_exhaustive()
    }
}

impl Stream for RowStream {
    type Item = Result<Row>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Row>>> {
        loop {
            if let Some(row) = self.page.pop_front() {
                return Poll::Ready(Some(Ok(row)));
            }
            if let Some(fetching) = &mut self.fetching
                && fetching.as_mut().poll(context).is_ready()
            {
                self.fetching = None;
            }
            match ready!(self.pages.poll_recv(context)) {
                Some(Ok(page)) => self.page = page.into(),
                Some(Err(error)) => {
                    self.fetching = None;
                    self.pages.close();
                    return Poll::Ready(Some(Err(error)));
                }
                None => return Poll::Ready(None),
            }
        }
    }
}

impl Store {
    /// Runs a read-only statement and returns its rows as a stream, of which a few hundred are in memory at a time.
    ///
    /// The stream keeps a connection of the pool. It fails when nothing is taken from it for longer than a statement
    /// may take.
    pub fn stream(&self, sql: impl Into<Cow<'static, str>>, parameters: impl Into<Vec<Value>>) -> RowStream {
        let (sender, pages) = mpsc::channel(1);
        let (store, sql, parameters) = (self.clone(), sql.into(), parameters.into());
        let fetching = async move {
            let fetched = match store {
                Self::Sqlite(sqlite) => fetch_sqlite(&sqlite, sql, parameters, sender.clone()).await,
                Self::Postgres(postgres) => fetch_postgres(&postgres, &sql, &parameters, &sender).await,
            };
            if let Err(error) = fetched {
                // A receiver that has gone needs no error.
                let _ = sender.send(Err(error)).await;
            }
        };
        RowStream { fetching: Some(Box::pin(fetching)), pages, page: VecDeque::new() }
    }
}

async fn fetch_postgres(
    postgres: &Postgres,
    sql: &str,
    parameters: &[Value],
    pages: &mpsc::Sender<Page>,
) -> Result<()> {
    let refused = |error| Error::from(error).of(sql);
    let mut connection = postgres.get().await?;
    let transaction = connection.begin().await?;
    let declared = format!("DECLARE page NO SCROLL CURSOR FOR {}", Dialect::Postgres.statement(sql));
    let parameters: Vec<Parameter<'_>> = parameters.iter().map(Value::parameter).collect();
    Session::execute(&transaction, &declared, &parameters).await.map_err(refused)?;
    let fetch = format!("FETCH {PAGE} FROM page");
    loop {
        let rows = Session::query(&transaction, &fetch, &[]).await.map_err(refused)?;
        let is_last = rows.len() < PAGE;
        match pages.send_timeout(Ok(read_rows(&rows, sql)?), postgres.statement_timeout()).await {
            Ok(()) if is_last => return Ok(()),
            Ok(()) => {}
            Err(SendTimeoutError::Timeout(_)) => return Err(postgres::Error::Slow.into()),
            Err(SendTimeoutError::Closed(_)) => return Ok(()),
        }
    }
}

async fn fetch_sqlite(
    sqlite: &Sqlite,
    sql: Cow<'static, str>,
    parameters: Vec<Value>,
    pages: mpsc::Sender<Page>,
) -> Result<()> {
    let (limit, runtime) = (sqlite.statement_timeout(), Handle::current());
    let fetch = move |connection: &super::Connection, deadline: &sqlite::Deadline| {
        let mut page = Vec::new();
        let rows = each_of_sqlite(connection, &sql, &parameters, |row| {
            page.push(row);
            if page.len() == PAGE {
                hand_over(&runtime, &pages, std::mem::take(&mut page), limit)?;
                deadline.renew(limit);
            }
            Ok(())
        });
        rows.and_then(|()| hand_over(&runtime, &pages, page, limit)).map_err(Error::into_sqlite)
    };
    Ok(sqlite.read_renewing(limit, fetch).await?)
}

/// Waits until the page is taken, on the thread of a reader.
fn hand_over(runtime: &Handle, pages: &mpsc::Sender<Page>, page: Vec<Row>, limit: Duration) -> Result<()> {
    let taken = runtime.block_on(pages.send_timeout(Ok(page), limit));
    taken.map_err(|_| sqlite::Error::Late.into())
}
