//! Where commands for operators are answered: at the running server, or here on its store while none runs.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use axum::body::Body;
use axum::{Extension, Router};
use bytes::Bytes;
use http::{Method, Request, header};
use http_body_util::BodyExt;
use perennial_store::pool::sql;
use perennial_workers::Jobs;
use perennial_workers::admission::Admission;
use serde_json::Value;
use tower::ServiceExt;

use super::client::{Answer, Client};
use super::open_alone;
use crate::addresses::Addresses;
use crate::admin::jobs::{self, Books};
use crate::admin::keys::{self, Keyring};
use crate::admin::schedules;
use crate::boot;
use crate::config::{Config, Store};
use crate::data_dir::{self, ADMIN_TOKEN, DataDir};
use crate::module::Blueprint;

/// Retrying a million dead jobs takes a while.
const TIMEOUT: Duration = Duration::from_secs(120);

/// See the module.
#[expect(clippy::large_enum_variant, reason = "there is one, for a moment")]
pub(super) enum Desk {
    Server(Client),
    Own(Own),
}

/// The store, while no server runs on it.
pub(super) struct Own {
    store: sql::Store,
    router: Router,
    _lock: Arc<DataDir>,
}

impl Desk {
    /// Finds the server, or opens the store; `answer` makes the routes that are asked then.
    pub(super) async fn open<F>(
        config: &Config,
        modules: &[Blueprint],
        answer: impl FnOnce(Arc<DataDir>, sql::Store, Jobs) -> F,
    ) -> anyhow::Result<Self>
    where
        F: Future<Output = anyhow::Result<Router>>,
    {
        data_dir::check_access(&config.data_dir)?;
        if data_dir::is_locked(&config.data_dir) {
            let base = Addresses::of_running(&config.data_dir)?.admin_url()?;
            let file = config.data_dir.join(ADMIN_TOKEN);
            let token = std::fs::read_to_string(&file)
                .with_context(|| format!("the admin token in {} cannot be read", file.display()))?;
            return Ok(Self::Server(Client::new(&base, Some(token.trim().to_owned()), TIMEOUT)?));
        }
        if matches!(config.store, Store::Sqlite { .. }) && !config.data_dir.exists() {
            bail!("there is no store in {} yet", config.data_dir.display());
        }
        let (data_dir, store) = open_alone(config, modules).await?;
        let data_dir = Arc::new(data_dir);
        let (queue, _) = boot::open_queue(config, &store).await?;
        let jobs = Jobs::new(queue, Admission::new(config.bounds));
        let router = answer(Arc::clone(&data_dir), store.clone(), jobs).await?;
        Ok(Self::Own(Own { store, router, _lock: data_dir }))
    }

    /// The same for what is asked about jobs and schedules.
    pub(super) async fn of_books(config: &Config, modules: &[Blueprint]) -> anyhow::Result<Self> {
        Self::open(config, modules, async |_, _, jobs| {
            let routes = jobs::admin_read().merge(jobs::admin_write());
            let routes = routes.merge(schedules::admin_read()).merge(schedules::admin_write());
            Ok(routes.layer(Extension(Books::alone(jobs))))
        })
        .await
    }

    /// The same for what is asked about API keys.
    pub(super) async fn of_keys(config: &Config, modules: &[Blueprint]) -> anyhow::Result<Self> {
        Self::open(config, modules, async |_, store, jobs| {
            let sites = config.sites.clone().open(&store).await?;
            let keyring = Keyring { store, sites, caches: boot::caches(jobs.store(), config) };
            Ok(keys::admin_read().merge(keys::admin_write()).layer(Extension(keyring)))
        })
        .await
    }

    /// Asks with JSON.
    pub(super) async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<Value> {
        match self {
            Self::Server(client) => client.call(method, path, body).await,
            Self::Own(own) => {
                own.answer(method, path, Bytes::from(body.map(Value::to_string).unwrap_or_default())).await
            }
        }
    }

    /// Posts lines of JSON.
    pub(super) async fn post_lines(&self, path: &str, lines: Bytes) -> anyhow::Result<Value> {
        match self {
            Self::Server(client) => client.post_lines(path, lines).await?.success(),
            Self::Own(own) => own.answer(Method::POST, path, lines).await,
        }
    }

    pub(super) async fn close(self) {
        if let Self::Own(own) = self {
            own.store.close().await;
        }
    }
}

impl Own {
    async fn answer(&self, method: Method, path: &str, body: Bytes) -> anyhow::Result<Value> {
        let request = Request::builder().method(method).uri(path);
        let request = request.header(header::CONTENT_TYPE, "application/json").body(Body::from(body))?;
        let response = self.router.clone().oneshot(request).await?;
        let status = response.status();
        let bytes = response.into_body().collect().await?.to_bytes();
        Answer { status, body: serde_json::from_slice(&bytes).unwrap_or_default() }.success()
    }
}
