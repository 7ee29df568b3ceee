//! The first hour: everything on one machine with one command, and a sink that says which settings a server lacks.

use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Child;

use support::process::Setup;
use support::soon;

/// Next line of a child's standard output that contains a text.
async fn line(lines: &mut tokio::io::Lines<BufReader<tokio::process::ChildStdout>>, part: &str) -> String {
    soon(part, async {
        loop {
            let line = lines.next_line().await.unwrap().unwrap_or_else(|| panic!("it ended before {part}"));
            if line.contains(part) {
                return line;
            }
        }
    })
    .await
}

fn piped(setup: &Setup, arguments: &[&str]) -> Child {
    let mut command = setup.command(arguments);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true).spawn().unwrap()
}

#[tokio::test]
async fn one_command_is_a_complete_trial_on_this_machine() {
    let setup = Setup::new();
    let mut trial = piped(&setup, &["serve", "--dev", "--subscribers", "2"]);
    let mut lines = BufReader::new(trial.stdout.take().unwrap()).lines();
    line(&mut lines, "\"subscribed\":\"#2\"").await;
    let sent = setup.run(&["notify", "--all", "--title", "Hello"]).await;
    assert!(sent.status.success(), "{}", String::from_utf8_lossy(&sent.stderr));
    assert!(String::from_utf8_lossy(&sent.stdout).contains("delivered 2"));
    let shown = line(&mut lines, "Hello").await;
    assert!(shown.contains("\"to\":\"#"), "{shown}");
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(trial.id().unwrap().cast_signed()),
        nix::sys::signal::Signal::SIGINT,
    )
    .unwrap();
    let ended = soon("it ends", trial.wait_with_output()).await.unwrap();
    assert!(ended.status.success());
    assert!(String::from_utf8_lossy(&ended.stderr).contains("This is a trial"));

    // A second trial, while another program has its usual port, does not meet the browsers of the first.
    let _taken = std::net::TcpListener::bind("127.0.0.1:8443");
    let mut again = piped(&setup, &["serve", "--dev", "--subscribers", "2"]);
    let mut lines = BufReader::new(again.stdout.take().unwrap()).lines();
    line(&mut lines, "\"subscribed\":\"#2\"").await;
    let sent = setup.run(&["notify", "--all", "--title", "Again"]).await;
    let told = String::from_utf8_lossy(&sent.stdout).into_owned();
    assert!(sent.status.success() && told.trim_end().ends_with(" delivered 2"), "{told}");

    let open = Setup::new().set("server.listen=0.0.0.0:0").run(&["serve", "--dev"]).await;
    assert_eq!(open.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&open.stderr).contains("--dev is for this machine alone"));
}

#[tokio::test]
async fn a_sink_says_what_a_running_server_lacks() {
    let perennial = Setup::new().start().await;
    let directory = perennial.setup.file("sink");
    let directory = directory.to_str().unwrap();
    let arguments = [
        "sink",
        "--listen",
        "127.0.0.1:0",
        "--browsers",
        "127.0.0.1:0",
        "--subscribers",
        "1",
        "--directory",
        directory,
    ];
    let output = perennial.setup.run(&arguments).await;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success());
    for part in [
        "it lacks push.allow_insecure, push.allow_hosts, push.allow_networks, push.extra_ca_file",
        "--set push.allow_insecure=true",
        "serve --dev",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
}

#[tokio::test]
async fn commands_complete_explain_and_answer_in_json() {
    let setup = Setup::new();
    for (shell, part) in
        [("bash", "complete -F"), ("zsh", "#compdef perennial"), ("fish", "complete -c perennial")]
    {
        let script = setup.run(&["completions", shell]).await;
        assert!(script.status.success());
        assert!(String::from_utf8_lossy(&script.stdout).contains(part), "{shell}");
    }
    let page = setup.run(&["man"]).await;
    assert!(String::from_utf8_lossy(&page.stdout).contains(".TH perennial"), "a page for man");
    let pages = setup.file("man");
    assert!(setup.run(&["man", pages.to_str().unwrap()]).await.status.success());
    assert!(pages.join("perennial-notify.1").exists());
    for command in ["notify", "keys", "jobs", "cron", "top", "sink", "completions"] {
        let help = setup.run(&[command, "--help"]).await;
        assert!(String::from_utf8_lossy(&help.stdout).contains("Examples:"), "{command}");
    }

    let perennial = setup.start().await;
    for arguments in [
        &["keys", "list"][..],
        &["jobs", "queues"],
        &["jobs", "list"],
        &["cron", "list"],
        &["health"],
        &["top"],
    ] {
        let output = perennial.setup.run(&[arguments, &["--json"]].concat()).await;
        assert!(output.status.success(), "{arguments:?}");
        for line in String::from_utf8(output.stdout).unwrap().lines() {
            assert!(serde_json::from_str::<serde_json::Value>(line).is_ok(), "{arguments:?}: {line}");
        }
    }
    let run = async |arguments: &[&str]| {
        let output = perennial.setup.run(arguments).await;
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, said) = run(&["jobs", "list", "--state", "broken"]).await;
    assert!(
        code == Some(1) && said.contains("state: one of scheduled, ready, running, dead, cancelled"),
        "{said}"
    );
    let (code, said) = run(&["jobs", "retry"]).await;
    assert!(code == Some(2) && said.contains("--all"), "{said}");
    let (code, said) = run(&["jobs", "pause", "nope"]).await;
    assert!(code == Some(1) && said.contains("queue: one of ") && said.contains("push-small"), "{said}");
    let (code, said) = run(&["jobs", "show", "00000000-0000-0000-0000-000000000000"]).await;
    assert!(code == Some(1) && said.contains("there is no such job") && !said.contains("404"), "{said}");
    let (code, said) = run(&["notify", "--all", "--title", "x", "--at", "next week"]).await;
    assert!(code == Some(1) && said.contains("--at: wanted a time such as"), "{said}");
    let later = perennial
        .setup
        .run(&["notify", "--all", "--title", "x", "--at", "tomorrow 9:00", "--detach", "--json"])
        .await;
    assert!(later.status.success(), "{}", String::from_utf8_lossy(&later.stderr));
}

#[tokio::test]
async fn a_key_that_cannot_be_printed_is_withdrawn() {
    let perennial = Setup::new().start().await;
    let mut command = perennial.setup.command(&["keys", "add", "lost"]);
    // The other end of the pipe is closed.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let child = command.stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
    let output = soon("it ends", child.wait_with_output()).await.unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("was withdrawn"), "{said}");
    let list = perennial.setup.run(&["keys", "list", "--json"]).await;
    let list = String::from_utf8(list.stdout).unwrap();
    let lost = list.lines().find(|line| line.contains("\"lost\"")).unwrap_or("{}");
    assert!(lost == "{}" || lost.contains("\"has_ended\":true"), "{lost}");
}

#[tokio::test]
async fn another_users_server_is_not_said_not_to_run() {
    let perennial = Setup::new().start().await;
    if !nix::unistd::geteuid().is_root() {
        eprintln!("not run: it takes root to be somebody else");
        return;
    }
    let mut command = perennial.setup.command(&["top", "--once"]);
    // The id 65534 belongs to an unprivileged user.
    command.uid(65534).stdout(Stdio::null()).stderr(Stdio::piped());
    let output = command.output().await.unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!said.contains("no server runs"), "{said}");
}

#[tokio::test]
async fn settings_that_come_through_a_pipe_are_read_once() {
    let setup = Setup::new();
    let pipe = setup.file("settings.fifo");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut serving = piped(&setup, &["serve", "--config", pipe.to_str().unwrap()]);
    // Opened for writing, a pipe waits for its reader. A second reader would wait without end.
    let written = tokio::task::spawn_blocking(move || std::fs::write(&pipe, "[queue]\nslots = 7\n"));
    soon("the settings are read", written).await.unwrap().unwrap();
    support::eventually("it is ready", || async {
        setup.run(&["health"]).await.status.success().then_some(())
    })
    .await;
    serving.kill().await.unwrap();
}
