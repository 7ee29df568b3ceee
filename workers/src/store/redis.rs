//! Jobs in Redis.
//!
//! A queue is a handful of hashes and sorted sets with one hash tag. A few scripts change them, each for a bounded
//! number of jobs. Nothing is ever trimmed: admission bounds a queue.
//!
//! A job that was enqueued is as safe as the persistence of the server: on the disk with `appendfsync always`, in
//! memory otherwise. A server that has lost its last writes hands out no epoch twice, since epochs are never below
//! its clock.
//!
//! Another program may enqueue with one command: the stream is an inbox, from which workers take jobs over with
//! their next poll.
//!
//! ```text
//! XADD perennial:{default}:inbox * kind mail.send payload '{"to": "ada@example.org"}' [delay 30] [priority -5]
//! ```
//!
//! Such a job lacks what the program does for its own jobs: the payload is checked only when the job runs, there
//! is no unique key, no immediate wake-up, and no bound on how much may wait. A kind with limits of its own waits
//! in a queue of its own, `{queue/kind}`.

mod job_admin;
mod schedules;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use jiff::Timestamp;
use parking_lot::Mutex;
use perennial_runtime::drain::Drain;
use perennial_store::pool::redis::Redis;
use perennial_store::pool::redis::client::{FromRedisValue, Script, ScriptInvocation, cmd};
use perennial_store::pool::set_apart;
use serde::{Deserialize, Serialize};
use tracing::warn;
use uuid::Uuid;

use crate::encoding::{json, millis, read_json, timestamp};
use crate::job::UniqueUntil;
use crate::outbox::Outbox;
use crate::queue::{
    Claim, Claimed, Claims, Depth, Due, Error, Failure, Held, Lapsed, NewJob, Queue, Renewal, Renewed,
    Result, Settlement,
};
use crate::state::{Attempts, State, Transition};
use crate::wake::Wake;

/// Highest number of jobs that one script takes.
const AT_ONCE: usize = 500;
/// Highest number of jobs that one claim takes over from an inbox: their ids differ in one byte.
const INBOX: usize = 50;
/// Number of the next jobs among which the job that has waited longest is looked for.
const OLDEST_AMONG: isize = 100;
/// Weight of a priority in the score of a job: 2^42 milliseconds.
const PRIORITY: f64 = 4_398_046_511_104.0;

/// Creates a script, which begins with the prelude.
///
/// Scripts that free memory, or lead to that, are flagged `allow-oom`.
macro_rules! script {
    ($name:literal) => {
        Script::new(concat!(
            "#!lua flags=allow-oom\n",
            include_str!("redis/prelude.lua"),
            "\n",
            include_str!(concat!("redis/", $name, ".lua"))
        ))
    };
}

/// Answer of `measure.lua`.
type Measured = (Option<i64>, u64, u64, u64, u64, Vec<(String, f64)>);

#[derive(Debug)]
struct Scripts {
    enqueue: Script,
    claim: Script,
    lapsed: Script,
    renew: Script,
    record: Script,
    settle: Script,
    release: Script,
    cancel: Script,
    prune: Script,
    view: Script,
    measure: Script,
    discard: Script,
    define: Script,
    due: Script,
    set: Script,
    fire: Script,
}

impl Scripts {
    fn new() -> Self {
        Self {
            enqueue: Script::new(concat!(
                include_str!("redis/prelude.lua"),
                "\n",
                include_str!("redis/enqueue.lua")
            )),
            claim: script!("claim"),
            lapsed: script!("lapsed"),
            renew: script!("renew"),
            record: script!("record"),
            settle: script!("settle"),
            release: script!("release"),
            cancel: script!("cancel"),
            prune: script!("prune"),
            view: script!("view"),
            measure: script!("measure"),
            discard: script!("discard"),
            define: Script::new(include_str!("redis/define.lua")),
            due: Script::new(include_str!("redis/due.lua")),
            set: Script::new(include_str!("redis/set.lua")),
            fire: Script::new(concat!(
                include_str!("redis/prelude.lua"),
                "\n",
                include_str!("redis/fire.lua"),
                "\n",
                include_str!("redis/enqueue.lua")
            )),
        }
    }
}

/// The queues in a Redis server. A cheap handle.
#[derive(Clone, Debug)]
pub struct RedisQueue(Arc<RedisQueueInner>);

#[derive(Debug)]
struct RedisQueueInner {
    redis: Redis,
    prefix: String,
    scripts: Scripts,
    wake: Wake,
    /// Queues that were added to the server's set of queues.
    known: Mutex<BTreeSet<String>>,
    /// Outbox of jobs that were added in transactions of another store.
    outbox: Option<Outbox>,
}

/// Where a job was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FoundJob {
    /// The job is not here, or has settled.
    Nowhere,
    /// The job waits or runs.
    Waiting,
    /// The job has ended, and is kept.
    Ended,
}

/// The part of a job that never changes, besides its payload.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Header {
    kind: String,
    created_at: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    trace: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    unique: Option<String>,
}

/// A job as it is stored: its priority, the header, and the payload on a line of its own.
struct JobRecord {
    priority: i16,
    header: Header,
    payload: String,
}

impl JobRecord {
    fn write(&self) -> String {
        format!("{} {}\n{}", self.priority, json(&self.header), self.payload)
    }

    fn read(text: &str) -> Result<Self> {
        let unreadable = || Error::Unreadable("its record has no header".to_owned());
        let (head, payload) = text.split_once('\n').ok_or_else(unreadable)?;
        let (priority, header) = head.split_once(' ').ok_or_else(unreadable)?;
        Ok(Self {
            priority: priority.parse().map_err(|_| unreadable())?,
            header: serde_json::from_str(header).map_err(|error| Error::Unreadable(error.to_string()))?,
            payload: payload.to_owned(),
        })
    }
}

/// A job as an argument of `enqueue.lua`.
struct JobEntry {
    id: Uuid,
    record: JobRecord,
    due: Due,
    /// Text of [`write_state`]; empty for a job without failures and crashes.
    state: String,
    /// How long its unique key is taken, if it has one.
    until: UniqueUntil,
    last_epoch: Option<i64>,
}

impl JobEntry {
    fn push(&self, script: &mut ScriptInvocation<'_>) {
        let (wait, milliseconds) = match self.due {
            Due::Now => ("now", 0),
            Due::In(wait) => ("in", millis(wait)),
            Due::At(time) => ("at", time.as_millisecond()),
        };
        let (scope, window) = self.until.scope();
        let window = window.map_or(0, |window| millis(window).max(1));
        script
            .arg(self.id.to_string())
            .arg(self.record.write())
            .arg(self.record.payload.len())
            .arg(self.record.priority)
            .arg(wait)
            .arg(milliseconds)
            .arg(&self.state)
            .arg(self.record.header.unique.as_deref().unwrap_or_default())
            .arg(scope)
            .arg(window)
            .arg(self.last_epoch.map(|epoch| epoch.to_string()).unwrap_or_default());
    }
}

/// Writes what has gone wrong with a job: failures, recoveries, the time of the first crash, and the errors.
fn write_state(spent: Attempts, errors: &[Failure]) -> String {
    let since = spent.since.map_or(0, Timestamp::as_millisecond);
    let errors = if errors.is_empty() { String::new() } else { json(&errors) };
    format!("{} {} {since} {errors}", spent.failures, spent.recoveries)
}

fn read_state(text: &str) -> (Attempts, Vec<Failure>) {
    let mut parts = text.splitn(4, ' ');
    let mut number = || parts.next().and_then(|part| part.parse::<i64>().ok()).unwrap_or_default();
    let (failures, recoveries, since) = (number(), number(), number());
    let spent = Attempts {
        failures: u32::try_from(failures).unwrap_or_default(),
        recoveries: u32::try_from(recoveries).unwrap_or_default(),
        since: (since > 0).then(|| timestamp(since)),
    };
    (spent, read_json(parts.next().map(str::to_owned)))
}

impl RedisQueue {
    /// Creates the queues in `redis` whose keys begin with `prefix`.
    pub fn new(redis: Redis, prefix: &str) -> Self {
        Self::with(redis, prefix, None)
    }

    /// The prefix of the keys.
    #[cfg(feature = "testing")]
    pub fn prefix(&self) -> &str {
        &self.0.prefix
    }

    /// Creates the same queues for a process whose other data are in a store with this outbox.
    pub fn with_outbox(redis: Redis, prefix: &str, outbox: Outbox) -> Self {
        Self::with(redis, prefix, Some(outbox))
    }

    fn with(redis: Redis, prefix: &str, outbox: Option<Outbox>) -> Self {
        Self(Arc::new(RedisQueueInner {
            redis,
            prefix: prefix.to_owned(),
            scripts: Scripts::new(),
            wake: Wake::default(),
            known: Mutex::default(),
            outbox,
        }))
    }

    /// Returns the server.
    pub fn redis(&self) -> &Redis {
        &self.0.redis
    }

    /// Wakes the outbox. Call it after the commit of a transaction that put jobs into the outbox.
    pub fn committed(&self) {
        if let Some(outbox) = &self.0.outbox {
            outbox.wake();
        }
    }

    /// Returns where each of these jobs of a queue is.
    ///
    /// # Errors
    /// When Redis cannot be asked.
    pub(crate) async fn find(&self, queue: &str, ids: &[Uuid]) -> Result<Vec<FoundJob>> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let mut places = vec![FoundJob::Nowhere; ids.len()];
        // A job goes through the parts in this order, so that none is missed on its way.
        for (command, part) in
            [("ZMSCORE", "scheduled"), ("ZMSCORE", "ready"), ("HMGET", "epochs"), ("ZMSCORE", "ended_at")]
        {
            let mut ask = cmd(command);
            ask.arg(self.key(queue, part));
            for id in ids {
                ask.arg(id.to_string());
            }
            let found: Vec<Option<String>> = self.0.redis.query(&ask).await?;
            let place = if part == "ended_at" { FoundJob::Ended } else { FoundJob::Waiting };
            for (known, found) in places.iter_mut().zip(found) {
                if found.is_some() && *known == FoundJob::Nowhere {
                    *known = place;
                }
            }
        }
        Ok(places)
    }

    /// Deletes the outbox entries of these jobs, which have ended.
    async fn passed(&self, ids: Vec<Uuid>) {
        if let Some(outbox) = &self.0.outbox {
            outbox.settled(ids).await;
        }
    }

    fn key(&self, queue: &str, part: &str) -> String {
        format!("{}:{{{queue}}}:{part}", self.0.prefix)
    }

    fn channel(&self) -> String {
        format!("{}:wake", self.0.prefix)
    }

    fn all_queues(&self) -> String {
        format!("{}:queues", self.0.prefix)
    }

    /// Prepares a script with the keys of a queue, in the order of the prelude.
    fn on<'a>(&self, script: &'a Script, queue: &str) -> ScriptInvocation<'a> {
        const PARTS: [&str; 17] = [
            "jobs",
            "state",
            "epochs",
            "ready",
            "scheduled",
            "waits",
            "leases",
            "workers",
            "progress",
            "checkpoints",
            "cancelled",
            "ended",
            "ended_at",
            "keys",
            "bytes",
            "inbox",
            "paused",
        ];
        let mut invocation = script.prepare_invoke();
        for part in PARTS {
            invocation.key(self.key(queue, part));
        }
        invocation
    }

    async fn invoke<T: FromRedisValue>(&self, invocation: &ScriptInvocation<'_>) -> Result<T> {
        Ok(self.0.redis.invoke(invocation).await?)
    }

    /// Adds a queue to the set of all queues, which operations on all jobs go through.
    async fn note(&self, queue: &str) -> Result<()> {
        if self.0.known.lock().contains(queue) {
            return Ok(());
        }
        self.0.redis.query::<()>(cmd("SADD").arg(self.all_queues()).arg(queue)).await?;
        self.0.known.lock().insert(queue.to_owned());
        Ok(())
    }

    async fn queues(&self) -> Result<Vec<String>> {
        let found: Vec<Vec<u8>> = self.0.redis.query(cmd("SMEMBERS").arg(self.all_queues())).await?;
        let name = |name: Vec<u8>| {
            let name = String::from_utf8(name);
            name.map_err(|error| set_apart("queues", &error.to_string(), &"its name is no text")).ok()
        };
        let mut queues: Vec<String> = found.into_iter().filter_map(name).collect();
        queues.sort();
        Ok(queues)
    }

    /// Reads jobs that were claimed. A job that cannot be read, since another program wrote it, must not
    /// block the others: it ends as dead.
    async fn read(&self, taken: Vec<Taken>, queue: &Arc<str>, now: i64) -> Result<Vec<Claimed>> {
        let mut jobs = Vec::with_capacity(taken.len());
        for taken in taken {
            let (id, epoch) = (taken.0.clone(), taken.1.clone());
            let record = String::from_utf8_lossy(&taken.4).into_owned();
            // The size is computed as it was when the job was added.
            let size = taken.4.iter().position(|byte| *byte == b'\n').map_or(0, |at| taken.4.len() - at - 1);
            let error = match claimed(taken, queue, now) {
                Ok(job) => {
                    jobs.push(job);
                    continue;
                }
                Err(error) => error.in_one_line(),
            };
            set_apart("jobs", &String::from_utf8_lossy(&id), &error);
            let kept = KeptJob {
                state: State::Dead,
                kind: String::new(),
                priority: 0,
                payload: json(&record),
                epoch: epoch.parse().unwrap_or_default(),
                failures: 0,
                recoveries: 0,
                errors: Vec::new(),
                trace: None,
                reason: error,
                created_at: timestamp(now),
            };
            let mut script = self.on(&self.0.scripts.settle, queue);
            script.arg(self.channel()).arg(&**queue).arg("e").arg(id).arg(epoch).arg(size).arg("");
            // If this fails, the lease expires and the job is looked at again.
            if let Err(error) = self.invoke::<()>(script.arg(0).arg(0).arg(now).arg(json(&kept))).await {
                warn!(
                    queue = &**queue,
                    error = error.in_one_line(),
                    "a job that cannot be read could not be ended yet"
                );
            }
        }
        Ok(jobs)
    }

    /// Adds jobs of one queue.
    async fn add(&self, queue: &str, jobs: &[&NewJob]) -> Result<Vec<String>> {
        let mut script = self.on(&self.0.scripts.enqueue, queue);
        script.arg(self.channel()).arg(queue);
        push_new(&mut script, jobs);
        self.invoke(&script).await
    }
}

/// Adds new jobs to the arguments of `enqueue.lua`.
fn push_new(script: &mut ScriptInvocation<'_>, jobs: &[&NewJob]) {
    let now = Timestamp::now();
    for job in jobs {
        let header = Header {
            kind: job.kind.to_string(),
            created_at: now.as_millisecond(),
            trace: job.trace.clone(),
            unique: job.unique_key(),
        };
        let spent = Attempts { recoveries: job.recoveries, since: Some(now), ..Attempts::default() };
        let entry = JobEntry {
            id: job.id,
            record: JobRecord { priority: job.priority, header, payload: job.payload.clone() },
            due: job.due,
            state: if job.recoveries > 0 { write_state(spent, &[]) } else { String::new() },
            until: job.unique.as_ref().map_or(UniqueUntil::Ended, |unique| unique.until),
            last_epoch: None,
        };
        entry.push(script);
    }
}

/// A job as a script returns it: id, epoch, whether it is the first claim, score, record, state, checkpoint.
/// Other programs may have written the last three.
type Taken = (Vec<u8>, String, String, String, Vec<u8>, Vec<u8>, Option<Vec<u8>>);

/// Answer of `lapsed.lua`: the time, the jobs, and for each job why it was cancelled, if it was.
type Lapsing = (i64, Vec<Taken>, Vec<Option<Vec<u8>>>);

fn id_of(bytes: &[u8]) -> Result<Uuid> {
    let id = String::from_utf8_lossy(bytes);
    id.parse().map_err(|_| Error::Unreadable(format!("its id is {id}, wanted a UUID")))
}

fn claimed(taken: Taken, queue: &Arc<str>, now: i64) -> Result<Claimed> {
    let (id, epoch, first, score, record, state, checkpoint) = taken;
    let text = |bytes: Vec<u8>| {
        String::from_utf8(bytes).map_err(|_| Error::Unreadable("its bytes are no text".to_owned()))
    };
    let JobRecord { priority, header, payload } = JobRecord::read(&text(record)?)?;
    let (spent, errors) = read_state(&text(state)?);
    let checkpoint = checkpoint.map(text).transpose()?;
    let due = due_of(&score, priority).unwrap_or(header.created_at);
    Ok(Claimed {
        id: id_of(&id)?,
        kind: header.kind,
        queue: Arc::clone(queue),
        priority,
        payload,
        epoch: epoch.parse().map_err(|_| Error::Unreadable(format!("its epoch is {epoch}")))?,
        first: first == "1",
        spent,
        errors,
        checkpoint,
        trace: header.trace,
        unique: header.unique,
        cancelled: None,
        created_at: timestamp(header.created_at),
        due_at: timestamp(due),
        waited: Duration::from_millis(now.saturating_sub(due).max(0).unsigned_abs()),
    })
}

/// Returns when a ready job was due, from its score.
#[expect(clippy::cast_possible_truncation, reason = "milliseconds since 1970")]
fn due_of(score: &str, priority: i16) -> Option<i64> {
    Some((score.parse::<f64>().ok()? - f64::from(priority) * PRIORITY) as i64)
}

impl Queue for RedisQueue {
    async fn enqueue(&self, jobs: Vec<NewJob>) -> Result<Vec<Uuid>> {
        let by_queue = by_queue(&jobs, |job| &job.queue);
        let queues: BTreeSet<&str> = by_queue.keys().copied().collect();
        let mut ids: Vec<Uuid> = jobs.iter().map(|job| job.id).collect();
        for (queue, jobs) in by_queue {
            self.note(queue).await?;
            for some in jobs.chunks(AT_ONCE) {
                let new: Vec<&NewJob> = some.iter().map(|(_, job)| *job).collect();
                let added = self.add(queue, &new).await?;
                for ((index, _), id) in some.iter().zip(added) {
                    ids[*index] = id.parse().unwrap_or(ids[*index]);
                }
            }
        }
        self.0.wake.queues(queues);
        Ok(ids)
    }

    async fn claim(&self, claim: Claim) -> Result<Claims> {
        self.note(&claim.queue).await?;
        let mut script = self.on(&self.0.scripts.claim, &claim.queue);
        script.arg(claim.limit.min(AT_ONCE)).arg(millis(claim.lease)).arg(&claim.worker);
        script.arg(INBOX).arg(Uuid::now_v7().to_string());
        let (now, next, taken): (i64, String, Vec<Taken>) = self.invoke(&script).await?;
        let jobs = self.read(taken, &claim.queue, now).await?;
        let keys: Vec<(&str, Uuid)> =
            jobs.iter().filter_map(|job| Some((job.unique.as_deref()?, job.id))).collect();
        if !keys.is_empty() {
            let mut release = self.on(&self.0.scripts.release, &claim.queue);
            for (key, id) in keys {
                release.arg(key).arg(id.to_string());
            }
            self.invoke::<()>(&release).await?;
        }
        let next_in = next.parse::<i64>().ok().map(|next| next.saturating_sub(now).max(0).unsigned_abs());
        Ok(Claims { jobs, next_in: next_in.map(Duration::from_millis) })
    }

    async fn renew(&self, renewals: Vec<Renewal>, lease: Duration) -> Result<Vec<Renewed>> {
        let mut renewed = Vec::with_capacity(renewals.len());
        for (queue, renewals) in by_queue(&renewals, |renewal| &renewal.queue) {
            for some in renewals.chunks(AT_ONCE) {
                let mut script = self.on(&self.0.scripts.renew, queue);
                script.arg(millis(lease));
                for (_, renewal) in some {
                    let progress = renewal.progress.as_ref().map(json).unwrap_or_default();
                    script.arg(renewal.held.id.to_string()).arg(renewal.held.epoch).arg(progress);
                }
                let answers: Vec<(i64, Option<String>)> = self.invoke(&script).await?;
                let held = some.iter().zip(answers).filter(|(_, (held, _))| *held == 1);
                renewed.extend(
                    held.map(|((_, renewal), (_, cancelled))| Renewed { held: renewal.held, cancelled }),
                );
            }
        }
        Ok(renewed)
    }

    async fn record(&self, held: Held, queue: Arc<str>, checkpoint: String) -> Result<bool> {
        let mut script = self.on(&self.0.scripts.record, &queue);
        script.arg(held.id.to_string()).arg(held.epoch).arg(checkpoint);
        Ok(self.invoke::<i64>(&script).await? == 1)
    }

    async fn settle(&self, settlements: Vec<Settlement>) -> Result<Vec<bool>> {
        let mut kept = vec![false; settlements.len()];
        for (queue, settlements) in by_queue(&settlements, |settlement| &settlement.job.queue) {
            for some in settlements.chunks(AT_ONCE) {
                let mut script = self.on(&self.0.scripts.settle, queue);
                script.arg(self.channel()).arg(queue);
                for (_, settlement) in some {
                    settled(&mut script, settlement);
                }
                let answers: Vec<i64> = self.invoke(&script).await?;
                for ((index, _), answer) in some.iter().zip(answers) {
                    kept[*index] = answer == 1;
                }
            }
        }
        let is_again = |settlement: &&Settlement| matches!(settlement.transition, Transition::Again { .. });
        let over = settlements.iter().zip(&kept).filter(|(settlement, kept)| **kept && !is_again(settlement));
        self.passed(over.map(|(settlement, _)| settlement.job.id).collect()).await;
        let again = settlements.iter().filter(is_again);
        let again: BTreeSet<&str> = again.map(|settlement| &*settlement.job.queue).collect();
        if !again.is_empty() {
            self.0.wake.queues(again);
        }
        Ok(kept)
    }

    async fn lapsed(&self, limit: usize, worker: String, lease: Duration) -> Result<Lapsed> {
        let mut lapsed = Lapsed { jobs: Vec::new(), now: Timestamp::now() };
        for queue in self.queues().await? {
            let left = limit.min(AT_ONCE).saturating_sub(lapsed.jobs.len());
            if left == 0 {
                break;
            }
            let mut script = self.on(&self.0.scripts.lapsed, &queue);
            script.arg(left).arg(millis(lease)).arg(&worker);
            let found: Result<Lapsing> = self.invoke(&script).await;
            let (now, taken, reasons) = match found {
                Ok(found) => found,
                // The other queues have jobs with expired leases, too.
                Err(error) if !error.is_passing() => {
                    warn!(queue, error = error.in_one_line(), "expired leases could not be looked for");
                    continue;
                }
                Err(error) => return Err(error),
            };
            let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
            let ids = taken.iter().map(|taken| text(taken.0.clone()));
            let reasons: BTreeMap<String, Option<String>> =
                ids.zip(reasons.into_iter().map(|reason| reason.map(text))).collect();
            for job in self.read(taken, &queue.into(), now).await? {
                let cancelled = reasons.get(&job.id.to_string()).cloned().flatten();
                lapsed.jobs.push(Claimed { cancelled, ..job });
            }
            lapsed.now = timestamp(now);
        }
        Ok(lapsed)
    }

    async fn measure(&self, queue: Arc<str>) -> Result<Depth> {
        // One script counts at one moment, since jobs go from one place to the next and back.
        let mut script = self.on(&self.0.scripts.measure, &queue);
        script.arg(OLDEST_AMONG);
        let (bytes, ready, inbox, scheduled, running, oldest): Measured = self.invoke(&script).await?;
        let now = Timestamp::now().as_millisecond();
        let waits = oldest.iter().filter_map(|(_, score)| {
            // The remainder is the due time: times are from 0 to 2^42.
            let due = score.rem_euclid(PRIORITY);
            u64::try_from(now.saturating_sub(whole(due))).ok()
        });
        Ok(Depth {
            ready: ready + inbox,
            scheduled,
            running,
            bytes: bytes.unwrap_or_default().max(0).unsigned_abs(),
            oldest_ms: waits.max().unwrap_or_default(),
        })
    }

    fn wake(&self) -> &Wake {
        &self.0.wake
    }

    async fn listen(&self, drain: Drain) -> anyhow::Result<()> {
        let mut pubsub = self.0.redis.subscribe(&self.channel()).await?;
        let mut messages = pubsub.on_message();
        loop {
            tokio::select! {
                message = messages.next() => {
                    let message = message.ok_or_else(|| anyhow::anyhow!("the connection that listens has ended"))?;
                    let queue: String = message.get_payload()?;
                    self.0.wake.queues([queue.as_str()]);
                }
                () = drain.soft() => return Ok(()),
            }
        }
    }
}

/// Groups items by their queues, with the index of each among all: a script is about one queue.
fn by_queue<'a, T>(all: &'a [T], queue: impl Fn(&'a T) -> &'a str) -> BTreeMap<&'a str, Vec<(usize, &'a T)>> {
    let mut by_queue = BTreeMap::<_, Vec<_>>::new();
    for (index, one) in all.iter().enumerate() {
        by_queue.entry(queue(one)).or_default().push((index, one));
    }
    by_queue
}

/// Adds a settlement to the arguments of `settle.lua`.
fn settled(script: &mut ScriptInvocation<'_>, settlement: &Settlement) {
    let job = &settlement.job;
    let (fate, wait, text) = match &settlement.transition {
        Transition::Finished => ("f", 0, String::new()),
        Transition::Again { wait, spent } => ("a", millis(*wait), write_state(*spent, &settlement.errors)),
        Transition::Ended { state, reason, spent } => {
            let kept = KeptJob {
                state: *state,
                kind: job.kind.clone(),
                priority: job.priority,
                payload: job.payload.clone(),
                epoch: job.epoch,
                failures: spent.failures,
                recoveries: spent.recoveries,
                errors: settlement.errors.clone(),
                trace: job.trace.clone(),
                reason: reason.clone(),
                created_at: job.created_at,
            };
            ("e", 0, json(&kept))
        }
    };
    script
        .arg(fate)
        .arg(job.id.to_string())
        .arg(job.epoch)
        .arg(job.payload.len())
        .arg(job.unique.as_deref().unwrap_or_default())
        .arg(wait)
        .arg(job.priority)
        .arg(job.due_at.as_millisecond())
        .arg(text);
}

/// A job that has ended and is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct KeptJob {
    state: State,
    kind: String,
    priority: i16,
    payload: String,
    epoch: i64,
    failures: u32,
    recoveries: u32,
    errors: Vec<Failure>,
    trace: Option<String>,
    reason: String,
    created_at: Timestamp,
}

#[expect(clippy::cast_possible_truncation, reason = "milliseconds since 1970")]
fn whole(ms: f64) -> i64 {
    ms as i64
}
