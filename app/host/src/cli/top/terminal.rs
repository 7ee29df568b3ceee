//! The terminal of `perennial top`: its width, and the key that ends the command.

use std::io::Read;

use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios};
use tokio::sync::mpsc;

/// Width if the terminal does not tell its own.
const USUAL: usize = 100;

/// Number of characters that fit into a line.
pub(super) fn width() -> usize {
    let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok();
    size.map(|size| usize::from(size.ws_col)).filter(|width| *width > 0).unwrap_or(USUAL)
}

/// Keys as they are pressed, without Enter. The terminal is restored on drop.
pub(super) struct KeyPresses {
    pressed: mpsc::Receiver<u8>,
    before: Option<Termios>,
}

impl KeyPresses {
    pub(super) fn listen() -> Self {
        let before = rustix::termios::tcgetattr(std::io::stdin()).ok();
        if let Some(before) = &before {
            let mut now = before.clone();
            now.local_modes -= LocalModes::ICANON | LocalModes::ECHO;
            now.special_codes[SpecialCodeIndex::VMIN] = 1;
            now.special_codes[SpecialCodeIndex::VTIME] = 0;
            let _ = rustix::termios::tcsetattr(std::io::stdin(), OptionalActions::Now, &now);
        }
        let (press, pressed) = mpsc::channel(8);
        if before.is_some() {
            // Reading a terminal cannot be cancelled: the thread ends with the process.
            let _ = std::thread::Builder::new().name("keys".to_owned()).spawn(move || {
                let mut byte = [0];
                while std::io::stdin().read_exact(&mut byte).is_ok() {
                    if press.blocking_send(byte[0]).is_err() {
                        return;
                    }
                }
            });
        }
        Self { pressed, before }
    }

    /// Waits for q. Without a terminal to read from, this never returns.
    pub(super) async fn quit(&mut self) {
        loop {
            match self.pressed.recv().await {
                Some(b'q' | b'Q') => return,
                Some(_) => {}
                None => std::future::pending().await,
            }
        }
    }
}

impl Drop for KeyPresses {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = rustix::termios::tcsetattr(std::io::stdin(), OptionalActions::Now, before);
        }
    }
}
