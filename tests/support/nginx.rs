//! An nginx as a push service that answers every message with 201. It serves for throughput, and because it closes
//! connections with GOAWAY after a number of requests, with others in flight, as the big push services do. It reads
//! the body of a request before it answers: with `return 201` alone it answers the headers and resets the stream.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tempfile::TempDir;
use tokio::process::{Child, Command};

use crate::{eventually, free_port};

/// Returns an address with a free port on 127.0.0.1.
fn any() -> String {
    format!("127.0.0.1:{}", free_port())
}

/// A running nginx.
#[derive(Debug)]
pub struct Nginx {
    /// Port on which nginx listens.
    pub port: u16,
    directory: TempDir,
    _child: Child,
}

impl Nginx {
    /// Starts nginx with the certificate in `certificates`. It closes each connection after
    /// `keepalive_requests` requests.
    pub async fn start(certificates: &Path, keepalive_requests: u32) -> Self {
        Self::start_with(certificates, &any(), keepalive_requests, "access.log").await
    }

    /// Starts nginx at a given address, such as `127.0.0.2:8443`.
    pub async fn start_at(certificates: &Path, address: &str) -> Self {
        Self::start_with(certificates, address, 1_000_000, "access.log").await
    }

    /// Starts nginx without a log of its requests, for benches.
    pub async fn start_silent(certificates: &Path, keepalive_requests: u32) -> Self {
        Self::start_with(certificates, &any(), keepalive_requests, "").await
    }

    /// Starts nginx with a log that has only the time of each request.
    pub async fn start_timed(certificates: &Path) -> Self {
        Self::start_with(certificates, &any(), 1_000_000_000, "access.log timed buffer=64k flush=100ms").await
    }

    async fn start_with(certificates: &Path, address: &str, keepalive_requests: u32, log: &str) -> Self {
        let directory = TempDir::new().unwrap();
        let port = address.rsplit(':').next().unwrap().parse().unwrap();
        let at = directory.path().display();
        let certificates = certificates.display();
        let log = if log.is_empty() { "off".to_owned() } else { format!("{at}/{log}") };
        let config = format!(
            "daemon off; master_process off; pid {at}/pid; error_log {at}/error.log; worker_processes 1;
             events {{ worker_connections 4096; }}
             http {{
                 log_format timed '$msec'; access_log {log}; client_body_temp_path {at}; proxy_temp_path {at};
                 fastcgi_temp_path {at}; uwsgi_temp_path {at}; scgi_temp_path {at};
                 keepalive_requests {keepalive_requests};
                 server {{
                     listen {address} ssl http2;
                     ssl_certificate {certificates}/cert.pem; ssl_certificate_key {certificates}/key.pem;
                     location / {{ mirror /drop; empty_gif; error_page 405 = @created; }}
                     location = /drop {{ internal; return 204; }}
                     location @created {{ return 201; }}
                 }}
             }}"
        );
        let file = directory.path().join("nginx.conf");
        std::fs::write(&file, config).unwrap();
        let child = Command::new("nginx")
            .arg("-c")
            .arg(&file)
            .args(["-p", &at.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("nginx is installed: tests/run does that");
        eventually("nginx listens", || async {
            let connected = tokio::net::TcpStream::connect(address).await;
            connected.is_ok().then_some(())
        })
        .await;
        Self { port, directory, _child: child }
    }

    /// Times of all answers in seconds since 1970, sorted, if nginx was started with [`Self::start_timed`].
    pub async fn times(&self) -> Vec<f64> {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let log = std::fs::read_to_string(self.directory.path().join("access.log")).unwrap_or_default();
        let mut times: Vec<f64> = log.lines().filter_map(|line| line.parse().ok()).collect();
        times.sort_by(f64::total_cmp);
        times
    }

    /// Number of requests that nginx has answered with 201.
    pub async fn answered(&self) -> usize {
        // nginx writes its log as it goes; the last lines may need a moment.
        tokio::time::sleep(Duration::from_millis(100)).await;
        let log = std::fs::read_to_string(self.directory.path().join("access.log")).unwrap_or_default();
        log.lines().filter(|line| line.contains("\" 201 ")).count()
    }
}
