//! One HTTP/2 connection: many requests at once.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use h2::client::SendRequest;
use h2::{Ping, PingPong, Reason, RecvStream};
use http::{Request, Response};
use parking_lot::Mutex;
use tokio::time::{sleep, timeout};
use tracing::debug;

use crate::addresses::ChosenAddress;
use crate::connect::Connected;
use crate::wire::{BODY, Drivers, IDLE, MAX_ANSWER, PushResponse, Room, SendError};

/// A connection that carries requests and is silent for this long is asked whether it lives, and has as long
/// to answer. Pings on idle connections are answered with GOAWAY `ENHANCE_YOUR_CALM`.
const PING: Duration = Duration::from_secs(20);
/// The most bytes of headers in an answer.
const MAX_HEADERS: u32 = 16 * 1024;
/// How many requests at once before the service has said how many it allows.
const STREAMS_AT_FIRST: usize = 100;

/// See the module.
#[derive(Debug)]
pub(crate) struct Http2 {
    sender: Mutex<SendRequest<Bytes>>,
    chosen: Option<ChosenAddress>,
    _room: Room,
    in_flight: AtomicUsize,
    answers: AtomicU64,
    /// How many requests at once the service allows.
    streams: AtomicUsize,
    last_used: Mutex<Instant>,
    /// It must not be used any more: it has ended, is about to, or swallows requests.
    over: AtomicBool,
}

impl Http2 {
    /// Begins to speak HTTP/2. The connection's task runs among `drivers`.
    ///
    /// # Errors
    /// Why that failed, in words.
    pub(crate) async fn open(
        connected: Connected,
        room: Room,
        drivers: &Drivers,
    ) -> Result<Arc<Self>, String> {
        let Connected { stream, chosen, .. } = connected;
        let handshake = h2::client::Builder::new()
            .enable_push(false)
            .max_header_list_size(MAX_HEADERS)
            .initial_max_send_streams(STREAMS_AT_FIRST)
            .handshake(stream)
            .await;
        let (sender, mut connection) = handshake.map_err(|error| error.to_string())?;
        let http2 = Arc::new(Self {
            sender: Mutex::new(sender),
            chosen,
            _room: room,
            in_flight: AtomicUsize::new(0),
            answers: AtomicU64::new(0),
            streams: AtomicUsize::new(connection.max_concurrent_send_streams()),
            last_used: Mutex::new(Instant::now()),
            over: AtomicBool::new(false),
        });
        let told = Arc::downgrade(&http2);
        let pings = connection.ping_pong();
        drivers.spawn(async move {
            let mut watch = pin!(watch(pings, told.clone()));
            let ended = poll_fn(|context| {
                if watch.as_mut().poll(context).is_ready() {
                    return Poll::Ready(Err(Silent));
                }
                let ended = Pin::new(&mut connection).poll(context);
                if let Some(told) = told.upgrade() {
                    told.streams.store(connection.max_concurrent_send_streams(), Ordering::Relaxed);
                }
                ended.map_err(Ended)
            })
            .await;
            if let Some(told) = told.upgrade() {
                told.ended(ended);
            }
        });
        Ok(http2)
    }

    fn ended(&self, ended: Result<(), End>) {
        self.over.store(true, Ordering::Relaxed);
        let Err(end) = ended else { return };
        debug!(?end, "a connection to a push service ended with an error");
        // A service that goes away in order is well.
        let in_order = matches!(&end, Ended(error) if error.is_go_away());
        if !in_order && let Some(chosen) = &self.chosen {
            chosen.fails(Instant::now());
        }
    }

    /// How many requests are under way.
    pub(crate) fn load(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// How many requests at once the service allows, and we do.
    pub(crate) fn room(&self, ours: usize) -> usize {
        ours.min(self.streams.load(Ordering::Relaxed)).max(1)
    }

    /// Whether it was of any use.
    pub(crate) fn has_answered(&self) -> bool {
        self.answers.load(Ordering::Relaxed) > 0
    }

    /// Whether requests may be sent on it.
    pub(crate) fn is_usable(&self) -> bool {
        let forgotten = self.load() == 0 && self.last_used.lock().elapsed() > IDLE;
        !self.over.load(Ordering::Relaxed) && !forgotten
    }

    /// Sends one request, and reads the answer.
    pub(crate) async fn send(
        self: Arc<Self>,
        request: Request<()>,
        body: Bytes,
    ) -> Result<PushResponse, SendError> {
        let mut in_flight = OpenStream::on(&self);
        let mut sender = self.sender.lock().clone();
        let sent = async {
            let over = |_| {
                // It is going away: the others are asked first.
                self.over.store(true, Ordering::Relaxed);
                SendError::NotLookedAt
            };
            poll_fn(|context| sender.poll_ready(context)).await.map_err(over)?;
            let (response, mut stream) = sender.send_request(request, body.is_empty()).map_err(over)?;
            if !body.is_empty() {
                // If this fails, the answer says why.
                let _ = stream.send_data(body, true);
            }
            response.await.map_err(|error| {
                if error.is_go_away() {
                    self.over.store(true, Ordering::Relaxed);
                }
                classify(&error)
            })
        };
        let sent = sent.await;
        // Also an error is an answer: the connection itself knows how it is.
        in_flight.answered = true;
        let response = sent?;
        self.answers.fetch_add(1, Ordering::Relaxed);
        Ok(read(response).await)
    }
}

/// Why a connection is over.
#[derive(Debug)]
enum End {
    /// It answers no ping.
    Silent,
    /// It says so.
    Ended(h2::Error),
}
use End::{Ended, Silent};

/// A request under way.
struct OpenStream<'a> {
    connection: &'a Http2,
    answered: bool,
    /// How many answers there were when it began.
    before: u64,
}

impl<'a> OpenStream<'a> {
    fn on(connection: &'a Http2) -> Self {
        connection.in_flight.fetch_add(1, Ordering::Relaxed);
        Self { connection, answered: false, before: connection.answers.load(Ordering::Relaxed) }
    }
}

impl Drop for OpenStream<'_> {
    fn drop(&mut self) {
        let connection = self.connection;
        if !self.answered && connection.answers.load(Ordering::Relaxed) == self.before {
            // What swallowed this request may swallow others: nothing else was answered meanwhile.
            connection.over.store(true, Ordering::Relaxed);
        }
        if connection.in_flight.fetch_sub(1, Ordering::Relaxed) == 1 {
            *connection.last_used.lock() = Instant::now();
        }
    }
}

/// Returns when the connection is dead: it carries requests, is silent, and answers no ping.
async fn watch(pings: Option<PingPong>, connection: Weak<Http2>) {
    let Some(mut pings) = pings else { return std::future::pending().await };
    let mut before = 0;
    loop {
        sleep(PING).await;
        let Some(connection) = connection.upgrade() else { return std::future::pending().await };
        let answers = connection.answers.load(Ordering::Relaxed);
        let waits = connection.load() > 0;
        drop(connection);
        if waits && answers == before && !matches!(timeout(PING, pings.ping(Ping::opaque())).await, Ok(Ok(_)))
        {
            return;
        }
        before = answers;
    }
}

/// Reads an answer, and as much of its body as comes at once.
async fn read(response: Response<RecvStream>) -> PushResponse {
    let (parts, body) = response.into_parts();
    let (status, headers) = (parts.status, parts.headers);
    if body.is_end_stream() {
        return PushResponse { status, headers, body: Bytes::new() };
    }
    // The status decides; a body that breaks off or never ends takes nothing away from it.
    let mut beginning = BytesMut::new();
    let _ = timeout(BODY, read_body(body, &mut beginning)).await;
    PushResponse { status, headers, body: beginning.freeze() }
}

async fn read_body(mut body: RecvStream, read: &mut BytesMut) {
    while read.len() < MAX_ANSWER
        && let Some(Ok(bytes)) = body.data().await
    {
        let _ = body.flow_control().release_capacity(bytes.len());
        read.extend_from_slice(&bytes[..bytes.len().min(MAX_ANSWER - read.len())]);
    }
}

/// Tells what was certainly not processed (RFC 9113, sections 6.8 and 8.7) from what may have been.
fn classify(error: &h2::Error) -> SendError {
    // h2 fails a stream with GOAWAY only when its id is above the last one that was processed.
    let unprocessed =
        error.is_remote() && error.is_go_away() || error.reason() == Some(Reason::REFUSED_STREAM);
    if unprocessed { SendError::NotLookedAt } else { SendError::Unknown(error.to_string()) }
}
