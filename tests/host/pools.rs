//! Pools by name: databases and Redis servers of modules beside the store, and the replica of the store.

use std::sync::Arc;

use nix::sys::signal::Signal;
use perennial::anyhow;
use perennial::pools::Pool;
use perennial::prelude::*;
use perennial::runtime::health::ReadinessPolicy;
use perennial::serde_json::json;
use perennial::store::pool::redis::client::cmd;
use perennial::testing::{TestBuilder, TestProgram};

use support::{eventually, postgres, redis};

struct Shop;

/// What the handlers share.
struct Pools {
    store: Store,
    replica: Store,
    reports: Store,
    hot: perennial::store::pool::redis::Redis,
}

impl Module for Shop {
    const NAME: &'static str = "shop";
    const POOLS: &'static [Pool] = &[Pool::database("reports"), Pool::redis("hot").cache()];
    const MIGRATIONS: &'static [&'static str] = &["CREATE TABLE sales (book TEXT NOT NULL)"];
    const POSTGRES_MIGRATIONS: &'static [&'static str] = Self::MIGRATIONS;

    fn configure(_: &mut Reader<'_>) -> Self {
        Self
    }

    async fn mount(self, host: &mut Host) -> anyhow::Result<()> {
        let mail = host.dependency("mail", ReadinessPolicy::Degraded);
        let pools = Arc::new(Pools {
            store: host.store.clone(),
            replica: host.replica.clone(),
            reports: host.database("reports")?,
            hot: host.redis("hot")?,
        });
        anyhow::ensure!(host.database("hot").is_err() && host.redis("reports").is_err(), "other kinds");
        let routes = Router::new()
            .route("/report", get(report))
            .route("/hot/{key}", put(set).get(read))
            .route("/sales/{book}", post(sell))
            .route("/sales", get(sales).delete(async |State(pools): State<Arc<Pools>>| forget(pools).await))
            .with_state(pools)
            .route("/mail", delete(async move || mail.unmet("it does not answer")));
        host.routes(routes);
        Ok(())
    }
}

async fn report(State(pools): State<Arc<Pools>>) -> Result<Json<i64>> {
    Ok(Json(pools.reports.query("SELECT 42", values![]).await?[0].first()?))
}

async fn set(State(pools): State<Arc<Pools>>, Path(key): Path<String>, value: String) -> Result<()> {
    Ok(pools.hot.query::<()>(cmd("SET").arg(key).arg(value)).await?)
}

async fn read(State(pools): State<Arc<Pools>>, Path(key): Path<String>) -> Result<String> {
    Ok(pools.hot.query(cmd("GET").arg(key)).await?)
}

async fn sell(State(pools): State<Arc<Pools>>, Path(book): Path<String>) -> Result<()> {
    pools.store.execute("INSERT INTO sales VALUES ($1)", values![book]).await?;
    Ok(())
}

async fn sales(State(pools): State<Arc<Pools>>) -> Result<Json<i64>> {
    Ok(Json(pools.replica.query("SELECT count(*) FROM sales", values![]).await?[0].first()?))
}

/// A write where only reads are possible.
async fn forget(pools: Arc<Pools>) -> Result<()> {
    pools.replica.execute("DELETE FROM sales", values![]).await?;
    Ok(())
}

fn shop(redis: &redis::Server) -> TestBuilder {
    Perennial::new().host::<Shop>().test().embedded().set(format!("redis.hot.url={}", redis.url()))
}

async fn reasons(shop: &TestProgram) -> anyhow::Result<String> {
    Ok(shop.admin().get("/readyz").await?.text())
}

#[tokio::test]
async fn a_module_uses_a_second_database_and_a_redis_that_is_a_cache() -> anyhow::Result<()> {
    let evicting = redis::Server::start(&["--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru"]).await;
    let server = postgres::Server::start(&[]).await;
    let reports = server.create().await;
    let shop = shop(&evicting).set(format!("databases.reports.url={reports}")).start().await?;
    assert_eq!(shop.client().get("/report").await?.json(), json!(42));
    assert_eq!(shop.client().put("/hot/book", &json!("Momo")).await?.status, 200);
    assert_eq!(shop.client().get("/hot/book").await?.text(), "\"Momo\"");
    let pools = shop.admin().get("/pools").await?.json();
    for name in ["sqlite", "reports", "hot"] {
        assert!(pools[name]["size"].as_u64() > Some(0), "{name}: {pools}");
    }
    let settings = shop.admin().get("/settings").await?.text();
    assert!(settings.contains("databases.reports.statement_timeout"), "{settings}");

    // Away is not the end: readiness names it, and it comes back by itself.
    server.signal_all(Signal::SIGSTOP);
    eventually("readiness names the database", || async {
        reasons(&shop).await.ok()?.contains("reports: ").then_some(())
    })
    .await;
    assert!(reasons(&shop).await?.contains("degraded"));
    server.signal_all(Signal::SIGCONT);
    eventually("the database is back", || async {
        (!reasons(&shop).await.ok()?.contains("reports")).then_some(())
    })
    .await;
    assert_eq!(shop.client().get("/report").await?.json(), json!(42));
    shop.stop().await
}

#[tokio::test]
async fn a_server_that_is_away_fails_the_start_only_if_it_is_required() -> anyhow::Result<()> {
    let redis = redis::Server::start(&[]).await;
    let away = "databases.reports.url=postgres://shop:s3cret@127.0.0.1:1/reports";
    let shop_without = shop(&redis).set(away).set("databases.reports.connect_timeout=300ms").start().await?;
    eventually("readiness names the database", || async {
        reasons(&shop_without).await.ok()?.contains("reports: ").then_some(())
    })
    .await;
    assert_eq!(shop_without.client().get("/report").await?.status, 503);
    shop_without.stop().await?;
    let required = shop(&redis).set(away).set("databases.reports.readiness=required");
    let error = format!("{:#}", required.start().await.unwrap_err());
    assert!(error.contains("databases.reports.url") && error.contains("127.0.0.1:1"), "{error}");
    assert!(!error.contains("s3cret"), "{error}");
    let error = shop(&redis).set("redis.hot.url=").start().await.unwrap_err().to_string();
    assert!(error.contains("redis.hot.url") && error.contains("redis://user:password@host/0"), "{error}");
    Ok(())
}

#[tokio::test]
async fn an_embedded_database_of_a_module_is_in_the_backup() -> anyhow::Result<()> {
    let redis = redis::Server::start(&[]).await;
    let (shop, directory) = (shop(&redis).start().await?, tempfile::TempDir::new()?);
    assert_eq!(shop.client().get("/report").await?.json(), json!(42));
    let copy = directory.path().join("copy");
    let copied = shop.admin().post("/backup", &json!({ "directory": copy })).await?.json();
    assert!(copied["files"].as_array().unwrap().contains(&json!("reports.db")), "{copied}");
    assert!(copy.join("reports.db").exists());
    assert_eq!(shop.client().delete("/mail").await?.status, 200);
    assert!(reasons(&shop).await?.contains("mail: it does not answer"));
    shop.stop().await
}

/// A module with a pool that has the name of another pool.
struct Clash;

impl Module for Clash {
    const NAME: &'static str = "clash";
    const POOLS: &'static [Pool] = &[Pool::redis("reports")];

    fn configure(_: &mut Reader<'_>) -> Self {
        Self
    }

    async fn mount(self, _: &mut Host) -> anyhow::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn two_pools_of_one_name_are_named_with_their_modules() {
    let error = Perennial::new().host::<Shop>().host::<Clash>().test().start().await.unwrap_err().to_string();
    assert!(error.contains("shop and clash both have a pool called reports"), "{error}");
}

#[tokio::test]
async fn statements_that_say_so_read_from_the_replica() -> anyhow::Result<()> {
    let redis = redis::Server::start(&[]).await;
    let primary = postgres::Server::start(&["wal_level=replica"]).await;
    let url = primary.create().await;
    let standby = primary.standby().await;
    let read_url = url.replace(&primary.port().to_string(), &standby.port().to_string());
    let urls = [format!("store.url={url}"), format!("store.read_url={read_url}")];
    let shop = urls.into_iter().fold(shop(&redis), TestBuilder::set).start().await?;
    assert_eq!(shop.client().post("/sales/Momo", &json!(null)).await?.status, 200);
    standby.caught_up_with(&primary).await;
    assert_eq!(shop.client().get("/sales").await?.json(), json!(1));
    assert_eq!(shop.client().delete("/sales").await?.status, 503, "a replica takes no writes");
    assert!(shop.admin().get("/pools").await?.json()["postgres-replica"].is_object());
    assert!(!reasons(&shop).await?.contains("postgres-replica"), "that it only reads is as it should be");
    standby.signal_all(Signal::SIGSTOP);
    eventually("readiness names the replica", || async {
        reasons(&shop).await.ok()?.contains("postgres-replica: ").then_some(())
    })
    .await;
    assert_eq!(
        shop.client().post("/sales/Momo", &json!(null)).await?.status,
        200,
        "the store is not affected"
    );
    standby.signal_all(Signal::SIGCONT);
    shop.stop().await
}
