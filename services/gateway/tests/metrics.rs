//! What the gateway counts of requests that do not come to an answer.

mod support;

use idefics_gateway::GatewayConfig;
use idefics_proto::gateway::v1 as pb;
use metrics_exporter_prometheus::PrometheusBuilder;
use support::{Script, Setup, ask, chat, text};
use tonic::Code;

#[tokio::test(start_paused = true)]
async fn requests_that_are_refused_or_do_not_start_are_counted() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let config = GatewayConfig { max_concurrent_requests: 1, ..Default::default() };
    let world = Setup { config, ..Default::default() }.ready().await;
    let refused = ask(&world, pb::ChatRequest::default()).await;
    assert_eq!(refused.error.unwrap().code(), Code::InvalidArgument);
    world.script([Script::TokensThenNothing(vec![399])]);
    let _running = world.client().chat(chat(vec![text("?")])).await.unwrap();
    for _ in 0..2 {
        assert_eq!(ask(&world, chat(vec![text("?")])).await.error.unwrap().code(), Code::ResourceExhausted);
    }
    let metrics = recorder.handle().render();
    for expected in ["idefics_gateway_requests_total{code=\"InvalidArgument\"} 1", "idefics_gateway_requests_refused_total 2"] {
        assert!(metrics.lines().any(|line| line == expected), "no {expected} in {metrics}");
    }
}
