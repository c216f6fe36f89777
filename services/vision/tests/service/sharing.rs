//! Nothing is computed twice: calls at the same time share the work, later ones find it done.

use crate::{
    checkpoint::{HIDDEN, LATENTS},
    role::{Role, picture, request, shipped, split, until, values},
};
use idefics_common::status;
use idefics_proto::vision::v1::EncodeTimings;
use idefics_vision::Config;
use std::{sync::atomic::Ordering, time::Duration};
use tonic::Code;

/// Of a whole picture in f32, the CPU's activation type.
const TOKENS_BYTES: usize = LATENTS * HIDDEN * 4;

#[tokio::test]
async fn calls_for_one_picture_share_a_pass() {
    let mut role = Role::gated(Config::default());
    let image = picture(1, 56, 42);
    let calls: Vec<_> = (0..8).map(|_| role.call(shipped(request(image.clone())))).collect();
    assert_eq!(role.entered().await, [12]);
    until(|| role.num_coalesced() == 7).await;
    assert_eq!((role.num_queued(), role.num_ready()), (1, 1));
    role.open_gate();
    for call in calls {
        let response = call.await.unwrap().unwrap();
        assert_eq!((response.tokens, response.cached, response.image_tokens.is_none()), (LATENTS as u32, false, true));
        let sub_image = response.sub_images[0];
        assert_eq!((response.sub_images.len(), sub_image.width, sub_image.height, sub_image.patches), (1, 56, 42, 12));
    }
    assert_eq!((role.num_passes(), role.num_queued()), (1, 0));
    let shipped = role.decoder.shipped.lock().unwrap();
    assert_eq!((shipped.len(), &*shipped[0].key), (8, blake3::hash(&image).as_bytes().as_slice()));
    let tensor = shipped[0].image_tokens.as_ref().unwrap();
    assert_eq!((tensor.shape.as_slice(), tensor.data.len()), ([LATENTS as u64, HIDDEN as u64].as_slice(), TOKENS_BYTES));
    assert!(shipped.iter().all(|put| *put == shipped[0]));
}

#[tokio::test]
async fn one_key_for_two_pictures_or_options_mixes_nothing() {
    let mut role = Role::gated(Config::default());
    let whole = request(picture(1, 56, 56));
    let mut smaller = whole.clone();
    smaller.options.as_mut().unwrap().longest_edge = 42;
    let mut other_bytes = request(picture(2, 56, 56));
    other_bytes.key = whole.key.clone();
    let mut expected = Vec::new();
    let requests = [whole.clone(), split(whole), smaller, other_bytes];
    // The first call keeps the engine busy while the others arrive.
    let mut calls = vec![role.call(requests[0].clone())];
    role.entered().await;
    for request in &requests[1..] {
        calls.push(role.call_until_ready(request.clone()).await);
    }
    role.open_gate();
    for call in calls {
        let response = call.await.unwrap().unwrap();
        assert!(!response.cached && expected.iter().all(|tokens| *tokens != values(&response)));
        expected.push(values(&response));
    }
    assert_eq!((role.num_coalesced(), role.stats.num_sub_images.load(Ordering::Relaxed)), (0, 8));
    for (request, expected) in requests.into_iter().zip(expected) {
        let response = role.encode(request).await.unwrap();
        assert!(response.cached && values(&response) == expected);
    }
}

#[tokio::test]
async fn finished_work_is_shipped_again() {
    let role = Role::open(Config::default());
    let request = split(request(picture(1, 56, 56)));
    let first = role.encode(request.clone()).await.unwrap();
    assert!(!first.cached && first.timings.unwrap().encode_ms > 0.0);
    let returned = role.encode(request.clone()).await.unwrap();
    assert_eq!((returned.cached, returned.timings.unwrap()), (true, EncodeTimings::default()));
    let again = role.encode(shipped(request)).await.unwrap();
    assert!(again.cached && again.timings.unwrap().ship_ms > 0.0);
    assert_eq!(again.timings.unwrap(), EncodeTimings { ship_ms: again.timings.unwrap().ship_ms, ..EncodeTimings::default() });
    assert_eq!((again.sub_images, again.tokens, &returned.image_tokens), (first.sub_images, first.tokens, &first.image_tokens));
    assert_eq!((role.num_passes(), role.stats.num_cached_calls.load(Ordering::Relaxed)), (1, 2));
    let shipped = role.decoder.shipped.lock().unwrap();
    assert_eq!((shipped.len(), &shipped[0].image_tokens), (1, &first.image_tokens));
}

#[tokio::test]
async fn cache_evicts_by_bytes() {
    let role = Role::open(Config { output_cache_bytes: 2 * TOKENS_BYTES, ..Config::default() });
    let cached = async |seed| role.encode(request(picture(seed, 14, 14))).await.unwrap().cached;
    assert!(!cached(1).await && !cached(2).await && cached(1).await);
    assert!(!cached(3).await && cached(1).await && !cached(2).await);
    assert_eq!(role.stats.output_cache_bytes.load(Ordering::Relaxed), 2 * TOKENS_BYTES);
    // Five times a whole picture's tokens have no room, and cost nobody theirs.
    assert!(!role.encode(split(request(picture(4, 14, 14)))).await.unwrap().cached);
    assert!(cached(2).await);
}

#[tokio::test]
async fn cache_may_be_off() {
    let role = Role::open(Config { output_cache_bytes: 0, ..Config::default() });
    let first = role.encode(request(picture(1, 14, 14))).await.unwrap();
    let second = role.encode(request(picture(1, 14, 14))).await.unwrap();
    assert!(!second.cached && second.image_tokens == first.image_tokens);
    assert_eq!(role.num_passes(), 2);
}

#[tokio::test]
async fn refusing_decoder_fails_its_caller_alone() {
    let mut role = Role::gated(Config::default());
    *role.decoder.refusal.lock().unwrap() = Some(status::resource_exhausted("store is full", Duration::from_secs(1)));
    let request = request(picture(1, 28, 28));
    let refused = role.call(shipped(request.clone()));
    let others = [role.call(request.clone()), role.call(request.clone())];
    role.entered().await;
    until(|| role.num_coalesced() == 2).await;
    role.open_gate();
    let status = refused.await.unwrap().unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::ResourceExhausted, "store is full"));
    for other in others {
        assert_eq!(other.await.unwrap().unwrap().tokens, LATENTS as u32);
    }
    *role.decoder.refusal.lock().unwrap() = None;
    assert!(role.encode(shipped(request)).await.unwrap().cached);
    assert_eq!((role.num_passes(), role.decoder.shipped.lock().unwrap().len()), (1, 1));
}

#[tokio::test]
async fn broken_picture_fails_every_caller_and_is_not_kept() {
    let role = Role::open(Config::default());
    let mut request = request(picture(1, 28, 28));
    request.image.truncate(60);
    for call in [role.call(request.clone()), role.call(request.clone()), role.call(request)] {
        let status = call.await.unwrap().unwrap_err();
        assert!(status::field_violations(&status).contains_key("image"), "{status}");
    }
    assert_eq!((role.num_passes(), role.num_queued()), (0, 0));
}
