//! Callers that go: before, between and during passes.

use crate::role::{Role, assert_close, cancel, picture, request, split, until, values};
use idefics_vision::{
    Config,
    preprocess::{ImageLimits, PreprocessError, PreprocessOptions, preprocess_while},
};
use std::sync::atomic::{AtomicUsize, Ordering};
use tonic::Code;
use tonic_types::StatusExt;

fn num_abandoned(role: &Role) -> u64 {
    role.stats.num_abandoned_images.load(Ordering::Relaxed)
}

fn num_computed(role: &Role) -> u64 {
    role.stats.num_computed_images.load(Ordering::Relaxed)
}

#[tokio::test]
async fn others_get_what_the_first_caller_left() {
    let mut role = Role::gated(Config::default());
    let request = request(picture(1, 28, 28));
    let first = role.call(request.clone());
    role.entered().await;
    let second = role.call(request.clone());
    let third = role.call(request);
    until(|| role.num_coalesced() == 2).await;
    cancel(first).await;
    cancel(third).await;
    role.open_gate();
    assert!(!second.await.unwrap().unwrap().cached);
    assert_eq!((role.num_passes(), num_abandoned(&role)), (1, 0));
}

#[tokio::test]
async fn picture_dropped_while_queued_is_never_computed() {
    let mut role = Role::gated(Config::default());
    let busy = role.call(request(picture(1, 14, 14)));
    role.entered().await;
    let shared = request(picture(2, 28, 28));
    let dropped = [role.call_until_ready(shared.clone()).await, role.call(shared.clone())];
    until(|| role.num_coalesced() == 1).await;
    for call in dropped {
        cancel(call).await;
    }
    let kept = role.call_until_ready(request(picture(3, 42, 14))).await;
    role.let_through();
    assert_eq!(role.entered().await, [3]);
    role.open_gate();
    assert!(busy.await.unwrap().is_ok() && kept.await.unwrap().is_ok());
    assert_eq!((num_abandoned(&role), role.num_passes(), role.num_queued()), (1, 2, 0));
    assert!(!role.encode(shared).await.unwrap().cached);
}

#[tokio::test]
async fn complete_output_is_kept_though_its_caller_went_during_the_pass() {
    let mut role = Role::gated(Config::default());
    let (gone, kept) = (request(picture(2, 28, 28)), request(picture(3, 42, 14)));
    let busy = role.call(request(picture(1, 14, 14)));
    role.entered().await;
    let calls = (role.call_until_ready(gone.clone()).await, role.call_until_ready(kept.clone()).await);
    role.let_through();
    assert_eq!(role.entered().await, [4, 3]);
    cancel(calls.0).await;
    role.open_gate();
    assert!(busy.await.unwrap().is_ok());
    let beside = calls.1.await.unwrap().unwrap();
    let found = role.encode(gone.clone()).await.unwrap();
    assert!(found.cached);
    assert_eq!((role.num_passes(), role.num_queued()), (2, 0));
    // It was not given up: it counts as computed, though nobody saw it done.
    assert_eq!((num_computed(&role), num_abandoned(&role)), (3, 0));
    let undisturbed = Role::open(Config::default());
    assert_close(&values(&beside), &values(&undisturbed.encode(kept).await.unwrap()));
    assert_close(&values(&found), &values(&undisturbed.encode(gone).await.unwrap()));
}

#[tokio::test]
async fn incomplete_output_is_dropped_with_its_last_caller() {
    // One sub-image a pass.
    let mut role = Role::gated(Config { max_batch_patches: 16, ..Config::default() });
    let request_split = split(request(picture(1, 56, 56)));
    let gone = role.call(request_split.clone());
    assert_eq!(role.entered().await, [4]);
    role.let_through();
    assert_eq!(role.entered().await, [4]);
    cancel(gone).await;
    let kept = role.call_until_ready(request(picture(2, 14, 14))).await;
    role.let_through();
    assert_eq!(role.entered().await, [1]);
    role.open_gate();
    assert!(kept.await.unwrap().is_ok());
    assert_eq!((num_computed(&role), num_abandoned(&role), role.num_passes()), (1, 1, 3));
    let computed = role.encode(request_split).await.unwrap();
    assert_eq!((computed.cached, role.num_passes()), (false, 8));
}

#[tokio::test]
async fn full_queue_refuses_at_once_and_cancelled_callers_make_room() {
    let mut role = Role::gated(Config { max_queued_images: 3, max_preprocessed_images: 2, preprocess_threads: 1, ..Config::default() });
    let (busy, ready, waiting, late) =
        (request(picture(1, 14, 14)), request(picture(2, 14, 14)), request(picture(3, 14, 14)), request(picture(4, 14, 14)));
    let busy_call = role.call(busy.clone());
    role.entered().await;
    let ready_call = role.call_until_ready(ready).await;
    let waiting_call = role.call(waiting);
    until(|| role.num_queued() == 3).await;
    let status = role.encode(late.clone()).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.get_details_retry_info().is_some());
    // Who asks for what is on its way takes no place.
    let joined = role.call(busy);
    until(|| role.num_coalesced() == 1).await;
    // The one that waits for memory gives its place back at once; the one in the engine does after the pass.
    cancel(waiting_call).await;
    assert_eq!((role.num_queued(), role.num_ready(), num_abandoned(&role)), (2, 2, 1));
    let late_call = role.call(late);
    until(|| role.num_queued() == 3).await;
    cancel(ready_call).await;
    role.open_gate();
    for call in [busy_call, joined, late_call] {
        assert!(call.await.unwrap().is_ok());
    }
    assert_eq!((role.num_passes(), num_abandoned(&role), role.num_queued(), role.num_ready()), (2, 2, 0, 0));
}

#[test]
fn preprocessing_stops_when_nobody_waits() {
    let image = picture(1, 56, 56);
    let options = PreprocessOptions { split: true, longest_edge: 56, shortest_edge: 14 };
    for questions in 0..6 {
        let asked = AtomicUsize::new(0);
        let wanted = || asked.fetch_add(1, Ordering::Relaxed) < questions;
        let result = preprocess_while(wanted, &image, &options, 14, &ImageLimits::default());
        assert!(matches!(result, Err(PreprocessError::Abandoned)), "{questions}");
    }
    assert_eq!(preprocess_while(|| true, &image, &options, 14, &ImageLimits::default()).unwrap().len(), 5);
}
