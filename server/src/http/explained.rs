//! A body for the refusals that hyper writes by itself. A request that hyper cannot parse never reaches a handler:
//! hyper answers with a status and no body, and closes the connection.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http::StatusCode;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::problem::Problem;
use super::scope::REQUEST_ID;

/// The byte stream of an HTTP/1.1 connection, in which such an answer becomes a problem document (RFC 9457), like every
/// other error.
pub(super) struct Explained<I> {
    io: I,
    /// Bytes of the replacing answer that are still to be written.
    rest: Vec<u8>,
    /// Length of the replaced answer of hyper, in bytes.
    stands_for: usize,
}

impl<I> Explained<I> {
    pub(super) fn new(io: I) -> Self {
        Self { io, rest: Vec::new(), stands_for: 0 }
    }

    pub(super) fn into_inner(self) -> I {
        self.io
    }
}

impl<I: AsyncWrite + Unpin> Explained<I> {
    /// Writes the rest of a replacing answer, and returns the length of the replaced one.
    fn poll_rest(&mut self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        while !self.rest.is_empty() {
            let written = ready!(Pin::new(&mut self.io).poll_write(context, &self.rest))?;
            if written == 0 {
                return Poll::Ready(Ok(0));
            }
            self.rest.drain(..written);
        }
        Poll::Ready(Ok(self.stands_for))
    }

    /// Returns true when `bytes` are an answer that hyper writes by itself, or a repeated write of one.
    fn takes(&mut self, bytes: &[u8]) -> bool {
        if self.rest.is_empty()
            && let Some(answer) = explained(bytes)
        {
            self.rest = answer;
            self.stands_for = bytes.len();
        }
        !self.rest.is_empty()
    }
}

/// Returns the answer that replaces `bytes` if hyper wrote them by itself. An answer of the stack is recognized by its
/// request id.
fn explained(bytes: &[u8]) -> Option<Vec<u8>> {
    const NO_BODY: &str = "content-length: 0\r\n";
    if !bytes.starts_with(b"HTTP/1.1 4") || !bytes.ends_with(b"\r\n\r\n") {
        return None;
    }
    let head = std::str::from_utf8(bytes).ok()?;
    if head.contains(REQUEST_ID.as_str()) || !head.contains(NO_BODY) {
        return None;
    }
    let status = StatusCode::from_bytes(bytes.get(9..12)?).ok()?;
    let detail = match status {
        StatusCode::URI_TOO_LONG => "the target of the request is too long",
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => {
            "the head of the request is too long, or has too many fields"
        }
        _ => "this is no head of an HTTP request",
    };
    let body = serde_json::to_vec(&Problem::new(status, detail)).ok()?;
    let fields = format!("content-type: application/problem+json\r\ncontent-length: {}\r\n", body.len());
    Some([head.replacen(NO_BODY, &fields, 1).as_bytes(), &body].concat())
}

impl<I: AsyncRead + Unpin> AsyncRead for Explained<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Explained<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.takes(bytes) {
            return self.poll_rest(context);
        }
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let first = slices.iter().find(|slice| !slice.is_empty());
        if first.is_some_and(|first| self.takes(first)) {
            return self.poll_rest(context);
        }
        Pin::new(&mut self.io).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_without_a_request_gets_a_body_and_any_other_stays() {
        let own =
            b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
        let answer = String::from_utf8(explained(own).unwrap()).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.contains("content-type: application/problem+json"), "{head}");
        assert!(head.contains(&format!("content-length: {}", body.len())), "{head}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(body).unwrap()["status"], 431);
        for other in [
            &b"HTTP/1.1 404 Not Found\r\nx-request-id: 1\r\ncontent-length: 0\r\n\r\n"[..],
            b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
            b"HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\nno",
            b"x",
        ] {
            assert_eq!(explained(other), None);
        }
    }
}
