//! Sends image tokens to decoders: only to those that the configuration allows.

use idefics_common::channel::{ChannelConfig, GrpcChannel, MAX_MESSAGE_BYTES, remote};
use idefics_proto::decoder::v1::decoder_service_client::DecoderServiceClient;
use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

/// The address of the decoder in the same process.
pub const IN_PROCESS: &str = "in-process";

/// Clients of the decoders that tokens have been shipped to.
pub(crate) struct Shipper {
    allowed: Vec<String>,
    channel: ChannelConfig,
    clients: Mutex<HashMap<String, DecoderServiceClient<GrpcChannel>>>,
}

impl Shipper {
    pub(crate) fn new(allowed: Vec<String>, channel: ChannelConfig, in_process: Option<GrpcChannel>) -> Self {
        let clients = in_process.map(|channel| (IN_PROCESS.to_owned(), client(channel)));
        Self { allowed, channel, clients: Mutex::new(clients.into_iter().collect()) }
    }

    /// The client for `uri`, or why there is none.
    pub(crate) fn client(&self, uri: &str) -> Result<DecoderServiceClient<GrpcChannel>, String> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(uri) {
            return Ok(client.clone());
        }
        if !self.allowed.iter().any(|pattern| matches(pattern, uri)) {
            return Err(format!("{uri:?} is not among vision.allowed_decoders {:?}; add it there", self.allowed));
        }
        let client = client(remote(uri, &self.channel)?);
        clients.insert(uri.to_owned(), client.clone());
        Ok(client)
    }
}

fn client(channel: GrpcChannel) -> DecoderServiceClient<GrpcChannel> {
    DecoderServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES)
}

/// Whether `uri` is `pattern`, or a host of the domain of a pattern `http://*.domain:port`.
fn matches(pattern: &str, uri: &str) -> bool {
    let Some(domain) = pattern.strip_prefix("http://*") else { return uri.trim_end_matches('/') == pattern.trim_end_matches('/') };
    let host = uri.strip_prefix("http://").and_then(|rest| rest.strip_suffix(domain));
    host.is_some_and(|host| !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_allowed_decoders_are_connected_to() {
        assert!(matches("http://decoder-0:50053", "http://decoder-0:50053"));
        assert!(!matches("http://decoder-0:50053", "http://decoder-0:50054"));
        assert!(matches("http://*.decoder:50053", "http://decoder-7.decoder:50053"));
        for uri in [
            "http://.decoder:50053x",
            "http://evil/.decoder:50053",
            "http://user@evil#.decoder:50053",
            "http://.decoder:50053",
            "https://a.decoder:50053",
        ] {
            assert!(!matches("http://*.decoder:50053", uri), "{uri}");
        }
    }

    #[test]
    fn refusal_names_the_setting() {
        let shipper = Shipper::new(vec!["http://a:1".into()], ChannelConfig::default(), None);
        assert!(shipper.client("http://b:1").unwrap_err().contains("vision.allowed_decoders"));
        assert!(shipper.client(IN_PROCESS).is_err());
    }
}
