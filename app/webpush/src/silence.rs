//! Peers that have gone without a word.

use tokio::net::TcpStream;

/// After this long without an acknowledgement a connection is dead, in milliseconds.
#[cfg(target_os = "linux")]
const SILENCE_MS: u32 = 20_000;

/// Has the kernel end a connection whose peer has not acknowledged anything for a while, instead of sending
/// again for a quarter of an hour.
#[cfg(target_os = "linux")]
pub(crate) fn notice_silence(tcp: &TcpStream) {
    // Without it the service is still asked, by pings and timeouts.
    let _ = rustix::net::sockopt::set_tcp_user_timeout(tcp, SILENCE_MS);
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn notice_silence(_tcp: &TcpStream) {}
