//! Places for clients of a listener: who has not said anything yet makes room for who comes, so that
//! no client holds all of them by idling.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;

/// The clients of one listener.
#[derive(Debug)]
pub(crate) struct Clients {
    places: Arc<Semaphore>,
    limit: usize,
    /// Those that may have to go, the oldest first.
    silent: VecDeque<Silent>,
}

/// A client that has said nothing when it was last looked at.
#[derive(Debug)]
struct Silent {
    task: AbortHandle,
    is_kept: Arc<AtomicBool>,
}

/// A client's place, until it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    is_kept: Arc<AtomicBool>,
    _permit: OwnedSemaphorePermit,
}

/// A free place.
#[derive(Debug)]
pub(crate) struct Free(OwnedSemaphorePermit);

impl Place {
    /// The client has sent its request, and is not evicted from now on.
    pub(crate) fn keep(&self) {
        self.is_kept.store(true, Relaxed);
    }
}

impl Free {
    /// Takes it; what comes with it says whether the client is kept.
    pub(crate) fn take(self) -> (Place, Arc<AtomicBool>) {
        let is_kept = Arc::<AtomicBool>::default();
        let place = Place {
            is_kept: is_kept.clone(),
            _permit: self.0,
        };
        (place, is_kept)
    }
}

impl Clients {
    /// Places for so many.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            places: Arc::new(Semaphore::new(limit)),
            limit,
            silent: VecDeque::new(),
        }
    }

    /// A place for one more, if need be that of whoever has been silent for longest; nothing if all
    /// have said what they want.
    pub(crate) async fn make_room(&mut self) -> Option<Free> {
        if let Ok(permit) = self.places.clone().try_acquire_owned() {
            return Some(Free(permit));
        }
        self.forget();
        self.silent.pop_front()?.task.abort();
        Some(self.wait().await)
    }

    /// A place for one more, when there is one.
    pub(crate) async fn wait(&self) -> Free {
        match self.places.clone().acquire_owned().await {
            Ok(permit) => Free(permit),
            // Nobody closes it.
            Err(_) => std::future::pending().await,
        }
    }

    /// Has a client served in its place.
    pub(crate) fn serve<F>(&mut self, room: Free, serve: impl FnOnce(Place) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (place, is_kept) = room.take();
        let task = tokio::spawn(serve(place)).abort_handle();
        if self.silent.len() >= 2 * self.limit {
            self.forget();
        }
        self.silent.push_back(Silent { task, is_kept });
    }

    /// Forgets those that have gone, and those that are kept.
    fn forget(&mut self) {
        self.silent
            .retain(|client| !client.task.is_finished() && !client.is_kept.load(Relaxed));
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

    use super::*;

    /// Says which client has gone when it is dropped.
    struct Leaves(usize, UnboundedSender<usize>);

    impl Drop for Leaves {
        fn drop(&mut self) {
            let _ = self.1.send(self.0);
        }
    }

    async fn come(
        clients: &mut Clients,
        number: usize,
        keeps: bool,
        gone: &UnboundedSender<usize>,
    ) {
        let room = clients.make_room().await.unwrap();
        let leaves = Leaves(number, gone.clone());
        clients.serve(room, |place| async move {
            let _leaves = leaves;
            if keeps {
                place.keep();
            }
            std::future::pending::<()>().await;
        });
        tokio::task::yield_now().await;
    }

    fn gone(receiver: &mut UnboundedReceiver<usize>) -> Vec<usize> {
        std::iter::from_fn(|| receiver.try_recv().ok()).collect()
    }

    #[tokio::test]
    async fn the_silent_make_room_and_the_others_do_not() {
        let (sender, mut receiver) = unbounded_channel();
        let mut clients = Clients::new(4);
        for (number, keeps) in [(0, true), (1, false), (2, true), (3, false)] {
            come(&mut clients, number, keeps, &sender).await;
        }
        assert!(gone(&mut receiver).is_empty());
        come(&mut clients, 4, true, &sender).await;
        assert_eq!(gone(&mut receiver), [1]);
        come(&mut clients, 5, false, &sender).await;
        assert_eq!(gone(&mut receiver), [3]);
        come(&mut clients, 6, true, &sender).await;
        assert_eq!(gone(&mut receiver), [5]);
        assert!(clients.make_room().await.is_none());
    }

    #[tokio::test]
    async fn nothing_is_kept_of_those_that_have_gone() {
        let mut clients = Clients::new(2);
        for _ in 0..100 {
            let room = clients.make_room().await.unwrap();
            clients.serve(room, |_place| async {});
            tokio::task::yield_now().await;
        }
        assert!(clients.silent.len() <= 4, "{}", clients.silent.len());
    }
}
