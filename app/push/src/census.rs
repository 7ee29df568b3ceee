//! Counts the stored subscriptions for the gauge.

use std::time::Duration;

use perennial_runtime::drain::Drain;
use perennial_runtime::pulse::pulse;

use crate::metrics;
use crate::model::audience::Audience;
use crate::model::profile::Profiles;
use crate::store::PushStore;

/// Time between two counts.
const EVERY: Duration = Duration::from_secs(60);

/// Counts until the soft phase of the drain. A site with more subscriptions than can be counted in time keeps its
/// last number.
pub(crate) async fn run(store: PushStore, profiles: Profiles, drain: Drain) -> anyhow::Result<()> {
    loop {
        for (site, profile) in profiles.iter() {
            // While the store is away, nothing is counted.
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
