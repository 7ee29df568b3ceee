//! The servers that `tests/bench/host.rs` compares, all in one binary with one allocator and one build:
//! `peers NAME` prints its address.
//!
//! | name | server |
//! |---|---|
//! | `hyper` | hyper's HTTP/1.1 connection on an accept loop, a fixed answer and nothing else |
//! | `axum` | `axum::serve` with one route |
//! | `host` | Perennial's host with everything, its access log for debugging only |
//! | `host-log` | Perennial's host with the access log, JSON to standard error |

#![allow(clippy::unwrap_used, reason = "a peer that fails should stop")]

use std::convert::Infallible;

use axum::Router;
use axum::routing::get;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use perennial_runtime::cpu::{self, Cpu};
use perennial_runtime::drain;
use perennial_runtime::metrics::Metrics;
use perennial_runtime::telemetry::{self, Format, Telemetry};
use perennial_server::http::scope::RequestScope;
use perennial_server::http::{Config, Server};
use perennial_server::net::{self, Inherited};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

fn main() {
    let name = std::env::args().nth(1).expect("a name");
    let threads = std::env::args().nth(2).map_or(1, |threads| threads.parse().expect("a number"));
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let limit = rustix::process::Rlimit { current: limit.maximum, ..limit };
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, limit);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build().unwrap();
    runtime.block_on(async {
        match name.as_str() {
            "hyper" => bare_hyper().await,
            "axum" => axum_serve().await,
            "host" => host("info,access=off").await,
            "host-log" => host("info").await,
            "host-off" => host("off").await,
            _ => panic!("{name} is none of the peers"),
        }
    });
}

async fn bind() -> TcpListener {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("{}", listener.local_addr().unwrap());
    listener
}

async fn bare_hyper() {
    let listener = bind().await;
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        let answer = |_: Request<Incoming>| async {
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"hello"))))
        };
        connections.spawn(async move {
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service_fn(answer))
                .await;
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn axum_serve() {
    let router = Router::new().route("/hello", get(|| async { "hello" }));
    axum::serve(bind().await, router).await.unwrap();
}

async fn host(filter: &str) {
    let config = telemetry::Config { filter: filter.parse().unwrap(), format: Format::Json };
    let telemetry = Telemetry::install(&config).unwrap();
    let _metrics = Metrics::install().unwrap();
    let mut net = net::Config::new("public", vec!["127.0.0.1:0".parse().unwrap()]);
    net.max_connections = 100_000;
    let config = Config { max_requests: 100_000, access_log: telemetry.json_lines(), ..Config::new(net) };
    let server = Server::bind(config, &Inherited::default()).await.unwrap();
    println!("{}", server.addresses()[0]);
    let threads = std::thread::available_parallelism().unwrap();
    let cpu = Cpu::start(cpu::Config { threads, queue: 1000 }).unwrap();
    let router = Router::new()
        .route("/hello", get(|| async { "hello" }))
        .route("/sleep", get(|| tokio::time::sleep(std::time::Duration::from_secs(1))))
        .route("/fib", get(fib))
        .route("/fib-inline", get(|| async { fib_of(std::hint::black_box(30)).to_string() }));
    let (_trigger, drain) = drain::channel();
    let Ok(()) = server.run(router, Some(cpu), drain).await;
}

async fn fib(scope: RequestScope) -> Result<String, StatusCode> {
    let result = scope.cpu(|| fib_of(std::hint::black_box(30))).await;
    result.map(|result| result.to_string()).map_err(|_| StatusCode::SERVICE_UNAVAILABLE)
}

fn fib_of(n: u32) -> u64 {
    if n < 2 { u64::from(n) } else { fib_of(n - 1) + fib_of(n - 2) }
}
