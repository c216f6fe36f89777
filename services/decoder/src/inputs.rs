//! What a step needs on the device besides weights, cache and activations: gathered on the host, and uploaded in one copy.

use crate::{
    drawing::{DrawRow, Drawing},
    model::StepInputs,
    sampler::Draw,
    scheduler::Scheduled,
    sequence::Sequence,
};
use idefics_kernels::{Backend, DType, Result, Tensor, Upload, Values};

/// Fewest columns of a step's block tables. They have as many as the longest sequence has blocks, rounded up to a power of two: few
/// widths, since graphs are recorded for each, and at most twice what is needed, since all of it goes over the bus.
const MIN_TABLE_BLOCKS: usize = 64;

/// Sizes of the largest step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) tokens: usize,
    pub(crate) sequences: usize,
    /// Rows whose next token is wanted.
    pub(crate) outputs: usize,
    /// Blocks of a sequence.
    pub(crate) blocks: usize,
    pub(crate) block_size: usize,
}

/// What a step gives for one of its parts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    /// Index in the step.
    pub(crate) part: usize,
    /// Rows of logits: behind the last token and behind each guess.
    pub(crate) rows: usize,
    /// How the device chooses from them; `None` if the host does.
    pub(crate) draw: Option<Draw>,
    /// How many of the likeliest tokens are wanted with each token's log-probability, if that is.
    pub(crate) logprobs: Option<usize>,
}

/// The tensors, which lie together, and their contents on the way to them.
pub(crate) struct Inputs<B: Backend> {
    /// The model's.
    pub(crate) step: StepInputs<B>,
    /// The sampler's.
    pub(crate) drawing: Drawing<B>,
    /// `[sequences, 1]` i32: where each sequence's last token stands among those that the step before drew; empty if the host knows
    /// it.
    pub(crate) sources: Tensor<B>,
    /// Which of a few places the tensors lie in.
    pub(crate) place: usize,
    host: Host,
    limits: Limits,
}

/// As [`Inputs`], on the host; kept, so that no step allocates them.
#[derive(Default)]
struct Host {
    token_ids: Vec<i32>,
    positions: Vec<i32>,
    slots: Vec<i32>,
    cu_seqlens_q: Vec<i32>,
    context_lens: Vec<i32>,
    output_rows: Vec<i32>,
    block_tables: Vec<i32>,
    sources: Vec<i32>,
}

impl Host {
    fn clear(&mut self) {
        let Self { token_ids, positions, slots, cu_seqlens_q, context_lens, output_rows, block_tables, sources } = self;
        for values in [token_ids, positions, slots, cu_seqlens_q, context_lens, output_rows, block_tables, sources] {
            values.clear();
        }
    }
}

impl<B: Backend> Inputs<B> {
    /// Room for steps up to `limits`.
    pub(crate) fn new(backend: &B, limits: Limits, vocab_size: usize, banned_token_ids: &[u32]) -> Result<Self> {
        let Limits { tokens, sequences, outputs, blocks, .. } = limits;
        let (draws, sources) = if B::SAMPLES { (outputs, sequences) } else { (0, 0) };
        let [
            token_ids,
            positions,
            slots,
            cu_seqlens_q,
            context_lens,
            output_rows,
            block_tables,
            temperature,
            top_k,
            top_p,
            random,
            sources,
        ] = backend.alloc_packed([
            (tokens, DType::I32),
            (tokens, DType::I32),
            (tokens, DType::I32),
            (sequences + 1, DType::I32),
            (sequences, DType::I32),
            (outputs, DType::I32),
            (sequences * blocks, DType::I32),
            (draws, DType::F32),
            (draws, DType::I32),
            (draws, DType::F32),
            (2 * draws, DType::I32),
            (sources, DType::I32),
        ])?;
        Ok(Self {
            step: StepInputs { token_ids, positions, slots, cu_seqlens_q, block_tables, context_lens, output_rows, max_seqlen_q: 0 },
            drawing: Drawing::new(backend, [temperature, top_k, top_p, random], draws, vocab_size, banned_token_ids)?,
            sources,
            place: 0,
            host: Host::default(),
            limits,
        })
    }

    /// Uploads the step. With `sources`, it is one token for each sequence, behind a step that is in flight and gives it: that step's
    /// tokens, at these rows, are its input.
    ///
    /// A step of decoding, one token for each sequence and a next one wanted for each, is filled up with empty sequences to as many as
    /// the backend likes; what comes of them follows all else. Where its tensors lie depends on their number, on the width of its block tables, on whether
    /// there are draws and sources, and on `place`: on what a graph of it is known by.
    pub(crate) fn fill(
        &mut self,
        backend: &B,
        step: &[Scheduled],
        sequences: &[Sequence],
        sources: Option<&[usize]>,
    ) -> Result<Vec<Output>> {
        let in_flight = usize::from(sources.is_some());
        let blocks = step.iter().map(|part| sequences[part.sequence].block_table.blocks().len()).max().unwrap_or(0);
        let width = blocks.next_power_of_two().clamp(MIN_TABLE_BLOCKS.min(self.limits.blocks), self.limits.blocks);
        let host = &mut self.host;
        host.clear();
        host.cu_seqlens_q.push(0);
        host.sources.extend(sources.unwrap_or_default().iter().map(|row| *row as i32));
        let mut outputs = Vec::with_capacity(step.len());
        for (i, part) in step.iter().enumerate() {
            let sequence = &sequences[part.sequence];
            let start = if in_flight == 0 { sequence.num_computed } else { sequence.token_ids.len() };
            let (range, real) = (start..start + part.num_tokens, start..start + part.num_tokens - part.num_drafts);
            if in_flight == 0 {
                let known = sequence.token_ids[real.clone()].iter().chain(&sequence.draft[..part.num_drafts]);
                host.token_ids.extend(known.map(|id| *id as i32));
            } else {
                host.token_ids.push(0);
            }
            host.positions.extend(range.clone().map(|p| p as i32));
            host.slots.extend(range.clone().map(|p| sequence.block_table.slot(p, self.limits.block_size)));
            host.cu_seqlens_q.push(host.token_ids.len() as i32);
            host.context_lens.push(range.end as i32);
            host.block_tables.extend(sequence.block_table.blocks().iter().map(|b| *b as i32));
            host.block_tables.resize((i + 1) * width, 0);
            if real.end == sequence.token_ids.len() + in_flight {
                let (end, rows) = (host.token_ids.len(), 1 + part.num_drafts);
                host.output_rows.extend((end - rows..end).map(|row| row as i32));
                let draw = if B::SAMPLES { sequence.sampler.plain_draw() } else { None };
                outputs.push(Output { part: i, rows, draw, logprobs: sequence.sampler.logprobs() });
            }
        }
        self.drawing.clear();
        if outputs.iter().any(|output| output.draw.is_some()) {
            for Output { part, rows, draw, .. } in &outputs {
                // The token in flight takes the bits before. A row whose logits go to the host has to have something here too.
                let random = sequences[step[*part].sequence].sampler.random_bits().skip(in_flight).take(*rows);
                random.for_each(|random| self.drawing.push(draw.map_or(DrawRow::GREEDY, |draw| DrawRow { draw, random })));
            }
        }
        self.step.max_seqlen_q = step.iter().map(|part| part.num_tokens).max().unwrap_or(0);
        if self.step.max_seqlen_q == 1 && outputs.len() == step.len() {
            self.pad(backend.padded_sequences(step.len()), width);
        }
        self.upload(backend, width)?;
        Ok(outputs)
    }

    /// Adds empty sequences, up to `sequences` or as many as there is room for, and a row for each that belongs to none.
    fn pad(&mut self, sequences: usize, width: usize) {
        let (host, limits) = (&mut self.host, &self.limits);
        let real = host.context_lens.len();
        let rows = sequences.min(limits.sequences).min(limits.tokens).min(limits.outputs).max(real);
        host.token_ids.resize(rows, 0);
        host.positions.resize(rows, 0);
        host.slots.resize(rows, -1);
        host.cu_seqlens_q.resize(rows + 1, real as i32);
        host.context_lens.resize(rows, 0);
        host.block_tables.resize(rows * width, 0);
        host.output_rows.extend(real as i32..rows as i32);
        if !host.sources.is_empty() {
            host.sources.resize(rows, 0);
        }
        if self.drawing.num_rows() > 0 {
            (real..rows).for_each(|_| self.drawing.push(DrawRow::GREEDY));
        }
    }

    fn upload(&mut self, backend: &B, width: usize) -> Result<()> {
        let Self { step, drawing, sources, place, host, .. } = self;
        let [temperature, top_k, top_p, random] = drawing.uploads();
        let column = |values, tensor| Upload { values: Values::I32(values), cols: 1, tensor };
        *place = backend.upload_packed(&mut [
            column(&host.token_ids, &mut step.token_ids),
            column(&host.positions, &mut step.positions),
            column(&host.slots, &mut step.slots),
            column(&host.cu_seqlens_q, &mut step.cu_seqlens_q),
            column(&host.context_lens, &mut step.context_lens),
            column(&host.output_rows, &mut step.output_rows),
            Upload { values: Values::I32(&host.block_tables), cols: width, tensor: &mut step.block_tables },
            temperature,
            top_k,
            top_p,
            random,
            column(&host.sources, sources),
        ])?;
        Ok(())
    }

    /// Takes the step's token ids from what the step before drew. An op: a backend may record and replay it.
    pub(crate) fn take_drawn(&mut self, backend: &B) -> Result<()> {
        backend.gather_rows(self.drawing.all_tokens()?, &self.sources, &mut self.step.token_ids)
    }
}
