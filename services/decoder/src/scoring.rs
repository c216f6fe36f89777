//! Log-probabilities on the device, of what it chose and of prompts: only they come back, and not the logits.

use crate::sequence::{Logprobs, MAX_LOGPROBS, TokenLogprob};
use idefics_kernels::{Backend, DType, Download, Result, Tensor};

/// Tensors of [`Backend::logprobs`], allocated once; empty where the backend does not sample.
pub(crate) struct Scoring<B: Backend> {
    vocab: usize,
    top_ids: Tensor<B>, // [O, K] i32: as many as anybody may ask for
    values: Tensor<B>,  // [O, 1 + K] f32
}

/// Log-probabilities on their way to the host.
#[derive(Debug)]
pub(crate) struct PendingScores {
    top: usize,
    rows: usize,
    top_ids: Download<i32>,
    values: Download<f32>,
}

/// Log-probabilities on the host; kept, so that no step allocates them.
#[derive(Debug, Default)]
pub(crate) struct Scores {
    top: usize,
    top_ids: Vec<i32>,
    values: Vec<f32>,
}

impl<B: Backend> Scoring<B> {
    /// Room for `outputs` rows.
    pub(crate) fn new(backend: &B, outputs: usize, vocab_size: usize) -> Result<Self> {
        let (rows, top) = if B::SAMPLES { (outputs, vocab_size.min(MAX_LOGPROBS as usize)) } else { (0, 0) };
        Ok(Self { vocab: vocab_size, top_ids: backend.alloc(rows, top, DType::I32)?, values: backend.alloc(rows, 1 + top, DType::F32)? })
    }

    /// Queues log-probabilities of `token_ids` `[n, 1]` i32 and of the most likely tokens of each row of `logits` `[n, vocab or more]`, and their
    /// way to the host.
    pub(crate) fn begin(&mut self, backend: &B, logits: &Tensor<B>, token_ids: &Tensor<B>) -> Result<PendingScores> {
        let Self { vocab, top_ids, values } = self;
        let rows = logits.rows();
        top_ids.set_rows(rows)?;
        values.set_rows(rows)?;
        backend.logprobs(logits, *vocab, token_ids, top_ids, values)?;
        let (top, top_ids) = (top_ids.cols(), backend.begin_download(top_ids)?);
        Ok(PendingScores { top, rows, top_ids, values: backend.begin_download(values)? })
    }
}

impl PendingScores {
    /// Waits for them.
    pub(crate) fn wait(self, scores: &mut Scores) -> Result<()> {
        let Self { top, rows, top_ids, values } = self;
        scores.top = top;
        scores.top_ids.resize(rows * top, 0);
        scores.values.resize(rows * (1 + top), 0.0);
        top_ids.wait(&mut scores.top_ids)?;
        values.wait(&mut scores.values)
    }
}

impl Scores {
    /// Of a row's token and of its `top` most likely ones.
    pub(crate) fn row(&self, row: usize, top: usize) -> Logprobs {
        let ids = &self.top_ids[row * self.top..(row + 1) * self.top];
        let values = &self.values[row * (1 + self.top)..(row + 1) * (1 + self.top)];
        let likely = ids.iter().zip(&values[1..]).take(top);
        Logprobs { logprob: values[0], top: likely.map(|(id, logprob)| TokenLogprob { token_id: *id as u32, logprob: *logprob }).collect() }
    }
}
