//! How a request is named in traces. Alone in its process: `tracing` remembers of a span that is opened first on a thread without
//! a subscriber, as those of other tests are, that nobody wants it.

mod support;

use idefics_proto::gateway::v1 as pb;
use std::sync::{Arc, Mutex};
use support::{World, ask, chat, picture};
use tracing::span::{Attributes, Id};
use tracing_subscriber::{
    Layer,
    layer::{Context, SubscriberExt},
};

/// Names of the spans that were opened.
#[derive(Clone, Default)]
struct Spans(Arc<Mutex<Vec<&'static str>>>);

impl<S: tracing::Subscriber> Layer<S> for Spans {
    fn on_new_span(&self, attributes: &Attributes<'_>, _: &Id, _: Context<'_, S>) {
        let metadata = attributes.metadata();
        if metadata.fields().field("request_id").is_some() {
            self.0.lock().unwrap().push(metadata.name());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn every_method_has_a_span_of_its_own() {
    let spans = Spans::default();
    let _guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(spans.clone()));
    let world = World::new().await;
    let input = Some(pb::tokenize_request::Input::Text("x".into()));
    world.client().tokenize(pb::TokenizeRequest { input, image_options: None }).await.unwrap();
    let images = vec![pb::Image { data: "1".into() }];
    world.client().encode_images(pb::EncodeImagesRequest { images, image_options: None }).await.unwrap();
    ask(&world, chat(vec![picture(b"one")])).await;
    assert_eq!(*spans.0.lock().unwrap(), ["tokenize", "encode_images", "encode", "chat", "encode", "generate"]);
}
