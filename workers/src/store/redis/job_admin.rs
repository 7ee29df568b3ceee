//! The job admin of Redis.

use std::time::Duration;

use perennial_store::pool::redis::client::cmd;
use uuid::Uuid;

use super::{AT_ONCE, Header, JobEntry, JobRecord, KeptJob, RedisQueue, due_of, read_state, write_state};
use crate::encoding::{from_json, json, millis, read_json, timestamp};
use crate::job::UniqueUntil;
use crate::job_admin::{Cancelled, JobAdmin, JobFilter, JobView, STEP};
use crate::queue::{Due, Result};
use crate::state::{Attempts, State};

/// Number of ids that one query looks at.
const SCAN: usize = 1000;

/// A job as `view.lua` returns it: where it is, its score, its record, its failures and errors, epoch,
/// worker, progress, and why it was cancelled.
type Seen =
    (String, String, String, Option<String>, Option<String>, Option<String>, Option<String>, Option<String>);

impl JobAdmin for RedisQueue {
    async fn list(&self, filter: JobFilter, cursor: Option<Uuid>, limit: usize) -> Result<Vec<JobView>> {
        let mut found = Vec::new();
        for queue in self.queues_of(&filter).await? {
            let mut ids = Vec::new();
            for (state, part) in [
                (State::Ready, "ready"),
                (State::Scheduled, "scheduled"),
                (State::Running, "leases"),
                (State::Dead, "ended_at"),
            ] {
                let wanted = filter.state.is_none_or(|wanted| {
                    wanted == state || (wanted == State::Cancelled && state == State::Dead)
                });
                if wanted {
                    ids.extend(self.scan(&queue, part).await?);
                }
            }
            ids.retain(|id| {
                cursor.is_none_or(|cursor| *id > cursor) && filter.id.is_none_or(|wanted| *id == wanted)
            });
            ids.sort();
            ids.dedup();
            let mut of_queue = 0;
            for some in ids.chunks(AT_ONCE) {
                for view in self.views(&queue, some).await? {
                    if of_queue < limit && fits(&filter, &view) {
                        of_queue += 1;
                        found.push(JobView { payload: None, ..view });
                    }
                }
                if of_queue == limit {
                    break;
                }
            }
        }
        found.sort_by_key(|view| view.id);
        found.truncate(limit);
        Ok(found)
    }

    async fn show(&self, id: Uuid) -> Result<Option<JobView>> {
        for queue in self.queues().await? {
            if let Some(view) = self.views(&queue, &[id]).await?.pop() {
                return Ok(Some(view));
            }
        }
        Ok(None)
    }

    async fn retry(&self, filter: JobFilter) -> Result<usize> {
        let mut revived = 0;
        for queue in self.queues_of(&filter).await? {
            let ended = self.ended_of(&queue, &filter, STEP - revived).await?;
            if ended.is_empty() {
                continue;
            }
            let mut script = self.on(&self.0.scripts.enqueue, &queue);
            script.arg(self.channel()).arg(&queue);
            for (id, kept) in &ended {
                let header = Header {
                    kind: kept.kind.clone(),
                    created_at: kept.created_at.as_millisecond(),
                    trace: kept.trace.clone(),
                    unique: None,
                };
                let entry = JobEntry {
                    id: *id,
                    record: JobRecord { priority: kept.priority, header, payload: kept.payload.clone() },
                    due: Due::Now,
                    state: write_state(Attempts::default(), &kept.errors),
                    until: UniqueUntil::Ended,
                    last_epoch: Some(kept.epoch),
                };
                entry.push(&mut script);
            }
            self.invoke::<()>(&script).await?;
            revived += self.forget(&queue, &ended, false).await?;
            self.0.wake.queues([queue.as_str()]);
        }
        Ok(revived)
    }

    async fn discard(&self, filter: JobFilter) -> Result<usize> {
        let mut discarded = 0;
        for queue in self.queues_of(&filter).await? {
            let ended = self.ended_of(&queue, &filter, STEP - discarded).await?;
            if !ended.is_empty() {
                discarded += self.forget(&queue, &ended, true).await?;
            }
        }
        Ok(discarded)
    }

    async fn cancel(&self, id: Uuid, reason: String) -> Result<Cancelled> {
        for queue in self.queues().await? {
            let seen = self.see(&queue, &[id]).await?.pop().flatten();
            let Some((place, _, record, state, epoch, ..)) = seen else { continue };
            if place == "ended" {
                return Ok(Cancelled::Never);
            }
            let JobRecord { priority, header, payload } = JobRecord::read(&record)?;
            let (spent, errors) = read_state(&state.unwrap_or_default());
            let (size, unique) = (payload.len(), header.unique.unwrap_or_default());
            let kept = KeptJob {
                state: State::Cancelled,
                kind: header.kind,
                priority,
                payload,
                epoch: epoch.and_then(|epoch| epoch.parse().ok()).unwrap_or_default(),
                failures: spent.failures,
                recoveries: spent.recoveries,
                errors,
                trace: header.trace,
                reason: reason.clone(),
                created_at: timestamp(header.created_at),
            };
            let mut script = self.on(&self.0.scripts.cancel, &queue);
            script.arg(id.to_string()).arg(&reason).arg(size).arg(unique).arg(json(&kept));
            return Ok(match self.invoke::<String>(&script).await?.as_str() {
                "now" => {
                    self.passed(vec![id]).await;
                    Cancelled::Now
                }
                "soon" => Cancelled::Soon,
                _ => Cancelled::Never,
            });
        }
        Ok(Cancelled::Never)
    }

    async fn pause(&self, queue: String, paused: bool) -> Result<()> {
        self.note(&queue).await?;
        let key = self.key(&queue, "paused");
        let redis = &self.0.redis;
        match paused {
            true => redis.query::<()>(cmd("SET").arg(key).arg(1)).await?,
            false => redis.query::<()>(cmd("DEL").arg(key)).await?,
        }
        redis.query::<()>(cmd("PUBLISH").arg(self.channel()).arg(&queue)).await?;
        self.0.wake.queues([queue.as_str()]);
        Ok(())
    }

    async fn paused(&self) -> Result<Vec<String>> {
        let mut paused = Vec::new();
        for queue in self.queues().await? {
            if self.0.redis.query::<bool>(cmd("EXISTS").arg(self.key(&queue, "paused"))).await? {
                paused.push(queue);
            }
        }
        Ok(paused)
    }

    async fn ended(&self) -> Result<Vec<(String, u64)>> {
        let mut ended = Vec::new();
        for queue in self.queues().await? {
            let count: u64 = self.0.redis.query(cmd("ZCARD").arg(self.key(&queue, "ended_at"))).await?;
            if count > 0 {
                ended.push((queue, count));
            }
        }
        Ok(ended)
    }

    async fn prune(&self, older: Duration) -> Result<usize> {
        let mut pruned = 0;
        for queue in self.queues().await? {
            let mut cursor = "0".to_owned();
            loop {
                let mut script = self.on(&self.0.scripts.prune, &queue);
                script.arg(millis(older)).arg(STEP - pruned).arg(&cursor);
                let (some, next): (usize, String) = self.invoke(&script).await?;
                pruned += some;
                cursor = next;
                if cursor == "0" || pruned == STEP {
                    break;
                }
            }
        }
        Ok(pruned)
    }
}

impl RedisQueue {
    async fn queues_of(&self, filter: &JobFilter) -> Result<Vec<String>> {
        let mut queues = self.queues().await?;
        queues.retain(|queue| filter.queue.as_ref().is_none_or(|wanted| wanted == queue));
        Ok(queues)
    }

    /// Reads the ids in a sorted set, in slices, so that other clients do not wait for it.
    async fn scan(&self, queue: &str, part: &str) -> Result<Vec<Uuid>> {
        let (mut ids, mut cursor) = (Vec::new(), "0".to_owned());
        loop {
            let mut scan = cmd("ZSCAN");
            scan.arg(self.key(queue, part)).arg(&cursor).arg("COUNT").arg(SCAN);
            let (next, some): (String, Vec<String>) = self.0.redis.query(&scan).await?;
            ids.extend(some.iter().step_by(2).filter_map(|id| id.parse::<Uuid>().ok()));
            cursor = next;
            if cursor == "0" {
                return Ok(ids);
            }
        }
    }

    async fn see(&self, queue: &str, ids: &[Uuid]) -> Result<Vec<Option<Seen>>> {
        let mut script = self.on(&self.0.scripts.view, queue);
        for id in ids {
            script.arg(id.to_string());
        }
        let seen: Vec<Option<Vec<Option<String>>>> = self.invoke(&script).await?;
        let read = |seen: Vec<Option<String>>| {
            let mut parts = seen.into_iter().chain(std::iter::repeat(None));
            let mut next = || parts.next().flatten();
            let (place, score, record) = (next(), next(), next());
            let text = Option::unwrap_or_default;
            (text(place), text(score), text(record), next(), next(), next(), next(), next())
        };
        Ok(seen.into_iter().map(|seen| seen.map(read)).collect())
    }

    async fn views(&self, queue: &str, ids: &[Uuid]) -> Result<Vec<JobView>> {
        let seen = self.see(queue, ids).await?;
        let views = ids.iter().zip(seen).filter_map(|(id, seen)| Some(view(*id, queue, seen?)));
        views.collect()
    }

    /// Returns up to `limit` ended jobs of a queue that match the filter.
    async fn ended_of(&self, queue: &str, filter: &JobFilter, limit: usize) -> Result<Vec<(Uuid, KeptJob)>> {
        let mut found = Vec::new();
        let mut ids = self.scan(queue, "ended_at").await?;
        ids.retain(|id| filter.id.is_none_or(|wanted| *id == wanted));
        for some in ids.chunks(AT_ONCE) {
            for (id, seen) in some.iter().zip(self.see(queue, some).await?) {
                let Some(seen) = seen.filter(|(place, ..)| place == "ended") else { continue };
                let kept: Option<KeptJob> = read_json(Some(seen.2.clone()));
                if let Some(kept) = kept
                    && found.len() < limit
                    && fits(filter, &view(*id, queue, seen)?)
                {
                    found.push((*id, kept));
                }
            }
            if found.len() == limit {
                break;
            }
        }
        Ok(found)
    }

    async fn forget(&self, queue: &str, ended: &[(Uuid, KeptJob)], with_checkpoints: bool) -> Result<usize> {
        let mut script = self.on(&self.0.scripts.discard, queue);
        script.arg(i32::from(with_checkpoints));
        for (id, _) in ended {
            script.arg(id.to_string());
        }
        self.invoke(&script).await
    }
}

fn fits(filter: &JobFilter, view: &JobView) -> bool {
    let reason = view.reason.as_deref().unwrap_or_default();
    filter.id.is_none_or(|id| id == view.id)
        && filter.kind.as_ref().is_none_or(|kind| *kind == view.kind)
        && filter.queue.as_ref().is_none_or(|queue| *queue == view.queue)
        && filter.state.is_none_or(|state| state == view.state)
        && filter.reason.as_ref().is_none_or(|text| reason.contains(text))
}

fn view(id: Uuid, queue: &str, seen: Seen) -> Result<JobView> {
    let (place, score, record, state, epoch, worker, progress, cancelled) = seen;
    let at = |score: &str| score.parse::<f64>().ok().map(super::whole).map(timestamp);
    if place == "ended" {
        let kept: KeptJob = serde_json::from_str(&record)
            .map_err(|error| crate::queue::Error::Unreadable(error.to_string()))?;
        return Ok(JobView {
            id,
            kind: kept.kind,
            queue: queue.to_owned(),
            state: kept.state,
            priority: kept.priority,
            epoch: kept.epoch,
            failures: kept.failures,
            recoveries: kept.recoveries,
            run_at: None,
            worker: None,
            progress: None,
            trace: kept.trace,
            created_at: kept.created_at,
            ended_at: at(&score),
            reason: Some(kept.reason),
            errors: kept.errors,
            payload: from_json(kept.payload),
        });
    }
    let JobRecord { priority, header, payload } = JobRecord::read(&record)?;
    let (spent, errors) = read_state(&state.unwrap_or_default());
    let run_at = match place.as_str() {
        "ready" => due_of(&score, priority).map(timestamp),
        "scheduled" => at(&score),
        _ => None,
    };
    Ok(JobView {
        id,
        kind: header.kind,
        queue: queue.to_owned(),
        state: place.parse().unwrap_or(State::Ready),
        priority,
        epoch: epoch.and_then(|epoch| epoch.parse().ok()).unwrap_or_default(),
        failures: spent.failures,
        recoveries: spent.recoveries,
        run_at,
        worker,
        progress: read_json(progress),
        trace: header.trace,
        created_at: timestamp(header.created_at),
        ended_at: None,
        reason: cancelled,
        errors,
        payload: from_json(payload),
    })
}
