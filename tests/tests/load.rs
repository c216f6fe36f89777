//! Many callers at once: every request ends exactly once, and nothing stays behind.

use idefics_load::{
    bench::Bench,
    client::Client,
    deployment::{Deployment, DeploymentConfig},
    observer::Observer,
    range::Range,
    runner::Load,
    summary::Slo,
    workload::{Kind, WorkloadConfig},
};
use idefics_tests::process::DEADLINE;
use std::{sync::Arc, time::Duration};

/// Conversations of every kind. Short prompts and long answers: sequences outgrow the blocks that they began with.
const WORKLOAD: WorkloadConfig = WorkloadConfig {
    seed: 17,
    text: 0.4,
    image: 0.25,
    split_image: 0.1,
    multi_turn: 0.25,
    prompt_words: Range { least: 1, most: 12 },
    output_tokens: Range { least: 1, most: 96 },
    picture_edge: Range { least: 32, most: 160 },
    shortest_edge: None,
    longest_edge: None,
    repeated_pictures: 0.5,
};

#[tokio::test]
async fn sixty_four_callers_are_all_answered_and_no_block_leaks() {
    // As many requests at once as the gateway takes, and fewer sequences and blocks than they need: some wait, some give way.
    let settings = [("decoder.max_num_seqs", "24"), ("decoder.kv_cache_bytes", "1500000")];
    let config = DeploymentConfig {
        bin: env!("CARGO_BIN_EXE_idefics-under-test").into(),
        model: None,
        settings: settings.map(|(key, value)| (key.to_owned(), value.to_owned())).to_vec(),
        log_folder: None,
    };
    let deployment = tokio::task::spawn_blocking(move || Deployment::start(&config)).await.unwrap().unwrap();
    let bench = Bench {
        client: Client::connect(&deployment.endpoint, DEADLINE).await.unwrap(),
        observer: Observer::of(Arc::new(deployment)),
        workload: WORKLOAD,
        slo: Slo::default(),
        settle: Duration::ZERO,
    };
    let (clients, conversations) = (64, 80);
    let run = bench.measure(conversations, 0, Load::Closed { concurrency: clients }).await.unwrap();

    // The driver counts an answer only if its stream has one start, as many tokens as were asked for, and one end.
    assert_eq!(run.problems(), Vec::<String>::new());
    let second_turns = run.by_kind[&Kind::FirstTurn].sent;
    assert_eq!((run.total.answered, run.total.refused), (conversations + second_turns, 0));
    for kind in [Kind::Text, Kind::Image, Kind::SplitImage, Kind::FirstTurn, Kind::SecondTurn] {
        assert!(run.by_kind.get(&kind).is_some_and(|summary| summary.answered > 0), "{kind:?} was not asked");
    }
    let gauge = |role: &str, name: &str| run.roles[role].gauges[name];
    for name in ["kv_blocks_used", "requests_running", "requests_waiting"] {
        assert_eq!(gauge("decoder", &format!("idefics_decoder_{name}")).after, 0.0, "{name}");
    }
    assert_eq!(gauge("gateway", "idefics_gateway_requests_running").after, 0.0);
    assert_eq!(run.roles["gateway"].increases["idefics_gateway_requests_total{code=\"Ok\"}"], run.total.answered as f64);
    assert!(run.roles["decoder"].increases["idefics_decoder_preemptions_total"] > 0.0, "nobody had to give way");
}
