//! Who calls and for how long: request id, deadline, time of receipt.

use std::time::Duration;
use tokio::time::Instant;
use tonic::{
    Status,
    body::Body,
    codegen::http::{self, HeaderMap},
};
use tonic_types::StatusExt;

const REQUEST_ID: &str = "x-request-id";
const GRPC_TIMEOUT: &str = "grpc-timeout";
const MAX_REQUEST_ID_BYTES: usize = 128;

/// What a request's headers say about it.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    /// The caller's `x-request-id`, or one of our own.
    pub(crate) request_id: String,
    /// Names the request to peers: unique even where a caller repeats its id.
    pub(crate) peer_request_id: String,
    pub(crate) received_at: Instant,
    pub(crate) deadline: Option<Instant>,
}

impl Call {
    pub(crate) fn new(headers: &HeaderMap) -> Self {
        let received_at = Instant::now();
        let given = headers.get(REQUEST_ID).and_then(|id| id.to_str().ok()).filter(|id| is_request_id(id));
        let (request_id, peer_request_id) = match given {
            Some(id) => (id.to_owned(), format!("{id}.{:08x}", rand::random::<u32>())),
            None => {
                let id = format!("{:032x}", rand::random::<u128>());
                (id.clone(), id)
            }
        };
        let timeout = headers.get(GRPC_TIMEOUT).and_then(|value| value.to_str().ok()).and_then(parse_timeout);
        // A timeout past what the clock can count is none.
        Self { request_id, peer_request_id, received_at, deadline: timeout.and_then(|timeout| received_at.checked_add(timeout)) }
    }

    /// What is left until the deadline, at most `limit`: the time that a peer gets.
    pub(crate) fn time_left(&self, limit: Duration) -> Duration {
        self.deadline.map_or(limit, |deadline| deadline.saturating_duration_since(Instant::now()).min(limit))
    }

    /// Runs `work` until the deadline.
    pub(crate) async fn within_deadline<T>(&self, work: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
        match self.deadline {
            None => work.await,
            Some(deadline) => tokio::time::timeout_at(deadline, work).await.unwrap_or_else(|_| Err(self.past_deadline())),
        }
    }

    pub(crate) fn past_deadline(&self) -> Status {
        Status::deadline_exceeded(format!("not finished {} ms after receipt, when the caller's deadline passed", self.elapsed_ms() as u64))
    }

    /// The answer with the request's name, be it a response or a status.
    pub(crate) fn name(&self, mut answer: http::Response<Body>) -> http::Response<Body> {
        if let Some(status) = Status::from_header_map(answer.headers()) {
            return self.sign(status).into_http();
        }
        if let Ok(id) = self.request_id.parse() {
            answer.headers_mut().insert(REQUEST_ID, id);
        }
        answer
    }

    /// The status with the request's name, as `google.rpc.RequestInfo` and as metadata.
    pub(crate) fn sign(&self, status: Status) -> Status {
        let mut details = status.get_error_details();
        details.set_request_info(self.request_id.as_str(), "");
        let mut metadata = status.metadata().clone();
        // Always: request ids are visible ASCII.
        if let Ok(id) = self.request_id.parse() {
            metadata.insert(REQUEST_ID, id);
        }
        Status::with_error_details_and_metadata(status.code(), status.message(), details, metadata)
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.received_at.elapsed()
    }

    pub(crate) fn elapsed_ms(&self) -> f64 {
        self.elapsed().as_secs_f64() * 1e3
    }
}

fn is_request_id(id: &str) -> bool {
    (1..=MAX_REQUEST_ID_BYTES).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic())
}

/// `grpc-timeout`: up to eight digits and a unit.
fn parse_timeout(value: &str) -> Option<Duration> {
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if !(1..=8).contains(&digits.len()) || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(key: &'static str, value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(key, value.parse().unwrap());
        headers
    }

    #[test]
    fn callers_request_id_is_kept_and_made_unique_for_peers() {
        let (first, second) = (Call::new(&headers(REQUEST_ID, "job-7")), Call::new(&headers(REQUEST_ID, "job-7")));
        assert_eq!((first.request_id.as_str(), second.request_id.as_str()), ("job-7", "job-7"));
        assert!(first.peer_request_id.starts_with("job-7.") && first.peer_request_id != second.peer_request_id);
    }

    #[test]
    fn odd_request_ids_are_replaced() {
        for id in ["", "two words", "tab\tin", &"x".repeat(129)] {
            let call = Call::new(&headers(REQUEST_ID, id));
            assert!(call.request_id.len() == 32 && call.request_id.bytes().all(|b| b.is_ascii_hexdigit()), "{id:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn deadline_is_read_from_grpc_timeout() {
        for (value, expected) in
            [("5S", Some(5_000)), ("250m", Some(250)), ("2M", Some(120_000)), ("x", None), ("", None), ("999999999S", None), ("-1S", None)]
        {
            let call = Call::new(&headers(GRPC_TIMEOUT, value));
            let left = call.deadline.map(|deadline| (deadline - call.received_at).as_millis());
            assert_eq!(left, expected, "{value:?}");
        }
    }
}
