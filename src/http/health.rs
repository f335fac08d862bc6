//! `/healthz` and `/readyz` over HTTP, in flannel's words.

use std::future::ready;
use std::net::SocketAddr;

use hyper::{Method, StatusCode};
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::server::{self, Answer};
use crate::condition::State;
use crate::error::Result;

/// Takes the address.
///
/// # Errors
/// If it cannot be had.
pub(crate) async fn listen(address: SocketAddr) -> Result<TcpListener> {
    server::listen(address, "health", "--healthz-port").await
}

/// Answers for ever.
pub(crate) async fn serve(listener: TcpListener, condition: watch::Receiver<State>) {
    let respond = move |request: hyper::Request<_>| {
        ready(respond(
            request.method(),
            request.uri().path(),
            &condition.borrow(),
        ))
    };
    server::serve(listener, respond).await;
}

fn respond(method: &Method, path: &str, state: &State) -> Answer {
    let (is_well, text) = match path {
        "/healthz" => (state.is_alive(), "flanneld is running"),
        "/readyz" => (state.is_ready && state.is_alive(), "flanneld is ready"),
        _ => return server::not_found(),
    };
    if !server::is_allowed(method) {
        return server::not_allowed();
    }
    match is_well {
        true => server::plain(StatusCode::OK, text),
        false => server::plain(StatusCode::SERVICE_UNAVAILABLE, unready(state)),
    }
}

/// flannel's words, and what the node waits for.
fn unready(state: &State) -> String {
    let text = "flanneld is not ready yet";
    match state.trouble() {
        Some(trouble) => format!("{text}: {trouble}"),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::server::tests::request;
    use super::*;
    use crate::condition::{Condition, Need};

    async fn start() -> (SocketAddr, Condition) {
        let listener = listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let condition = Condition::new();
        tokio::spawn(serve(listener, condition.subscribe()));
        (address, condition)
    }

    #[tokio::test]
    async fn answers_are_flannels() {
        let (address, condition) = start().await;
        let get = async |path| request(address, "GET", path).await;
        let answer = |status, body: &str| (status, body.to_owned());
        assert_eq!(get("/healthz").await, answer(200, "flanneld is running"));
        let not_yet = answer(503, "flanneld is not ready yet");
        assert_eq!(get("/readyz").await, not_yet);
        condition.lack(Need::Store, "the store is unreachable");
        let why = answer(503, "flanneld is not ready yet: the store is unreachable");
        assert_eq!(get("/readyz").await, why);
        condition.serve("node n".to_owned(), true);
        // What is lacking later does not end what pods have.
        assert_eq!(get("/readyz").await, answer(200, "flanneld is ready"));
        assert_eq!(get("/readyz?x=1").await, answer(200, "flanneld is ready"));
        for path in ["/", "/healthz/", "/metrics"] {
            assert_eq!(get(path).await.0, 404, "{path}");
        }
        condition.have(Need::Store);
        condition.lack(Need::DataPath, "worker-0 hangs");
        let why = answer(503, "flanneld is not ready yet: worker-0 hangs");
        assert_eq!(get("/healthz").await, why);
        assert_eq!(get("/readyz").await, why);
        condition.have(Need::DataPath);
        condition.end();
        assert_eq!(get("/readyz").await, not_yet);
        assert_eq!(request(address, "HEAD", "/readyz").await, answer(503, ""));
        assert_eq!(request(address, "HEAD", "/healthz").await, answer(200, ""));
        assert_eq!(request(address, "POST", "/healthz").await.0, 405);
        assert_eq!(request(address, "POST", "/nothing").await.0, 404);
    }
}
