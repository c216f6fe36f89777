//! What the vision role records: how many pictures wait, where their tokens came from, and how long each stage took.

use idefics_proto::vision::v1::EncodeTimings;
use metrics::{Gauge, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use std::time::Duration;

/// Describes every metric of this role.
pub(crate) fn describe() {
    describe_gauge!("idefics_vision_images_queued", "Pictures admitted and not yet encoded");
    describe_gauge!("idefics_vision_images_ready", "Of these, pictures that wait for a pass or take part in one");
    describe_gauge!("idefics_vision_output_cache_bytes", "Image tokens kept for later calls");
    describe_counter!(
        "idefics_vision_images_total",
        "Pictures computed, and calls that were coalesced with one under way or answered from the cache"
    );
    describe_counter!("idefics_vision_images_refused_total", "Pictures refused because the queue was full");
    describe_counter!("idefics_vision_images_abandoned_total", "Pictures given up because nobody waited for them any more");
    describe_histogram!("idefics_vision_preprocess_seconds", "Decoding, resizing and cutting a picture");
    describe_histogram!("idefics_vision_queue_seconds", "Waiting of a picture for preprocessing and for its pass");
    describe_histogram!("idefics_vision_encode_seconds", "A picture's passes");
    describe_histogram!("idefics_vision_ship_seconds", "Image tokens of a picture on their way to a decoder");
    describe_histogram!("idefics_vision_pass_seconds", "A forward pass");
    describe_histogram!("idefics_vision_pass_sub_images_size", "Sub-images in a forward pass");
    describe_histogram!("idefics_vision_pass_patches_size", "Patches in a forward pass");
}

/// Pictures admitted and not yet encoded.
pub(crate) fn images_queued() -> Gauge {
    gauge!("idefics_vision_images_queued")
}

/// Of these, pictures that the engine has.
pub(crate) fn images_ready() -> Gauge {
    gauge!("idefics_vision_images_ready")
}

pub(crate) fn output_cache(bytes: usize) {
    gauge!("idefics_vision_output_cache_bytes").set(bytes as f64);
}

pub(crate) fn refused() {
    counter!("idefics_vision_images_refused_total").increment(1);
}

pub(crate) fn abandoned(images: u64) {
    counter!("idefics_vision_images_abandoned_total").increment(images);
}

/// Where the tokens of a call came from, if not from work of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Coalesced,
    Cached,
}

/// Counts a call that needs no work of its own.
pub(crate) fn answered(source: Source) {
    let label = match source {
        Source::Coalesced => "coalesced",
        Source::Cached => "cached",
    };
    counter!("idefics_vision_images_total", "source" => label).increment(1);
}

/// Records a picture that was computed, whichever of its calls saw it done, if any.
pub(crate) fn computed(timings: &EncodeTimings) {
    counter!("idefics_vision_images_total", "source" => "computed").increment(1);
    histogram!("idefics_vision_preprocess_seconds").record(timings.preprocess_ms / 1e3);
    histogram!("idefics_vision_queue_seconds").record(timings.queue_ms / 1e3);
    histogram!("idefics_vision_encode_seconds").record(timings.encode_ms / 1e3);
}

pub(crate) fn shipped(elapsed: Duration) {
    histogram!("idefics_vision_ship_seconds").record(elapsed);
}

/// Records a forward pass.
pub(crate) fn pass(elapsed: Duration, sub_images: usize, patches: usize) {
    histogram!("idefics_vision_pass_seconds").record(elapsed);
    histogram!("idefics_vision_pass_sub_images_size").record(sub_images as f64);
    histogram!("idefics_vision_pass_patches_size").record(patches as f64);
}
