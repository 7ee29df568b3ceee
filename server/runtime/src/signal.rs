//! SIGTERM, SIGQUIT, SIGINT, SIGHUP and SIGUSR2 as a stream of values.
//!
//! The handlers are installed before any slow step of boot: until then SIGTERM kills the process at once, or is ignored
//! when the process is PID 1 of a container.

use std::io;

use futures_util::StreamExt;
use signal_hook::consts::{SIGHUP, SIGINT, SIGPIPE, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};

/// A request to the process from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessSignal {
    /// SIGTERM: stop in order.
    Terminate,
    /// SIGQUIT: stop in order. Images of nginx and php-fpm are stopped with this signal.
    Quit,
    /// SIGINT (Ctrl-C): stop in order, without the notice phase that load balancers need.
    Interrupt,
    /// SIGHUP: reload the settings and files that support it.
    Reload,
    /// SIGUSR2: start a successor and hand the sockets over to it.
    Succeed,
}

/// A stream of the signals that reach the process after [`Signals::install`].
pub struct Signals(Option<signal_hook_tokio::Signals>);

impl std::fmt::Debug for Signals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Signals")
    }
}

impl Signals {
    /// Installs the handlers. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// When the operating system refuses a handler or the wake-up socket.
    pub fn install() -> io::Result<Self> {
        // Other programs reopen their logs on SIGUSR1, and SIGPIPE means that a reader has gone: neither may end the
        // process.
        let heard = [SIGTERM, SIGQUIT, SIGINT, SIGHUP, SIGUSR2, SIGUSR1, SIGPIPE];
        Ok(Self(Some(signal_hook_tokio::Signals::new(heard)?)))
    }

    /// Makes a stream without signals, for a program within another one.
    pub fn none() -> Self {
        Self(None)
    }

    /// Waits for the next signal. Signals of one kind that arrive together count as one.
    pub async fn next(&mut self) -> ProcessSignal {
        loop {
            let Some(signals) = &mut self.0 else { return std::future::pending().await };
            match signals.next().await {
                Some(SIGTERM) => return ProcessSignal::Terminate,
                Some(SIGQUIT) => return ProcessSignal::Quit,
                Some(SIGINT) => return ProcessSignal::Interrupt,
                Some(SIGHUP) => return ProcessSignal::Reload,
                Some(SIGUSR2) => return ProcessSignal::Succeed,
                Some(_) => {}
                // The stream ends only when its handle is closed, and no code holds a handle.
                None => std::future::pending().await,
            }
        }
    }
}
