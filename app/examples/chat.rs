//! An example application with long connections: members talk by WebSocket, others only listen, by server-sent events. At a
//! stop, both are told at once, so that they connect to another process, and nothing keeps the drain waiting.
//!
//! `cargo run --example chat --no-default-features`, then `websocat ws://127.0.0.1:8080/chat` in two terminals, and
//! `curl -N http://127.0.0.1:8080/listen`.

use std::convert::Infallible;
use std::process::ExitCode;

use perennial::anyhow;
use perennial::axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use perennial::axum::response::IntoResponse;
use perennial::axum::response::sse::{Event, KeepAlive, Sse};
use perennial::futures_util::stream;
use perennial::prelude::*;
use perennial::tokio::sync::broadcast::{self, Receiver, Sender, error::RecvError};

/// Messages that wait for a slow member, who loses older ones.
const WAITING: usize = 256;
/// Longest message, in bytes.
const LONGEST: usize = 2000;

struct Chat;

/// The room: what is said in this process. With several, a Redis of [`Module::POOLS`] would carry it between them.
#[derive(Clone)]
struct Room {
    said: Sender<String>,
    drain: Drain,
}

impl Module for Chat {
    const NAME: &'static str = "chat";

    fn configure(_: &mut Reader<'_>) -> Self {
        Self
    }

    async fn mount(self, host: &mut Host) -> anyhow::Result<()> {
        let room = Room { said: broadcast::channel(WAITING).0, drain: host.drain.clone() };
        host.routes(Router::new().route("/chat", get(join)).route("/listen", get(listen)).with_state(room));
        Ok(())
    }
}

async fn join(State(room): State<Room>, upgrade: WebSocketUpgrade) -> impl IntoResponse {
    upgrade.max_message_size(LONGEST).on_upgrade(|socket| talk(socket, room))
}

/// Talks with one member, until they leave or the process stops.
async fn talk(mut socket: WebSocket, room: Room) {
    let mut heard = room.said.subscribe();
    loop {
        perennial::tokio::select! {
            message = socket.recv() => match message {
                Some(Ok(Message::Text(text))) => _ = room.said.send(text.to_string()),
                Some(Ok(Message::Close(_)) | Err(_)) | None => return,
                Some(Ok(_)) => {}
            },
            said = next(&mut heard) => {
                if socket.send(Message::Text(said.into())).await.is_err() {
                    return;
                }
            }
            () = room.drain.soft() => {
                let reason = CloseFrame { code: close_code::AWAY, reason: "come back".into() };
                return drop(socket.send(Message::Close(Some(reason))).await);
            }
        }
    }
}

/// The next message. A member who is too slow is told how many are missing.
async fn next(heard: &mut Receiver<String>) -> String {
    match heard.recv().await {
        Ok(said) => said,
        Err(RecvError::Lagged(missing)) => format!("({missing} messages are missing)"),
        Err(RecvError::Closed) => std::future::pending().await,
    }
}

async fn listen(State(room): State<Room>) -> impl IntoResponse {
    let events = stream::unfold((room.said.subscribe(), room.drain), |(mut heard, drain)| async {
        perennial::tokio::select! {
            said = next(&mut heard) => Some((Ok::<_, Infallible>(Event::default().data(said)), (heard, drain))),
            () = drain.soft() => None,
        }
    });
    Sse::new(events).keep_alive(KeepAlive::default())
}

fn main() -> ExitCode {
    Perennial::new().name("chat").host::<Chat>().main()
}
