//! Limits the connections of the store that one site may have for reads that callers ask for and that may take long:
//! counting an audience, listing. The other connections stay free for all other work, however many requests a site
//! sends at once.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use perennial_store::pool::sql::{self, Dialect, Result};
use perennial_store::pool::{postgres, sqlite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// How long a caller waits for its site's share.
const WAIT: Duration = Duration::from_secs(5);

/// The shares of all sites. Cloning is cheap.
#[derive(Clone, Debug)]
pub(super) struct Shares {
    /// Number of reads of one site that may run at once.
    size: usize,
    dialect: Dialect,
    /// One semaphore for each site that has asked for a read.
    sites: Arc<Mutex<HashMap<i64, Arc<Semaphore>>>>,
}

impl Shares {
    /// Gives each site half of the connections, but at least one.
    pub(super) fn of(connections: usize, dialect: Dialect) -> Self {
        Self { size: (connections / 2).max(1), dialect, sites: Arc::default() }
    }

    /// Takes a permit for one read of a site.
    ///
    /// # Errors
    /// The store is busy: no permit of the site became free in time.
    pub(super) async fn take(&self, site: i64) -> Result<OwnedSemaphorePermit> {
        let share = {
            let mut sites = self.sites.lock();
            Arc::clone(sites.entry(site).or_insert_with(|| Arc::new(Semaphore::new(self.size))))
        };
        let taken = tokio::time::timeout(WAIT, share.acquire_owned()).await;
        taken.ok().and_then(std::result::Result::ok).ok_or_else(|| self.busy())
    }

    fn busy(&self) -> sql::Error {
        match self.dialect {
            Dialect::Sqlite => sqlite::Error::Busy("reader for one site more").into(),
            Dialect::Postgres => postgres::Error::Busy.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_site_keeps_only_itself_waiting() {
        let shares = Shares::of(4, Dialect::Sqlite);
        let (_one, two) = (shares.take(1).await.unwrap(), shares.take(1).await.unwrap());
        assert!(shares.take(1).await.is_err_and(|error| error.is_passing()), "it has its half");
        assert!(shares.take(2).await.is_ok());
        drop(two);
        assert!(shares.take(1).await.is_ok());
        assert!(Shares::of(1, Dialect::Sqlite).take(1).await.is_ok(), "never none");
    }
}
