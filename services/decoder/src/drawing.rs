//! Choosing tokens on the device: what it needs is uploaded with the step, and only ids come back.

use crate::sampler::Draw;
use idefics_kernels::{Backend, DType, Download, Draws, Result, Tensor, Upload, Values};

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
    banned: Tensor<B>,      // [1, ceil(columns of logits / 32)] i32: bits
    out: Tensor<B>,         // [O, 1] i32
    rows: Rows,
}

/// The same on the host, a row of each for a row of logits.
#[derive(Default)]
struct Rows {
    temperature: Vec<f32>,
    top_k: Vec<i32>,
    top_p: Vec<f32>,
    random: Vec<i32>,
}

impl<B: Backend> Drawing<B> {
    /// Room for `outputs` rows. `packed` are temperature, top-k, top-p and random bits, which go up with the step. What fills up the
    /// logits is never drawn, as `banned_token_ids` are not.
    pub(crate) fn new(backend: &B, packed: [Tensor<B>; 4], outputs: usize, vocab_size: usize, banned_token_ids: &[u32]) -> Result<Self> {
        let [temperature, top_k, top_p, random] = packed;
        let columns = backend.padded_features(vocab_size);
        let mut bits = vec![0i32; columns.div_ceil(32)];
        let banned = banned_token_ids.iter().map(|id| *id as usize).chain(vocab_size..columns);
        banned.for_each(|id| bits[id / 32] |= 1 << (id % 32));
        let mut banned = backend.alloc(1, bits.len(), DType::I32)?;
        backend.upload(&bits, &mut banned)?;
        Ok(Self { temperature, top_k, top_p, random, banned, out: backend.alloc(outputs, 1, DType::I32)?, rows: Rows::default() })
    }

    /// Forgets the rows of the last step.
    pub(crate) fn clear(&mut self) {
        let Rows { temperature, top_k, top_p, random } = &mut self.rows;
        temperature.clear();
        top_k.clear();
        top_p.clear();
        random.clear();
    }

    /// Adds a row.
    pub(crate) fn push(&mut self, DrawRow { draw, random }: DrawRow) {
        self.rows.temperature.push(draw.temperature);
        self.rows.top_k.push(draw.top_k as i32);
        self.rows.top_p.push(draw.top_p);
        self.rows.random.extend([random as i32, (random >> 32) as i32]);
    }

    /// Rows that are to be drawn.
    pub(crate) fn num_rows(&self) -> usize {
        self.rows.top_k.len()
    }

    /// What goes up with the step.
    pub(crate) fn uploads(&mut self) -> [Upload<'_, B>; 4] {
        let Self { temperature, top_k, top_p, random, rows, .. } = self;
        [
            Upload { values: Values::F32(&rows.temperature), cols: 1, tensor: temperature },
            Upload { values: Values::I32(&rows.top_k), cols: 1, tensor: top_k },
            Upload { values: Values::F32(&rows.top_p), cols: 1, tensor: top_p },
            Upload { values: Values::I32(&rows.random), cols: 2, tensor: random },
        ]
    }

    /// Chooses a token from each row of `logits`. An op: a backend may record and replay it.
    pub(crate) fn run(&mut self, backend: &B, logits: &Tensor<B>) -> Result<()> {
        self.out.set_rows(self.rows.top_k.len())?;
        let Self { temperature, top_k, top_p, random, banned, out, .. } = self;
        backend.sample(logits, &Draws { temperature, top_k, top_p, random, banned }, out)
    }

    /// `[outputs, 1]` i32: what the last [`run`](Self::run) chose, and behind that anything.
    pub(crate) fn all_tokens(&mut self) -> Result<&Tensor<B>> {
        self.out.set_rows(self.out.capacity())?;
        Ok(&self.out)
    }

    /// `[rows, 1]` i32: what the last [`run`](Self::run) chose.
    pub(crate) fn tokens(&mut self) -> Result<&Tensor<B>> {
        self.out.set_rows(self.rows.top_k.len())?;
        Ok(&self.out)
    }

    /// Begins to bring what the last [`run`](Self::run) chose to the host.
    pub(crate) fn download(&mut self, backend: &B) -> Result<Download<i32>> {
        backend.begin_download(self.tokens()?)
    }
}
