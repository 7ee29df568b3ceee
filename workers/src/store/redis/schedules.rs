//! Schedules in Redis: a hash for each, and its runs.
//!
//! Schedules belong to no queue, and their keys have no hash tag: a job that moves to another queue has the same
//! schedule.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use perennial_store::pool::redis::client::{FromRedisValue, Value, cmd, from_redis_value};
use perennial_store::pool::set_apart;
use serde::{Deserialize, Serialize};
use serde_json::json;
use uuid::Uuid;

use super::{AT_ONCE, FoundJob, RedisQueue, push_new};
use crate::cron::{Ending, Run, Schedule, ScheduleClaim, ScheduleState, ScheduleStates, TakeOver};
use crate::encoding::{json as to_json, read_json, timestamp};
use crate::queue::{NewJob, Result};
use crate::schedules::{FORGOTTEN, KEPT_RUNS, KEPT_UNFINISHED, Schedules};
use crate::store::stands_for;

/// A schedule as a script returns it: name, definition, timing, last_fire, queued, paused, held, version, seen_at.
type Fields = (String, String, String, i64, Option<i64>, String, Option<String>, i64, i64);

/// A run, and the queue that its job was put into; the queue is empty if an earlier version has written the
/// run.
#[derive(Serialize, Deserialize)]
struct Placed {
    #[serde(flatten)]
    run: Run,
    #[serde(default)]
    queue: String,
}

/// Suffixes of the keys of a schedule: itself, the ids of its runs, its runs, their endings.
const PARTS: [&str; 4] = ["", ":ids", ":runs", ":endings"];

impl Schedules for RedisQueue {
    async fn sync(&self, schedules: Vec<Arc<Schedule>>, take_over: TakeOver) -> Result<()> {
        for schedule in schedules {
            let mut script = self.0.scripts.define.prepare_invoke();
            script.key(self.schedule(&schedule.name)).key(self.all_schedules());
            script.arg(&schedule.name).arg(schedule.definition()).arg(schedule.expression.to_string());
            script.arg(u8::from(schedule.paused)).arg(stands_for(take_over));
            self.invoke::<()>(&script).await?;
        }
        if take_over == TakeOver::Always {
            self.forget_schedules().await?;
        }
        Ok(())
    }

    async fn due(&self) -> Result<ScheduleStates> {
        let mut script = self.0.scripts.due.prepare_invoke();
        script.key(self.all_schedules()).arg(self.schedule(""));
        let (now, found): (i64, Vec<Value>) = self.invoke(&script).await?;
        let (mut all, mut unreadable) = (Vec::new(), Vec::new());
        for one in found {
            match Fields::from_redis_value(one.clone()) {
                Ok(fields) => all.push(standing(fields)),
                Err(error) => {
                    let name = match &one {
                        Value::Array(fields) => {
                            fields.first().and_then(|name| from_redis_value(name.clone()).ok())
                        }
                        _ => None,
                    };
                    let name: String = name.unwrap_or_default();
                    set_apart("schedules", &name, &error);
                    unreadable.push(name);
                }
            }
        }
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(ScheduleStates { now: timestamp(now), all, unreadable })
    }

    async fn fire(&self, claim: ScheduleClaim) -> Result<bool> {
        let queue = claim.jobs.first().map_or("", |job| &*job.queue);
        if !queue.is_empty() {
            self.note(queue).await?;
        }
        let mut script = self.on(&self.0.scripts.fire, queue);
        for part in PARTS {
            script.key(format!("{}{part}", self.schedule(&claim.schedule)));
        }
        let runs = claim.runs.iter().map(|run| {
            let ending = run.ending.as_ref().map(to_json).unwrap_or_default();
            let run_only = to_json(&Placed { run: Run { ending: None, ..run.clone() }, queue: queue.to_owned() });
            json!({ "id": run.id, "claimed_at": run.claimed_at.as_millisecond().to_string(), "run": run_only, "ending": ending })
        });
        let claimed = json!({
            "version": claim.version.to_string(),
            "last_fire": claim.last_fire.as_millisecond().to_string(),
            "queued": claim.queued.map(|queued| queued.as_millisecond().to_string()).unwrap_or_default(),
            "runs": runs.collect::<Vec<_>>(),
            "kept": KEPT_RUNS,
            "kept_unfinished": KEPT_UNFINISHED,
        });
        script.arg(claimed.to_string()).arg(self.channel()).arg(queue);
        push_new(&mut script, &claim.jobs.iter().collect::<Vec<&NewJob>>());
        let fired = self.invoke::<Option<Vec<String>>>(&script).await?.is_some();
        if fired && !queue.is_empty() {
            self.0.wake.queues([queue]);
        }
        Ok(fired)
    }

    async fn set(&self, schedule: String, paused: bool) -> Result<bool> {
        let mut script = self.0.scripts.set.prepare_invoke();
        script.key(self.schedule(&schedule)).arg(u8::from(paused));
        self.invoke(&script).await
    }

    async fn unfinished(&self, schedule: &str, queue: &str) -> Result<Vec<Uuid>> {
        let ids = self.run_ids(schedule, 0, -1).await?;
        // The queue of the kind may have changed: each job is looked for where it was put.
        let mut places = BTreeMap::<String, Vec<Uuid>>::new();
        for some in ids.chunks(AT_ONCE) {
            let runs = self.of_runs(schedule, "runs", some).await?;
            for (id, run) in some.iter().zip(runs) {
                let placed: Option<Placed> = read_json(run);
                let place = placed
                    .map(|placed| placed.queue)
                    .filter(|place| !place.is_empty())
                    .unwrap_or_else(|| queue.to_owned());
                places.entry(place).or_default().push(*id);
            }
        }
        let mut unfinished = BTreeSet::new();
        for (place, ids) in places {
            for some in ids.chunks(AT_ONCE) {
                let found = self.find(&place, some).await?;
                let waiting = some.iter().zip(found).filter(|(_, found)| *found == FoundJob::Waiting);
                unfinished.extend(waiting.map(|(id, _)| *id));
            }
        }
        // The ids keep their order, the oldest first.
        Ok(ids.into_iter().filter(|id| unfinished.contains(id)).collect())
    }

    async fn runs(&self, schedule: &str, limit: usize) -> Result<Vec<Run>> {
        let last = isize::try_from(limit).unwrap_or(isize::MAX);
        let mut ids = self.run_ids(schedule, -last, -1).await?;
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        ids.reverse();
        let runs = self.of_runs(schedule, "runs", &ids).await?;
        let runs = runs.into_iter().zip(self.of_runs(schedule, "endings", &ids).await?);
        let read = |(run, ending): (Option<String>, Option<String>)| {
            let run: Option<Run> = read_json(run);
            run.map(|run| Run { ending: read_json(ending), ..run })
        };
        Ok(runs.filter_map(read).collect())
    }

    async fn record_endings(&self, endings: Vec<(String, Uuid, Ending)>) -> Result<()> {
        for (schedule, job, ending) in endings {
            let (schedule, job) = (self.schedule(&schedule), job.to_string());
            let is_kept = cmd("HEXISTS").arg(format!("{schedule}:runs")).arg(&job).clone();
            if self.0.redis.query::<bool>(&is_kept).await? {
                let set =
                    cmd("HSET").arg(format!("{schedule}:endings")).arg(job).arg(to_json(&ending)).clone();
                self.0.redis.query::<()>(&set).await?;
            }
        }
        Ok(())
    }
}

impl RedisQueue {
    fn schedule(&self, name: &str) -> String {
        format!("{}:schedule:{name}", self.0.prefix)
    }

    fn all_schedules(&self) -> String {
        format!("{}:schedules", self.0.prefix)
    }

    /// Deletes the schedules that no process has upheld for [`FORGOTTEN`].
    async fn forget_schedules(&self) -> Result<()> {
        let ScheduleStates { now, all, .. } = self.due().await?;
        for standing in all.iter().filter(|one| now.duration_since(one.seen_at).unsigned_abs() > FORGOTTEN) {
            let mut delete = cmd("DEL");
            for part in PARTS {
                delete.arg(format!("{}{part}", self.schedule(&standing.name)));
            }
            self.0.redis.query::<()>(&delete).await?;
            self.0.redis.query::<()>(cmd("SREM").arg(self.all_schedules()).arg(&standing.name)).await?;
        }
        Ok(())
    }

    /// Returns the stored texts of these runs, or of their endings.
    async fn of_runs(&self, schedule: &str, part: &str, ids: &[Uuid]) -> Result<Vec<Option<String>>> {
        let mut get = cmd("HMGET");
        get.arg(format!("{}:{part}", self.schedule(schedule)));
        for id in ids {
            get.arg(id.to_string());
        }
        Ok(self.0.redis.query(&get).await?)
    }

    /// Returns the ids of the runs with these ranks, the oldest first.
    async fn run_ids(&self, schedule: &str, first: isize, last: isize) -> Result<Vec<Uuid>> {
        let mut range = cmd("ZRANGE");
        range.arg(format!("{}:ids", self.schedule(schedule))).arg(first).arg(last);
        let ids: Vec<String> = self.0.redis.query(&range).await?;
        Ok(ids.iter().filter_map(|id| id.parse().ok()).collect())
    }
}

fn standing(fields: Fields) -> ScheduleState {
    let (name, definition, timing, last_fire, queued, paused, held, version, seen_at) = fields;
    ScheduleState {
        name,
        definition,
        timing,
        last_fire: timestamp(last_fire),
        queued: queued.map(timestamp),
        paused: paused == "1",
        held: held.map(|held| held == "1"),
        version,
        seen_at: timestamp(seen_at),
    }
}
