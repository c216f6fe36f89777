//! The section `gateway` of the configuration.

use idefics_common::{
    channel::{ChannelConfig, MAX_MESSAGE_BYTES},
    config::Validate,
};
use serde::{Deserialize, Serialize};

/// How the gateway finds its peers and what it lets callers ask for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GatewayConfig {
    /// URIs of the decoder replicas, as `http://127.0.0.1:50053`.
    pub decoders: Vec<String>,
    /// URIs of the vision replicas, as `http://127.0.0.1:50052`.
    pub visions: Vec<String>,
    /// How connections to them are made.
    pub channel: ChannelConfig,
    /// Requests that are received or run at the same time; one more ends with `RESOURCE_EXHAUSTED` before its body is read.
    /// Each holds up to `max_request_bytes`.
    pub max_concurrent_requests: usize,
    /// A client that pauses for this long in the middle of its request, or does not read its answer for this long, loses it.
    pub stalled_client_ms: u64,
    /// Tokens to generate for a request that does not say.
    pub default_max_new_tokens: u32,
    /// Pictures in a request.
    pub max_images: usize,
    /// Size of an encoded picture.
    pub max_image_bytes: usize,
    /// Size of a request, pictures included.
    pub max_request_bytes: usize,
    /// Text in a request, all parts together.
    pub max_text_bytes: usize,
    /// Turns in a conversation.
    pub max_messages: usize,
    /// Stop texts in a request.
    pub max_stop_texts: usize,
    /// Size of a stop text.
    pub max_stop_bytes: usize,
    /// A decoder that has not answered `Reserve` after this time is taken for unavailable.
    pub reserve_timeout_ms: u64,
    /// A vision replica that has not encoded and shipped a picture after this time is taken for unavailable.
    pub encode_timeout_ms: u64,
    /// A decoder that sends nothing for this long is taken for unavailable; a long prompt on a CPU takes minutes.
    pub token_timeout_ms: u64,
    /// How often peers are asked who they are.
    pub probe_interval_ms: u64,
    /// A peer that has not answered that question after this time is not ready.
    pub probe_timeout_ms: u64,
}

impl Default for GatewayConfig {
    fn default() -> Self {
        Self {
            decoders: Vec::new(),
            visions: Vec::new(),
            channel: ChannelConfig::default(),
            max_concurrent_requests: 64,
            stalled_client_ms: 60_000,
            default_max_new_tokens: 256,
            max_images: 16,
            max_image_bytes: 20 << 20,
            max_request_bytes: 64 << 20,
            max_text_bytes: 256 << 10,
            max_messages: 1024,
            max_stop_texts: 16,
            max_stop_bytes: 256,
            reserve_timeout_ms: 10_000,
            encode_timeout_ms: 3_600_000,
            token_timeout_ms: 3_600_000,
            probe_interval_ms: 2_000,
            probe_timeout_ms: 5_000,
        }
    }
}

impl Validate for GatewayConfig {
    fn problems(&self, problems: &mut Vec<String>) {
        let positive = [
            ("max_concurrent_requests", self.max_concurrent_requests as u64),
            ("stalled_client_ms", self.stalled_client_ms),
            ("default_max_new_tokens", u64::from(self.default_max_new_tokens)),
            ("max_image_bytes", self.max_image_bytes as u64),
            ("max_text_bytes", self.max_text_bytes as u64),
            ("max_messages", self.max_messages as u64),
            ("reserve_timeout_ms", self.reserve_timeout_ms),
            ("encode_timeout_ms", self.encode_timeout_ms),
            ("token_timeout_ms", self.token_timeout_ms),
            ("probe_interval_ms", self.probe_interval_ms),
            ("probe_timeout_ms", self.probe_timeout_ms),
        ];
        for (key, _) in positive.into_iter().filter(|(_, value)| *value == 0) {
            problems.push(format!("gateway.{key} is 0, expected 1 or more"));
        }
        if !(self.max_image_bytes..=MAX_MESSAGE_BYTES).contains(&self.max_request_bytes) {
            let (found, least) = (self.max_request_bytes, self.max_image_bytes);
            problems.push(format!(
                "gateway.max_request_bytes is {found}, expected from gateway.max_image_bytes, {least}, to {MAX_MESSAGE_BYTES}"
            ));
        }
        for (key, uris) in [("decoders", &self.decoders), ("visions", &self.visions)] {
            for uri in uris {
                if !uri.starts_with("http://") {
                    problems.push(format!("gateway.{key} has {uri:?}, expected a URI such as http://127.0.0.1:50052"));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_have_no_problems_and_bad_values_have_one_each() {
        let problems = |config: GatewayConfig| {
            let mut problems = Vec::new();
            config.problems(&mut problems);
            problems
        };
        assert_eq!(problems(GatewayConfig::default()), Vec::<String>::new());
        let bad = GatewayConfig {
            decoders: vec!["localhost:1".into()],
            max_concurrent_requests: 0,
            max_request_bytes: 1,
            ..GatewayConfig::default()
        };
        let found = problems(bad);
        assert_eq!(found.len(), 3, "{found:?}");
    }
}
