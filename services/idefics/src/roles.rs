//! Builds the roles from a checkpoint and a configuration.

use crate::{
    config::Config,
    demo,
    device::Processor,
    progress::{self, DECODER_PREFIXES, VISION_PREFIXES},
};
use anyhow::{Context, Result};
use idefics_common::{
    channel::in_process,
    checkpoint::{Checkpoint, Source},
    serve::Shutdown,
};
use idefics_decoder::Decoder;
use idefics_gateway::{Gateway, Peer, Peers};
use idefics_kernels::weights::Weights;
use idefics_vision::{IN_PROCESS, Vision, preprocess::Normalization};
use indicatif::ProgressBar;
use std::path::Path;
use tokio::sync::watch;

/// A checkpoint whose weights are mapped.
#[derive(Clone)]
pub(crate) struct Model {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) weights: Weights,
    pub(crate) fingerprint: String,
}

impl Model {
    /// Opens a folder, or the demo checkpoint. Blocks on the disk.
    pub(crate) fn open(folder: Option<&Path>) -> Result<Self> {
        let checkpoint = Checkpoint::open(demo::source(folder))?;
        let weights = match &checkpoint.source {
            Source::Folder(folder) => Weights::open(folder)?,
            Source::Embedded { name, .. } => Weights::from_static(name, demo::weights())?,
        };
        Ok(Self { fingerprint: checkpoint.fingerprint()?, checkpoint, weights })
    }
}

/// A role's engine is running as long as this is true.
pub(crate) type Alive = watch::Receiver<bool>;

/// Loads the decoder. Blocks.
pub(crate) fn decoder(
    model: &Model,
    config: &Config,
    processor: &mut Processor,
    bar: &ProgressBar,
    shutdown: Shutdown,
) -> Result<(Decoder, Alive)> {
    let bar = bar.clone();
    let options = idefics_decoder::EngineOptions {
        weights: model.weights.clone(),
        model: model.checkpoint.config.clone(),
        config: config.decoder.clone(),
        stop_token_ids: model.checkpoint.stop_token_ids(),
        banned_token_ids: model.checkpoint.banned_token_ids(),
        progress: Box::new(move |bytes| bar.inc(bytes as u64)),
    };
    let engine = processor.start(options).context("the decoder cannot start")?;
    let alive = engine.alive();
    Ok((Decoder::new(config.decoder.clone(), &model.checkpoint, model.fingerprint.clone(), engine, shutdown), alive))
}

/// Loads the vision role. Blocks.
pub(crate) fn vision(
    model: &Model,
    config: &Config,
    processor: &mut Processor,
    bar: &ProgressBar,
    shutdown: Shutdown,
) -> Result<(Vision, Alive)> {
    let engine = vision_engine(model, config, processor, bar)?;
    let alive = engine.alive();
    Ok((Vision::new(&config.vision, &model.checkpoint, model.fingerprint.clone(), engine, None, shutdown), alive))
}

fn vision_engine(model: &Model, config: &Config, processor: &mut Processor, bar: &ProgressBar) -> Result<idefics_vision::Engine> {
    let bar = bar.clone();
    let options = idefics_vision::EngineOptions {
        weights: model.weights.clone(),
        model: model.checkpoint.config.clone(),
        normalization: Normalization::from(&model.checkpoint.preprocessor),
        max_batch_patches: config.vision.max_batch_patches,
        max_queued_images: config.vision.max_queued_images,
        progress: Box::new(move |bytes| bar.inc(bytes as u64)),
    };
    processor.start(options).context("the vision role cannot start")
}

/// All roles in this process: the gateway calls the others directly. Blocks.
pub(crate) fn all_in_one(model: &Model, config: &Config, shutdown: &Shutdown) -> Result<(Gateway, Vec<Alive>)> {
    let mut processor = Processor::open(config)?;
    let bar = progress::bar(&model.weights, &[VISION_PREFIXES, DECODER_PREFIXES].concat());
    // Before the decoder, whose KV cache takes what is left of a card.
    let vision_engine = vision_engine(model, config, &mut processor, &bar)?;
    let vision_alive = vision_engine.alive();
    let (decoder, decoder_alive) = decoder(model, config, &mut processor, &bar, shutdown.clone())?;
    let decoder = in_process(decoder.into_server());
    let (to, fingerprint) = (Some(decoder.clone()), model.fingerprint.clone());
    let vision = Vision::new(&config.vision, &model.checkpoint, fingerprint, vision_engine, to, shutdown.clone());
    bar.finish_and_clear();
    let peers = Peers {
        decoders: vec![Peer { uri: IN_PROCESS.into(), channel: decoder }],
        visions: vec![Peer { uri: IN_PROCESS.into(), channel: in_process(vision.into_server()) }],
    };
    let gateway = Gateway::new(config.gateway.clone(), model.checkpoint.clone(), peers, shutdown.clone())?;
    Ok((gateway, vec![decoder_alive, vision_alive]))
}
