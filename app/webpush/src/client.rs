//! Sends requests to push services over the connections of their pools.
//!
//! A request that a connection gave back unsent, or that the service says it has not processed (GOAWAY,
//! REFUSED_STREAM), is sent again on another connection: over HTTP/2 that neither loses nor doubles a message. One
//! case of HTTP/1.1 is ambiguous: a connection that ends just as a request is written to it. That request is sent
//! again, too. Any other failure may have come after the service took the message; it is reported, and the caller
//! decides.

use std::collections::HashMap;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, Version};
use parking_lot::Mutex;

use crate::concurrency_limit::ConcurrencyPermit;
use crate::connect::{Connector, HttpVersion};
use crate::connection_pool::ConnectionPool;
use crate::reputation::Reputation;
use crate::service::Service;
use crate::wire::{ClientError, Drivers, PoolContext, PoolLimits, PushResponse, Rooms, SendError};

/// Maximum number of times that a request that was certainly not processed is sent again, within its timeout.
const RESENDS: u32 = 20;
/// Number of resends without a pause.
const AT_ONCE: u32 = 3;
/// First and longest pause before each further resend; the pauses double.
const PAUSES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));
/// Shortest time after which a message to an unproven subscription gives its permit back.
const PATIENCE: Duration = Duration::from_millis(100);
/// Time between two sweeps, which close idle connections.
const SWEEP: Duration = Duration::from_secs(15);

/// The pools to all push services.
#[derive(Debug)]
pub(crate) struct PushClient {
    shared: Arc<PoolContext>,
    pools: Pools,
}

type Pools = Arc<Mutex<HashMap<HttpVersion, HashMap<String, Arc<ConnectionPool>>>>>;

impl PushClient {
    pub(crate) fn new(connector: Arc<Connector>, limits: PoolLimits, rooms: Rooms) -> Self {
        let shared = PoolContext { connector, limits, drivers: Drivers::default(), rooms };
        Self { shared: Arc::new(shared), pools: Pools::default() }
    }

    /// Returns the pool of the service with this origin name, and makes it when there is none yet.
    pub(crate) fn pool(
        &self,
        origin: &str,
        asked: HttpVersion,
        service: impl FnOnce() -> Option<Arc<Service>>,
    ) -> Option<Arc<ConnectionPool>> {
        let http = self.shared.connector.offered(asked);
        let mut all = self.pools.lock();
        if all.is_empty() {
            self.shared.drivers.spawn(sweep(Arc::clone(&self.pools)));
        }
        let pools = all.entry(http).or_default();
        if let Some(pool) = pools.get(origin) {
            return Some(Arc::clone(pool));
        }
        let pool = ConnectionPool::new(service()?, http, Arc::clone(&self.shared));
        pools.insert(origin.to_owned(), Arc::clone(&pool));
        Some(pool)
    }

    /// Waits for a permit to send one message; `None` when that takes longer than the timeout.
    pub(crate) async fn turn<'a>(
        &self,
        pool: &'a ConnectionPool,
        bulk: bool,
    ) -> Option<ConcurrencyPermit<'a>> {
        if let Some(turn) = pool.turns.take_at_once(bulk) {
            return Some(turn);
        }
        tokio::time::timeout(self.shared.limits.timeout, pool.turns.take(bulk)).await.ok()
    }

    /// Sends the request that `make` builds, again and again while it was certainly not processed.
    pub(crate) async fn send(
        &self,
        pool: &Arc<ConnectionPool>,
        mut turn: ConcurrencyPermit<'_>,
        make: impl Fn(Version) -> Request<()> + Send + Sync,
        body: Bytes,
        who: Reputation,
    ) -> Result<PushResponse, ClientError> {
        // The request has the whole timeout, however long it waited before: a message that is cut off in the middle
        // may have been taken.
        let limit = self.shared.limits.timeout;
        let answer = tokio::time::timeout(limit, send_on(pool, &mut turn, make, body, who)).await;
        let answer = answer.unwrap_or(Err(ClientError::Timeout(limit)));
        match &answer {
            Ok(answer) if is_choking(answer.status) => turn.choked(who),
            Ok(answer) if answer.status.is_success() => turn.answered(),
            // A refusal is quick, and says nothing about how long deliveries take.
            Ok(_) | Err(ClientError::Closed) => {}
            Err(_) => turn.choked(who),
        }
        answer
    }

    /// All pools, for the status.
    pub(crate) fn pools(&self) -> Vec<Arc<ConnectionPool>> {
        self.pools.lock().values().flat_map(HashMap::values).cloned().collect()
    }

    /// Closes every connection, and waits for their tasks.
    pub(crate) async fn close(&self) {
        self.shared.drivers.stop.cancel();
        self.pools.lock().clear();
        self.shared.drivers.end().await;
    }
}

/// A request that has given its permit back and is still under way.
struct Overdue<'a>(&'a ConnectionPool);

impl<'a> Overdue<'a> {
    /// Counts one more such request; `None` when there are too many.
    fn enter(pool: &'a ConnectionPool) -> Option<Self> {
        let before = pool.overdue.fetch_add(1, Ordering::Relaxed);
        let overdue = Self(pool);
        (before < pool.most_overdue()).then_some(overdue)
    }
}

impl Drop for Overdue<'_> {
    fn drop(&mut self) {
        self.0.overdue.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Returns true when the answer says that the service is overloaded.
fn is_choking(status: StatusCode) -> bool {
    status == StatusCode::TOO_MANY_REQUESTS
        || status == StatusCode::REQUEST_TIMEOUT
        || status.is_server_error()
}

async fn send_on(
    pool: &Arc<ConnectionPool>,
    turn: &mut ConcurrencyPermit<'_>,
    make: impl Fn(Version) -> Request<()> + Send + Sync,
    body: Bytes,
    who: Reputation,
) -> Result<PushResponse, ClientError> {
    for resends in 0..=RESENDS {
        if resends > AT_ONCE {
            let (first, last) = PAUSES;
            tokio::time::sleep((first * 2_u32.pow(resends - AT_ONCE - 1)).min(last)).await;
        }
        let connection = pool.checkout().await?;
        let request = make(connection.version());
        let answer = pin!(pool.send(connection, request, body.clone()));
        let answer = match who {
            Reputation::Proven => answer.await,
            Reputation::Unproven => patiently(pool, turn, answer).await,
        };
        match answer {
            Ok(answer) => return Ok(answer),
            Err(SendError::NotLookedAt) => {}
            Err(SendError::Unknown(why)) => return Err(ClientError::Broken(why)),
        }
    }
    Err(ClientError::Refused(RESENDS + 1))
}

/// Waits for an answer. When it takes long, the permit is given back: any visitor can bring a subscription that is
/// never answered.
async fn patiently<T>(
    pool: &ConnectionPool,
    turn: &mut ConcurrencyPermit<'_>,
    mut answer: Pin<&mut impl Future<Output = T>>,
) -> T {
    let patience = (pool.turns.usual() * 8).max(PATIENCE);
    if let Ok(answer) = tokio::time::timeout(patience, answer.as_mut()).await {
        return answer;
    }
    let overdue = Overdue::enter(pool);
    if overdue.is_some() {
        turn.give_back();
    }
    answer.await
}

/// Closes connections that have become idle, and removes pools that are not in use.
async fn sweep(pools: Pools) {
    loop {
        tokio::time::sleep(SWEEP).await;
        for pools in pools.lock().values_mut() {
            pools.values().for_each(|pool| pool.sweep());
            pools.retain(|_, pool| Arc::strong_count(pool) > 1 || pool.connections() > 0);
        }
    }
}
