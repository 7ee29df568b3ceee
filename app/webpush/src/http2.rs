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

/// A connection that carries requests and is silent for this long gets a ping, and has as long to answer it. Idle
/// connections get none: services answer that with GOAWAY `ENHANCE_YOUR_CALM`.
const PING: Duration = Duration::from_secs(20);
/// Maximum size of the headers of an answer, in bytes.
const MAX_HEADERS: u32 = 16 * 1024;
/// Number of requests at once before the service has announced its own limit.
const STREAMS_AT_FIRST: usize = 100;

/// One HTTP/2 connection, which carries many requests at once.
#[derive(Debug)]
pub(crate) struct Http2 {
    sender: Mutex<SendRequest<Bytes>>,
    chosen: Option<ChosenAddress>,
    _room: Room,
    in_flight: AtomicUsize,
    answers: AtomicU64,
    /// Number of requests at once that the service allows.
    streams: AtomicUsize,
    last_used: Mutex<Instant>,
    /// True when the connection must not be used any more: it has ended, is about to end, or swallows requests.
    over: AtomicBool,
}

impl Http2 {
    /// Starts HTTP/2 on a connection, whose task runs in `drivers`.
    ///
    /// # Errors
    /// The reason of the failure, as text.
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
        // GOAWAY is an orderly end and no fault of the address.
        let in_order = matches!(&end, Ended(error) if error.is_go_away());
        if !in_order && let Some(chosen) = &self.chosen {
            chosen.fails(Instant::now());
        }
    }

    /// Number of requests under way.
    pub(crate) fn load(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Number of requests at once that both the service and `ours` allow: at least one.
    pub(crate) fn room(&self, ours: usize) -> usize {
        ours.min(self.streams.load(Ordering::Relaxed)).max(1)
    }

    /// Returns true when the connection has answered a request.
    pub(crate) fn has_answered(&self) -> bool {
        self.answers.load(Ordering::Relaxed) > 0
    }

    /// Returns true when requests may be sent on the connection.
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
                // The connection is going away: the other connections are asked first.
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
        // An error is an answer, too: the connection itself notices when it is over.
        in_flight.answered = true;
        let response = sent?;
        self.answers.fetch_add(1, Ordering::Relaxed);
        Ok(read(response).await)
    }
}

/// Reason why a connection is over.
#[derive(Debug)]
enum End {
    /// The peer answers no ping.
    Silent,
    /// The connection has ended with this error.
    Ended(h2::Error),
}
use End::{Ended, Silent};

/// A request under way.
struct OpenStream<'a> {
    connection: &'a Http2,
    answered: bool,
    /// Number of answers on the connection when the request began.
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
            // No other request was answered meanwhile: the connection may swallow those, too.
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

/// Reads an answer and the beginning of its body.
async fn read(response: Response<RecvStream>) -> PushResponse {
    let (parts, body) = response.into_parts();
    let (status, headers) = (parts.status, parts.headers);
    if body.is_end_stream() {
        return PushResponse { status, headers, body: Bytes::new() };
    }
    // The status decides. A body that breaks off or never ends does not change it.
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

/// Tells a request that was certainly not processed (RFC 9113, sections 6.8 and 8.7) from one that may have been.
fn classify(error: &h2::Error) -> SendError {
    // h2 fails a stream with GOAWAY only when its id is above the last one that was processed.
    let unprocessed =
        error.is_remote() && error.is_go_away() || error.reason() == Some(Reason::REFUSED_STREAM);
    if unprocessed { SendError::NotLookedAt } else { SendError::Unknown(error.to_string()) }
}
