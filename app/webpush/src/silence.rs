//! Detection of peers that have gone without closing the connection.

use tokio::net::TcpStream;

/// Time without an acknowledgement after which a connection is dead, in milliseconds.
#[cfg(target_os = "linux")]
const SILENCE_MS: u32 = 20_000;

/// Lets the kernel end a connection whose peer has acknowledged nothing for a while, instead of sending again for a
/// quarter of an hour.
#[cfg(target_os = "linux")]
pub(crate) fn notice_silence(tcp: &TcpStream) {
    // Without this option, pings and timeouts still detect a silent peer.
    let _ = rustix::net::sockopt::set_tcp_user_timeout(tcp, SILENCE_MS);
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn notice_silence(_tcp: &TcpStream) {}
