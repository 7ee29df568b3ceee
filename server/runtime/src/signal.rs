//! SIGTERM, SIGQUIT, SIGINT, SIGHUP and SIGUSR2 as a stream of values.
//!
//! Installed before anything slow happens: until then SIGTERM kills the process outright, and as PID 1 of a
//! container it would be ignored altogether.

use std::io;

use futures_util::StreamExt;
use signal_hook::consts::{SIGHUP, SIGINT, SIGPIPE, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};

/// What somebody outside asked of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessSignal {
    /// SIGTERM: leave, in order.
    Terminate,
    /// SIGQUIT, which images of nginx and php-fpm are stopped with: the same.
    Quit,
    /// SIGINT (Ctrl-C): leave, in order, without the notice that load balancers need.
    Interrupt,
    /// SIGHUP: read again what can be read again.
    Reload,
    /// SIGUSR2: start a successor, and leave the sockets to it.
    Succeed,
}

/// The signals that reach this process from now on.
pub struct Signals(signal_hook_tokio::Signals);

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
        // SIGUSR1 reopens logs elsewhere, and SIGPIPE says that a reader has gone: neither is a reason to end.
        let heard = [SIGTERM, SIGQUIT, SIGINT, SIGHUP, SIGUSR2, SIGUSR1, SIGPIPE];
        Ok(Self(signal_hook_tokio::Signals::new(heard)?))
    }

    /// The next signal. Signals of one kind that arrive together are one.
    pub async fn next(&mut self) -> ProcessSignal {
        loop {
            match self.0.next().await {
                Some(SIGTERM) => return ProcessSignal::Terminate,
                Some(SIGQUIT) => return ProcessSignal::Quit,
                Some(SIGINT) => return ProcessSignal::Interrupt,
                Some(SIGHUP) => return ProcessSignal::Reload,
                Some(SIGUSR2) => return ProcessSignal::Succeed,
                Some(_) => {}
                // The stream ends only when its handle is closed, and nobody holds one.
                None => std::future::pending().await,
            }
        }
    }
}
