//! Counts the members of audiences.

use std::sync::Arc;
use std::time::Duration;

use perennial_host::sites::SiteId;
use perennial_store::cache::{self, Cache, Caches, Kept};
use perennial_store::pool::sql::{self, StoreTransaction};

use crate::model::audience::Audience;
use crate::store::PushStore;

/// Cache of the member counts of large audiences. A count that is a few seconds old affects only how the notification
/// is cut into batches; the members themselves are read when it is sent.
const COUNTS: cache::Config = cache::Config {
    name: "audience_counts",
    bytes: 4 << 20,
    ttl: Duration::from_secs(10),
    negative_ttl: Duration::ZERO,
    stale: Duration::ZERO,
};

/// The member count of an audience.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Count {
    /// Number of members, or an upper bound when the count did not finish in time.
    pub(crate) members: u64,
    pub(crate) is_exact: bool,
    is_small: bool,
}

impl Kept for Count {
    fn bytes(&self) -> usize {
        size_of::<Self>()
    }

    /// Small audiences are not cached: counting them is cheap, and a browser that has just subscribed must be included.
    fn is_kept(&self) -> bool {
        !self.is_small
    }
}

/// Counts audiences, and caches the counts of large ones.
#[derive(Clone, Debug)]
pub(crate) struct Audiences {
    counts: Cache<Count>,
    store: PushStore,
    /// Largest number of members of a small audience.
    small: u64,
}

impl Audiences {
    pub(crate) fn new(caches: &Caches, store: PushStore, small: u64) -> Self {
        Self { counts: caches.make(COUNTS), store, small }
    }

    /// Returns the member count of an audience, and the watermark: the highest subscription id of the site. Only
    /// subscriptions with an id up to the watermark are members.
    pub(crate) async fn estimate(
        &self,
        site: SiteId,
        audience: &Audience,
    ) -> Result<(Count, i64), Arc<sql::Error>> {
        let watermark = self.store.watermark(site.0).await?;
        let load = async {
            let count = async |audience| self.store.count(site.0, audience, watermark).await;
            let counted = count(audience).await?;
            let members = match counted {
                Some(members) => members,
                // The number of all subscriptions is an upper bound; when that count is late too, the highest id is
                // one.
                None => count(&Audience::All).await?.unwrap_or(u64::try_from(watermark).unwrap_or_default()),
            };
            let is_exact = counted.is_some();
            Ok(Some(Count { members, is_exact, is_small: is_exact && members <= self.small }))
        };
        let key = format!("{} {}", site.0, serde_json::to_string(audience).unwrap_or_default());
        Ok((self.counts.get(&key, load).await?.unwrap_or_default(), watermark))
    }

    /// Like [`Audiences::estimate`], within a transaction. A large audience is not counted to its end: the highest id is
    /// an upper bound.
    pub(crate) async fn estimate_in(
        &self,
        tx: &StoreTransaction,
        site: SiteId,
        audience: &Audience,
    ) -> sql::Result<(Count, i64)> {
        let (counted, watermark) = self.store.count_in(tx, site.0, audience, self.small + 1).await?;
        let is_small = counted <= self.small;
        let members = if is_small { counted } else { u64::try_from(watermark).unwrap_or_default() };
        Ok((Count { members, is_exact: is_small, is_small }, watermark))
    }
}
