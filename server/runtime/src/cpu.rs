//! CPU-bound work, on threads of its own.
//!
//! A handler that computes for a second makes every other request on its thread wait for a second. Here such work runs
//! on separate threads, which the system's scheduler ranks behind the threads that serve. The queue is bounded, and
//! work whose caller has stopped waiting is not begun.

use std::any::Any;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Instant;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tracing::warn;

use crate::metrics::{self, Counted};

/// Nice value of these threads (`setpriority(2)`): at 10 they get about a tenth of a processor that the threads that
/// serve want too.
const NICE: i32 = 10;

/// Size of the pool of threads and of its queue.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Number of threads.
    pub threads: NonZeroUsize,
    /// Number of work items that may wait for a thread.
    pub queue: usize,
}

/// Error of [`Cpu::run`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpuError {
    /// The queue is full.
    #[error("too much work is waiting for the processor")]
    Full,
    /// The deadline passed before the work was done.
    #[error("the work was not done in time")]
    Late,
}

type Work = Box<dyn FnOnce() + Send>;

/// The pool of threads. A cheap handle; the threads end when the last handle is dropped and their work is done.
#[derive(Clone, Debug)]
pub struct Cpu(SyncSender<Work>);

impl Cpu {
    /// Starts the threads.
    ///
    /// # Errors
    /// When the system can start no more threads.
    pub fn start(config: Config) -> std::io::Result<Self> {
        let (sender, receiver) = sync_channel::<Work>(config.queue);
        let receiver = Arc::new(Mutex::new(receiver));
        for number in 0..config.threads.get() {
            let receiver = Arc::clone(&receiver);
            std::thread::Builder::new().name(format!("cpu-{number}")).spawn(move || work_on(&receiver))?;
        }
        Ok(Self(sender))
    }

    /// Runs `work` and returns its result. A panic of `work` continues in the caller.
    ///
    /// # Errors
    /// [`CpuError::Full`] when the queue is full, and [`CpuError::Late`] when `deadline` passes first. Work that has
    /// begun cannot be stopped and runs to its end.
    pub async fn run<T, F>(&self, deadline: Instant, work: F) -> Result<T, CpuError>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        let (result, done) = oneshot::channel::<Result<T, Box<dyn Any + Send>>>();
        let counted = Counted::new(metrics::cpu_waiting());
        let work = Box::new(move || {
            drop(counted);
            // The caller no longer waits for the result.
            if result.is_closed() || Instant::now() >= deadline {
                return;
            }
            let _running = Counted::new(metrics::cpu_running());
            let _ = result.send(catch_unwind(AssertUnwindSafe(work)));
        });
        match self.0.try_send(work) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                metrics::cpu_refused();
                return Err(CpuError::Full);
            }
        }
        match tokio::time::timeout_at(deadline.into(), done).await {
            Ok(Ok(Ok(result))) => Ok(result),
            Ok(Ok(Err(panic))) => resume_unwind(panic),
            Ok(Err(_)) | Err(_) => Err(CpuError::Late),
        }
    }
}

fn work_on(receiver: &Mutex<Receiver<Work>>) {
    let thread = rustix::thread::gettid();
    if let Err(error) = rustix::process::setpriority_process(Some(thread), NICE) {
        warn!(%error, "the priority of a processor thread cannot be lowered: its work competes with requests");
    }
    loop {
        // The thread that has the lock waits for work, the others wait for the lock.
        let work = receiver.lock().recv();
        match work {
            Ok(work) => work(),
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::time::Duration;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    fn one_thread(queue: usize) -> Cpu {
        Cpu::start(Config { threads: NonZeroUsize::MIN, queue }).unwrap()
    }

    #[tokio::test]
    async fn work_has_a_result() {
        let cpu = one_thread(1);
        assert_eq!(cpu.run(soon(), || 6 * 7).await, Ok(42));
    }

    #[tokio::test]
    async fn a_full_queue_says_so_and_late_work_is_not_begun() {
        let cpu = one_thread(1);
        let gate = Arc::new(Barrier::new(2));
        let (inside, began) = oneshot::channel();
        let running = cpu.run(soon(), {
            let gate = Arc::clone(&gate);
            move || {
                let _ = inside.send(());
                gate.wait();
            }
        });
        let mut running = std::pin::pin!(running);
        assert!(futures_util::poll!(running.as_mut()).is_pending());
        began.await.unwrap();
        let late = cpu.run(Instant::now() + Duration::from_millis(30), || panic!("it was begun"));
        let mut late = std::pin::pin!(late);
        assert!(futures_util::poll!(late.as_mut()).is_pending());
        assert_eq!(cpu.run(soon(), || ()).await, Err(CpuError::Full));
        assert_eq!(late.await, Err(CpuError::Late));
        gate.wait();
        assert_eq!(running.await, Ok(()));
        // Late work leaves the queue when a thread takes it.
        while cpu.run(soon(), || 1).await == Err(CpuError::Full) {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_panic_is_the_callers_and_the_thread_lives_on() {
        let cpu = one_thread(4);
        let failed =
            futures_util::FutureExt::catch_unwind(AssertUnwindSafe(cpu.run(soon(), || panic!("a bug"))))
                .await;
        assert!(failed.is_err());
        assert_eq!(cpu.run(soon(), || 1).await, Ok(1));
    }
}
