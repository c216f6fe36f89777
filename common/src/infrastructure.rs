//! What every server answers besides its own services: health and reflection.
//!
//! Their streams have no end of their own. A watcher of health stays for as long as the server does, so these streams end
//! when a shutdown begins, where calls of the role's own services are waited for.

use crate::status;
use axum::Router;
use http::{HeaderMap, Request, Response};
use http_body::{Body, Frame};
use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::service::RoutesBuilder;
use tonic_health::{
    pb::health_server::{Health, HealthServer},
    server::HealthReporter,
};
use tower::ServiceBuilder;

/// Largest message that is read here: both protocols ask with names of services and files.
const MAX_MESSAGE_BYTES: usize = 64 << 10;

/// The routes of health and reflection. Once `ended` is cancelled, their streams deliver what is there and end with
/// `UNAVAILABLE`.
pub(crate) fn routes(ended: CancellationToken) -> (HealthReporter, Router) {
    let (reporter, health) = health();
    let mut routes = RoutesBuilder::default();
    routes.add_service(health);
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(idefics_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    // Clients still use both versions of the protocol.
    if let (Ok(v1), Ok(v1alpha)) = (reflection().build_v1(), reflection().build_v1alpha()) {
        routes.add_service(v1.max_decoding_message_size(MAX_MESSAGE_BYTES));
        routes.add_service(v1alpha.max_decoding_message_size(MAX_MESSAGE_BYTES));
    }
    let requests_ended = ended.clone();
    let layer = ServiceBuilder::new()
        // Reflection goes on reading, and that keeps a connection open even where the answer has ended.
        .map_request(move |request: Request<axum::body::Body>| {
            request.map(|body| UntilEnded::wrap(body, &requests_ended, HeaderMap::default))
        })
        .map_response(move |response: Response<axum::body::Body>| response.map(|body| UntilEnded::wrap(body, &ended, shutting_down)));
    (reporter, routes.routes().into_axum_router().layer(layer))
}

fn health() -> (HealthReporter, HealthServer<impl Health>) {
    let (reporter, health) = tonic_health::server::health_reporter();
    (reporter, health.max_decoding_message_size(MAX_MESSAGE_BYTES))
}

fn shutting_down() -> HeaderMap {
    let mut trailers = HeaderMap::new();
    let status = status::unavailable("the server is shutting down; ask another", Duration::from_secs(1));
    // Cannot fail: what goes into a header is percent-encoded.
    drop(status.add_header(&mut trailers));
    trailers
}

/// A body that ends at its own end, or with other trailers when there is nothing to send and the end has come.
struct UntilEnded {
    body: axum::body::Body,
    ended: Pin<Box<WaitForCancellationFutureOwned>>,
    trailers: fn() -> HeaderMap,
    is_over: bool,
}

impl UntilEnded {
    fn wrap(body: axum::body::Body, ended: &CancellationToken, trailers: fn() -> HeaderMap) -> axum::body::Body {
        axum::body::Body::new(Self { body, ended: Box::pin(ended.clone().cancelled_owned()), trailers, is_over: false })
    }
}

impl Body for UntilEnded {
    type Data = bytes::Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        // What is there goes first: a watcher of health learns that the server does not serve any more.
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) {
            return Poll::Ready(frame);
        }
        ready!(self.ended.as_mut().poll(context));
        self.is_over = true;
        Poll::Ready(Some(Ok(Frame::trailers((self.trailers)()))))
    }

    fn is_end_stream(&self) -> bool {
        self.is_over || self.body.is_end_stream()
    }
}
