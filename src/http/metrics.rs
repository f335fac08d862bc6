//! `/metrics`, for Prometheus.

use std::fmt;
use std::net::SocketAddr;

use hyper::header::{ACCEPT, VARY};
use hyper::http::{HeaderValue, request};
use hyper::{Method, StatusCode};
use tokio::net::TcpListener;
use tracing::error;

use super::server::{self, Answer};
use crate::error::Result;
use crate::metrics::Format;

/// Who knows the metrics.
pub(crate) trait Source: Clone + Send + Sync + 'static {
    /// The metrics in this format.
    ///
    /// # Errors
    /// If the metrics are none by the format's rules.
    fn scrape(
        &self,
        format: Format,
    ) -> impl Future<Output = std::result::Result<String, fmt::Error>> + Send;
}

/// Takes the address.
///
/// # Errors
/// If it cannot be had.
pub(crate) async fn listen(address: SocketAddr) -> Result<TcpListener> {
    server::listen(address, "metrics", "--metrics").await
}

/// Answers for ever.
pub(crate) async fn serve(listener: TcpListener, source: impl Source) {
    server::serve(listener, move |request| {
        let (source, (head, _)) = (source.clone(), request.into_parts());
        async move { respond(&head, &source).await }
    })
    .await;
}

async fn respond(head: &request::Parts, source: &impl Source) -> Answer {
    if head.uri.path() != "/metrics" {
        return server::not_found();
    }
    if !server::is_allowed(&head.method) {
        return server::not_allowed();
    }
    let accept = head.headers.get_all(ACCEPT).into_iter();
    let accept: Vec<_> = accept.filter_map(|value| value.to_str().ok()).collect();
    let format = Format::accepted(&accept.join(","));
    let written = match head.method {
        // What it would be is not worth the effort.
        Method::HEAD => Ok(String::new()),
        _ => source.scrape(format).await,
    };
    match written {
        Ok(written) => {
            let mut answer = server::answer(StatusCode::OK, format.content_type(), written);
            let vary = HeaderValue::from_static("Accept");
            answer.headers_mut().insert(VARY, vary);
            answer
        }
        Err(reason) => {
            error!("the metrics cannot be written: {reason}");
            server::plain(
                StatusCode::INTERNAL_SERVER_ERROR,
                "the metrics cannot be written\n",
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::server::tests::{ask, request};
    use super::*;

    #[derive(Clone)]
    struct Words;

    impl Source for Words {
        async fn scrape(&self, format: Format) -> std::result::Result<String, fmt::Error> {
            Ok(format!("{format:?}\n"))
        }
    }

    #[tokio::test]
    async fn one_page_is_there_in_two_formats() {
        let listener = listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, Words));
        let text = (200, "Text\n".to_owned());
        assert_eq!(request(address, "GET", "/metrics").await, text);
        assert_eq!(request(address, "GET", "/metrics?x=1").await, text);
        assert_eq!(request(address, "HEAD", "/metrics").await.0, 200);
        assert_eq!(request(address, "POST", "/metrics").await.0, 405);
        for path in ["/", "/metrics/", "/healthz"] {
            assert_eq!(request(address, "GET", path).await.0, 404, "{path}");
        }
        let question = "GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: text/plain;q=0.1\r\n\
                        Accept: application/openmetrics-text;version=1.0.0\r\n\r\n";
        let answer = ask(address, question).await.to_ascii_lowercase();
        assert!(answer.ends_with("openmetrics\n"), "{answer}");
        let kind = "content-type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n";
        assert!(answer.contains(kind), "{answer}");
    }
}
