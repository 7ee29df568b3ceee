//! A module of another application: the example, as a process.

use serde_json::json;

use support::double::Double;
use support::eventually;
use support::postgres::Database;
use support::process::{Setup, example};
use support::stores::on_postgres;

#[tokio::test]
async fn an_application_of_ones_own_has_routes_settings_tables_jobs_schedules_and_a_status() {
    let mut hello = Setup::new().program(example("hello")).set("hello.greeting=Bonjour").start().await;
    for _ in 0..3 {
        let answer = hello.client().post("/hello/world", &json!({})).await;
        assert_eq!(answer.json(), json!({ "said": "Bonjour, world" }));
    }
    assert_eq!(hello.admin().get("/modules").await.json(), json!({ "hello": { "greeting": "Bonjour" } }));
    let store = rusqlite::Connection::open(hello.setup.data_dir().join("perennial.db")).unwrap();
    store.busy_timeout(support::SOON).unwrap();
    let counted = async |name: &str, times: i64| {
        let sql = "SELECT times FROM greeted WHERE name = ?";
        eventually("the jobs have counted", || async {
            let found = store.query_row(sql, [name], |row| row.get::<_, i64>(0));
            (found.ok() == Some(times)).then_some(())
        })
        .await;
    };
    counted("world", 3).await;
    assert!(hello.setup.run(&["cron", "run", "hello.morning"]).await.status.success());
    counted("the morning", 1).await;
    assert_eq!(hello.client().get("/push/key").await.status, 404, "web push is not part of it");
    assert_eq!(hello.stop().await, Some(0));
}

/// The example of a shop, whose settings have environment variables of its own.
fn bookshop() -> Setup {
    let setup = Setup::new().program(example("books"));
    let data_dir = setup.data_dir();
    setup.environment("BOOKSHOP_DATA_DIR", data_dir.to_str().unwrap())
}

/// Books are added, and readers are told, on both stores.
#[tokio::test]
async fn an_application_sends_web_push_in_the_transaction_of_its_own_rows() {
    let database = Database::new().await;
    for is_shared in [false, true] {
        let double = Double::start().await;
        let setup = bookshop().sending_to(&double);
        let setup = if is_shared { on_postgres(setup, database.url()).await } else { setup };
        let mut books = setup.start().await;
        books.subscribe(&double, 3).await;
        let add = async |title: &str| {
            books.client().post("/books", &json!({ "title": title, "price": "12.90" })).await
        };
        let added = add("Momo").await;
        assert_eq!(added.status, 201, "{}", added.text());
        eventually("the readers are told", || async { (double.taken().len() == 3).then_some(()) }).await;
        assert!(double.taken()[0].text.contains("Momo"));
        assert_eq!(add("Momo").await.status, 409);
        let too_long = add(&"M".repeat(5000)).await;
        assert_eq!(too_long.status, 422, "no notification has room for it: {}", too_long.text());
        let listed = books.client().get("/books").await.json();
        assert_eq!(listed.as_array().unwrap().len(), 1, "{listed}");
        assert_eq!(listed[0], added.json());
        let braces = add("{{email}}").await;
        assert_eq!(braces.status, 201, "{}", braces.text());
        eventually("what a visitor wrote is no template", || async {
            double.taken().iter().any(|taken| taken.text.contains("{{email}}")).then_some(())
        })
        .await;
        let told = double.taken().len();
        let path = format!("/books/{}", added.json()["id"].as_str().unwrap());
        assert_eq!(books.client().delete(&path, None).await.status, 204);
        assert_eq!(books.client().delete(&path, None).await.status, 404);
        eventually("all are told of both", || async { (double.taken().len() == 6).then_some(()) }).await;
        assert!(told >= 4, "{told}");
        assert_eq!(books.stop().await, Some(0));
    }
}

/// Each request has a connection for its transaction; a second one would be waited for without end.
#[tokio::test]
async fn many_transactions_with_web_push_share_a_small_pool() {
    let (double, database) = (Double::start().await, Database::new().await);
    let setup = bookshop().sending_to(&double).set("store.connections=4");
    let mut books = on_postgres(setup, database.url()).await.start().await;
    let added = futures_util::future::join_all((0..20).map(|number| {
        let client = books.client();
        async move {
            let book = json!({ "title": format!("Book {number}"), "price": "1" });
            client.post("/books", &book).await.status
        }
    }));
    assert!(added.await.iter().all(|status| *status == 201));
    assert_eq!(books.stop().await, Some(0));
}

#[tokio::test]
async fn a_program_has_its_own_name_version_variables_and_defaults() {
    let setup = bookshop();
    let help = setup.run(&["jobs", "list", "--help"]).await;
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    assert!(
        help.contains("Usage: bookshop jobs list") && help.contains("  bookshop jobs list --state"),
        "{help}"
    );
    assert!(!help.contains("perennial "), "{help}");
    let settings = setup.run(&["check", "--json"]).await;
    let settings = String::from_utf8_lossy(&settings.stdout).into_owned();
    assert!(settings.contains("mailto:shop@example.com"), "{settings}");
    let unknown = setup.run(&["check", "--set", "books.colour=1"]).await;
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("books.colour"));
    let books = setup.set("push.contact=mailto:a@example.com").start().await;
    let openapi = books.client().get("/openapi.json").await.json();
    assert_eq!(openapi["info"]["title"], "bookshop");
    assert_eq!(openapi["info"]["description"], "A shop for books.");
    assert_eq!(books.admin().get("/build").await.json()["name"], "bookshop");
}
