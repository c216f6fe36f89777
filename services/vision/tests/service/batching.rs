//! Which sub-images share a pass, and that sharing changes nothing.

use crate::role::{Role, assert_close, picture, request, split, values};
use idefics_kernels::Error;
use idefics_proto::vision::v1::EncodeRequest;
use idefics_vision::Config;
use tonic::Code;

/// Whole and split, one patch to sixteen, upright and lying.
fn requests() -> Vec<EncodeRequest> {
    vec![
        request(picture(1, 14, 14)),
        request(picture(2, 56, 56)),
        split(request(picture(3, 56, 28))),
        request(picture(4, 14, 56)),
        split(request(picture(5, 40, 50))),
        request(picture(6, 100, 30)),
    ]
}

/// Passes of the requests after one that keeps the engine busy, and the tokens of each.
async fn packed(config: Config, requests: Vec<EncodeRequest>) -> (Vec<Vec<usize>>, Vec<Vec<f32>>) {
    let mut role = Role::gated(config);
    let mut calls = vec![role.call(request(picture(99, 42, 42)))];
    assert_eq!(role.entered().await, [9]);
    for request in requests {
        calls.push(role.call_until_ready(request).await);
    }
    let (mut passes, mut tokens) = (Vec::new(), Vec::new());
    role.let_through();
    while role.num_ready() > 0 {
        tokio::select! {
            biased;
            pass = role.entered() => passes.push(pass),
            () = tokio::task::yield_now() => continue,
        }
        role.let_through();
    }
    for call in calls.into_iter().skip(1) {
        tokens.push(values(&call.await.unwrap().unwrap()));
    }
    (passes, tokens)
}

#[tokio::test]
async fn packed_pictures_get_the_tokens_they_get_alone() {
    let role = Role::open(Config::default());
    let mut alone = Vec::new();
    for request in requests() {
        alone.push(values(&role.encode(request).await.unwrap()));
    }
    // All in one pass; then three sub-images a pass, which parts the split pictures.
    for (max_batch_patches, num_passes) in [(4_900, 1), (192, 5)] {
        let (passes, tokens) = packed(Config { max_batch_patches, ..Config::default() }, requests()).await;
        assert_eq!((passes.len(), passes.concat().len()), (num_passes, 14));
        assert_eq!(tokens.len(), alone.len());
        for (found, expected) in tokens.iter().zip(&alone) {
            assert_close(found, expected);
        }
    }
}

#[tokio::test]
async fn first_come_is_first_served() {
    // Two sub-images a pass. The split picture, 4 x 4 and 16 patches, is not passed over for the small ones behind it.
    let mut requests = vec![split(request(picture(1, 56, 56)))];
    requests.extend((1..=4).map(|n| request(picture(1 + u64::from(n), 14 * n, 14))));
    let (passes, _) = packed(Config { max_batch_patches: 128, ..Config::default() }, requests).await;
    assert_eq!(passes, [vec![4, 4], vec![4, 4], vec![16, 1], vec![2, 3], vec![4]]);
}

#[tokio::test]
async fn failed_pass_fails_its_pictures_alone() {
    // One sub-image a pass.
    let mut role = Role::gated(Config { max_batch_patches: 16, ..Config::default() });
    let failing = role.call(request(picture(1, 14, 14)));
    role.entered().await;
    let behind = role.call_until_ready(request(picture(2, 28, 14))).await;
    role.fail(Error::shape("vision pass", "told to"));
    let status = failing.await.unwrap().unwrap_err();
    assert!(status.code() == Code::Internal && status.message().contains("told to"), "{status}");
    role.open_gate();
    assert!(behind.await.unwrap().is_ok());
    assert!(!role.encode(request(picture(1, 14, 14))).await.unwrap().cached);
}

#[tokio::test]
async fn device_fault_makes_the_role_unavailable() {
    let mut role = Role::gated(Config { max_batch_patches: 16, ..Config::default() });
    let failing = role.call(request(picture(1, 14, 14)));
    role.entered().await;
    let behind = role.call_until_ready(request(picture(2, 28, 14))).await;
    role.fail(Error::Device("told to".into()));
    // The picture that may have caused it is not sent on to another replica; those that only met it are.
    assert_eq!(failing.await.unwrap().unwrap_err().code(), Code::Internal);
    for call in [behind, role.call(request(picture(3, 14, 14)))] {
        assert_eq!(call.await.unwrap().unwrap_err().code(), Code::Unavailable);
    }
    role.ended().await;
    assert_eq!(role.get_info().await.unwrap_err().code(), Code::Unavailable);
    assert_eq!((role.num_ready(), role.num_queued()), (0, 0));
}
