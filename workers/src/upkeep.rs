//! What somebody has to do for all jobs: take them from workers that died, and count them.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use perennial_runtime::drain::Drain;
use perennial_runtime::telemetry::Seldom;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::admission::Admission;
use crate::ledger::JobAdmin;
use crate::metrics;
use crate::queue::{Queue, Result, Settlement};
use crate::registry::Registry;
use crate::state::{Event, next};

/// How many lapsed leases are dealt with at once.
const BATCH: usize = 100;
/// Who deals with them, for those who look.
const NAME: &str = "rescue";
/// How often to count, at the most: and never more than a fiftieth of the time is spent with it.
const COUNT: Duration = Duration::from_secs(1);

/// How to keep the books.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// How often to look for lapsed leases.
    pub rescue_every: Duration,
    /// For how long workers claim jobs.
    pub lease: Duration,
}

/// Looks after all jobs, until nothing new may be claimed here.
///
/// # Errors
/// Never: the type is that of a task. A store that fails is asked again.
pub async fn run<Q: Queue + JobAdmin>(
    queue: Q,
    registry: Arc<Registry>,
    admission: Admission,
    config: Config,
    drain: Drain,
) -> std::result::Result<(), Infallible> {
    let begin = Instant::now();
    let (mut rescue_at, mut count_at) = (begin, begin);
    loop {
        tokio::select! {
            () = tokio::time::sleep_until(rescue_at.min(count_at)) => {}
            () = drain.notice() => return Ok(()),
        }
        let now = Instant::now();
        if now >= rescue_at {
            rescue_at = now + config.rescue_every;
            complain(rescue(&queue, &registry, config.lease).await, "lapsed leases could not be looked for");
        }
        if now >= count_at {
            complain(count(&queue, &registry, &admission).await, "jobs could not be counted");
            count_at = Instant::now() + COUNT.max(now.elapsed() * 50);
        }
    }
}

/// A store that is away fails all of this, each time.
static FAILED: Seldom = Seldom::each_minute();

fn complain<T>(result: Result<T>, what: &'static str) {
    if let Err(error) = result
        && let Some(more) = FAILED.tell()
    {
        warn!(error = error.in_one_line(), more_since_last = more, "{what}");
    }
}

/// Takes jobs from workers that have not renewed their leases, and returns how many. It claims them as a worker
/// does, so that one that wakes up late settles nothing, and settles them as crashed.
///
/// # Errors
/// When the store fails. What was claimed and not settled lapses again.
pub async fn rescue<Q: Queue>(queue: &Q, registry: &Registry, lease: Duration) -> Result<usize> {
    let mut rescued = 0;
    loop {
        let lapsed = queue.lapsed(BATCH, NAME.to_owned(), lease).await?;
        let found = lapsed.jobs.len();
        let settlements: Vec<Settlement> = lapsed
            .jobs
            .into_iter()
            .map(|job| {
                let event = job.cancelled.clone().map_or(Event::Lapsed, Event::Cancelled);
                let transition = next(&registry.budget(&job.kind), job.spent, event, lapsed.now, 0.0);
                Settlement::of(Arc::new(job), transition)
            })
            .collect();
        if !settlements.is_empty() {
            rescued += queue.settle(settlements).await?.into_iter().filter(|kept| *kept).count();
        }
        if found < BATCH {
            break;
        }
    }
    if rescued > 0 {
        metrics::rescued(rescued);
        info!(jobs = rescued, "jobs taken from workers that did not renew their leases");
    }
    Ok(rescued)
}

async fn count<Q: Queue + JobAdmin>(queue: &Q, registry: &Registry, admission: &Admission) -> Result<()> {
    let queues: Vec<Arc<str>> = registry.lanes().into_iter().map(|lane| lane.name).collect();
    let added: HashMap<Arc<str>, _> =
        queues.iter().map(|queue| (Arc::clone(queue), admission.added(queue))).collect();
    for (queue, depth) in queue.measure_all(queues).await {
        match (depth, added.get(&queue)) {
            (Ok(depth), Some(added)) => {
                admission.measured(&queue, depth, *added);
                metrics::depth(&queue, depth);
            }
            (Ok(_), None) => {}
            (Err(error), _) => complain::<()>(Err(error), "a queue could not be counted"),
        }
    }
    for (queue, jobs) in queue.ended().await? {
        metrics::kept(&queue, jobs);
    }
    Ok(())
}
