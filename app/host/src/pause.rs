//! The pause of jobs, of schedules, and so of sending. It holds in a process that was started with `serve --paused`,
//! and on a store that is a copy of another, until an operator says that the copy takes the place of the original.
//! Everything else goes on: requests are answered, and jobs are accepted.
//!
//! | route | what |
//! |---|---|
//! | `POST /resume` | ends the pause; `{"resumed"}` says whether there was one |

use axum::routing::post;
use axum::{Extension, Router};
use perennial_store::pool::sql;
use serde::Serialize;
use tokio::sync::watch;
use tracing::info;

use crate::api::{Json, Result};

/// Reason of a pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    /// The process was started with `--paused`.
    Asked,
    /// The store is a copy, and the original may be at work on the same jobs.
    Copy,
}

impl Why {
    /// The reason as a text for operators.
    pub(crate) fn reason(self) -> String {
        let program = crate::program_name();
        match self {
            Self::Asked => {
                format!("paused: started with --paused; `{program} resume` lets jobs and schedules run")
            }
            Self::Copy => format!(
                "paused: the store is a copy, and the original may run the same jobs; `{program} resume` lets them run here"
            ),
        }
    }
}

/// The pause of a process, for the parts that start jobs and schedules. A cheap handle.
#[derive(Clone, Debug)]
pub(crate) struct Pause(watch::Sender<Option<Why>>);

impl Pause {
    /// Makes a pause, which holds if there is a reason.
    pub(crate) fn new(why: Option<Why>) -> Self {
        Self(watch::Sender::new(why))
    }

    /// Reason of the pause, as long as it holds.
    pub(crate) fn why(&self) -> Option<Why> {
        *self.0.borrow()
    }

    /// Returns when the pause has ended.
    pub(crate) async fn ended(&self) {
        // The sender is held here, so the wait cannot fail.
        let _ = self.0.subscribe().wait_for(Option::is_none).await;
    }

    fn end(&self) -> bool {
        self.0.send_replace(None).is_some()
    }
}

/// State of the route.
#[derive(Clone)]
struct ResumeAnswer {
    pause: Pause,
    store: sql::Store,
}

/// Answer of the route.
#[derive(Serialize)]
struct Resumed {
    resumed: bool,
}

/// Route with which operators end the pause.
pub(crate) fn admin_write(pause: Pause, store: sql::Store) -> Router {
    Router::new().route("/resume", post(resume)).layer(Extension(ResumeAnswer { pause, store }))
}

async fn resume(Extension(resume): Extension<ResumeAnswer>) -> Result<Json<Resumed>> {
    // The store comes first, so that jobs that go on now are not paused again at the next boot.
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
