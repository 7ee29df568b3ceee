//! How many members an audience has.

use std::sync::Arc;
use std::time::Duration;

use perennial_host::sites::SiteId;
use perennial_store::cache::{self, Cache, Caches, Kept};
use perennial_store::pool::sql;

use crate::model::audience::Audience;
use crate::store::PushStore;

/// How many members big audiences have. A count that is a few seconds old decides nothing but how the notification is
/// cut; who its members are is read when it is sent.
const COUNTS: cache::Config = cache::Config {
    name: "audience_counts",
    bytes: 4 << 20,
    ttl: Duration::from_secs(10),
    negative_ttl: Duration::ZERO,
    stale: Duration::ZERO,
};

/// How many members an audience has.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Count {
    /// The number, or an upper bound where it could not be counted in time.
    pub(crate) members: u64,
    pub(crate) is_exact: bool,
    is_small: bool,
}

impl Kept for Count {
    fn bytes(&self) -> usize {
        size_of::<Self>()
    }

    /// Small audiences are counted in no time, and a browser that has just subscribed is to be among them.
    fn is_kept(&self) -> bool {
        !self.is_small
    }
}

/// Counts audiences, and keeps what takes long.
#[derive(Clone, Debug)]
pub(crate) struct Audiences {
    counts: Cache<Count>,
    store: PushStore,
    /// Up to how many members an audience is small.
    small: u64,
}

impl Audiences {
    pub(crate) fn new(caches: &Caches, store: PushStore, small: u64) -> Self {
        Self { counts: caches.make(COUNTS), store, small }
    }

    /// How many subscriptions an audience has now, and the highest id among all of its site: members are those
    /// up to it.
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
                // No more than all; of these there are no more than were ever stored.
                None => count(&Audience::All).await?.unwrap_or(u64::try_from(watermark).unwrap_or_default()),
            };
            let is_exact = counted.is_some();
            Ok(Some(Count { members, is_exact, is_small: is_exact && members <= self.small }))
        };
        let key = format!("{} {}", site.0, serde_json::to_string(audience).unwrap_or_default());
        Ok((self.counts.get(&key, load).await?.unwrap_or_default(), watermark))
    }
}
