//! SIGTERM at moments when there is nothing to wait for.

use idefics_tests::{
    checkpoint,
    client::{channel, until, within_deadline},
    process::{Idefics, Server},
};
use std::{fs, process::Command};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

const IDEFICS: Idefics = Idefics(env!("CARGO_BIN_EXE_idefics-under-test"));

/// A drain time that no test waits for.
const AN_HOUR: (&str, &str) = ("IDEFICS_SERVER__DRAIN_MS", "3600000");

#[tokio::test]
async fn sigterm_during_a_load_ends_the_process_at_once() {
    let model = checkpoint::random();
    // Opening a pipe that nobody writes to lasts for ever.
    let pipe = model.file("tokenizer.json");
    fs::remove_file(&pipe).unwrap();
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    for role in ["serve", "decoder", "vision", "gateway"] {
        let peers = r#"["http://127.0.0.1:1"]"#;
        let env = [AN_HOUR, ("IDEFICS_GATEWAY__DECODERS", peers), ("IDEFICS_GATEWAY__VISIONS", peers)];
        let server = Server::start(IDEFICS, role, Some(model.path()), &env);
        until("the process listens", async || server.log().contains("listening").then_some(())).await;
        server.terminate();
        assert_eq!(server.wait().code(), Some(0), "{role}");
    }
}

#[tokio::test]
async fn sigterm_does_not_wait_for_watchers_of_health() {
    let server = Server::start(IDEFICS, "serve", None, &[AN_HOUR]).ready();
    let mut watcher = HealthClient::new(channel(&server).await).watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    let first = within_deadline(watcher.message()).await.unwrap().unwrap();
    assert_eq!(first.status(), ServingStatus::Serving);
    server.terminate();
    assert_eq!(within_deadline(watcher.message()).await.unwrap().unwrap().status(), ServingStatus::NotServing);
    assert_eq!(server.wait().code(), Some(0));
}
