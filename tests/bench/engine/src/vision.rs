//! The vision engine: patches in, image tokens out. Decoding, resizing and cutting do not count.

use crate::{Model, Report, cases::PictureCase, median, wait_for_end};
use anyhow::{Context, Result};
use idefics_kernels::Backend;
use idefics_vision::{
    Config, Engine, EngineOptions,
    engine::Picture,
    preprocess::{Normalization, PatchGrid, RgbPicture},
};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use std::{sync::Arc, time::Instant};
use tokio::{runtime::Runtime, sync::Semaphore};

/// Loads the engine and encodes each of `pictures`.
pub(crate) fn measure<B: Backend>(
    pictures: &[PictureCase],
    repeats: u32,
    model: &Model,
    open: &impl Fn() -> Result<B>,
    report: &mut Report,
) {
    let started_at = Instant::now();
    let engine = open().and_then(|backend| start(backend, model));
    let loaded = engine.as_ref().map(|engine| json!({ "device": engine.device_name(), "seconds": started_at.elapsed().as_secs_f64() }));
    report.line(json!({ "kind": "load", "engine": "vision" }), loaded.map_err(|error| anyhow::anyhow!("{error:#}")));
    let Ok(engine) = engine else { return };
    for picture in pictures {
        let grids = grids(*picture, model.checkpoint.config.vision_config.patch_size);
        let patches: usize = grids.iter().map(|grid| grid.rows * grid.cols).sum();
        let case = json!({ "kind": "vision", "name": picture.to_string(), "sub_images": grids.len(), "patches": patches });
        report.line(case, encode(&engine, &grids, repeats));
    }
    let alive = engine.alive();
    drop(engine);
    wait_for_end(alive);
}

fn start<B: Backend>(backend: B, model: &Model) -> Result<Engine> {
    let defaults = Config::default();
    let options = EngineOptions {
        weights: model.weights.clone(),
        model: model.checkpoint.config.clone(),
        normalization: Normalization::from(&model.checkpoint.preprocessor),
        max_batch_patches: defaults.max_batch_patches,
        max_queued_images: defaults.max_queued_images,
        progress: Box::new(|_| ()),
    };
    Engine::start(backend, options).context("the vision engine cannot start")
}

/// Random pixels, as the preprocessing would leave them.
fn grids(case: PictureCase, patch_size: usize) -> Vec<PatchGrid> {
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut grid = |width: u32, height: u32| {
        let mut pixels = vec![0; (width * height * 3) as usize];
        rng.fill_bytes(&mut pixels);
        PatchGrid::new(RgbPicture { width, height, pixels }, patch_size)
    };
    let mut grids = Vec::new();
    if case.split {
        grids.extend((0..4).map(|_| grid(case.width / 2, case.height / 2)));
    }
    grids.push(grid(case.width, case.height));
    grids
}

/// The median time of the passes of one picture: from the upload of its patches until its tokens are in the host's memory.
fn encode(engine: &Engine, grids: &[PatchGrid], repeats: u32) -> Result<Value> {
    let runtime = Runtime::new()?;
    let memory = Arc::new(Semaphore::new(1));
    let mut times = Vec::new();
    for repeat in 0..=repeats {
        let encoded = runtime.block_on(async {
            let (queue_permit, memory_permit) = (engine.admit()?, Arc::clone(&memory).acquire_owned().await?);
            let picture = Picture { sub_images: grids.to_vec(), queue_permit, memory_permit, on_encoded: Box::new(|_| ()) };
            anyhow::Ok(engine.encode(picture).await?)
        })?;
        if repeat > 0 {
            times.push((encoded.ended_at - encoded.started_at).as_secs_f64() * 1e3);
        }
    }
    let least = times.iter().copied().fold(f64::INFINITY, f64::min);
    Ok(json!({ "ms": median(times), "least_ms": least }))
}
