//! What the gateway records: what its callers experience.

use idefics_proto::gateway::v1 as pb;
use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use std::time::Duration;
use tonic::Code;

/// Describes every metric of this role.
pub(crate) fn describe() {
    describe_gauge!("idefics_gateway_requests_running", "Generations in progress");
    describe_counter!("idefics_gateway_requests_total", "Generations let in and ended, by gRPC code");
    describe_counter!("idefics_gateway_requests_refused_total", "Requests refused because as many ran as may");
    describe_histogram!("idefics_gateway_time_to_first_token_seconds", "From the receipt of a request to its first token");
    describe_histogram!("idefics_gateway_inter_token_seconds", "From one token to the next");
    describe_histogram!("idefics_gateway_request_seconds", "From the receipt of a request to its last token");
    describe_counter!("idefics_gateway_tokens_total", "Tokens by kind: prompt, image (of the prompt), cached (of the prompt), completion");
}

/// Counts a generation as running for as long as it lives.
pub(crate) struct Running(());

impl Running {
    pub(crate) fn new() -> Self {
        gauge!("idefics_gateway_requests_running").increment(1.0);
        Self(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        gauge!("idefics_gateway_requests_running").decrement(1.0);
    }
}

/// Records how a generation ended.
pub(crate) fn ended(code: Code) {
    counter!("idefics_gateway_requests_total", "code" => format!("{code:?}")).increment(1);
}

/// Records a request that was not let in.
pub(crate) fn refused() {
    counter!("idefics_gateway_requests_refused_total").increment(1);
}

pub(crate) fn first_token(since_receipt: Duration) {
    histogram!("idefics_gateway_time_to_first_token_seconds").record(since_receipt);
}

pub(crate) fn next_token(since_last: Duration) {
    histogram!("idefics_gateway_inter_token_seconds").record(since_last);
}

/// Records what a generation that succeeded took.
pub(crate) fn finished(usage: &pb::Usage, total: Duration) {
    histogram!("idefics_gateway_request_seconds").record(total);
    for (kind, tokens) in [
        ("prompt", usage.prompt_tokens),
        ("image", usage.image_tokens),
        ("cached", usage.cached_tokens),
        ("completion", usage.completion_tokens),
    ] {
        counter!("idefics_gateway_tokens_total", "kind" => kind).increment(tokens.into());
    }
}
