//! An example application with the state that a long-lived PHP server gets wrong (the talk "Swoole: double troubles in C"
//! shows four such bugs): each handler does here what that code wanted, and the comment says why the bug cannot happen.
//!
//! `cargo run --example seed --no-default-features`; a Redis on port 6379 is used when there is one.

use std::process::ExitCode;

use perennial::anyhow;
use perennial::http::StatusCode;
use perennial::pools::Pool;
use perennial::prelude::*;
use perennial::server::http::problem::Problem;
use perennial::server::http::scope::RequestScope;
use perennial::store::pool::redis::{Redis, client::cmd};

struct Seed;

impl Module for Seed {
    const NAME: &'static str = "seed";
    const POOLS: &'static [Pool] = &[Pool::redis("basket").cache()];
    const MIGRATIONS: &'static [&'static str] =
        &["CREATE TABLE orders (number INTEGER PRIMARY KEY, buyer TEXT NOT NULL)"];
    const POSTGRES_MIGRATIONS: &'static [&'static str] =
        &["CREATE TABLE orders (number bigint PRIMARY KEY, buyer text NOT NULL)"];

    fn configure(_: &mut Reader<'_>) -> Self {
        Self
    }

    async fn mount(self, host: &mut Host) -> anyhow::Result<()> {
        let orders = Router::new().route("/orders/{number}", put(order)).with_state(host.store.clone());
        let basket = Router::new().route("/basket", post(fill)).with_state(host.redis("basket")?);
        host.routes(orders.merge(basket).route("/id", get(id)).route("/price/{cents}", get(price)));
        Ok(())
    }
}

/// The id of the first request was stored in a service, and all later requests had it. Here the id belongs to the scope of
/// the request, which ends with it; a handler has no other place that outlives it and can be written to.
async fn id(scope: RequestScope) -> String {
    scope.id().to_string()
}

/// A service kept the currency of the last visitor for the next one. Here a service that has state is made for the request;
/// values that requests share are behind `State`, and the compiler refuses code that changes them.
struct PriceFormat {
    currency: String,
}

impl PriceFormat {
    fn format(&self, cents: u32) -> String {
        format!("{}.{:02} {}", cents / 100, cents % 100, self.currency)
    }
}

#[derive(serde::Deserialize)]
struct Wanted {
    currency: Option<String>,
}

async fn price(Path(cents): Path<u32>, Query(wanted): Query<Wanted>) -> String {
    let format = PriceFormat { currency: wanted.currency.unwrap_or_else(|| "EUR".to_owned()) };
    format.format(cents)
}

/// After one failed statement the entity manager was closed, and every later request failed. Here a transaction is a value:
/// when this function returns early, it is rolled back, and its connection goes back to the pool.
async fn order(State(store): State<Store>, Path(number): Path<i64>, buyer: String) -> Result<StatusCode> {
    let tx = store.begin().await?;
    match tx.execute("INSERT INTO orders VALUES ($1, $2)", &values![number, buyer]).await {
        Err(error) if error.is_unique_violation() => {
            Err(Problem::new(StatusCode::CONFLICT, "there is an order with this number").into())
        }
        inserted => {
            inserted?;
            tx.commit().await?;
            Ok(StatusCode::CREATED)
        }
    }
}

/// Coroutines shared one connection to Redis, and read the answers of others. Here each command has a connection of the
/// pool, or its own place on one that answers in order; no handler ever holds a bare connection.
async fn fill(State(redis): State<Redis>, book: String) -> Result<String> {
    let books: i64 = redis.query(cmd("HINCRBY").arg("basket").arg(&book).arg(1)).await?;
    Ok(format!("{books} of {book}\n"))
}

fn main() -> ExitCode {
    let seed = Perennial::new().name("seed").default("redis.basket.url", "redis://127.0.0.1:6379/0");
    seed.host::<Seed>().main()
}
