//! Settings: four layers, one schema, all errors at once, no secret shown.

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

    for (contact, reason) in [
        ("mailto:me@localhost", "reachable from outside"),
        ("mailto:me@x.local", "reachable from outside"),
        ("me@example.com", "starts with mailto: or https:"),
        ("mailto: a@b.example.com", "without spaces or brackets"),
    ] {
        let setup = Setup::new().set(&format!("push.contact={contact}"));
        for command in ["check", "serve"] {
            let refused = setup.run(&[command]).await;
            assert_eq!(refused.status.code(), Some(2), "{contact}");
            assert!(text(&refused.stderr).contains(reason), "{contact}: {}", text(&refused.stderr));
        }
    }
}

#[tokio::test]
async fn sighup_reads_the_log_filter_again_and_says_what_takes_a_restart() {
    let setup = Setup::new();
    let file = setup.file("p.toml");
    std::fs::write(&file, "[telemetry]\nlog = \"info\"\n").unwrap();
    let setup = setup.environment("PERENNIAL_SERVER__IDLE_TIMEOUT", "60s");
    // The file is a layer below `--set`, so the settings of the tests themselves stay in force.
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

#[tokio::test]
async fn check_ends_with_a_summary_and_shows_what_differs() {
    let setup = Setup::new().set("server.proxy_protocol=true").environment("PERENNIAL_SERVER_LISTEN", "x");
    let check = setup.run(&["check", "--changed"]).await;
    let (shown, said) = (text(&check.stdout), text(&check.stderr));
    assert_eq!(check.status.code(), Some(0), "{said}");
    assert!(shown.contains("server.proxy_protocol = true") && !shown.contains("drain.hard"), "{shown}");
    assert!(said.contains("warning: PERENNIAL_SERVER_LISTEN is no setting"), "{said}");
    assert!(said.contains("PERENNIAL_SERVER__LISTEN"), "{said}");
    assert!(said.contains("warning: server.proxy_protocol: no proxy is trusted"), "{said}");
    assert_eq!(said.lines().last(), Some("0 errors, 2 warnings"));

    let setup = setup.set("server.threads=many").set("sever.listen=x");
    let check = setup.run(&["check", "--json"]).await;
    assert_eq!(check.status.code(), Some(2));
    let all: serde_json::Value = serde_json::from_slice(&check.stdout).unwrap();
    let errors = all["errors"].to_string();
    assert!(errors.contains("did you mean server.listen?") && errors.contains("server.threads"), "{errors}");
    assert!(all["settings"].as_array().unwrap().len() > 100);
}

#[tokio::test]
async fn what_will_not_work_is_a_warning_before_it_does_not() {
    let setup = Setup::new().set("cron.schedules=[{ name = 'x', expression = '0 0 30 2 *', job = 'y' }]");
    let data_dir = setup.data_dir();
    std::fs::create_dir_all(&data_dir).unwrap();
    std::fs::set_permissions(&data_dir, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let directory = setup.file("tls");
    std::fs::create_dir_all(&directory).unwrap();
    let mut certificate = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    certificate.not_after = rcgen::date_time_ymd(2024, 1, 1);
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = certificate.self_signed(&key).unwrap();
    std::fs::write(directory.join("cert.pem"), certificate.pem()).unwrap();
    std::fs::write(directory.join("key.pem"), key.serialize_pem()).unwrap();
    let setup = setup
        .set(&format!("server.tls.cert_file={}", directory.join("cert.pem").display()))
        .set(&format!("server.tls.key_file={}", directory.join("key.pem").display()));
    let said = text(&setup.run(&["check"]).await.stderr);
    for part in [
        "the schedule x is never due again",
        "the certificate has expired (2024-01-01T00:00:00Z)",
        "data_dir: others can read",
    ] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
}

#[tokio::test]
async fn a_misspelt_log_level_is_refused_and_silence_hides_no_failure() {
    for level in ["debg", "warning", "info,perennial_workers"] {
        let refused = Setup::new().set(&format!("telemetry.log={level}")).run(&["serve"]).await;
        assert_eq!(refused.status.code(), Some(2), "{level}");
        assert!(text(&refused.stderr).contains("telemetry.log"), "{}", text(&refused.stderr));
    }
    // The value has a line break, as when it is read from a file.
    let perennial = Setup::new().set("telemetry.log= info\n").start().await;
    perennial.logged("ready").await;
    let silent = Setup::new().set("telemetry.log=off").set("store.url=postgres://nobody@127.0.0.1:9/none");
    let failed = silent.run(&["serve"]).await;
    let said = text(&failed.stderr);
    assert_eq!(failed.status.code(), Some(1));
    assert!(said.contains("boot failed") && said.contains("Postgres at 127.0.0.1:9"), "{said}");
    assert_eq!(said.matches("Connection refused").count(), 1, "once, and not in each layer: {said}");
}

#[tokio::test]
async fn settings_in_force_are_shown_with_their_types_and_without_secrets() {
    let setup = Setup::new();
    let file = setup.file("p.toml");
    std::fs::write(&file, "[telemetry]\nlog = \"info\"\n").unwrap();
    let setup = setup.config(file.to_str().unwrap());
    let hook = setup.file("hook");
    std::fs::write(&hook, "a secret of more than sixteen bytes").unwrap();
    let webhooks = format!(
        "sites.default.webhooks=[{{ name = 'b', url = 'https://u:pw@hooks.example.com/T0/s3cret?t=s3cret', secret_file = '{}' }}]",
        hook.display()
    );
    let perennial = setup.set(&webhooks).start().await;
    let shown = async || {
        let all = perennial.admin().get("/settings").await;
        assert!(!all.text().contains("s3cret") && !all.text().contains("u:pw"), "{}", all.text());
        let all = all.json();
        move |key: &str| {
            all.as_array().unwrap().iter().find(|shown| shown["key"] == key).unwrap()["value"].clone()
        }
    };
    let of = shown().await;
    assert_eq!(of("server.threads"), 0);
    assert_eq!(of("push.page"), true);
    assert_eq!(of("sites.default.webhooks")[0]["url"], "https://u:***@hooks.example.com/***?t=***");
    assert_eq!(of("telemetry.log"), "info");
    std::fs::write(&file, "[telemetry]\nlog = \"debug\"\n").unwrap();
    perennial.signal(nix::sys::signal::Signal::SIGHUP);
    perennial.logged("reloaded telemetry.log").await;
    assert_eq!(shown().await("telemetry.log"), "debug");
}

#[tokio::test]
async fn a_port_that_is_taken_names_the_setting_and_the_remedy() {
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap();
    for setting in ["server.listen", "admin.listen"] {
        let failed = Setup::new().set(&format!("{setting}={address}")).run(&["serve"]).await;
        let said = text(&failed.stderr);
        assert_eq!(failed.status.code(), Some(1), "{said}");
        assert!(said.contains(&format!("{setting}: another program listens there")), "{said}");
        assert!(said.contains(&format!("--set {setting}=")), "{said}");
    }
}
