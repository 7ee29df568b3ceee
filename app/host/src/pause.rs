//! Jobs, schedules and what they send rest: in a process that was started with `serve --paused`, and on a store that is a
//! copy of another until an operator says that it takes the other's place. Everything else goes on: requests are answered,
//! and jobs are taken in.
//!
//! | route | what |
//! |---|---|
//! | `POST /resume` | lets them go on; `{"resumed"}` says whether they rested |

use axum::routing::post;
use axum::{Extension, Router};
use perennial_store::pool::sql;
use serde::Serialize;
use tokio::sync::watch;
use tracing::info;

use crate::api::{Json, Result};

/// Why they rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    /// The process was started so.
    Asked,
    /// The store is a copy, and the original may be at work on the same jobs.
    Copy,
}

impl Why {
    /// For operators.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::Asked => "paused: started with --paused; `perennial resume` lets jobs and schedules run",
            Self::Copy => {
                "paused: the store is a copy, and the original may run the same jobs; `perennial resume` lets them run here"
            }
        }
    }
}

/// Whether they rest, for all who start them. A cheap handle.
#[derive(Clone, Debug)]
pub(crate) struct Pause(watch::Sender<Option<Why>>);

impl Pause {
    /// They do, if there is a reason.
    pub(crate) fn new(why: Option<Why>) -> Self {
        Self(watch::Sender::new(why))
    }

    /// Why they rest now.
    pub(crate) fn why(&self) -> Option<Why> {
        *self.0.borrow()
    }

    /// Returns when they rest no more.
    pub(crate) async fn ended(&self) {
        // We hold the sender.
        let _ = self.0.subscribe().wait_for(Option::is_none).await;
    }

    fn end(&self) -> bool {
        self.0.send_replace(None).is_some()
    }
}

/// What lets them go on.
#[derive(Clone)]
struct ResumeAnswer {
    pause: Pause,
    store: sql::Store,
}

/// What was done.
#[derive(Serialize)]
struct Resumed {
    resumed: bool,
}

/// What operators may do about it.
pub(crate) fn admin_write(pause: Pause, store: sql::Store) -> Router {
    Router::new().route("/resume", post(resume)).layer(Extension(ResumeAnswer { pause, store }))
}

async fn resume(Extension(resume): Extension<ResumeAnswer>) -> Result<Json<Resumed>> {
    // First in the store: what goes on now must not rest again at the next boot.
    let was_copy = resume.store.end_copy().await?;
    let rested = resume.pause.end();
    if rested || was_copy {
        info!("jobs and schedules were let go on by an operator");
    }
    Ok(Json(Resumed { resumed: rested || was_copy }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_waits_for_the_end_is_told_also_when_it_is_over() {
        let pause = Pause::new(Some(Why::Copy));
        let waiting = pause.ended();
        assert!(pause.end());
        waiting.await;
        pause.ended().await;
        assert_eq!(pause.why(), None);
        assert!(!pause.end(), "once");
    }
}
