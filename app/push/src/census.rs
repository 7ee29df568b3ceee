//! How many subscriptions there are, for the gauge.

use std::time::Duration;

use perennial_runtime::drain::Drain;
use perennial_runtime::pulse::pulse;

use crate::metrics;
use crate::model::audience::Audience;
use crate::model::profile::Profiles;
use crate::store::PushStore;

/// How often they are counted.
const EVERY: Duration = Duration::from_secs(60);

/// Counts, until nothing new is taken. A site with more than can be counted in time keeps its last number.
pub(crate) async fn run(store: PushStore, profiles: Profiles, drain: Drain) -> anyhow::Result<()> {
    loop {
        for (site, profile) in profiles.iter() {
            // A store that is away is counted later.
            let Ok(watermark) = store.watermark(site.0).await else { break };
            if let Ok(Some(count)) = store.count(site.0, &Audience::All, watermark).await {
                metrics::subscriptions(&profile.name, count);
            }
        }
        tokio::select! {
            () = pulse(EVERY) => {}
            () = drain.soft() => return Ok(()),
        }
    }
}
