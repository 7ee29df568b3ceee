//! The admin backend, which answers commands of operators: the running server, or the same routes on its store while no
//! server runs.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use axum::Router;
use axum::body::Body;
use bytes::Bytes;
use http::{Method, Request, header};
use http_body_util::BodyExt;
use perennial_store::cache::Caches;
use perennial_store::pool::sql;
use perennial_workers::Jobs;
use perennial_workers::admission::Admission;
use serde_json::Value;
use tower::ServiceExt;

use super::CommandContext;
use super::client::{Client, ServerAnswer};
use crate::access::Scopes;
use crate::addresses::Addresses;
use crate::boot::open;
use crate::config::{Config, StoreConfig};
use crate::data_dir::{ADMIN_TOKEN, DataDir};
use crate::sites::Sites;

/// Time limit for an answer: retrying a million dead jobs takes a while.
const TIMEOUT: Duration = Duration::from_secs(120);

/// The running server, or the store while no server runs.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one, for a moment")]
pub enum AdminBackend {
    /// The running server.
    Server(Client),
    /// The store, opened by this process.
    Own(Own),
}

/// The parts of the host for a command that runs while no server does.
#[derive(Debug)]
pub struct Offline {
    /// The data directory, locked.
    pub data_dir: Arc<DataDir>,
    /// The store, with its tables up to date.
    pub store: sql::Store,
    /// The jobs.
    pub jobs: Jobs,
    config: Arc<Config>,
}

impl Offline {
    pub(super) async fn open(context: &CommandContext) -> anyhow::Result<Self> {
        let config = &context.config;
        let (data_dir, store) = context.open_alone().await?;
        let (queue, _) = open::queue(config, &store).await?;
        let jobs = Jobs::new(queue, Admission::new(config.bounds));
        Ok(Self { data_dir: Arc::new(data_dir), store, jobs, config: Arc::clone(config) })
    }

    /// Registers the sites in the store, and returns them.
    ///
    /// # Errors
    /// When the store refuses.
    pub async fn sites(&self) -> sql::Result<Sites> {
        self.config.sites.clone().open(&self.store).await
    }

    /// Makes caches; running replicas drop entries together with this process.
    pub fn caches(&self) -> Caches {
        open::caches(self.jobs.store(), &self.config)
    }

    /// The scopes that a key can have.
    pub(crate) fn scopes(&self) -> &Scopes {
        &self.config.scopes
    }
}

/// The store, while no server runs on it.
#[derive(Debug)]
pub struct Own {
    store: sql::Store,
    router: Router,
    _lock: Arc<DataDir>,
}

impl AdminBackend {
    /// Finds the running server, or opens the store; `routes` makes the routes that are called then.
    pub(super) async fn open(
        context: &CommandContext,
        routes: impl AsyncFnOnce(Offline) -> anyhow::Result<Router>,
    ) -> anyhow::Result<Self> {
        let config = &context.config;
        context.check_access()?;
        if context.is_running() {
            let base = Addresses::of_running(&config.data_dir)?.admin_url()?;
            let file = config.data_dir.join(ADMIN_TOKEN);
            let token = std::fs::read_to_string(&file)
                .with_context(|| format!("the admin token in {} cannot be read", file.display()))?;
            return Ok(Self::Server(Client::new(&base, Some(token.trim().to_owned()), TIMEOUT)?));
        }
        if matches!(config.store, StoreConfig::Sqlite { .. }) && !config.data_dir.exists() {
            bail!("there is no store in {} yet", config.data_dir.display());
        }
        let offline = Offline::open(context).await?;
        let (store, lock) = (offline.store.clone(), Arc::clone(&offline.data_dir));
        let router = routes(offline).await?;
        Ok(Self::Own(Own { store, router, _lock: lock }))
    }

    /// Sends a request, with a JSON body if there is one, and returns the body of the answer.
    ///
    /// # Errors
    /// When the answer is not a success, or the server does not answer.
    pub async fn call(&self, method: Method, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        match self {
            Self::Server(client) => client.call(method, path, body).await,
            Self::Own(own) => {
                own.answer(method, path, Bytes::from(body.map(Value::to_string).unwrap_or_default())).await
            }
        }
    }

    /// Posts lines of JSON, and returns the body of the answer.
    ///
    /// # Errors
    /// When the answer is not a success, or the server does not answer.
    pub async fn post_lines(&self, path: &str, lines: Bytes) -> anyhow::Result<Value> {
        match self {
            Self::Server(client) => client.post_lines(path, lines).await?.success(),
            Self::Own(own) => own.answer(Method::POST, path, lines).await,
        }
    }

    /// Closes the store, if this process has opened it.
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
        ServerAnswer { status, body: serde_json::from_slice(&bytes).unwrap_or_default() }.success()
    }
}
