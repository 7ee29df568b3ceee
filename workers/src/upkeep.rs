//! Maintenance of all jobs: claim the ones whose lease has expired, and count them.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use perennial_runtime::drain::Drain;
use perennial_runtime::telemetry::Seldom;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::admission::Admission;
use crate::job_admin::JobAdmin;
use crate::metrics;
use crate::queue::{Queue, Result, Settlement};
use crate::registry::Registry;
use crate::state::{Event, next};

/// Number of jobs with an expired lease that are claimed at once.
const BATCH: usize = 100;
/// Name of the worker that claims them, for operators.
const NAME: &str = "rescue";
/// Shortest time between two counts. At most a fiftieth of the time is spent counting.
const COUNT: Duration = Duration::from_secs(1);

/// Settings of the maintenance.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// How often to look for expired leases.
    pub rescue_every: Duration,
    /// Length of the leases of workers.
    pub lease: Duration,
}

/// Runs the maintenance of all jobs, until no new jobs may be claimed here.
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
            complain(rescue(&queue, &registry, config.lease).await, "expired leases could not be looked for");
        }
        if now >= count_at {
            complain(count(&queue, &registry, &admission).await, "jobs could not be counted");
            count_at = Instant::now() + COUNT.max(now.elapsed() * 50);
        }
    }
}

/// Limits the log lines: a store that is away fails every attempt.
static FAILED: Seldom = Seldom::each_minute();

fn complain<T>(result: Result<T>, what: &'static str) {
    if let Err(error) = result
        && let Some(more) = FAILED.tell()
    {
        warn!(error = error.in_one_line(), more_since_last = more, "{what}");
    }
}

/// Claims jobs whose workers have not renewed their leases, settles them as crashed, and returns how many.
/// Since they are claimed anew, a worker that wakes up late settles nothing.
///
/// # Errors
/// When the store fails. The leases of jobs that were claimed and not settled expire again.
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
