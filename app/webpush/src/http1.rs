//! One HTTP/1.1 connection: one request at a time.

use std::time::Instant;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Request, Response, header};
use http_body::Body as _;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::time::timeout;
use tracing::debug;

use crate::addresses::ChosenAddress;
use crate::connect::Connected;
use crate::wire::{BODY, Drivers, IDLE, MAX_ANSWER, PushResponse, Room, SendError};

/// An HTTP/1.1 connection between two requests.
#[derive(Debug)]
pub(crate) struct Http1 {
    sender: SendRequest<Full<Bytes>>,
    chosen: Option<ChosenAddress>,
    _room: Room,
    /// True when the connection has carried a request.
    pub(crate) used: bool,
    since: Instant,
}

/// Outcome of a request, and the connection when it can carry another one.
pub(crate) struct Http1Sent {
    pub(crate) answer: Result<PushResponse, SendError>,
    pub(crate) connection: Option<Http1>,
    /// True when the service closed the connection without notice: it may have closed others.
    pub(crate) closed: bool,
}

impl Http1 {
    /// Starts HTTP/1.1 on a connection, whose task runs in `drivers`.
    ///
    /// # Errors
    /// The reason of the failure, as text.
    pub(crate) async fn open(connected: Connected, room: Room, drivers: &Drivers) -> Result<Self, String> {
        let (sender, connection) =
            handshake(TokioIo::new(connected.stream)).await.map_err(|error| error.to_string())?;
        drivers.spawn(async move {
            if let Err(error) = connection.await {
                debug!(%error, "a connection to a push service ended with an error");
            }
        });
        Ok(Self { sender, chosen: connected.chosen, _room: room, used: false, since: Instant::now() })
    }

    /// Returns true when a request may be sent on the connection.
    pub(crate) fn is_usable(&self) -> bool {
        !self.sender.is_closed() && self.since.elapsed() < IDLE
    }

    /// Sends one request, and reads the answer.
    pub(crate) async fn send(mut self, request: Request<()>, body: Bytes) -> Http1Sent {
        let lost = |answer, closed| Http1Sent { answer, connection: None, closed };
        // A new connection is ready once its task has run; one that was closed meanwhile never is.
        if self.sender.ready().await.is_err() {
            return lost(Err(SendError::NotLookedAt), false);
        }
        let response = match self.sender.try_send_request(request.map(|()| Full::new(body))).await {
            Ok(response) => response,
            Err(error) if error.message().is_some() => return lost(Err(SendError::NotLookedAt), false),
            // The service closed the idle connection while our request was on the way.
            Err(error) if self.used && error.error().is_incomplete_message() => {
                return lost(Err(SendError::NotLookedAt), true);
            }
            Err(error) => {
                if let Some(chosen) = &self.chosen {
                    chosen.fails(Instant::now());
                }
                return lost(Err(SendError::Unknown(chain(error.error()))), false);
            }
        };
        let closing = is_closing(response.headers());
        let (answer, is_whole) = read(response).await;
        let answer = Ok(answer);
        if closing || !is_whole || self.sender.ready().await.is_err() {
            return lost(answer, false);
        }
        Http1Sent {
            answer,
            connection: Some(Self { used: true, since: Instant::now(), ..self }),
            closed: false,
        }
    }
}

/// Returns true for the last answer on a connection, which may look usable until its end arrives.
fn is_closing(headers: &HeaderMap) -> bool {
    let options = headers.get_all(header::CONNECTION).iter();
    options
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|option| option.trim().eq_ignore_ascii_case("close"))
}

/// Reads an answer and the beginning of its body. Returns true when the body was read to its end: otherwise the
/// connection cannot be used again.
async fn read(response: Response<Incoming>) -> (PushResponse, bool) {
    let (parts, body) = response.into_parts();
    // The status decides. A body that breaks off or never ends does not change it, and its beginning is kept.
    let mut beginning = BytesMut::new();
    let is_whole = timeout(BODY, read_body(body, &mut beginning)).await.unwrap_or(false);
    (PushResponse { status: parts.status, headers: parts.headers, body: beginning.freeze() }, is_whole)
}

async fn read_body(mut body: Incoming, read: &mut BytesMut) -> bool {
    loop {
        match body.frame().await {
            None => return true,
            Some(Err(error)) => {
                debug!(%error, "the answer's body was not read to its end");
                return false;
            }
            Some(Ok(frame)) => {
                let Ok(bytes) = frame.into_data() else { continue };
                read.extend_from_slice(&bytes[..bytes.len().min(MAX_ANSWER - read.len())]);
                if read.len() >= MAX_ANSWER {
                    return body.is_end_stream();
                }
            }
        }
    }
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
