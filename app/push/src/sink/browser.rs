//! A browser's connection: the WebSocket protocol between Firefox and its push service.
//!
//! A Firefox uses this service with these preferences: `dom.push.serverURL` = `ws://127.0.0.1:8444/`,
//! `dom.push.testing.allowInsecureServerURL` = true, `dom.push.connection.enabled` = true.
//!
//! ```text
//! browser                                        service
//! {"messageType":"hello", uaid?}           ──►
//!                                          ◄──   {"messageType":"hello", uaid, status: 200, use_webpush: true}
//! {"messageType":"register", channelID, key} ──►
//!                                          ◄──   {"messageType":"register", channelID, status, pushEndpoint}
//!                                          ◄──   {"messageType":"notification", channelID, version, data, headers}
//! {"messageType":"ack", updates}           ──►
//! ```

use std::pin::pin;
use std::sync::Arc;

use axum::extract::State;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tracing::debug;
use uuid::Uuid;

use super::{Owner, Sink};

/// Maximum number of messages that wait for a browser.
const QUEUE: usize = 256;
/// The longest message from a browser, in bytes.
const MAX_MESSAGE: usize = 64 * 1024;

/// A message on its way to a browser.
#[derive(Clone, Debug)]
pub(super) struct Notice {
    pub(super) channel: String,
    pub(super) body: Bytes,
}

pub(super) async fn connect(State(sink): State<Sink>, upgrade: WebSocketUpgrade) -> Response {
    upgrade
        .protocols(["push-notification"])
        .max_message_size(MAX_MESSAGE)
        .on_upgrade(move |socket| BrowserConnection::new(sink).serve(socket))
}

struct BrowserConnection {
    sink: Sink,
    to: mpsc::Sender<Notice>,
    notices: mpsc::Receiver<Notice>,
    /// The channels that were registered here, with their endpoints.
    channels: Vec<(String, String)>,
}

impl BrowserConnection {
    fn new(sink: Sink) -> Self {
        let (to, notices) = mpsc::channel(QUEUE);
        Self { sink, to, notices, channels: Vec::new() }
    }

    async fn serve(mut self, mut socket: WebSocket) {
        let shared = Arc::clone(&self.sink.0);
        let mut disconnect = pin!(shared.disconnect.notified());
        loop {
            let reply = tokio::select! {
                message = socket.recv() => match message {
                    Some(Ok(Message::Text(text))) => self.answer(&text),
                    Some(Ok(Message::Close(_)) | Err(_)) | None => break,
                    Some(Ok(_)) => None,
                },
                Some(notice) = self.notices.recv() => Some(notification(&notice)),
                () = &mut disconnect => break,
            };
            if let Some(reply) = reply
                && socket.send(Message::text(reply.to_string())).await.is_err()
            {
                break;
            }
        }
        // Real services keep messages for a browser that is away; this one forgets it.
        for (_, endpoint) in &self.channels {
            self.sink.end(endpoint);
        }
    }

    fn answer(&mut self, text: &str) -> Option<Value> {
        let message: Value = serde_json::from_str(text).unwrap_or_default();
        debug!(%message, "from a browser");
        let channel = message["channelID"].as_str().unwrap_or_default();
        match message["messageType"].as_str() {
            Some("hello") => Some(json!({
                "messageType": "hello",
                "status": 200,
                "uaid": Uuid::now_v7().simple().to_string(),
                "use_webpush": true,
                "broadcasts": {},
            })),
            Some("register") => {
                let vapid_key = message["key"].as_str().and_then(perennial_webpush::decode_base64);
                let owner = Owner::Browser { channel: channel.to_owned(), to: self.to.clone() };
                let endpoint = self.sink.register(owner, vapid_key);
                self.channels.push((channel.to_owned(), endpoint.clone()));
                Some(json!({
                    "messageType": "register",
                    "channelID": channel,
                    "status": 200,
                    "pushEndpoint": endpoint,
                }))
            }
            Some("unregister") => {
                let gone = self.channels.iter().position(|(known, _)| known == channel);
                if let Some((_, endpoint)) = gone.map(|index| self.channels.swap_remove(index)) {
                    self.sink.end(&endpoint);
                }
                Some(json!({ "messageType": "unregister", "channelID": channel, "status": 200 }))
            }
            // An empty object asks whether the service is alive.
            None if message.as_object().is_some_and(serde_json::Map::is_empty) => Some(json!({})),
            // ack, nack, broadcast_subscribe: nothing to answer.
            _ => None,
        }
    }
}

fn notification(notice: &Notice) -> Value {
    let mut message = json!({
        "messageType": "notification",
        "channelID": notice.channel,
        "version": Uuid::now_v7().to_string(),
    });
    if !notice.body.is_empty() {
        message["data"] = URL_SAFE_NO_PAD.encode(&notice.body).into();
        message["headers"] = json!({ "encoding": "aes128gcm" });
    }
    message
}
