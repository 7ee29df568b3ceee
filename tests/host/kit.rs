//! The test kit: programs within tests.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use perennial::anyhow;
use perennial::http::HeaderMap;
use perennial::http::header::SET_COOKIE;
use perennial::prelude::*;
use perennial::push::testing::{PushTest, Pushes};
use perennial::push::{Notification, Push, PushHandle};
use perennial::sessions::{Config, Session, Sessions};
use perennial::sql::Dialect;
use perennial::store::cache::{self, Kept};
use perennial::testing::TestProgram;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// A module with a page, a table, a job that fails at first, a schedule, and a job that never ends.
struct Shop;

static RUNS: AtomicUsize = AtomicUsize::new(0);

impl Module for Shop {
    const NAME: &'static str = "shop";
    const NEEDS: &'static [Need] = &[Need::of::<Push>()];
    const DEFAULTS: &'static str = "[shop]\n# The name of the shop.\nname = \"Books\"";
    const MIGRATIONS: &'static [&'static str] = &["CREATE TABLE visits (name TEXT PRIMARY KEY)"];
    const POSTGRES_MIGRATIONS: &'static [&'static str] = Self::MIGRATIONS;
    const DIRECTORIES: &'static [&'static str] = &["covers"];

    fn configure(_: &mut Reader<'_>) -> Self {
        Self
    }

    async fn mount(self, host: &mut Host) -> anyhow::Result<()> {
        std::fs::create_dir_all(host.data_dir.join("covers/small"))?;
        std::fs::write(host.data_dir.join("covers/small/momo.png"), "a picture")?;
        std::os::unix::fs::symlink("/etc", host.data_dir.join("covers/elsewhere"))?;
        let push = host.get::<Push>()?;
        host.job::<Order>(push.clone());
        host.job::<Endless>(Arc::new(()));
        host.schedule(Schedule::new("shop.daily", "0 7 * * *", &Order { fails: 0 })?);
        let jobs = host.jobs.clone();
        let order = async |State(jobs): State<Jobs>, Form(order): Form<Order>| -> Result<Json<Value>> {
            let id = jobs.enqueue(NewJob::new(&order)?).await?;
            Ok(Json(json!({ "job": id })))
        };
        host.routes(Router::new().route("/orders", post(order)).with_state(jobs));
        Ok(())
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Order {
    fails: u32,
}

impl Job for Order {
    const KIND: &'static str = "shop.order";
    type Tools = PushHandle;

    async fn run(&self, context: Context, push: PushHandle) -> anyhow::Result<JobOutcome> {
        RUNS.fetch_add(1, Ordering::SeqCst);
        anyhow::ensure!(context.spent.failures >= self.fails, "not yet");
        push.send(Notification::new("Ordered").body("Thank you").to_tags("readers")).await?;
        Ok(JobOutcome::Done)
    }
}

#[derive(Serialize, Deserialize)]
struct Endless;

impl Job for Endless {
    const KIND: &'static str = "shop.endless";
    type Tools = Arc<()>;

    async fn run(&self, _: Context, _: Arc<()>) -> anyhow::Result<JobOutcome> {
        std::future::pending().await
    }
}

fn shop() -> Perennial {
    Perennial::new().default("push.page", false).host::<Shop>().host::<Push>()
}

/// `tests/run` names a Postgres server in the environment.
#[tokio::test]
async fn a_program_is_tested_within_its_own_tests_on_postgres() -> anyhow::Result<()> {
    let shop = shop().test().with(&Pushes::start().await?).start().await?;
    assert_eq!(shop.store().dialect(), Dialect::Postgres);
    is_tested(shop).await
}

#[tokio::test]
async fn a_program_is_tested_within_its_own_tests_on_the_embedded_store() -> anyhow::Result<()> {
    let shop = shop().test().embedded().with(&Pushes::start().await?).start().await?;
    assert_eq!(shop.store().dialect(), Dialect::Sqlite);
    is_tested(shop).await
}

async fn is_tested(shop: TestProgram) -> anyhow::Result<()> {
    shop.pushes().subscribe(&shop, &["readers"]).await?;
    let answer = shop.client().without_key().post_form("/orders", &json!({ "fails": 1 })).await?;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let wrong = shop.client().post_form("/orders", &json!({ "fails": "often" })).await?;
    assert_eq!((wrong.status.as_u16(), &wrong.json()["errors"][0]["field"]), (422, &json!("fails")));
    shop.jobs().run_until_idle().await?;
    assert!(shop.pushes().received().is_empty(), "the first attempt fails");
    let runs = RUNS.load(Ordering::SeqCst);
    shop.clock().advance(Duration::from_secs(3600)).await?;
    let received = shop.pushes().wait_for(1).await?;
    assert_eq!((received[0].title(), received[0].body()), ("Ordered".to_owned(), "Thank you".to_owned()));
    shop.clock().advance(Duration::from_secs(24 * 3600)).await?;
    shop.pushes().wait_for(2).await?;
    assert!(RUNS.load(Ordering::SeqCst) >= runs + 2, "the schedule has run, too");
    let rows = shop.store().query("SELECT count(*) FROM visits", values![]).await?;
    assert_eq!(rows[0].first::<i64>()?, 0);
    assert_eq!(shop.client().get("/").await?.status, 404, "the page is off by default here");
    shop.stop().await
}

#[tokio::test]
async fn many_programs_run_in_one_test_and_know_nothing_of_each_other() -> anyhow::Result<()> {
    let started = (0..4).map(|_| shop().test().embedded().start());
    let shops = futures_util::future::try_join_all(started).await?;
    shops[0].store().execute("INSERT INTO visits VALUES ('Ada')", values![]).await?;
    for (number, shop) in shops.iter().enumerate() {
        let found = shop.store().query("SELECT name FROM visits", values![]).await?.len();
        assert_eq!(found, usize::from(number == 0));
    }
    for shop in shops {
        shop.stop().await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_failure_names_what_still_runs() -> anyhow::Result<()> {
    let shop = shop().test().embedded().set("drain.soft=100ms").set("drain.hard=100ms").start().await?;
    shop.jobs().handle().enqueue(NewJob::new(&Endless)?).await?;
    let waited = tokio::time::timeout(Duration::from_millis(300), shop.jobs().run_until_idle()).await;
    assert!(waited.is_err(), "the job never ends");
    let stopped = shop.stop().await.unwrap_err().to_string();
    assert!(stopped.contains("shop.endless"), "{stopped}");
    Ok(())
}

#[tokio::test]
async fn a_wrong_setting_is_an_error_of_the_start() {
    let error = shop().test().embedded().set("shop.nam=x").start().await.unwrap_err().to_string();
    assert!(error.contains("did you mean shop.name?"), "{error}");
}

/// A module with a route and a table that another module has.
struct Copy;

impl Module for Copy {
    const NAME: &'static str = "copy";

    fn configure(_: &mut Reader<'_>) -> Self {
        Self
    }

    async fn mount(self, host: &mut Host) -> anyhow::Result<()> {
        host.routes(Router::new().route("/orders", post(async || "a copy")));
        Ok(())
    }
}

struct Visits;

impl Module for Visits {
    const NAME: &'static str = "visits";
    const MIGRATIONS: &'static [&'static str] = Shop::MIGRATIONS;

    fn configure(_: &mut Reader<'_>) -> Self {
        Self
    }

    async fn mount(self, _: &mut Host) -> anyhow::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_backup_has_the_directories_of_the_modules() -> anyhow::Result<()> {
    let (shop, directory) = (shop().test().embedded().start().await?, tempfile::TempDir::new()?);
    let copy = directory.path().join("copy");
    let copied = shop.admin().post("/backup", &json!({ "directory": copy })).await?;
    assert_eq!(copied.status, 200, "{}", copied.text());
    assert_eq!(std::fs::read_to_string(copy.join("covers/small/momo.png"))?, "a picture");
    assert!(!copy.join("covers/elsewhere").exists(), "a link may lead anywhere");
    let files = copied.json()["files"].clone();
    assert!(files.as_array().unwrap().contains(&json!("covers/small/momo.png")), "{files}");
    shop.stop().await
}

#[tokio::test]
async fn a_clash_of_routes_or_of_tables_names_the_modules() {
    let routes = shop().host::<Copy>().test().embedded().start().await.unwrap_err();
    let routes = format!("{routes:#}");
    for part in
        ["the module copy cannot be mounted", "/orders", "the module shop has this route, too", "host_at"]
    {
        assert!(routes.contains(part), "{routes}");
    }
    let tables = shop().host::<Visits>().test().embedded().start().await.unwrap_err().to_string();
    assert!(tables.contains("shop and visits both create the table visits"), "{tables}");
    let twice = shop().host::<Visits>().host::<Visits>().test().embedded().start().await.unwrap_err();
    assert!(twice.to_string().contains("two modules have the name visits"), "{twice}");
}

#[tokio::test]
async fn a_module_is_hosted_below_a_prefix() -> anyhow::Result<()> {
    let both = Perennial::new().host::<Shop>().host_at::<Copy>("/copies").host_at::<Push>("/push");
    let both = both.test().embedded().with(&Pushes::start().await?).start().await?;
    let client = both.client();
    assert_eq!(client.post("/copies/orders", &json!({})).await?.text(), "a copy");
    assert_eq!(client.post_form("/orders", &json!({ "fails": 0 })).await?.status, 200);
    assert_eq!(client.get("/push/key").await?.status, 404);
    assert_eq!(client.get("/push/push/key").await?.status, 200);
    let sent =
        client.post("/push/notify", &json!({ "to": { "all": true }, "payload": { "title": "A" } })).await?;
    assert_eq!(sent.status, 202, "{}", sent.text());
    let location = sent.headers["location"].to_str()?.to_owned();
    assert!(location.starts_with("/push/notifications/"), "{location}");
    assert_eq!(client.get(&location).await?.status, 200);
    let described = client.get("/openapi.json").await?.json();
    assert!(described["paths"]["/push/notify"]["post"].is_object(), "{}", described["paths"]);
    both.stop().await?;
    let error = Perennial::new().host_at::<Copy>("copies/").test().start().await.unwrap_err().to_string();
    assert!(error.contains("the module copy is hosted at \"copies/\""), "{error}");
    Ok(())
}

/// A module with a session and a cache, both of which last for an hour.
struct Timed;

/// Number of loads of the cache.
static LOADS: AtomicUsize = AtomicUsize::new(0);

/// A cached number.
#[derive(Clone)]
struct Loaded(usize);

impl Kept for Loaded {
    fn bytes(&self) -> usize {
        8
    }
}

impl Module for Timed {
    const NAME: &'static str = "timed";

    fn configure(_: &mut Reader<'_>) -> Self {
        Self
    }

    async fn mount(self, host: &mut Host) -> anyhow::Result<()> {
        let hour = Duration::from_secs(3600);
        let config = cache::Config {
            name: "loads",
            bytes: 1 << 20,
            ttl: hour,
            negative_ttl: hour,
            stale: Duration::ZERO,
        };
        let loads = host.caches.make::<Loaded>(config);
        let load = async move || -> Result<String> {
            let load = async {
                Ok::<_, perennial::sql::Error>(Some(Loaded(LOADS.fetch_add(1, Ordering::SeqCst) + 1)))
            };
            Ok(loads.get("one", load).await?.map_or(0, |Loaded(number)| number).to_string())
        };
        let sessions = host.sessions(Config { idle: hour, ..Config::default() }).await?;
        let login = async |State(sessions): State<Sessions>| -> Result<HeaderMap> {
            let (_, cookie) = sessions.login(None, "ada").await?;
            Ok(HeaderMap::from_iter([(SET_COOKIE, cookie)]))
        };
        let who = async |session: Option<Session>| {
            session.and_then(|session| session.user().map(str::to_owned)).unwrap_or_default()
        };
        host.routes(Router::new().route("/login", post(login)).route("/who", get(who)).with_state(sessions));
        host.routes(Router::new().route("/loads", get(load)));
        Ok(())
    }
}

#[tokio::test]
async fn the_clock_moves_sessions_and_caches() -> anyhow::Result<()> {
    let timed = Perennial::new().host::<Timed>().test().embedded().start().await?;
    assert_eq!(timed.client().get("/loads").await?.text(), "1");
    assert_eq!(timed.client().get("/loads").await?.text(), "1");
    let login = timed.client().post("/login", &json!({})).await?;
    assert_eq!(login.status, 200, "{}", login.text());
    let cookie = login.headers["set-cookie"].to_str()?.split(';').next().unwrap().to_owned();
    let browser = timed.client().with_header("cookie", &cookie);
    assert_eq!(browser.get("/who").await?.text(), "ada");
    timed.clock().advance(Duration::from_secs(1800)).await?;
    assert_eq!(
        (timed.client().get("/loads").await?.text(), browser.get("/who").await?.text()),
        ("1".into(), "ada".into())
    );
    timed.clock().advance(Duration::from_secs(7200)).await?;
    assert_eq!(
        (timed.client().get("/loads").await?.text(), browser.get("/who").await?.text()),
        ("2".into(), String::new())
    );
    timed.stop().await
}

#[tokio::test]
async fn a_job_is_tested_alone() -> anyhow::Result<()> {
    let shop = shop().test().embedded().start().await?;
    let context = Context::for_test();
    assert!(!context.cancel.is_cancelled() && context.lease.is_held());
    let ended = tokio::time::timeout(Duration::from_millis(50), Endless.run(context, Arc::new(()))).await;
    assert!(ended.is_err());
    shop.stop().await
}
