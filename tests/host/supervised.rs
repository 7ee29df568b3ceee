//! Under a supervisor: messages to systemd, the sockets that systemd opens, and the unit file.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;

use command_fds::{CommandFdExt, FdMapping};

use nix::sys::signal::Signal;
use tokio::net::UnixDatagram;

use support::process::Setup;
use support::soon;
use support::tools::{must_pass, tool};

/// Returns the next message that contains this line.
async fn told(socket: &UnixDatagram, line: &str) -> String {
    soon(line, async {
        loop {
            let mut message = vec![0; 4096];
            let length = socket.recv(&mut message).await.unwrap();
            let text = String::from_utf8_lossy(&message[..length]).into_owned();
            if text.lines().any(|told| told == line) {
                return text;
            }
        }
    })
    .await
}

#[tokio::test]
async fn a_supervisor_is_told_when_it_is_ready_alive_reloads_and_stops() {
    let setup = Setup::new();
    let path = setup.file("notify").to_str().unwrap().to_owned();
    supervise(setup, UnixDatagram::bind(&path).unwrap(), &path).await;
}

/// Some supervisors in containers use the abstract namespace of sockets.
#[tokio::test]
async fn a_supervisor_may_have_a_socket_without_a_path() {
    let name = format!("perennial-notify-{}", std::process::id());
    let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
    let socket = std::os::unix::net::UnixDatagram::bind_addr(&address).unwrap();
    socket.set_nonblocking(true).unwrap();
    supervise(Setup::new(), UnixDatagram::from_std(socket).unwrap(), &format!("@{name}")).await;
}

async fn supervise(setup: Setup, socket: UnixDatagram, name: &str) {
    let perennial =
        setup.environment("NOTIFY_SOCKET", name).environment("WATCHDOG_USEC", "200000").start().await;
    let ready = told(&socket, "READY=1").await;
    assert!(ready.contains("STATUS=serving on 127.0.0.1:"), "{ready}");
    told(&socket, "WATCHDOG=1").await;
    perennial.signal(Signal::SIGHUP);
    let reloading = told(&socket, "RELOADING=1").await;
    assert!(reloading.contains("MONOTONIC_USEC="), "{reloading}");
    told(&socket, "READY=1").await;
    perennial.signal(Signal::SIGTERM);
    let stopping = told(&socket, "STOPPING=1").await;
    assert!(stopping.contains("STATUS=draining: SIGTERM"), "{stopping}");
}

#[tokio::test]
async fn signals_of_other_servers_drain_or_do_nothing() {
    let mut perennial = Setup::new().start().await;
    for harmless in [Signal::SIGUSR1, Signal::SIGPIPE] {
        perennial.signal(harmless);
    }
    assert_eq!(perennial.client().get("/push/key").await.status, 200);
    perennial.signal(Signal::SIGQUIT);
    let ended = perennial.ended().await;
    assert_eq!(ended.code(), Some(0), "as SIGTERM: {ended}");
    assert!(perennial.log().contains(r#""reason":"SIGQUIT""#), "{}", perennial.log());
}

/// A successor of process 1 would end with it, so there is no handover.
#[tokio::test]
async fn process_1_of_a_container_goes_on_and_says_why() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("not run: a namespace of processes takes root");
        return;
    }
    let setup = Setup::new();
    let log = std::fs::File::create(setup.file("pid1.log")).unwrap();
    let plain = setup.command(&["serve"]);
    let mut command = tokio::process::Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]).arg(plain.as_std().get_program());
    command.args(plain.as_std().get_args()).stderr(log).kill_on_drop(true);
    for (name, value) in plain.as_std().get_envs().filter_map(|(name, value)| Some((name, value?))) {
        command.env(name, value);
    }
    let unshare = command.spawn().unwrap();
    let text = || std::fs::read_to_string(setup.file("pid1.log")).unwrap();
    support::eventually("it is ready", || async { text().contains("\"ready\"").then_some(()) }).await;
    let children = format!("/proc/{0}/task/{0}/children", unshare.id().unwrap());
    let child: i32 = std::fs::read_to_string(children).unwrap().trim().parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child), Signal::SIGUSR2).unwrap();
    support::eventually("it says why", || async {
        text().contains("process 1 of a container").then_some(())
    })
    .await;
    assert!(std::path::Path::new(&format!("/proc/{child}")).exists(), "it goes on");
}

#[tokio::test]
async fn unix_sockets_have_a_mode_and_a_group() {
    let setup = Setup::listening_as_configured();
    let path = setup.file("p.sock");
    let group = nix::unistd::getegid().as_raw();
    let perennial = setup
        .set(&format!("server.listen=127.0.0.1:0,unix:{}", path.display()))
        .set("admin.listen=127.0.0.1:0")
        .set("server.socket_mode=0660")
        .set(&format!("server.socket_group={group}"))
        .start()
        .await;
    let file = std::fs::metadata(&path).unwrap();
    assert_eq!(file.permissions().mode() & 0o777, 0o660);
    drop(perennial);
    let bad = Setup::new()
        .set("server.socket_mode=rw")
        .set("server.socket_group=no-such-group")
        .run(&["check"])
        .await;
    let said = String::from_utf8_lossy(&bad.stderr).into_owned();
    assert!(said.contains("a mode in octal") && said.contains("a group of this machine"), "{said}");
}

/// A socket that a supervisor has opened belongs to the supervisor, even when the process ends.
#[tokio::test]
async fn an_inherited_unix_socket_stays() {
    let setup = Setup::listening_as_configured();
    let path = setup.file("inherited.sock");
    let socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let setup = setup.set(&format!("server.listen=unix:{}", path.display())).set("admin.listen=127.0.0.1:0");
    let mut command = setup.command(&["serve"]);
    command.env("LISTEN_FDS", "1").env("LISTEN_FDNAMES", "public");
    let mapping = FdMapping { parent_fd: socket.into(), child_fd: 3 };
    command.fd_mappings(vec![mapping]).unwrap();
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let addresses = setup.data_dir().join("addresses.json");
    support::eventually("it listens", || async { addresses.exists().then_some(()) }).await;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id().unwrap().cast_signed()), Signal::SIGTERM)
        .unwrap();
    let ended = soon("it ends", child.wait()).await.unwrap();
    assert!(ended.success());
    assert!(path.exists(), "its file is there for the next process");
}

#[tokio::test]
async fn the_unit_file_leaves_little_to_attack() {
    let Some(analyze) = tool("systemd-analyze") else { return };
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../systemd");
    let said = must_pass(
        &analyze,
        &["security", "--offline=true", "--threshold=20", "perennial.service"],
        &directory,
    )
    .await;
    let level = said.rsplit("Overall exposure level for perennial.service: ").next().unwrap();
    let level: f64 = level.split_whitespace().next().unwrap().parse().unwrap();
    assert!(level < 2.0, "{level}");
}
