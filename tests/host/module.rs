//! A module of another application: the example, as a process.

use serde_json::json;

use support::eventually;
use support::process::{Setup, example};

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
