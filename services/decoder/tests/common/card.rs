//! A CPU that behaves as a card: it chooses tokens itself, tensors that are uploaded together move, downloads arrive when somebody
//! waits for them, and what went wrong is known by then and not before.

use idefics_kernels::{
    AttentionShape, Backend, DType, Download, Draws, Element, Epilogue, Error, KvCache, Matrix, PagedAttention, Pictures, Result, Rope,
    Tensor, Upload, Values, VarlenAttention,
    cpu::{Cpu, CpuOptions},
    weights::WeightView,
};
use std::{
    ops::{Deref, DerefMut},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

/// What goes wrong at which call of [`Backend::sample`], counted from 1.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    /// The card fails: who waits for it, or for what comes behind it, is told.
    Lost(usize),
    /// It is not queued.
    Refused(usize),
    /// No logit of the first row is finite.
    NotFinite(usize),
}

pub(crate) struct Card {
    cpu: Cpu,
    fault: Option<Fault>,
    samples: AtomicUsize,
}

impl Card {
    pub(crate) fn new(fault: Option<Fault>) -> Self {
        Self { cpu: Cpu::new(CpuOptions::default()).unwrap(), fault, samples: AtomicUsize::new(0) }
    }

    fn alive(&self) -> Result<()> {
        match self.fault {
            Some(Fault::Lost(at)) if self.samples.load(Ordering::Relaxed) >= at => Err(Error::Device("the card was lost".into())),
            _ => Ok(()),
        }
    }

    fn values<T: Element>(&self, tensor: &Tensor<Self>) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); tensor.rows() * tensor.cols()];
        self.cpu.download(&lend(tensor), &mut values)?;
        Ok(values)
    }
}

/// A tensor of the CPU; taken out while an op has it.
type Memory = Mutex<Option<Tensor<Cpu>>>;

struct Lent<'a> {
    tensor: Option<Tensor<Cpu>>,
    home: &'a Memory,
}

/// The tensor with the same window.
fn lend(tensor: &Tensor<Card>) -> Lent<'_> {
    let home = &tensor.storage;
    let mut lent = home.lock().unwrap().take().expect("an op writes what it reads");
    lent.set_window(tensor.window()).unwrap();
    Lent { tensor: Some(lent), home }
}

impl Deref for Lent<'_> {
    type Target = Tensor<Cpu>;

    fn deref(&self) -> &Tensor<Cpu> {
        self.tensor.as_ref().unwrap()
    }
}

impl DerefMut for Lent<'_> {
    fn deref_mut(&mut self) -> &mut Tensor<Cpu> {
        self.tensor.as_mut().unwrap()
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        *self.home.lock().unwrap() = self.tensor.take();
    }
}

/// Calls `f` with the cache.
fn with_kv<T>(kv: &KvCache<Card>, f: impl FnOnce(&mut KvCache<Cpu>) -> T) -> T {
    let (mut k, mut v) = (lend(&kv.k), lend(&kv.v));
    let mut cache = KvCache { k: k.tensor.take().unwrap(), v: v.tensor.take().unwrap(), block_size: kv.block_size };
    let result = f(&mut cache);
    (k.tensor, v.tensor) = (Some(cache.k), Some(cache.v));
    result
}

/// As the sampler of the host draws: by id, in f64.
fn choose(logits: &[f32], temperature: f32, top_k: usize, top_p: f32, random: u64, banned: &[i32]) -> i32 {
    let allowed = |id: usize| logits[id].is_finite() && banned[id / 32] >> (id % 32) & 1 == 0;
    let mut ids: Vec<usize> = (0..logits.len()).filter(|id| allowed(*id)).collect();
    // Higher ids first, so that of equals at the border of top-p the higher stay.
    ids.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(b.cmp(a)));
    let Some(most) = ids.first().map(|id| logits[*id]) else { return -1 };
    if temperature == 0.0 {
        return ids.into_iter().filter(|id| logits[*id] == most).min().map_or(-1, |id| id as i32);
    }
    if top_k > 0 && top_k < ids.len() {
        let last = logits[ids[top_k - 1]];
        ids.retain(|id| logits[*id] >= last);
    }
    let weight = |id: usize| f64::from(((logits[id] - most) / temperature).exp());
    let total: f64 = ids.iter().map(|id| weight(*id)).sum();
    if top_p < 1.0 {
        let mut before = 0.0;
        ids.retain(|id| {
            let is_kept = before < f64::from(top_p) * total;
            before += weight(*id);
            is_kept
        });
    }
    ids.sort_unstable();
    let mut left = (random >> 11) as f64 / 2f64.powi(53) * ids.iter().map(|id| weight(*id)).sum::<f64>();
    let drawn = ids.iter().find(|id| {
        left -= weight(**id);
        left < 0.0
    });
    drawn.or(ids.last()).map_or(-1, |id| *id as i32)
}

impl Backend for Card {
    type Storage = Memory;
    type WeightStorage = Matrix<Cpu>;

    const SAMPLES: bool = true;

    fn device_name(&self) -> String {
        "card".into()
    }

    fn step_tokens(&self) -> usize {
        self.cpu.step_tokens()
    }

    fn padded_sequences(&self, sequences: usize) -> usize {
        sequences.next_multiple_of(3)
    }

    fn padded_features(&self, features: usize) -> usize {
        features.next_multiple_of(8) + 8
    }

    fn activation_dtype(&self) -> DType {
        self.cpu.activation_dtype()
    }

    fn alloc(&self, rows: usize, cols: usize, dtype: DType) -> Result<Tensor<Self>> {
        Ok(Tensor::new(Mutex::new(Some(self.cpu.alloc(rows, cols, dtype)?)), rows, cols, dtype))
    }

    fn load_weight(&self, parts: &[WeightView]) -> Result<Matrix<Self>> {
        let storage = self.cpu.load_weight(parts)?;
        Ok(Matrix { rows: storage.rows, cols: storage.cols, dtype: storage.dtype, storage })
    }

    fn upload<T: Element>(&self, src: &[T], dst: &mut Tensor<Self>) -> Result<()> {
        self.cpu.upload(src, &mut lend(dst))
    }

    fn download<T: Element>(&self, src: &Tensor<Self>, dst: &mut [T]) -> Result<()> {
        self.alive()?;
        self.cpu.download(&lend(src), dst)
    }

    fn begin_download<T: Element>(&self, src: &Tensor<Self>) -> Result<Download<T>> {
        let (values, alive) = (self.values(src)?, self.alive());
        Ok(Download::new(values.len(), move |dst: &mut [T]| {
            alive?;
            dst.copy_from_slice(&values);
            Ok(())
        }))
    }

    fn upload_packed(&self, uploads: &mut [Upload<'_, Self>]) -> Result<usize> {
        for upload in uploads {
            // Somewhere else than before: what is graphed is never replayed here.
            *upload.tensor = self.alloc(upload.rows()?, upload.cols, upload.values.dtype())?;
            match upload.values {
                Values::F32(values) => self.upload(values, upload.tensor)?,
                Values::I32(values) => self.upload(values, upload.tensor)?,
            }
        }
        Ok(0)
    }

    /// Ids that are not in the table give anything, and no error.
    fn embed(&self, table: &Matrix<Self>, ids: &Tensor<Self>, out: &mut Tensor<Self>) -> Result<()> {
        let known: Vec<i32> =
            self.values(ids)?.into_iter().map(|id: i32| if (0..table.rows as i32).contains(&id) { id } else { 0 }).collect();
        let mut sane = self.cpu.alloc(known.len(), 1, DType::I32)?;
        self.cpu.upload(&known, &mut sane)?;
        self.cpu.embed(&table.storage, &sane, &mut lend(out))
    }

    fn gather_rows(&self, src: &Tensor<Self>, rows: &Tensor<Self>, out: &mut Tensor<Self>) -> Result<()> {
        self.cpu.gather_rows(&lend(src), &lend(rows), &mut lend(out))
    }

    fn scatter_rows(&self, src: &Tensor<Self>, rows: &Tensor<Self>, out: &mut Tensor<Self>) -> Result<()> {
        self.cpu.scatter_rows(&lend(src), &lend(rows), &mut lend(out))
    }

    fn patchify(&self, _: &Pictures<'_, Self>, _: &mut Tensor<Self>) -> Result<()> {
        unreachable!("no op of a decoder")
    }

    fn linear(
        &self,
        x: &Tensor<Self>,
        weight: &Matrix<Self>,
        bias: Option<&Matrix<Self>>,
        epilogue: Epilogue,
        out: &mut Tensor<Self>,
    ) -> Result<()> {
        self.cpu.linear(&lend(x), &weight.storage, bias.map(|bias| &bias.storage), epilogue, &mut lend(out))
    }

    fn rms_norm(&self, x: &Tensor<Self>, weight: &Matrix<Self>, eps: f32, out: &mut Tensor<Self>) -> Result<()> {
        self.cpu.rms_norm(&lend(x), &weight.storage, eps, &mut lend(out))
    }

    fn layer_norm(&self, x: &Tensor<Self>, weight: &Matrix<Self>, bias: &Matrix<Self>, eps: f32, out: &mut Tensor<Self>) -> Result<()> {
        self.cpu.layer_norm(&lend(x), &weight.storage, &bias.storage, eps, &mut lend(out))
    }

    fn rope_cos_sin(&self, positions: &Tensor<Self>, inv_freq: &Tensor<Self>, out: &mut Tensor<Self>) -> Result<()> {
        self.cpu.rope_cos_sin(&lend(positions), &lend(inv_freq), &mut lend(out))
    }

    fn rope_and_store_kv(&self, qkv: &mut Tensor<Self>, rope: Rope<'_, Self>, shape: AttentionShape, kv: &mut KvCache<Self>) -> Result<()> {
        let rope = Rope { cos_sin: &*lend(rope.cos_sin), slots: &*lend(rope.slots) };
        with_kv(kv, |kv| self.cpu.rope_and_store_kv(&mut lend(qkv), rope, shape, kv))
    }

    fn paged_attention(
        &self,
        qkv: &Tensor<Self>,
        kv: &KvCache<Self>,
        step: &PagedAttention<'_, Self>,
        out: &mut Tensor<Self>,
    ) -> Result<()> {
        let paged = PagedAttention {
            positions: &*lend(step.positions),
            cu_seqlens_q: &*lend(step.cu_seqlens_q),
            block_tables: &*lend(step.block_tables),
            context_lens: &*lend(step.context_lens),
            max_seqlen_q: step.max_seqlen_q,
            sliding_window: step.sliding_window,
            shape: step.shape,
        };
        with_kv(kv, |kv| self.cpu.paged_attention(&lend(qkv), kv, &paged, &mut lend(out)))
    }

    /// Not the decoder's.
    fn attention_varlen(&self, _: &VarlenAttention<'_, Self>, _: &mut Tensor<Self>) -> Result<()> {
        Err(Error::shape("attention_varlen", "expected a decoder"))
    }

    fn sample(&self, logits: &Tensor<Self>, draws: &Draws<'_, Self>, out: &mut Tensor<Self>) -> Result<()> {
        let at = self.samples.fetch_add(1, Ordering::Relaxed) + 1;
        if matches!(self.fault, Some(Fault::Refused(fault)) if fault == at) {
            return Err(Error::shape("sample", "refused"));
        }
        let (temperature, top_p) = (self.values::<f32>(draws.temperature)?, self.values::<f32>(draws.top_p)?);
        let (top_k, random) = (self.values::<i32>(draws.top_k)?, self.values::<i32>(draws.random)?);
        let (banned, all) = (self.values::<i32>(draws.banned)?, self.values::<f32>(logits)?);
        let chosen = all.chunks_exact(logits.cols()).enumerate().map(|(i, logits)| match self.fault {
            Some(Fault::NotFinite(fault)) if (fault, 0) == (at, i) => -1,
            _ => {
                let random = u64::from(random[2 * i] as u32) | u64::from(random[2 * i + 1] as u32) << 32;
                choose(logits, temperature[i], top_k[i] as usize, top_p[i], random, &banned)
            }
        });
        self.cpu.upload(&chosen.collect::<Vec<i32>>(), &mut lend(out))
    }

    fn logprobs(
        &self,
        logits: &Tensor<Self>,
        vocab: usize,
        token_ids: &Tensor<Self>,
        top_ids: &mut Tensor<Self>,
        out: &mut Tensor<Self>,
    ) -> Result<()> {
        let top = top_ids.cols();
        let (mut ids, mut values) = (Vec::new(), Vec::new());
        for (logits, token_id) in self.values::<f32>(logits)?.chunks_exact(logits.cols()).zip(self.values::<i32>(token_ids)?) {
            let logits = &logits[..vocab];
            let log_sum = logits.iter().map(|logit| f64::from(*logit).exp()).sum::<f64>().ln();
            let of = |id: usize| logits.get(id).map_or(f32::NAN, |logit| (f64::from(*logit) - log_sum) as f32);
            let mut likeliest: Vec<usize> = (0..vocab).collect();
            likeliest.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
            values.push(of(token_id as usize));
            values.extend(likeliest[..top].iter().map(|id| of(*id)));
            ids.extend(likeliest[..top].iter().map(|id| *id as i32));
        }
        self.cpu.upload(&ids, &mut lend(top_ids))?;
        self.cpu.upload(&values, &mut lend(out))
    }

    fn silu_and_mul(&self, x: &Tensor<Self>, out: &mut Tensor<Self>) -> Result<()> {
        self.cpu.silu_and_mul(&lend(x), &mut lend(out))
    }
}
