//! In front of the service: a request is named and gets its permit before its body is read. From then on its deadline counts,
//! and its answer is named, also where it never reaches its method.
//!
//! A body is up to `gateway.max_request_bytes` long and connections are many, so a gateway that decoded first and refused
//! then would hold as many bodies as anyone cares to send.

use crate::{call::Call, failure::RETRY_AFTER, metrics};
use bytes::Bytes;
use futures::future::BoxFuture;
use http_body::{Frame, SizeHint};
use idefics_common::{serve::Shutdown, status};
use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, Sleep, sleep},
};
use tonic::{
    Status,
    body::Body,
    codegen::{Service, http},
    server::NamedService,
};

/// Methods whose requests are long or take work. The others ask about the gateway itself and are answered when it is full.
const ADMITTED_METHODS: [&str; 4] = ["Chat", "Generate", "EncodeImages", "Tokenize"];
/// Longest body of a request of another method, all of which are empty messages.
const MAX_OTHER_BYTES: usize = 4096;

/// The right to be uploaded and to run. Given back when the last clone is dropped.
pub(crate) type Permit = Arc<OwnedSemaphorePermit>;

/// What admission adds to a request.
#[derive(Clone)]
pub(crate) struct Admitted {
    pub(crate) call: Call,
    pub(crate) permit: Permit,
}

/// Decides which requests may come in. Clones share the permits.
#[derive(Clone)]
pub(crate) struct Admission {
    permits: Arc<Semaphore>,
    max_concurrent_requests: usize,
    shutdown: Shutdown,
}

impl Admission {
    pub(crate) fn new(max_concurrent_requests: usize, shutdown: Shutdown) -> Self {
        Self { permits: Arc::new(Semaphore::new(max_concurrent_requests)), max_concurrent_requests, shutdown }
    }

    /// A permit, or why there is none; never waits.
    ///
    /// # Errors
    /// `UNAVAILABLE` while the process drains, `RESOURCE_EXHAUSTED` where as many requests run as may.
    pub(crate) fn admit(&self, call: Call) -> Result<Admitted, Status> {
        if self.shutdown.stop_accepting.is_cancelled() {
            return Err(status::unavailable("the gateway is shutting down; ask another", RETRY_AFTER));
        }
        match Arc::clone(&self.permits).try_acquire_owned() {
            Ok(permit) => Ok(Admitted { call, permit: Arc::new(permit) }),
            Err(_) => {
                metrics::refused();
                let limit = self.max_concurrent_requests;
                Err(status::resource_exhausted(format!("{limit} requests are running, which is the limit; retry later"), RETRY_AFTER))
            }
        }
    }
}

/// A server behind admission.
#[derive(Clone)]
pub struct AdmissionServer<S> {
    server: S,
    admission: Admission,
    stalled_client: Duration,
}

impl<S> AdmissionServer<S> {
    pub(crate) fn new(server: S, admission: Admission, stalled_client: Duration) -> Self {
        Self { server, admission, stalled_client }
    }
}

impl<S: NamedService> NamedService for AdmissionServer<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for AdmissionServer<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible, Future: Send + 'static>,
{
    type Response = S::Response;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.server.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let method = request.uri().path().rsplit('/').next().unwrap_or_default();
        let call = Call::new(request.headers());
        let mut max_bytes = MAX_OTHER_BYTES;
        if ADMITTED_METHODS.contains(&method) {
            match self.admission.admit(call.clone()) {
                Ok(admitted) => request.extensions_mut().insert(admitted),
                Err(status) => return Box::pin(async move { Ok(call.sign(status).into_http()) }),
            };
            // The decoder of messages has the limit.
            max_bytes = usize::MAX;
        }
        let stalled_client = self.stalled_client;
        let request = request.map(|body| Body::new(Upload { body, max_bytes, stalled_client, pause: Box::pin(sleep(stalled_client)) }));
        let answer = self.server.call(request);
        Box::pin(async move {
            let answer = async { Ok(answer.await.unwrap_or_else(|never| match never {})) };
            Ok(call.within_deadline(answer).await.map_or_else(|status| call.sign(status).into_http(), |answer| call.name(answer)))
        })
    }
}

/// A request's body, which fails when the client pauses for too long in the middle of it.
struct Upload {
    body: Body,
    /// What may still come.
    max_bytes: usize,
    stalled_client: Duration,
    pause: Pin<Box<Sleep>>,
}

impl http_body::Body for Upload {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) {
            let next_by = Instant::now() + self.stalled_client;
            self.pause.as_mut().reset(next_by);
            let bytes = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()).map_or(0, Bytes::len);
            return match self.max_bytes.checked_sub(bytes) {
                Some(left) => {
                    self.max_bytes = left;
                    Poll::Ready(frame)
                }
                None => {
                    Poll::Ready(Some(Err(Status::out_of_range("the request is longer than any of its kind; send the expected message"))))
                }
            };
        }
        ready!(self.pause.as_mut().poll(context));
        Poll::Ready(Some(Err(stalled("sent", self.stalled_client))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The status for a client that has not `done` anything for the given time.
pub(crate) fn stalled(done: &str, limit: Duration) -> Status {
    let limit_ms = limit.as_millis();
    Status::deadline_exceeded(format!("the client has {done} nothing for {limit_ms} ms; be faster or raise gateway.stalled_client_ms"))
}
