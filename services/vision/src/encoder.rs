//! From a picture's bytes to its tokens, once: the cache, calls that share their work, preprocessing, the engine.

use crate::{
    config::Config,
    engine::{Encoded, Engine, EngineError, EngineStats, Picture, QueuePermit},
    flights::{Boarding, Flights},
    metrics::{self, Source},
    output_cache::{Output, OutputCache, PictureId},
    preprocess::{self, ImageLimits, PatchGrid, PreprocessOptions},
};
use bytes::Bytes;
use futures::{FutureExt, future::BoxFuture};
use idefics_proto::vision::v1::{EncodeTimings, SubImage};
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::Instant,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

/// Why there are no tokens.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EncodeError {
    /// The caller's picture is at fault.
    #[error("{0}")]
    Image(String),
    /// A bug.
    #[error("preprocessing failed unexpectedly; the picture was not encoded")]
    Panicked,
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// The tokens of a call.
pub(crate) struct Answer {
    pub(crate) encoded: Encoded,
    pub(crate) sub_images: Arc<[SubImage]>,
    /// All but the time of shipping.
    pub(crate) timings: EncodeTimings,
    /// No work was done, not even another call's.
    pub(crate) cached: bool,
}

/// What all calls share.
pub(crate) struct Encoder {
    flights: Flights<PictureId, Result<Output, EncodeError>>,
    pipeline: Arc<Pipeline>,
}

/// What the work needs that calls share; it may outlive the call that started it.
struct Pipeline {
    engine: Engine,
    cache: Mutex<OutputCache>,
    limits: ImageLimits,
    patch_size: usize,
    /// Pictures that may hold patches.
    memory: Arc<Semaphore>,
    /// Pictures preprocessed at once.
    threads: Arc<Semaphore>,
}

impl Encoder {
    pub(crate) fn new(config: &Config, engine: Engine, limits: ImageLimits, patch_size: usize) -> Self {
        let threads = match config.preprocess_threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        let pipeline = Pipeline {
            engine,
            cache: Mutex::new(OutputCache::new(config.output_cache_bytes)),
            limits,
            patch_size,
            memory: Arc::new(Semaphore::new(config.max_preprocessed_images)),
            threads: Arc::new(Semaphore::new(threads)),
        };
        Self { flights: Flights::new(), pipeline: Arc::new(pipeline) }
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.pipeline.engine
    }

    /// The tokens of a picture: from the cache, from the work for another call, or computed. Dropping the future gives up the
    /// work if no other call waits for it.
    ///
    /// # Errors
    /// [`EncodeError`]
    pub(crate) async fn encode(&self, key: [u8; 32], options: PreprocessOptions, image: Bytes) -> Result<Answer, EncodeError> {
        let (image_hash, image) = hash(image).await?;
        let id = PictureId { key, image_hash, options };
        let arrived_at = Instant::now();
        let (pipeline, stats) = (&self.pipeline, self.pipeline.engine.stats());
        let boarding = self.flights.board(id, || pipeline.cache().get(&id), || Arc::clone(pipeline).start(id, image))?;
        let flight = match boarding {
            Boarding::Done(Output { encoded, sub_images, .. }) => {
                stats.num_cached_calls.fetch_add(1, Ordering::Relaxed);
                metrics::answered(Source::Cached);
                return Ok(Answer { encoded, sub_images, timings: EncodeTimings::default(), cached: true });
            }
            Boarding::Joined(flight) => {
                stats.num_coalesced_calls.fetch_add(1, Ordering::Relaxed);
                metrics::answered(Source::Coalesced);
                flight
            }
            Boarding::Started(flight) => flight,
        };
        let output = flight.await?;
        let timings = timings(&output, arrived_at);
        Ok(Answer { encoded: output.encoded, sub_images: output.sub_images, timings, cached: false })
    }
}

impl Pipeline {
    /// Admits a picture; the future does all that is to do for it, and leaves the tokens in the cache.
    fn start(self: Arc<Self>, id: PictureId, image: Bytes) -> Result<BoxFuture<'static, Result<Output, EncodeError>>, EncodeError> {
        let queue_permit = self.engine.admit()?;
        Ok(async move { self.encode(id, image, queue_permit).await }.boxed())
    }

    async fn encode(self: Arc<Self>, id: PictureId, image: Bytes, queue_permit: QueuePermit) -> Result<Output, EncodeError> {
        let queued_at = Instant::now();
        let unprepared = Unprepared(self.engine.stats());
        // Both wait in the order of arrival.
        let memory_permit = acquire(&self.memory).await?;
        let thread_permit = acquire(&self.threads).await?;
        let preprocess_started_at = Instant::now();
        let prepared = self.preprocess(image, id.options, thread_permit, memory_permit).await;
        unprepared.end();
        let (grids, memory_permit) = prepared?;
        let preprocessed_at = Instant::now();
        let sub_images: Arc<[SubImage]> =
            grids.iter().map(|g| SubImage { width: g.width, height: g.height, patches: g.len() as u32 }).collect();
        let output = move |encoded: Encoded| Output { encoded, sub_images, queued_at, preprocess_started_at, preprocessed_at };
        let (pipeline, stats, kept) = (Arc::downgrade(&self), Arc::clone(self.engine.stats()), output.clone());
        // The engine's thread must not keep the engine alive, hence weak.
        let on_encoded = Box::new(move |encoded: &Encoded| {
            let output = kept(encoded.clone());
            stats.num_computed_images.fetch_add(1, Ordering::Relaxed);
            metrics::computed(&timings(&output, queued_at));
            if let Some(pipeline) = pipeline.upgrade() {
                pipeline.keep(id, output);
            }
        });
        let encoded = self.engine.encode(Picture { sub_images: grids, queue_permit, memory_permit, on_encoded }).await?;
        Ok(output(encoded))
    }

    /// Patches of a picture, made on a blocking thread. Both permits go there: a cancelled call gives them back when the
    /// thread has noticed, which is when the memory and the processor are free again.
    async fn preprocess(
        self: &Arc<Self>,
        image: Bytes,
        options: PreprocessOptions,
        thread_permit: OwnedSemaphorePermit,
        memory_permit: OwnedSemaphorePermit,
    ) -> Result<(Vec<PatchGrid>, OwnedSemaphorePermit), EncodeError> {
        let (reply, answer) = oneshot::channel();
        let pipeline = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            let (patch_size, limits) = (pipeline.patch_size, &pipeline.limits);
            let result = preprocess::preprocess_while(|| !reply.is_closed(), &image, &options, patch_size, limits);
            drop((image, thread_permit));
            drop(reply.send(result.map(|grids| (grids, memory_permit))));
        });
        let result = answer.await.map_err(|_| EncodeError::Panicked)?;
        result.map_err(|e| EncodeError::Image(e.to_string()))
    }

    fn keep(&self, id: PictureId, output: Output) {
        let mut cache = self.cache();
        cache.put(id, output);
        self.engine.stats().output_cache_bytes.store(cache.bytes(), Ordering::Relaxed);
        metrics::output_cache(cache.bytes());
    }

    fn cache(&self) -> MutexGuard<'_, OutputCache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A picture on its way to the engine, which counts as given up if it is dropped; from there on the engine counts.
struct Unprepared<'a>(&'a EngineStats);

impl Unprepared<'_> {
    /// The picture has got there, or is at fault.
    fn end(self) {
        std::mem::forget(self);
    }
}

impl Drop for Unprepared<'_> {
    fn drop(&mut self) {
        self.0.num_abandoned_images.fetch_add(1, Ordering::Relaxed);
        metrics::abandoned(1);
    }
}

async fn acquire(permits: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, EncodeError> {
    Arc::clone(permits).acquire_owned().await.map_err(|_| EncodeError::Engine(EngineError::Ended))
}

/// 20 MiB take milliseconds, which are too many on a thread that other calls need.
async fn hash(image: Bytes) -> Result<([u8; 32], Bytes), EncodeError> {
    let hashed = tokio::task::spawn_blocking(move || (*blake3::hash(&image).as_bytes(), image));
    hashed.await.map_err(|_| EncodeError::Panicked)
}

/// How much of each stage lay after the call's arrival.
fn timings(output: &Output, arrived_at: Instant) -> EncodeTimings {
    let ms = |from: Instant, to: Instant| to.saturating_duration_since(from.max(arrived_at)).as_secs_f64() * 1e3;
    EncodeTimings {
        preprocess_ms: ms(output.preprocess_started_at, output.preprocessed_at),
        queue_ms: ms(output.queued_at, output.preprocess_started_at) + ms(output.preprocessed_at, output.encoded.started_at),
        encode_ms: ms(output.encoded.started_at, output.encoded.ended_at),
        ship_ms: 0.0,
    }
}
