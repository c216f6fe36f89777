//! What a peer's error means for the caller, and whether another replica may do better.

use crate::replicas::{Replica, Role};
use idefics_common::status::{self, IMAGE_TOKENS_MISSING, MODEL_FINGERPRINT, SHIP_TO_NOT_ALLOWED, Violation};
use std::time::Duration;
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// When to come back after a peer was down.
pub(crate) const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Why a step of a request failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Another replica may do it; the status is for the caller if there is none.
    Elsewhere(Status),
    /// No replica will.
    Final(Status),
    /// The decoder lacks the tokens of these image keys, in hexadecimal.
    TokensMissing(Vec<String>),
}

impl Failure {
    /// The status for the caller.
    pub(crate) fn into_status(self) -> Status {
        match self {
            Self::Elsewhere(status) | Self::Final(status) => status,
            Self::TokensMissing(_) => status::unavailable("the decoder dropped the image tokens twice; retry later", RETRY_AFTER),
        }
    }

    /// A peer that did not answer in time.
    pub(crate) fn timeout<C>(replica: &Replica<C>, limit: Duration) -> Self {
        let message = format!("{} {} did not answer within {} ms; retry later", replica.role, replica.uri, limit.as_millis());
        Self::Elsewhere(status::unavailable(message, RETRY_AFTER))
    }

    /// What `replica` answered. `fields` are the paths of the picture that it was asked about.
    pub(crate) fn from_peer<C>(replica: &Replica<C>, answer: Status, fields: &[String]) -> Self {
        let (role, uri) = (replica.role, replica.uri.as_str());
        if is_unreachable(&answer) {
            replica.mark_down();
            tracing::warn!(%role, uri, code = ?answer.code(), cause = answer.message(), "call to a peer broke off");
            return Self::Elsewhere(status::unavailable(format!("{role} {uri} is not reachable; retry later"), RETRY_AFTER));
        }
        match answer.code() {
            Code::Unavailable | Code::Cancelled => {
                // It may drain, or its engine may have ended; the next request should not have to find out.
                replica.probe_soon();
                Self::Elsewhere(status::unavailable(format!("{role} {uri} is unavailable: {}", answer.message()), retry_after(&answer)))
            }
            Code::ResourceExhausted => {
                Self::Elsewhere(status::resource_exhausted(format!("{role} is full: {}", answer.message()), retry_after(&answer)))
            }
            Code::OutOfRange => Self::Final(Status::out_of_range(answer.message())),
            Code::DeadlineExceeded => Self::Final(Status::deadline_exceeded(format!("{role} {uri}: {}", answer.message()))),
            Code::FailedPrecondition => {
                let missing = status::precondition_subjects(&answer, IMAGE_TOKENS_MISSING);
                if !missing.is_empty() {
                    Self::TokensMissing(missing)
                } else if !status::precondition_subjects(&answer, MODEL_FINGERPRINT).is_empty() {
                    let message = format!("{role} {uri} has changed to another checkpoint; retry later");
                    Self::Elsewhere(status::unavailable(message, RETRY_AFTER))
                } else if let [decoder] = &status::precondition_subjects(&answer, SHIP_TO_NOT_ALLOWED)[..] {
                    tracing::error!(%role, uri, decoder, "peer is not configured to ship to the decoder");
                    let message = format!("{role} {uri} may not ship to {decoder}; add {decoder:?} to its vision.allowed_decoders");
                    Self::Elsewhere(Status::failed_precondition(message))
                } else {
                    unexpected(role, uri, &answer)
                }
            }
            Code::InvalidArgument => match picture_violations(&answer, fields) {
                violations if violations.is_empty() => unexpected(role, uri, &answer),
                violations => Self::Final(status::invalid_argument(violations)),
            },
            _ => unexpected(role, uri, &answer),
        }
    }
}

/// An answer that is nobody's fault outside; its words stay in the log.
fn unexpected(role: Role, uri: &str, answer: &Status) -> Failure {
    tracing::error!(%role, uri, code = ?answer.code(), cause = answer.message(), "peer failed");
    Failure::Final(Status::internal(format!("{role} {uri} failed; the logs have the cause under the request id")))
}

/// A status that no peer sent: the connection could not be made, or broke.
fn is_unreachable(status: &Status) -> bool {
    use std::error::Error;
    matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled) && status.source().is_some()
}

fn retry_after(status: &Status) -> Duration {
    status.get_details_retry_info().and_then(|info| info.retry_delay).unwrap_or(RETRY_AFTER)
}

/// Vision's violations under the names that the caller knows.
fn picture_violations(answer: &Status, fields: &[String]) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (field, what) in status::field_violations(answer) {
        match field.split_once('.') {
            _ if field == "image" => violations.extend(fields.iter().map(|path| Violation::new(path.as_str(), what.as_str()))),
            Some(("options", option)) => violations.push(Violation::new(format!("image_options.{option}"), what)),
            _ => {}
        }
    }
    violations
}
