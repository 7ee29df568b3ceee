//! What happens to the jobs of a worker that died: their leases lapse, and they are ready again.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use perennial_server::drain::Drain;
use tracing::warn;

use crate::job::Registry;
use crate::metrics;
use crate::queue::Queue;

/// Looks for lapsed leases every `every`, until nothing new may be claimed here.
///
/// # Errors
/// Never: the type is that of a task. A store that fails is asked again.
pub async fn run<Q: Queue>(
    queue: Q,
    registry: Arc<Registry>,
    every: Duration,
    drain: Drain,
) -> Result<(), Infallible> {
    loop {
        tokio::select! {
            () = tokio::time::sleep(every) => {}
            () = drain.notice() => return Ok(()),
        }
        match queue.rescue(Arc::clone(&registry)).await {
            Ok(0) => {}
            Ok(jobs) => {
                metrics::rescued(jobs);
                warn!(jobs, "jobs taken from workers that did not renew their leases");
            }
            Err(error) => warn!(error = error.in_one_line(), "lapsed leases could not be looked for"),
        }
    }
}
