//! The content of a request for which its server has to ask (RFC 9110 section 10.1.1): nothing of it
//! is read before, since reading tells the client to send it.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use hyper::body::{Body, Frame, SizeHint};
use parking_lot::Mutex;

/// What holds content back.
#[derive(Debug, Clone)]
pub(super) struct Gate(Arc<Mutex<State>>);

#[derive(Debug)]
enum State {
    /// The server has not answered yet; this waits.
    Shut(Option<Waker>),
    Open,
    /// The server has answered without it.
    Unwanted,
}

impl Gate {
    /// A gate that is shut if the server is to ask first.
    pub(super) fn new(is_shut: bool) -> Self {
        let state = if is_shut {
            State::Shut(None)
        } else {
            State::Open
        };
        Self(Arc::new(Mutex::new(state)))
    }

    /// Lets the content through.
    pub(super) fn open(&self) {
        self.leave_shut_for(State::Open);
    }

    fn leave_shut_for(&self, next: State) {
        let mut state = self.0.lock();
        if let State::Shut(waker) = &mut *state {
            let waker = waker.take();
            *state = next;
            drop(state);
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }
}

/// The server has answered without the content, and it will not be sent any more.
#[derive(Debug, thiserror::Error)]
#[error("the server does not want the content")]
pub(super) struct Unwanted;

/// Content behind a gate.
pub(super) struct Gated<B> {
    content: B,
    gate: Gate,
}

impl<B> Gated<B> {
    pub(super) const fn new(content: B, gate: Gate) -> Self {
        Self { content, gate }
    }
}

impl<B: Body + Unpin> Body for Gated<B>
where
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Data = B::Data;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        task: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        match &mut *self.gate.0.lock() {
            State::Shut(waker) => {
                *waker = Some(task.waker().clone());
                return Poll::Pending;
            }
            State::Unwanted => return Poll::Ready(Some(Err(Unwanted.into()))),
            State::Open => {}
        }
        let frame = Pin::new(&mut self.content).poll_frame(task);
        frame.map_err(Into::into)
    }

    fn is_end_stream(&self) -> bool {
        self.content.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.content.size_hint()
    }
}

/// The content of an answer. When it is through, the server wants nothing that it has not asked for.
pub(super) struct Answer<B> {
    content: B,
    gate: Gate,
}

impl<B> Answer<B> {
    pub(super) const fn new(content: B, gate: Gate) -> Self {
        Self { content, gate }
    }
}

impl<B> Drop for Answer<B> {
    fn drop(&mut self) {
        self.gate.leave_shut_for(State::Unwanted);
    }
}

impl<B: Body + Unpin> Body for Answer<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        task: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.content).poll_frame(task)
    }

    fn is_end_stream(&self) -> bool {
        self.content.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.content.size_hint()
    }
}
