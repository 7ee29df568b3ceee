//! Web push for the code of other modules.

use std::sync::Arc;

use perennial_host::api::{Result, trace};
use perennial_host::sites::SiteId;
use perennial_server::http::problem::FieldError;
use perennial_server::http::scope::RequestScope;
use perennial_store::pool::sql::StoreTransaction;

use super::builder::Notification;
use super::idempotency::{checked_key, fingerprint};
use super::request::{NAMES, Notified};
use super::{Prepared, prepare};
use crate::api::ApiState;
use crate::store::Idempotency;

/// The owner of the idempotency keys of code. No API key has this name.
const CODE: &str = "(code)";

/// Sends notifications from the code of another module: `host.get::<Push>()`. A cheap handle.
///
/// Errors are those of `POST /notify`: a problem that names the fields.
#[derive(Clone, Debug)]
pub struct PushHandle {
    api: ApiState,
    site: SiteId,
    /// The trace that the jobs carry.
    trace: Option<String>,
}

impl PushHandle {
    pub(crate) fn new(api: ApiState) -> Self {
        Self { api, site: SiteId::DEFAULT, trace: None }
    }

    /// The handle for a request: jobs of its notifications carry the trace of the request.
    #[must_use]
    pub fn traced(&self, scope: &RequestScope) -> Self {
        Self { trace: Some(trace(scope)), ..self.clone() }
    }

    /// The handle for another site; `None` when no site has this name.
    #[must_use]
    pub fn of_site(&self, name: &str) -> Option<Self> {
        let site = self.api.access.sites().named(name)?.id;
        Some(Self { site, ..self.clone() })
    }

    /// Accepts a notification: it is stored, and will be sent.
    ///
    /// # Errors
    /// A problem, when the notification is not valid or its queue is full, or an error of the store.
    pub async fn send(&self, notification: Notification) -> Result<Notified> {
        let prepared = self.prepare(notification, None).await?;
        let accepted = self.api.store.accept(Arc::clone(&prepared.new)).await?;
        prepared.answer(&accepted)
    }

    /// Accepts a notification within a transaction: it is sent if and only if the transaction is committed.
    ///
    /// # Errors
    /// See [`PushHandle::send`].
    pub async fn insert(&self, tx: &StoreTransaction, notification: Notification) -> Result<Notified> {
        // A second connection beside that of the transaction could be waited for without end.
        let prepared = self.prepare(notification, Some(tx)).await?;
        let accepted = self.api.store.accept_in(tx, &prepared.new).await?;
        prepared.answer(&accepted)
    }

    async fn prepare(&self, notification: Notification, tx: Option<&StoreTransaction>) -> Result<Prepared> {
        let key = notification.idempotency.clone();
        let wanted = || FieldError::new("to", format!("one of {NAMES}"));
        let request = notification.request().ok_or_else(wanted)?;
        let idempotency = match key {
            None => None,
            Some(key) => Some(Idempotency {
                api_key: format!("{CODE} {}", self.site.0),
                key: checked_key(&key)?.to_owned(),
                fingerprint: fingerprint(&request),
            }),
        };
        prepare(&self.api, self.site, request, self.trace.clone(), idempotency, tx).await
    }
}
