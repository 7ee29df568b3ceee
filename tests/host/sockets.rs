//! Listening sockets: several, shared, inherited, renewed; and proxies that are trusted or not.

use std::io::Write;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::process::Stdio;

use axum::Router;
use axum::routing::get;
use command_fds::{CommandFdExt, FdMapping};
use perennial_server::http::scope::RequestScope;
use perennial_server::net::{ForwardedHeader, tls};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use support::double::Double;
use support::eventually;
use support::host::{Host, net, until_closed};
use support::http::{Client, tls_connect};
use support::process::Setup;

fn who() -> Router {
    Router::new().route(
        "/who",
        get(|scope: RequestScope| async move {
            format!(
                "{} {}",
                scope.connection().peer(),
                scope.client().map_or_else(String::new, |ip| ip.to_string())
            )
        }),
    )
}

#[tokio::test]
async fn one_process_listens_on_several_addresses() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("p.sock");
    let config = net(|net| {
        net.listen = ["127.0.0.1:0", "127.0.0.2:0", &format!("unix:{}", path.display())]
            .map(|listen| listen.parse().unwrap())
            .to_vec();
    });
    let host = Host::start(config, who()).await;
    for address in &host.addresses[..2] {
        let answer = Client::new(&format!("http://{address}")).get("/who").await;
        assert_eq!(answer.status, 200, "{address}");
    }
    assert!(path.exists());
    host.stop().await;
}

#[tokio::test]
async fn two_processes_may_share_an_address_if_they_say_so() {
    let first = Host::start(net(|net| net.reuse_port = true), who()).await;
    let address: perennial_server::net::Listen = first.addresses[0].parse().unwrap();
    let second = net(|net| {
        net.reuse_port = true;
        net.listen = vec![address.clone()];
    });
    let second = Host::start(second, who()).await;
    assert_eq!(first.addresses, second.addresses);
    let alone = net(|net| net.listen = vec![address.clone()]);
    let refused =
        perennial_server::http::Server::bind(alone, &perennial_server::net::Inherited::default()).await;
    assert!(refused.is_err(), "and only if all of them do");
    first.stop().await;
    assert_eq!(second.client().get("/who").await.status, 200);
    second.stop().await;
}

#[tokio::test]
async fn a_certificate_that_was_renewed_is_used_for_new_connections() {
    let (first, second) = (Double::start().await, Double::start().await);
    let directory = tempfile::tempdir().unwrap();
    let copy = |double: &Double| {
        for file in ["cert.pem", "key.pem"] {
            std::fs::copy(double.ca_file().parent().unwrap().join(file), directory.path().join(file))
                .unwrap();
        }
    };
    copy(&first);
    let files = tls::Config {
        cert_file: directory.path().join("cert.pem"),
        key_file: directory.path().join("key.pem"),
    };
    let host = Host::start(
        net(|net| {
            net.listen = vec!["https://127.0.0.1:0".parse().unwrap()];
            net.tls = Some(files);
        }),
        who(),
    )
    .await;
    let address = host.addresses[0].trim_start_matches("https://").to_owned();
    let serves = async |double: &Double| {
        let stream = TcpStream::connect(&address).await.unwrap();
        let stream = tls_connect(stream, double.ca_file(), &["h2"]).await;
        let shown = stream.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned();
        let file = double.ca_file().parent().unwrap().join("cert.pem");
        assert_eq!(shown, CertificateDer::from_pem_file(file).unwrap());
    };
    serves(&first).await;
    // A renewal that is half done and not readable is ignored: the old certificate stays.
    std::fs::write(directory.path().join("cert.pem"), "nonsense").unwrap();
    host.sockets.renew_certificate();
    serves(&first).await;
    copy(&second);
    host.sockets.renew_certificate();
    serves(&second).await;
    host.stop().await;
}

/// Builds a PROXY header, version 2, for a TCP connection over IPv4.
fn proxy_header(client: [u8; 4]) -> Vec<u8> {
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c".to_vec();
    header.extend(client);
    header.extend([10, 0, 0, 1]);
    header.extend([0x12, 0x67, 0, 80]);
    header
}

const REQUEST: &[u8] = b"GET /who HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";

#[tokio::test]
async fn the_proxy_protocol_is_believed_of_trusted_networks() {
    let believing = |trusted: &str| {
        let trusted = trusted.parse().unwrap();
        net(|net| {
            net.proxy_protocol = true;
            net.trusted_proxies = vec![trusted].into();
        })
    };
    let host = Host::start(believing("127.0.0.0/8"), who()).await;
    let with_header = [proxy_header([192, 0, 2, 7]), REQUEST.to_vec()].concat();
    let (answer, _) = until_closed(&mut host.connect().await, &with_header).await;
    assert!(answer.ends_with("192.0.2.7:4711 192.0.2.7"), "{answer}");
    // The header comes in two parts.
    let mut stream = host.connect().await;
    stream.write_all(&with_header[..9]).await.unwrap();
    tokio::task::yield_now().await;
    let (answer, _) = until_closed(&mut stream, &with_header[9..]).await;
    assert!(answer.ends_with("192.0.2.7:4711 192.0.2.7"), "{answer}");
    let (answer, _) = until_closed(&mut host.connect().await, REQUEST).await;
    assert_eq!(answer, "", "whoever is trusted must say for whom it speaks");
    host.stop().await;

    let host = Host::start(believing("10.0.0.0/8"), who()).await;
    let (answer, _) = until_closed(&mut host.connect().await, REQUEST).await;
    assert!(answer.contains(" 127.0.0.1"), "{answer}");
    let (answer, _) = until_closed(&mut host.connect().await, &with_header).await;
    assert!(!answer.contains("192.0.2.7"), "{answer}");
    host.stop().await;
}

#[tokio::test]
async fn headers_of_proxies_are_believed_of_trusted_networks() {
    let believing = |header: ForwardedHeader| {
        net(|net| {
            net.trusted_proxies = vec!["127.0.0.1/32".parse().unwrap()].into();
            net.forwarded_header = header;
        })
    };
    let anybody = Host::start(net(|_| {}), who()).await;
    let headers = [("x-forwarded-for", "6.6.6.6, 192.0.2.7"), ("forwarded", "for=192.0.2.7;proto=https")];
    let kinds = [ForwardedHeader::XForwardedFor, ForwardedHeader::Forwarded];
    for ((name, value), kind) in headers.into_iter().zip(kinds) {
        let trusting = Host::start(believing(kind), who()).await;
        let ask = async |host: &Host| host.client().with_header(name, value).get("/who").await.text();
        assert!(ask(&trusting).await.ends_with(" 192.0.2.7"), "{name}");
        assert!(ask(&anybody).await.ends_with(" 127.0.0.1"), "{name}");
        // The other header is whatever the client has sent.
        let other = headers.iter().find(|(other, _)| *other != name).unwrap();
        let spoofed = trusting.client().with_header(other.0, other.1).get("/who").await.text();
        assert!(spoofed.ends_with(" 127.0.0.1"), "{name}");
        trusting.stop().await;
    }
    anybody.stop().await;
}

#[tokio::test]
async fn the_limit_of_one_address_is_that_of_the_client_in_the_proxy_header() {
    let config = net(|net| {
        net.proxy_protocol = true;
        net.trusted_proxies = vec!["127.0.0.0/8".parse().unwrap()].into();
        net.max_per_address = 1;
    });
    let host = Host::start(config, who()).await;
    let mut first = host.connect().await;
    let request = b"GET /who HTTP/1.1\r\nhost: x\r\n\r\n";
    first.write_all(&[proxy_header([192, 0, 2, 7]), request.to_vec()].concat()).await.unwrap();
    assert!(support::soon("an answer", first.read(&mut [0; 1024])).await.unwrap() > 0);
    for (client, served) in [([192, 0, 2, 7], false), ([192, 0, 2, 8], true)] {
        let request = [proxy_header(client), REQUEST.to_vec()].concat();
        let (answer, _) = until_closed(&mut host.connect().await, &request).await;
        assert_eq!(answer.starts_with("HTTP/1.1 200"), served, "{client:?}: {answer}");
    }
    // A PROXY header that announces a client, but has no address of it.
    let mut nobody = b"\r\n\r\n\0\r\nQUIT\n\x21\x00\x00\x00".to_vec();
    nobody.extend(REQUEST);
    assert_eq!(until_closed(&mut host.connect().await, &nobody).await.0, "");
    drop(first);
    host.stop().await;
}

#[tokio::test]
async fn limits_of_one_address_are_those_of_the_client_behind_a_trusted_proxy() {
    let setup = Setup::new().set("push.address_burst=1").set("push.address_per_minute=1");
    let perennial = setup.set("server.trusted_proxies=127.0.0.1").start().await;
    let client = perennial.client().without_key();
    let from = async |address: &str| {
        let client = client.with_header("x-forwarded-for", address);
        client.post("/subscriptions", &serde_json::json!({})).await.status.as_u16()
    };
    assert_eq!([from("192.0.2.1").await, from("192.0.2.1").await, from("192.0.2.2").await], [422, 429, 422]);
}

#[tokio::test]
async fn sockets_of_systemd_are_taken_over_by_their_address() {
    let setup = Setup::new();
    let (public, admin) =
        (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
    let (public_at, admin_at) = (public.local_addr().unwrap(), admin.local_addr().unwrap());
    // A client connects before there is a process at all.
    let early = std::net::TcpStream::connect(public_at).unwrap();
    let descriptors: Vec<OwnedFd> = vec![public.into(), admin.into()];
    let setup = setup.set(&format!("server.listen={public_at}")).set(&format!("admin.listen={admin_at}"));
    let mappings =
        descriptors.into_iter().zip(3..).map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd });
    let mut command = setup.command(&["serve"]);
    command.env("LISTEN_FDS", "2").env("LISTEN_FDNAMES", "perennial.socket:perennial.socket");
    command.fd_mappings(mappings.collect()).unwrap();
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let ready = Client::new(&format!("http://{admin_at}"));
    eventually("it is ready", || async {
        let ready = ready.try_send(http::Method::GET, "/readyz", None, bytes::Bytes::new()).await;
        ready.is_ok_and(|ready| ready.status.is_success()).then_some(())
    })
    .await;
    let mut early_writer = early.try_clone().unwrap();
    early_writer.write_all(b"GET /push/key HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    early.set_nonblocking(true).unwrap();
    let (answer, _) = until_closed(&mut TcpStream::from_std(early).unwrap(), b"").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    child.kill().await.unwrap();
}
