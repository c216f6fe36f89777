//! A request's way through the peers: a decoder admits it, vision encodes the pictures that the decoder lacks and ships them
//! there, the decoder generates.
//!
//! Everything a request holds is held by its future: dropping it, at any point, cancels the calls in flight and gives the
//! reservation back.

use crate::{
    GatewayConfig,
    call::Call,
    events::Events,
    failure::{Failure, RETRY_AFTER},
    media::{Image, Media},
    prompt::Prompt,
    relay::{Progress, Relay, Stream},
    replicas::{Affinity, Decoder, Replicas},
    tokenizer::TextTokenizer,
    validate::{ImageOptions, Sampling},
};
use bytes::Bytes;
use futures::future::try_join_all;
use idefics_common::{channel::GrpcChannel, status};
use idefics_proto::{
    decoder::v1::{self as decoder, decoder_service_client::DecoderServiceClient},
    gateway::v1::{self as pb, generation_event::Event},
    vision::v1 as vision,
};
use std::{sync::Arc, time::Duration};
use tonic::{Request, Response, Status};
use tracing::Instrument;

/// A request that is ready to run.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) call: Call,
    pub(crate) model_fingerprint: String,
    pub(crate) prompt: Prompt,
    pub(crate) media: Media,
    pub(crate) image_options: ImageOptions,
    pub(crate) sampling: Sampling,
    pub(crate) return_prompt_token_ids: bool,
    pub(crate) cache_salt: Bytes,
    pub(crate) priority: i32,
}

/// Longest waits for peers.
#[derive(Clone, Copy, Debug)]
struct Timeouts {
    reserve: Duration,
    encode: Duration,
    token: Duration,
}

/// How much longer than we ourselves a peer waits.
const PEER_GRACE: Duration = Duration::from_millis(100);
/// Longest timeout that is written into a request.
const MAX_STREAM: Duration = Duration::from_secs(24 * 3600);

/// Runs requests on the replicas.
pub(crate) struct Coordinator {
    replicas: Arc<Replicas>,
    tokenizer: Arc<TextTokenizer>,
    timeouts: Timeouts,
}

impl Coordinator {
    pub(crate) fn new(config: &GatewayConfig, replicas: Arc<Replicas>, tokenizer: Arc<TextTokenizer>) -> Self {
        let timeouts = Timeouts {
            reserve: Duration::from_millis(config.reserve_timeout_ms),
            encode: Duration::from_millis(config.encode_timeout_ms),
            token: Duration::from_millis(config.token_timeout_ms),
        };
        Self { replicas, tokenizer, timeouts }
    }

    /// Runs a request to its end. Until the first of its answer it goes to another decoder if one fails.
    ///
    /// # Errors
    /// The status for the caller.
    pub(crate) async fn generate(&self, job: &mut Job, events: &Events) -> Result<(), Status> {
        let affinity = match job.media.images.first() {
            Some(image) => Affinity::of_image(image.key),
            None => Affinity::of_prompt(&job.prompt.token_ids),
        };
        let decoders = self.replicas.decoders_for(affinity).map_err(|why| status::unavailable(why, RETRY_AFTER))?;
        let mut progress = Progress::default();
        let mut last = None;
        for decoder in &decoders {
            match self.attempt(job, decoder, events, &mut progress).await {
                Ok(()) => return Ok(()),
                Err(Failure::Elsewhere(status)) if !progress.answered => {
                    tracing::debug!(decoder = decoder.uri, code = ?status.code(), "decoder did not take the request");
                    // A full decoder tells the caller more than one that is down.
                    last = last.filter(|last: &Status| last.code() == tonic::Code::ResourceExhausted).or(Some(status));
                }
                Err(failure) => return Err(failure.into_status()),
            }
        }
        Err(last.unwrap_or_else(|| status::unavailable("no decoder is ready", RETRY_AFTER)))
    }

    /// Encodes the pictures and returns their tokens, in the order of `media.images`.
    ///
    /// # Errors
    /// The status for the caller.
    pub(crate) async fn encode(
        &self,
        call: &Call,
        media: &Media,
        options: ImageOptions,
        model_fingerprint: &str,
    ) -> Result<Vec<vision::EncodeResponse>, Status> {
        let target = EncodeTarget { call, options, model_fingerprint, ship_to: "" };
        try_join_all(media.images.iter().map(|image| self.encode_image(image, target))).await.map_err(Failure::into_status)
    }

    async fn attempt(&self, job: &mut Job, decoder: &Arc<Decoder>, events: &Events, progress: &mut Progress) -> Result<(), Failure> {
        let _running = decoder.start(job.sampling.n as usize);
        let max_new_tokens = max_new_tokens(job, decoder)?;
        let (reservation, missing) = self.reserve(job, decoder, max_new_tokens).await?;
        self.ship(job, &missing, decoder, &mut progress.timings).await?;
        if !progress.started {
            progress.started = true;
            events.send(Event::Started(started(job))).await?;
        }
        let stream = match self.open(job, decoder, max_new_tokens).await {
            Err(Failure::TokensMissing(keys)) => {
                let evicted = images_named(job, decoder, |image| keys.contains(&image.key.to_string()), keys.len())?;
                tracing::debug!(images = evicted.len(), "image tokens were evicted meanwhile");
                self.ship(job, &evicted, decoder, &mut progress.timings).await?;
                self.open(job, decoder, max_new_tokens).await?
            }
            opened => opened?,
        };
        // From here on, dropping the stream is what cancels.
        reservation.keep();
        if stream.first.as_ref().is_some_and(|first| first.event.is_some()) {
            // No other decoder will take the request now, so nobody will ask for its pictures.
            job.media.drop_pictures();
        }
        let span = tracing::info_span!("generate", request_id = job.call.request_id, decoder = decoder.uri);
        let relay = Relay::new(job, decoder, events, progress, &self.tokenizer);
        relay.run(stream, self.timeouts.token).instrument(span).await
    }

    /// Asks for admission. The answer is the reservation and the images whose tokens the decoder lacks.
    async fn reserve<'a>(
        &self,
        job: &'a Job,
        decoder: &Arc<Decoder>,
        max_new_tokens: u32,
    ) -> Result<(Reservation, Vec<&'a Image>), Failure> {
        let request = decoder::ReserveRequest {
            request_id: job.call.peer_request_id.clone(),
            model_fingerprint: job.model_fingerprint.clone(),
            image_keys: job.media.images.iter().map(|image| image.key.to_wire()).collect(),
            prompt_tokens: job.prompt.token_ids.len() as u32,
            max_new_tokens,
            n: job.sampling.n,
        };
        // Before the call: the decoder may admit a request whose answer nobody waits for any more.
        let reservation = Reservation::new(decoder, &job.call);
        let mut client = decoder.client.clone();
        let limit = self.timeouts.reserve;
        let request = for_peer(request, &job.call, limit);
        let answer = match tokio::time::timeout(limit, client.reserve(request)).await {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(answer)) => {
                reservation.keep();
                return Err(Failure::from_peer(decoder, answer, &[]));
            }
            Err(_) => return Err(Failure::timeout(decoder, limit)),
        };
        let missing = &answer.missing_image_keys;
        let images = images_named(job, decoder, |image| missing.iter().any(|key| key[..] == image.key.as_bytes()[..]), missing.len())?;
        Ok((reservation, images))
    }

    /// Has `images` encoded, side by side, and shipped to the decoder.
    async fn ship(&self, job: &Job, images: &[&Image], decoder: &Decoder, timings: &mut pb::Timings) -> Result<(), Failure> {
        let target =
            EncodeTarget { call: &job.call, options: job.image_options, model_fingerprint: &job.model_fingerprint, ship_to: &decoder.uri };
        let encoded = try_join_all(images.iter().map(|image| self.encode_image(image, target))).await?;
        for times in encoded.iter().filter_map(|encoded| encoded.timings.as_ref()) {
            longest(timings, times);
        }
        Ok(())
    }

    /// Encodes one picture on the replica that may have its tokens, or on another.
    async fn encode_image(&self, image: &Image, target: EncodeTarget<'_>) -> Result<vision::EncodeResponse, Failure> {
        let visions = self.replicas.visions_for(Affinity::of_image(image.key));
        let visions = visions.map_err(|why| Failure::Final(status::unavailable(why, RETRY_AFTER)))?;
        let mut last = Failure::Final(status::unavailable("no vision replica is ready", RETRY_AFTER));
        for replica in &visions {
            let _running = replica.start(1);
            let ImageOptions { split, longest_edge, shortest_edge } = target.options;
            let request = vision::EncodeRequest {
                request_id: target.call.peer_request_id.clone(),
                image: image.data.clone(),
                options: Some(vision::PreprocessOptions { split, longest_edge, shortest_edge }),
                key: image.key.to_wire(),
                model_fingerprint: target.model_fingerprint.to_owned(),
                ship_to: target.ship_to.to_owned(),
            };
            let mut client = replica.client.clone();
            let limit = self.timeouts.encode;
            let request = for_peer(request, target.call, limit);
            let span = tracing::info_span!("encode", request_id = target.call.request_id, vision = replica.uri, bytes = image.data.len());
            last = match tokio::time::timeout(limit, client.encode(request).instrument(span)).await {
                Ok(Ok(answer)) => return Ok(answer.into_inner()),
                Ok(Err(answer)) => Failure::from_peer(replica, answer, &image.fields),
                Err(_) => Failure::timeout(replica, limit),
            };
            if !matches!(last, Failure::Elsewhere(_)) {
                break;
            }
        }
        // Another decoder may help where vision could not reach this one.
        Err(last)
    }

    /// Starts generation; the stream's first event is there.
    async fn open(&self, job: &Job, decoder: &Arc<Decoder>, max_new_tokens: u32) -> Result<Stream, Failure> {
        let params = job.sampling.params.clone();
        let span = |span: &crate::prompt::ImageSpan| {
            let key = job.media.order.get(span.image).and_then(|index| job.media.images.get(*index)).map(|image| image.key.to_wire());
            decoder::ImageSpan { key: key.unwrap_or_default(), sub_image: span.sub_image, start: span.start }
        };
        let request = decoder::GenerateRequest {
            request_id: job.call.peer_request_id.clone(),
            token_ids: job.prompt.token_ids.clone(),
            image_spans: job.prompt.image_spans.iter().map(span).collect(),
            max_new_tokens,
            // What the context leaves may be less than the caller's minimum.
            sampling: Some(decoder::SamplingParams { min_new_tokens: params.min_new_tokens.min(max_new_tokens), ..params }),
            cache_salt: job.cache_salt.clone(),
            n: job.sampling.n,
            prompt_logprobs: job.sampling.prompt_logprobs,
            priority: job.priority,
        };
        let mut client = decoder.client.clone();
        // A stream may outlast any limit of ours, but not the caller's deadline.
        let request = if job.call.deadline.is_some() { for_peer(request, &job.call, MAX_STREAM) } else { Request::new(request) };
        let first = async {
            let mut events = client.generate(request).await.map(Response::into_inner)?;
            let first = events.message().await?;
            Ok::<_, Status>(Stream { first, events })
        };
        match tokio::time::timeout(self.timeouts.token, first).await {
            Ok(opened) => opened.map_err(|answer| Failure::from_peer(decoder, answer, &[])),
            Err(_) => Err(Failure::timeout(decoder, self.timeouts.token)),
        }
    }
}

/// What all pictures of a request have in common.
#[derive(Clone, Copy)]
struct EncodeTarget<'a> {
    call: &'a Call,
    options: ImageOptions,
    model_fingerprint: &'a str,
    /// Empty: the tokens come back here.
    ship_to: &'a str,
}

/// Gives a reservation back when it is dropped.
struct Reservation {
    held: Option<(DecoderServiceClient<GrpcChannel>, String)>,
}

/// A `Release` that takes longer is left to the reservation's lease.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(5);

impl Reservation {
    fn new(decoder: &Decoder, call: &Call) -> Self {
        Self { held: Some((decoder.client.clone(), call.peer_request_id.clone())) }
    }

    /// Nothing is to be given back: it was refused, or generation has taken it over.
    fn keep(mut self) {
        self.held = None;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let Some((mut client, request_id)) = self.held.take() else { return };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        runtime.spawn(async move {
            let mut request = Request::new(decoder::ReleaseRequest { request_id });
            request.set_timeout(RELEASE_TIMEOUT);
            let released = tokio::time::timeout(RELEASE_TIMEOUT, client.release(request)).await;
            if !matches!(released, Ok(Ok(_))) {
                tracing::debug!("a reservation was left to its lease");
            }
        });
    }
}

/// A request that the peer gives up on shortly after we do. Ours comes first, so that a deadline looks like one to the caller.
fn for_peer<T>(message: T, call: &Call, limit: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(call.time_left(limit) + PEER_GRACE);
    request
}

/// Most tokens to generate: what the caller wants, at most what the context leaves.
fn max_new_tokens(job: &Job, decoder: &Decoder) -> Result<u32, Failure> {
    let Some(info) = decoder.info() else { return Ok(job.sampling.max_new_tokens) };
    let (prompt_tokens, limit) = (job.prompt.token_ids.len() as u32, info.max_model_tokens);
    match limit.saturating_sub(prompt_tokens) {
        0 => {
            let what =
                format!("prompt is {prompt_tokens} tokens, limit is {limit} with the answer; shorten it or raise decoder.max_model_tokens");
            Err(Failure::Final(Status::out_of_range(what)))
        }
        left => Ok(job.sampling.max_new_tokens.min(left)),
    }
}

/// The `named` images among the job's; a decoder that names others is at fault.
fn images_named<'a>(job: &'a Job, decoder: &Decoder, named: impl Fn(&Image) -> bool, count: usize) -> Result<Vec<&'a Image>, Failure> {
    let images: Vec<&Image> = job.media.images.iter().filter(|image| named(image)).collect();
    if images.len() == count {
        return Ok(images);
    }
    tracing::error!(decoder = decoder.uri, count, "decoder names images that are not in the request");
    Err(Failure::Final(Status::internal(format!("decoder {} named images that are not in the request", decoder.uri))))
}

fn started(job: &Job) -> pb::Started {
    pb::Started {
        request_id: job.call.request_id.clone(),
        prompt_tokens: job.prompt.token_ids.len() as u32,
        image_tokens: job.prompt.image_tokens,
        prompt_token_ids: if job.return_prompt_token_ids { job.prompt.token_ids.clone() } else { Vec::new() },
    }
}

/// Keeps the longest of each phase.
pub(crate) fn longest(timings: &mut pb::Timings, times: &vision::EncodeTimings) {
    timings.preprocess_ms = timings.preprocess_ms.max(times.preprocess_ms);
    timings.encode_queue_ms = timings.encode_queue_ms.max(times.queue_ms);
    timings.encode_ms = timings.encode_ms.max(times.encode_ms);
    timings.ship_ms = timings.ship_ms.max(times.ship_ms);
}
