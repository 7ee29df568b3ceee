//! The application of `perennial new`, by hand.

use std::time::Duration;

use axum::extract::{DefaultBodyLimit, Form, State};
use axum::response::{Html, Redirect};
use axum::routing::get;
use axum::{Router, http::StatusCode};
use maud::{DOCTYPE, html};
use sqlx::AnyPool;
use tokio_cron_scheduler::{Job, JobScheduler};
use tower_http::timeout::TimeoutLayer;
use tower_http::trace::TraceLayer;

#[derive(serde::Deserialize)]
struct NewNote {
    text: String,
}

async fn show(State(pool): State<AnyPool>) -> Result<Html<String>, StatusCode> {
    let notes: Vec<(String,)> = sqlx::query_as("SELECT text FROM notes ORDER BY id DESC LIMIT 50")
        .fetch_all(&pool)
        .await
        .map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?;
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head { meta charset="utf-8"; title { "Guest book" } }
            body {
                h1 { "Guest book" }
                form method="post" { textarea name="text" {} button { "Leave it" } }
                @for (text,) in &notes { p { (text) } }
            }
        }
    };
    Ok(Html(page.into_string()))
}

async fn add(State(pool): State<AnyPool>, Form(note): Form<NewNote>) -> Result<Redirect, StatusCode> {
    let failed = |_| StatusCode::SERVICE_UNAVAILABLE;
    let mut tx = pool.begin().await.map_err(failed)?;
    sqlx::query("INSERT INTO notes (text) VALUES ($1)").bind(&note.text).execute(&mut *tx).await.map_err(failed)?;
    sqlx::query("INSERT INTO jobs (payload) VALUES ($1)").bind(&note.text).execute(&mut *tx).await.map_err(failed)?;
    tx.commit().await.map_err(failed)?;
    Ok(Redirect::to("/notes"))
}

/// Runs jobs, one at a time, at least once.
async fn work(pool: AnyPool) {
    loop {
        let job: Option<(i64, String)> =
            sqlx::query_as("SELECT id, payload FROM jobs ORDER BY id LIMIT 1").fetch_optional(&pool).await.unwrap_or_default();
        match job {
            Some((id, payload)) => {
                tracing::info!(payload, "a note was left");
                let _ = sqlx::query("DELETE FROM jobs WHERE id = $1").bind(id).execute(&pool).await;
            }
            None => tokio::time::sleep(Duration::from_secs(1)).await,
        }
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().json().init();
    let metrics = metrics_exporter_prometheus::PrometheusBuilder::new().install_recorder()?;
    sqlx::any::install_default_drivers();
    let url = std::env::var("DATABASE_URL").unwrap_or_else(|_| "sqlite:notes.db?mode=rwc".to_owned());
    let pool = AnyPool::connect(&url).await?;
    sqlx::query("CREATE TABLE IF NOT EXISTS notes (id INTEGER PRIMARY KEY, text TEXT NOT NULL)").execute(&pool).await?;
    sqlx::query("CREATE TABLE IF NOT EXISTS jobs (id INTEGER PRIMARY KEY, payload TEXT NOT NULL)").execute(&pool).await?;
    let scheduler = JobScheduler::new().await?;
    scheduler.add(Job::new("0 0 7 * * *", |_, _| tracing::info!("a digest"))?).await?;
    scheduler.start().await?;
    tokio::spawn(work(pool.clone()));
    let app = Router::new()
        .route("/notes", get(show).post(add))
        .route("/metrics", get(move || std::future::ready(metrics.render())))
        .layer((
            TraceLayer::new_for_http(),
            TimeoutLayer::with_status_code(StatusCode::SERVICE_UNAVAILABLE, Duration::from_secs(30)),
            DefaultBodyLimit::max(1 << 20),
        ))
        .with_state(pool);
    let handle = axum_server::Handle::new();
    let stopping = handle.clone();
    tokio::spawn(async move {
        let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).unwrap();
        term.recv().await;
        stopping.graceful_shutdown(Some(Duration::from_secs(20)));
    });
    let address = "127.0.0.1:8080".parse::<std::net::SocketAddr>()?;
    match (std::env::var("CERT"), std::env::var("KEY")) {
        (Ok(cert), Ok(key)) => {
            let tls = axum_server::tls_rustls::RustlsConfig::from_pem_file(cert, key).await?;
            axum_server::bind_rustls(address, tls).handle(handle).serve(app.into_make_service()).await?;
        }
        _ => axum_server::bind(address).handle(handle).serve(app.into_make_service()).await?,
    }
    Ok(())
}
