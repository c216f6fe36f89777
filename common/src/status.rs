//! gRPC statuses with `google.rpc` details, and how to read them.

use std::{collections::HashMap, time::Duration};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, PreconditionViolation, StatusExt};

/// Violation type of a decoder that lacks an image's tokens; the subject is the key in hexadecimal.
pub const IMAGE_TOKENS_MISSING: &str = "IMAGE_TOKENS_MISSING";
/// Violation type of roles that serve different checkpoints.
pub const MODEL_FINGERPRINT: &str = "MODEL_FINGERPRINT";
/// Violation type of a vision role that is not configured to ship to a decoder; the subject is the decoder's URI.
pub const SHIP_TO_NOT_ALLOWED: &str = "SHIP_TO_NOT_ALLOWED";

/// One thing that is wrong with a request: the field's path and what to change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Path in the request, as in `messages[0].content[1].image.data`; empty for the request as a whole.
    pub field: String,
    /// What was expected, what was found, what to change.
    pub description: String,
}

impl Violation {
    /// A violation of `field`.
    pub fn new(field: impl Into<String>, description: impl Into<String>) -> Self {
        Self { field: field.into(), description: description.into() }
    }
}

/// Most violations in a status: statuses travel in headers, which proxies and clients bound.
const MAX_VIOLATIONS: usize = 33;

/// `INVALID_ARGUMENT` with a field violation each; of too many the first ones, and how many more there are.
pub fn invalid_argument(mut violations: Vec<Violation>) -> Status {
    if violations.len() > MAX_VIOLATIONS {
        let more = violations.len() - (MAX_VIOLATIONS - 1);
        violations.truncate(MAX_VIOLATIONS - 1);
        violations.push(Violation::new("", format!("{more} more problems")));
    }
    // One without a field is about the request as a whole.
    let described =
        violations.iter().map(|v| if v.field.is_empty() { v.description.clone() } else { format!("{}: {}", v.field, v.description) });
    let message = described.collect::<Vec<_>>().join("; ");
    let details = violations.into_iter().map(|v| FieldViolation::new(v.field, v.description)).collect::<Vec<_>>();
    Status::with_error_details(Code::InvalidArgument, message, ErrorDetails::with_bad_request(details))
}

/// `RESOURCE_EXHAUSTED` with RetryInfo.
pub fn resource_exhausted(message: impl Into<String>, retry_after: Duration) -> Status {
    Status::with_error_details(Code::ResourceExhausted, message, ErrorDetails::with_retry_info(Some(retry_after)))
}

/// `UNAVAILABLE` with RetryInfo: loading, draining, or a peer is down.
pub fn unavailable(message: impl Into<String>, retry_after: Duration) -> Status {
    Status::with_error_details(Code::Unavailable, message, ErrorDetails::with_retry_info(Some(retry_after)))
}

/// `FAILED_PRECONDITION` with a violation per subject.
pub fn failed_precondition(kind: &str, subjects: impl IntoIterator<Item = String>, message: impl Into<String>) -> Status {
    let message = message.into();
    let violations = subjects.into_iter().map(|s| PreconditionViolation::new(kind, s, message.clone())).collect::<Vec<_>>();
    Status::with_error_details(Code::FailedPrecondition, message, ErrorDetails::with_precondition_failure(violations))
}

/// `FAILED_PRECONDITION` because the caller's checkpoint is not ours.
pub fn wrong_fingerprint(ours: &str, theirs: &str) -> Status {
    let message = format!("this role serves the checkpoint {ours}, the request is for {theirs}; start all roles with the same --model");
    failed_precondition(MODEL_FINGERPRINT, [theirs.to_owned()], message)
}

/// Subjects of the precondition violations of `kind` in a status.
pub fn precondition_subjects(status: &Status, kind: &str) -> Vec<String> {
    let violations = status.get_details_precondition_failure().map(|failure| failure.violations).unwrap_or_default();
    violations.into_iter().filter(|v| v.r#type == kind).map(|v| v.subject).collect()
}

/// Field violations of a status, by field.
pub fn field_violations(status: &Status) -> HashMap<String, String> {
    let violations = status.get_details_bad_request().map(|bad| bad.field_violations).unwrap_or_default();
    violations.into_iter().map(|v| (v.field, v.description)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_violations_are_counted() {
        let status = invalid_argument((0..2000).map(|i| Violation::new(format!("sampling.logit_bias[{i}]"), "is too large")).collect());
        assert_eq!(field_violations(&status).len(), MAX_VIOLATIONS);
        assert!(status.message().ends_with("sampling.logit_bias[31]: is too large; 1968 more problems"), "{}", status.message());
    }

    #[test]
    fn violations_survive_the_wire_format() {
        let status = invalid_argument(vec![Violation::new("sampling.top_p", "is NaN, expected above 0 and up to 1")]);
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(field_violations(&status)["sampling.top_p"].contains("NaN"));
        let status = invalid_argument(vec![Violation::new("n", "is 0"), Violation::new("", "3 more problems are not listed")]);
        assert_eq!(status.message(), "n: is 0; 3 more problems are not listed");
        let status = failed_precondition(IMAGE_TOKENS_MISSING, ["ab".to_owned(), "cd".to_owned()], "put them first");
        assert_eq!(precondition_subjects(&status, IMAGE_TOKENS_MISSING), ["ab", "cd"]);
        assert!(precondition_subjects(&status, MODEL_FINGERPRINT).is_empty());
    }
}
