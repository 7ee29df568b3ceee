//! Settings: four layers, one schema, every error at once, no secret shown.

use std::path::Path;

use support::process::Setup;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[tokio::test]
async fn check_prints_what_is_in_effect_and_where_it_came_from() {
    let setup =
        Setup::new().environment("PERENNIAL_DRAIN__SOFT", "7s").set("push.allow_hosts=a.example,b.example");
    let file = setup.file("p.toml");
    std::fs::write(&file, "[server]\nrequest_timeout = \"3s\"\nbody_limit = \"2MiB\"\n").unwrap();
    let check = setup.run(&["check", "--config", file.to_str().unwrap()]).await;
    assert_eq!(check.status.code(), Some(0), "{}", text(&check.stderr));
    let printed = text(&check.stdout);
    let line = |start: &str| {
        let line = printed.lines().find(|line| line.starts_with(start));
        line.unwrap_or_else(|| panic!("{start} is not in {printed}"))
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert_eq!(line("drain.soft"), "drain.soft = \"7s\" # PERENNIAL_DRAIN__SOFT");
    assert_eq!(line("drain.hard"), "drain.hard = \"5s\" # default");
    assert_eq!(line("server.body_limit"), format!("server.body_limit = \"2MiB\" # {}", file.display()));
    assert_eq!(line("push.allow_hosts"), r#"push.allow_hosts = ["a.example", "b.example"] # --set"#);
    assert_eq!(
        line("data_dir"),
        format!("data_dir = \"{}\" # PERENNIAL_DATA_DIR", setup.data_dir().display())
    );
    assert!(!setup.data_dir().exists(), "checking touches nothing");
}

#[tokio::test]
async fn every_error_is_reported_at_once_with_key_value_and_what_was_wanted() {
    let setup = Setup::new()
        .set("server.request_timeout=soon")
        .set("server.max_connections=0")
        .set("server.listen=nowhere")
        .set("telemetry.log=info,=")
        .set("push.allow_networks=10.0.0.0/33")
        .set("push.http=3")
        .set("queue.renew_every=10s")
        .set("sites.default.origins=https://shop.example/path")
        .set("sites.default.user_secret_file=/no/such/file")
        .environment("PERENNIAL_STORE__URL", "mysql://root:pa55word@db/x");
    for command in ["check", "serve"] {
        let run = setup.run(&[command]).await;
        let said = text(&run.stderr);
        assert_eq!(run.status.code(), Some(2), "{said}");
        for part in [
            r#"server.request_timeout = "soon" (from --set): wanted a duration from 1ms to"#,
            "server.max_connections = 0 (from --set): wanted a whole number from 1 to 1000000",
            r#"server.listen = ["nowhere"] (from --set): wanted a list of host:port, https://host:port or unix:/path"#,
            r#"telemetry.log = "info,=" (from --set): wanted a level such as info"#,
            r#"push.allow_networks = ["10.0.0.0/33"] (from --set): wanted a list of networks"#,
            r#"push.http = "3" (from --set): wanted auto, 1 or 2"#,
            "(from default): wanted at least three times queue.renew_every",
            r#"sites.default.origins = ["https://shop.example/path"] (from --set): wanted a list of origins"#,
            "sites.default.user_secret_file",
            r#"store.url = "mysql://root:***@db/x" (from PERENNIAL_STORE__URL): wanted sqlite:FILE"#,
        ] {
            assert!(said.contains(part), "{part:?} is not in {said}");
        }
        assert!(!said.contains("pa55word"));
    }
    assert!(!setup.data_dir().exists(), "nothing was touched");
}

#[tokio::test]
async fn unknown_keys_are_errors_in_every_layer() {
    let setup = Setup::new().set("sever.listen=1").environment("PERENNIAL_PUSH__WINDOWS", "4");
    let file = setup.file("p.toml");
    std::fs::write(&file, "[server.tls]\ncert = \"x\"\n").unwrap();
    let check = setup.run(&["check", "--config", file.to_str().unwrap()]).await;
    let said = text(&check.stderr);
    assert_eq!(check.status.code(), Some(2));
    for part in [
        "sever.listen (from --set): there is no such setting; did you mean server.listen?",
        "push.windows (from PERENNIAL_PUSH__WINDOWS): there is no such setting; did you mean push.window?",
        "server.tls.cert (from ",
    ] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
}

#[tokio::test]
async fn production_wants_a_contact_and_nothing_else() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/production.toml");
    let arguments = ["check", "--config", file.to_str().unwrap()];
    let without = Setup::new().run(&arguments).await;
    assert_eq!(without.status.code(), Some(2));
    assert!(text(&without.stderr).contains("push.contact = \"\""), "{}", text(&without.stderr));
    let unusable = Setup::new().set("push.contact=mailto:me@localhost").run(&arguments).await;
    assert_eq!(unusable.status.code(), Some(2));
    let with = Setup::new().set("push.contact=mailto:ops@shop.example.com").run(&arguments).await;
    assert_eq!(with.status.code(), Some(0), "{}", text(&with.stderr));
}

#[tokio::test]
async fn a_contact_that_apple_refuses_is_a_warning_at_boot() {
    let perennial = Setup::new().start().await;
    let warning = perennial.logged("Apple refuses messages without a contact").await;
    assert_eq!(
        (warning["level"].as_str(), warning["reason"].as_str()),
        (Some("WARN"), Some("push.contact is not set"))
    );

    let perennial = Setup::new().set("push.contact=mailto:me@localhost").start().await;
    let warning = perennial.logged("Apple refuses messages without a contact").await;
    assert!(warning["reason"].as_str().unwrap().contains("reachable from outside"), "{warning}");
}

#[tokio::test]
async fn sighup_reads_the_log_filter_again_and_says_what_takes_a_restart() {
    let setup = Setup::new();
    let file = setup.file("p.toml");
    std::fs::write(&file, "[telemetry]\nlog = \"info\"\n").unwrap();
    let setup = setup.environment("PERENNIAL_SERVER__IDLE_TIMEOUT", "60s");
    // The file is a layer below --set, and so the tests' own settings stay as they are.
    let log = setup.file("log");
    let mut child = setup
        .command(&["serve", "--config", file.to_str().unwrap()])
        .stderr(std::fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let said = |what: &'static str| {
        let log = log.clone();
        support::eventually(what, move || {
            std::future::ready(std::fs::read_to_string(&log).unwrap_or_default().contains(what).then_some(()))
        })
    };
    said(r#""message":"ready""#).await;
    std::fs::write(&file, "[telemetry]\nlog = \"debug\"\n[drain]\nsoft = \"9s\"\n").unwrap();
    let pid = nix::unistd::Pid::from_raw(child.id().unwrap().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();
    said(r#""message":"reloaded telemetry.log","needs_a_restart":"[\"drain.soft\"]""#).await;
    std::fs::write(&file, "[telemetry]\nlog = 5\n").unwrap();
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();
    said("nothing was reloaded").await;
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().await.unwrap().code(), Some(0));
}
