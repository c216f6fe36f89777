//! Choosing tokens on the device: what it needs is uploaded, and only ids come back.

use crate::sampler::Draw;
use idefics_kernels::{Backend, DType, Draws, Result, Tensor};

/// How one row is chosen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DrawRow {
    pub(crate) draw: Draw,
    /// Uniform bits.
    pub(crate) random: u64,
}

impl DrawRow {
    /// The most likely token.
    pub(crate) const GREEDY: Self = Self { draw: Draw { temperature: 0.0, top_k: 0, top_p: 1.0 }, random: 0 };
}

/// Tensors of [`Backend::sample`], allocated once; empty where the backend does not sample.
pub(crate) struct Drawing<B: Backend> {
    temperature: Tensor<B>, // [O, 1] f32
    top_k: Tensor<B>,       // [O, 1] i32
    top_p: Tensor<B>,       // [O, 1] f32
    random: Tensor<B>,      // [O, 2] i32
    banned: Tensor<B>,      // [1, ceil(vocab / 32)] i32: bits
    out: Tensor<B>,         // [O, 1] i32
    tokens: Vec<i32>,
}

impl<B: Backend> Drawing<B> {
    /// Room for `outputs` rows.
    pub(crate) fn new(backend: &B, outputs: usize, vocab_size: usize, banned_token_ids: &[u32]) -> Result<Self> {
        let outputs = if B::SAMPLES { outputs } else { 0 };
        let column = |dtype| backend.alloc(outputs, 1, dtype);
        let mut bits = vec![0i32; vocab_size.div_ceil(32)];
        banned_token_ids.iter().for_each(|id| bits[*id as usize / 32] |= 1 << (id % 32));
        let mut banned = backend.alloc(1, bits.len(), DType::I32)?;
        backend.upload(&bits, &mut banned)?;
        Ok(Self {
            temperature: column(DType::F32)?,
            top_k: column(DType::I32)?,
            top_p: column(DType::F32)?,
            random: backend.alloc(outputs, 2, DType::I32)?,
            banned,
            out: column(DType::I32)?,
            tokens: Vec::new(),
        })
    }

    /// Chooses a token from each row of `logits`; they are then in [`tokens`](Self::tokens).
    pub(crate) fn run(&mut self, backend: &B, logits: &Tensor<B>, rows: impl Iterator<Item = DrawRow>) -> Result<()> {
        let rows: Vec<DrawRow> = rows.collect();
        for tensor in [&mut self.temperature, &mut self.top_k, &mut self.top_p, &mut self.random, &mut self.out] {
            tensor.set_rows(rows.len())?;
        }
        let f32s = |value: fn(&DrawRow) -> f32| rows.iter().map(value).collect::<Vec<f32>>();
        backend.upload(&f32s(|row| row.draw.temperature), &mut self.temperature)?;
        backend.upload(&f32s(|row| row.draw.top_p), &mut self.top_p)?;
        backend.upload(&rows.iter().map(|row| row.draw.top_k as i32).collect::<Vec<i32>>(), &mut self.top_k)?;
        let halves: Vec<i32> = rows.iter().flat_map(|row| [row.random as i32, (row.random >> 32) as i32]).collect();
        backend.upload(&halves, &mut self.random)?;
        let Self { temperature, top_k, top_p, random, banned, out, .. } = self;
        backend.sample(logits, &Draws { temperature, top_k, top_p, random, banned }, out)?;
        self.tokens.resize(rows.len(), 0);
        backend.download(&self.out, &mut self.tokens)
    }

    /// What the last [`run`](Self::run) chose.
    pub(crate) fn tokens(&self) -> &[i32] {
        &self.tokens
    }
}
