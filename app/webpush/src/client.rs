//! How a request gets through to a push service, over the connections of its lane.
//!
//! A request that a connection gave back unsent, or that the service says it has not looked at (GOAWAY,
//! REFUSED_STREAM), is sent again on another connection: over HTTP/2 that loses nothing and doubles nothing.
//! Over HTTP/1.1 there is one case that nobody can tell apart, a connection that ends just as a request is
//! written to it; it is sent again too. Any other failure may have come after the service took the message;
//! it is reported, and the caller decides.

use std::collections::HashMap;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode, Version};
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::connect::{ConnectError, Connector, HttpVersion};
use crate::lane::{Lane, Room};
use crate::reputation::Reputation;
use crate::service::Service;
use crate::turns::Turn;

/// How much of an answer's body is read, and for how long: error texts are shorter, and nothing else is of
/// interest.
pub(crate) const MAX_ANSWER: usize = 4096;
pub(crate) const BODY: Duration = Duration::from_secs(1);
/// How often a request that was certainly not looked at is sent again, within its time.
const RESENDS: u32 = 20;
/// So many of these at once; then there are pauses, which double from the first to the last.
const AT_ONCE: u32 = 3;
const PAUSES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));
/// The least time after which a message to an unproven subscription lets others have its turn.
const PATIENCE: Duration = Duration::from_millis(100);
/// How often connections that have become idle are closed.
const SWEEP: Duration = Duration::from_secs(15);

/// How many connections, and how much on each.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// HTTP/2 connections to one service.
    pub(crate) connections: usize,
    /// Requests at once on one HTTP/2 connection; the service may allow fewer.
    pub(crate) streams: usize,
    /// HTTP/1.1 connections to one service.
    pub(crate) http1_connections: usize,
    /// Between two connections to one service.
    pub(crate) connect_every: Duration,
    /// From a turn to the end of the answer; and as long for the turn.
    pub(crate) timeout: Duration,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    #[error(transparent)]
    Connect(#[from] Arc<ConnectError>),
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("the connection failed: {0}")]
    Broken(String),
    #[error("the service gave the request back {0} times")]
    Refused(u32),
    #[error("the sender is closed")]
    Closed,
}

/// Why a connection has no answer.
#[derive(Debug)]
pub(crate) enum SendError {
    /// The service has certainly not processed it.
    NotLookedAt,
    /// It may have.
    Unknown(String),
}

/// An answer, and as much of its body as was read.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// What all lanes of a runtime need.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) connector: Arc<Connector>,
    pub(crate) limits: Limits,
    pub(crate) drivers: Drivers,
    pub(crate) rooms: Rooms,
}

impl Shared {
    /// The right to open one more connection.
    pub(crate) fn room(&self, is_listed: bool) -> Result<Room, ConnectError> {
        let take =
            |from: &Arc<Semaphore>| Arc::clone(from).try_acquire_owned().map_err(|_| ConnectError::TooMany);
        let unlisted = if is_listed { None } else { Some(take(&self.rooms.unlisted)?) };
        Ok(Room { _all: take(&self.rooms.all)?, _unlisted: unlisted })
    }
}

/// How many connections there may be in the process; services that the settings do not name have half of them.
#[derive(Clone, Debug)]
pub(crate) struct Rooms {
    all: Arc<Semaphore>,
    unlisted: Arc<Semaphore>,
}

impl Rooms {
    pub(crate) fn new(count: usize) -> Self {
        Self { all: Arc::new(Semaphore::new(count)), unlisted: Arc::new(Semaphore::new(count.div_ceil(2))) }
    }
}

/// The lanes to all push services.
#[derive(Debug)]
pub(crate) struct Client {
    shared: Arc<Shared>,
    lanes: Lanes,
}

type Lanes = Arc<Mutex<HashMap<HttpVersion, HashMap<String, Arc<Lane>>>>>;

impl Client {
    pub(crate) fn new(connector: Arc<Connector>, limits: Limits, rooms: Rooms) -> Self {
        let shared = Shared { connector, limits, drivers: Drivers::default(), rooms };
        Self { shared: Arc::new(shared), lanes: Lanes::default() }
    }

    /// The lane to a service, by its origin's name.
    pub(crate) fn lane(
        &self,
        origin: &str,
        asked: HttpVersion,
        service: impl FnOnce() -> Option<Arc<Service>>,
    ) -> Option<Arc<Lane>> {
        let http = self.shared.connector.offered(asked);
        let mut all = self.lanes.lock();
        if all.is_empty() {
            self.shared.drivers.spawn(sweep(Arc::clone(&self.lanes)));
        }
        let lanes = all.entry(http).or_default();
        if let Some(lane) = lanes.get(origin) {
            return Some(Arc::clone(lane));
        }
        let lane = Lane::new(service()?, http, Arc::clone(&self.shared));
        lanes.insert(origin.to_owned(), Arc::clone(&lane));
        Some(lane)
    }

    /// Waits for the right to send one message; none when it takes too long.
    pub(crate) async fn turn<'a>(&self, lane: &'a Lane, bulk: bool) -> Option<Turn<'a>> {
        if let Some(turn) = lane.turns.take_at_once(bulk) {
            return Some(turn);
        }
        tokio::time::timeout(self.shared.limits.timeout, lane.turns.take(bulk)).await.ok()
    }

    /// Sends what `make` makes, as often as it takes to have it looked at once.
    pub(crate) async fn send(
        &self,
        lane: &Arc<Lane>,
        mut turn: Turn<'_>,
        make: impl Fn(Version) -> Request<()> + Send + Sync,
        body: Bytes,
        who: Reputation,
    ) -> Result<Answer, ClientError> {
        // Its own time, however long it has waited: what is cut off in the middle may have been taken.
        let limit = self.shared.limits.timeout;
        let answer = tokio::time::timeout(limit, send_on(lane, &mut turn, make, body, who)).await;
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

    /// All lanes, for those who look.
    pub(crate) fn lanes(&self) -> Vec<Arc<Lane>> {
        self.lanes.lock().values().flat_map(HashMap::values).cloned().collect()
    }

    /// Ends every connection.
    pub(crate) async fn close(&self) {
        self.shared.drivers.stop.cancel();
        self.lanes.lock().clear();
        self.shared.drivers.end().await;
    }
}

/// A request that has given its turn to others and is still under way.
struct Overdue<'a>(&'a Lane);

impl<'a> Overdue<'a> {
    /// None when there are too many.
    fn enter(lane: &'a Lane) -> Option<Self> {
        let before = lane.overdue.fetch_add(1, Ordering::Relaxed);
        let overdue = Self(lane);
        (before < lane.most_overdue()).then_some(overdue)
    }
}

impl Drop for Overdue<'_> {
    fn drop(&mut self) {
        self.0.overdue.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether an answer says that it is too much.
fn is_choking(status: StatusCode) -> bool {
    status == StatusCode::TOO_MANY_REQUESTS
        || status == StatusCode::REQUEST_TIMEOUT
        || status.is_server_error()
}

async fn send_on(
    lane: &Arc<Lane>,
    turn: &mut Turn<'_>,
    make: impl Fn(Version) -> Request<()> + Send + Sync,
    body: Bytes,
    who: Reputation,
) -> Result<Answer, ClientError> {
    for resends in 0..=RESENDS {
        if resends > AT_ONCE {
            let (first, last) = PAUSES;
            tokio::time::sleep((first * 2_u32.pow(resends - AT_ONCE - 1)).min(last)).await;
        }
        let connection = lane.checkout().await?;
        let request = make(connection.version());
        let answer = pin!(lane.send(connection, request, body.clone()));
        let answer = match who {
            Reputation::Proven => answer.await,
            Reputation::Unproven => patiently(lane, turn, answer).await,
        };
        match answer {
            Ok(answer) => return Ok(answer),
            Err(SendError::NotLookedAt) => {}
            Err(SendError::Unknown(why)) => return Err(ClientError::Broken(why)),
        }
    }
    Err(ClientError::Refused(RESENDS + 1))
}

/// Waits for an answer; one that takes long lets others have the turn. Anybody can bring a subscription that is never answered.
async fn patiently<T>(lane: &Lane, turn: &mut Turn<'_>, mut answer: Pin<&mut impl Future<Output = T>>) -> T {
    let patience = (lane.turns.usual() * 8).max(PATIENCE);
    if let Ok(answer) = tokio::time::timeout(patience, answer.as_mut()).await {
        return answer;
    }
    let overdue = Overdue::enter(lane);
    if overdue.is_some() {
        turn.give_back();
    }
    answer.await
}

/// Closes connections that have become idle, and forgets lanes that nobody uses.
async fn sweep(lanes: Lanes) {
    loop {
        tokio::time::sleep(SWEEP).await;
        for lanes in lanes.lock().values_mut() {
            lanes.values().for_each(|lane| lane.sweep());
            lanes.retain(|_, lane| Arc::strong_count(lane) > 1 || lane.connections() > 0);
        }
    }
}

/// The tasks that move the bytes of connections. They end with the client.
#[derive(Clone, Debug, Default)]
pub(crate) struct Drivers {
    running: TaskTracker,
    stop: CancellationToken,
}

impl Drivers {
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.running.spawn(self.stop.clone().run_until_cancelled_owned(task));
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stop.is_cancelled()
    }

    async fn end(&self) {
        self.running.close();
        self.running.wait().await;
    }
}
