//! Paged attention against softmax in f64.

use crate::{
    attention::{HEAD_DIMS, assert_attends, attend, heads, starts},
    common::{Comparison, Rng},
    support::*,
};
use idefics_kernels::{AttentionShape, Backend, DType, GraphKey, KvCache, PagedAttention, Rope, Tensor, cuda::Cuda};

/// A sequence of a paged step: how many tokens came before, and how many rows it has now.
pub(crate) type Span = (usize, usize);

pub(crate) struct Paged {
    pub(crate) shape: AttentionShape,
    pub(crate) block_size: usize,
    pub(crate) window: Option<usize>,
    pub(crate) spans: Vec<Span>,
    /// Of q.
    pub(crate) size: f32,
    pub(crate) seed: u64,
}

/// Numbers of a paged case.
#[derive(Clone)]
struct Data {
    qkv: Vec<f32>,
    /// Caches in shuffled blocks; what no sequence owns is poison.
    k: Vec<f32>,
    v: Vec<f32>,
    tables: Vec<i32>,
    width: usize,
}

/// A step on the card.
struct Step {
    qkv: Tensor<Cuda>,
    kv: KvCache<Cuda>,
    positions: Tensor<Cuda>,
    cu_seqlens_q: Tensor<Cuda>,
    block_tables: Tensor<Cuda>,
    context_lens: Tensor<Cuda>,
    out: Tensor<Cuda>,
}

impl Paged {
    fn rows(&self) -> usize {
        self.spans.iter().map(|(_, rows)| rows).sum()
    }

    fn cols(&self) -> usize {
        self.shape.q_size() + 2 * self.shape.kv_size()
    }

    /// Tables are `width` blocks wide.
    fn data(&self, width: usize) -> Data {
        let rng = &mut Rng(self.seed);
        let kv_size = self.shape.kv_size();
        let blocks = width * self.spans.len() + 2;
        let mut order: Vec<i32> = (0..blocks as i32).collect();
        for i in (1..blocks).rev() {
            order.swap(i, rng.below(i + 1));
        }
        let mut k = vec![f32::NAN; blocks * self.block_size * kv_size];
        let (mut v, mut tables) = (k.clone(), Vec::new());
        for (i, (before, rows)) in self.spans.iter().enumerate() {
            let mut table: Vec<i32> = order[i * width..][..(before + rows).div_ceil(self.block_size)].to_vec();
            for t in 0..before + rows {
                let slot = table[t / self.block_size] as usize * self.block_size + t % self.block_size;
                k[slot * kv_size..][..kv_size].copy_from_slice(&units(rng, kv_size));
                v[slot * kv_size..][..kv_size].copy_from_slice(&units(rng, kv_size));
            }
            table.resize(width, -1);
            tables.extend(table);
        }
        let qkv = units(rng, self.rows() * self.cols()).iter().map(|x| round(self.size * x)).collect();
        Data { qkv, k, v, tables, width }
    }

    fn positions(&self) -> Vec<i32> {
        self.spans.iter().flat_map(|(before, rows)| *before as i32..(before + rows) as i32).collect()
    }

    fn context_lens(&self) -> Vec<i32> {
        self.spans.iter().map(|(before, rows)| (before + rows) as i32).collect()
    }

    fn step(&self, cuda: &Cuda, data: &Data) -> Step {
        let (kv_size, slots) = (self.shape.kv_size(), data.k.len() / self.shape.kv_size());
        Step {
            qkv: tensor(cuda, self.rows(), self.cols(), &data.qkv),
            kv: KvCache { k: tensor(cuda, slots, kv_size, &data.k), v: tensor(cuda, slots, kv_size, &data.v), block_size: self.block_size },
            positions: indices(cuda, &self.positions()),
            cu_seqlens_q: indices(cuda, &starts(0, self.spans.iter().map(|s| s.1))),
            block_tables: elements(cuda, self.spans.len(), data.width, &data.tables),
            context_lens: indices(cuda, &self.context_lens()),
            out: poisoned(cuda, self.rows(), self.shape.q_size(), DType::Bf16),
        }
    }

    /// Attention of rows that are rotated and in the cache, or, with `rope`, are not yet.
    fn launch(&self, cuda: &Cuda, step: &mut Step, rope: Option<Rope<'_, Cuda>>) {
        let attention = PagedAttention {
            positions: &step.positions,
            cu_seqlens_q: &step.cu_seqlens_q,
            block_tables: &step.block_tables,
            context_lens: &step.context_lens,
            max_seqlen_q: self.spans.iter().map(|(_, rows)| *rows).max().unwrap_or(0),
            sliding_window: self.window,
            shape: self.shape,
        };
        match rope {
            None => cuda.paged_attention(&step.qkv, &step.kv, &attention, &mut step.out).unwrap(),
            Some(rope) => cuda.rope_and_paged_attention(&mut step.qkv, rope, &mut step.kv, &attention, &mut step.out).unwrap(),
        }
    }

    fn assert_right(&self, cuda: &Cuda, data: &Data, step: &mut Step) {
        let name = format!("{:?} {:?} blocks of {} window {:?}", self.shape, self.spans, self.block_size, self.window);
        assert_untouched_around(&name, cuda, &mut step.out);
        let found = read(cuda, &step.out);
        let AttentionShape { num_heads, num_kv_heads, head_dim } = self.shape;
        let kv_size = self.shape.kv_size();
        let mut comparison = Comparison::new(&format!("paged_attention {name}"));
        let mut row = 0;
        for (i, (before, rows)) in self.spans.iter().enumerate() {
            let slot = |t: usize| data.tables[i * data.width + t / self.block_size] as usize * self.block_size + t % self.block_size;
            for position in *before..before + rows {
                let seen = self.window.map_or(0, |window| (position + 1).saturating_sub(window))..position + 1;
                for head in 0..num_heads {
                    let start = head / (num_heads / num_kv_heads) * head_dim;
                    let keys: Vec<&[f32]> = seen.clone().map(|t| &data.k[slot(t) * kv_size + start..][..head_dim]).collect();
                    let values: Vec<&[f32]> = seen.clone().map(|t| &data.v[slot(t) * kv_size + start..][..head_dim]).collect();
                    let expected = attend(&data.qkv[row * self.cols() + head * head_dim..][..head_dim], &keys, &values);
                    let found = &found[row * self.shape.q_size() + head * head_dim..][..head_dim];
                    assert_attends(&mut comparison, format_args!("position {position} of {i}, head {head}"), found, expected);
                }
                row += 1;
            }
        }
    }

    pub(crate) fn run(&self, cuda: &Cuda) {
        let longest = self.spans.iter().map(|(before, rows)| before + rows).max().unwrap_or(0);
        let data = self.data(longest.div_ceil(self.block_size) + 1);
        let mut step = self.step(cuda, &data);
        // Twice: what the splits of the first left behind must not show in the second.
        for _ in 0..2 {
            self.launch(cuda, &mut step, None);
            self.assert_right(cuda, &data, &mut step);
        }
    }

    /// The slots of the rows.
    fn slots(&self, data: &Data) -> Vec<i32> {
        let sequences = self.spans.iter().zip(data.tables.chunks(data.width));
        let slots = sequences.flat_map(|(&(before, rows), table)| {
            let slot = |t: usize| table[t / self.block_size] * self.block_size as i32 + (t % self.block_size) as i32;
            (before..before + rows).map(slot)
        });
        slots.collect()
    }

    /// That attention which rotates rows and stores their keys and values gives what it gives when that was done ahead of it, and
    /// leaves the same cache.
    fn run_fused(&self, cuda: &Cuda) {
        let longest = self.spans.iter().map(|(before, rows)| before + rows).max().unwrap_or(0);
        let mut data = self.data(longest.div_ceil(self.block_size) + 1);
        let (kv_size, slots) = (self.shape.kv_size(), self.slots(&data));
        for slot in &slots {
            data.k[*slot as usize * kv_size..][..kv_size].fill(f32::NAN);
            data.v[*slot as usize * kv_size..][..kv_size].fill(f32::NAN);
        }
        let half = self.shape.head_dim / 2;
        let inv_freq: Vec<f32> = (0..half).map(|j| 10_000f32.powf(-(j as f32) / half as f32)).collect();
        let mut cos_sin = poisoned(cuda, self.rows(), 2 * half, DType::F32);
        cuda.rope_cos_sin(&indices(cuda, &self.positions()), &elements(cuda, 1, half, &inv_freq), &mut cos_sin).unwrap();
        let rope = Rope { cos_sin: &cos_sin, slots: &indices(cuda, &slots) };

        let mut ahead = self.step(cuda, &data);
        cuda.rope_and_store_kv(&mut ahead.qkv, rope, self.shape, &mut ahead.kv).unwrap();
        let [qkv, k, v] = [&ahead.qkv, &ahead.kv.k, &ahead.kv.v].map(|tensor| read(cuda, tensor));
        let rotated = Data { qkv, k, v, ..data.clone() };
        let mut step = self.step(cuda, &data);
        self.launch(cuda, &mut step, Some(rope));
        self.assert_right(cuda, &rotated, &mut step);
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<u32>>();
        for (name, found, expected) in [("k", &mut step.kv.k, &rotated.k), ("v", &mut step.kv.v, &rotated.v)] {
            assert!(bits(&read(cuda, found)) == bits(expected), "{:?}: {name} in the cache differs", self.spans);
            assert_untouched_around(name, cuda, found);
        }
    }
}

pub(crate) fn paged(cuda: &Cuda, shape: AttentionShape, block_size: usize, window: Option<usize>, spans: &[Span]) {
    Paged { shape, block_size, window, spans: spans.to_vec(), size: 4.0, seed: spans.len() as u64 }.run(cuda);
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn decoding_sees_all_of_a_shuffled_cache() {
    let cuda = open();
    for head_dim in HEAD_DIMS {
        for block_size in [1, 7, 16] {
            paged(&cuda, heads(4, 1, head_dim), block_size, None, &[(0, 1), (15, 1), (16, 1), (100, 1)]);
        }
    }
    paged(&cuda, heads(24, 2, 64), 4, None, &[(140, 1), (0, 1), (20, 7)]);
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn long_contexts_are_split_and_put_together() {
    let cuda = open();
    // The emulation has 4 multiprocessors: 16 splits of one tile, 8 of two.
    paged(&cuda, heads(4, 1, 128), 16, None, &[(2100, 1)]);
    paged(&cuda, heads(4, 1, 128), 16, Some(1000), &[(1500, 1)]);
    paged(&cuda, heads(4, 1, 72), 16, None, &[(510, 1), (0, 1)]);
    paged(&cuda, heads(8, 1, 64), 16, None, &[(600, 3)]);
    paged(&cuda, heads(2, 2, 96), 16, None, &[(128, 1), (127, 1), (1024, 1)]);
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn rows_are_rotated_and_stored_on_their_way_into_attention() {
    let fused = |cuda: &Cuda, shape, block_size, window, spans: &[Span]| {
        Paged { shape, block_size, window, spans: spans.to_vec(), size: 4.0, seed: spans.len() as u64 }.run_fused(cuda);
    };
    let cuda = &open();
    for head_dim in HEAD_DIMS {
        for block_size in [1, 7, 16] {
            fused(cuda, heads(4, 1, head_dim), block_size, None, &[(0, 1), (15, 1), (16, 1), (0, 0), (100, 1)]);
        }
    }
    for rows in 1..=9 {
        fused(cuda, heads(4, 1, 128), 16, None, &[(30, rows), (0, rows), (300, rows)]);
    }
    // Tiles of several rows, and splits of which some have no new key.
    fused(cuda, heads(24, 2, 64), 4, None, &[(140, 1), (0, 1), (20, 7)]);
    fused(cuda, heads(8, 2, 128), 16, None, &[(2100, 1)]);
    fused(cuda, heads(8, 1, 64), 16, None, &[(600, 8)]);
    for window in [1, 3, 16, 130] {
        fused(cuda, heads(4, 1, 128), 16, Some(window), &[(0, 1), (300, 1), (250, 8), (12, 5)]);
    }
    // Prompts beside them.
    fused(cuda, heads(4, 1, 128), 16, None, &[(0, 40), (100, 1), (9, 33)]);
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn rows_without_a_slot_are_stored_nowhere() {
    let cuda = &open();
    for head_dim in [64, 128] {
        let case = Paged { shape: heads(2, 1, head_dim), block_size: 16, window: None, spans: vec![(20, 1), (5, 5)], size: 1.0, seed: 1 };
        let data = case.data(3);
        let mut step = case.step(cuda, &data);
        let cos_sin = elements(cuda, case.rows(), head_dim, &vec![1f32; case.rows() * head_dim]);
        let slots = [-1, step.kv.k.rows() as i32, i32::MAX, i32::MIN, -2, -(step.kv.k.rows() as i32)];
        case.launch(cuda, &mut step, Some(Rope { cos_sin: &cos_sin, slots: &indices(cuda, &slots) }));
        for (name, found, before) in [("k", &mut step.kv.k, &data.k), ("v", &mut step.kv.v, &data.v)] {
            let same = read(cuda, found).iter().zip(before).all(|(a, b)| a == b || a.is_nan() && b.is_nan());
            assert!(same, "head size {head_dim}: {name} was stored");
            assert_untouched_around(name, cuda, found);
        }
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn drafts_of_every_length_are_causal() {
    for cuda in open_each() {
        for rows in 1..=9 {
            paged(&cuda, heads(4, 1, 128), 16, None, &[(30, rows), (0, rows), (300, rows)]);
        }
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn windows_hide_what_is_too_far_back() {
    for cuda in open_each() {
        for window in [1, 5, 16, 130, 5000] {
            paged(&cuda, heads(4, 1, 128), 16, Some(window), &[(0, 1), (300, 1), (3, 40), (250, 2), (200, 70)]);
        }
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn prompts_chunks_and_single_rows_share_a_step() {
    for cuda in open_each() {
        for head_dim in HEAD_DIMS {
            paged(&cuda, heads(4, 1, head_dim), 16, None, &[(0, 70), (1, 3), (125, 20), (0, 9), (200, 1), (0, 0), (150, 33)]);
        }
        for block_size in [1, 5, 64, 200] {
            paged(&cuda, heads(4, 2, 128), block_size, None, &[(0, 130), (47, 49), (30, 1)]);
        }
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn a_recorded_step_is_right_for_other_contexts() {
    let cuda = open();
    let step_of = |before: [usize; 3], seed: u64| {
        let spans = before.map(|before| (before, 1)).to_vec();
        Paged { shape: heads(4, 1, 128), block_size: 16, window: Some(600), spans, size: 4.0, seed }
    };
    let width = 50;
    let first = step_of([3, 700, 20], 1);
    let mut step = first.step(&cuda, &first.data(width));
    for (i, before) in [[3, 700, 20], [4, 701, 21], [127, 128, 700], [790, 0, 15], [0, 0, 0]].into_iter().enumerate() {
        let case = step_of(before, i as u64);
        let data = case.data(width);
        write(&cuda, &data.qkv, &mut step.qkv);
        write(&cuda, &data.k, &mut step.kv.k);
        write(&cuda, &data.v, &mut step.kv.v);
        cuda.upload(&case.positions(), &mut step.positions).unwrap();
        cuda.upload(&case.context_lens(), &mut step.context_lens).unwrap();
        cuda.upload(&data.tables, &mut step.block_tables).unwrap();
        cuda.graphed(GraphKey { name: "decode", sizes: [3, 0, 0] }, &mut || {
            case.launch(&cuda, &mut step, None);
            Ok(())
        })
        .unwrap();
        case.assert_right(&cuda, &data, &mut step);
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn padding_without_context_gives_zeros() {
    for cuda in open_each() {
        for ends in [[0, 1], [0, 3], [1, 2], [0, 20], [3, 20]] {
            let rows = ends[1].max(3) as usize;
            let shape = heads(2, 1, 128);
            let kv = KvCache { k: poisoned(&cuda, 16, 128, DType::Bf16), v: poisoned(&cuda, 16, 128, DType::Bf16), block_size: 8 };
            let step = PagedAttention {
                positions: &indices(&cuda, &vec![0; rows]),
                cu_seqlens_q: &indices(&cuda, &ends),
                block_tables: &elements(&cuda, 1, 1, &[-1]),
                context_lens: &indices(&cuda, &[0]),
                max_seqlen_q: rows,
                sliding_window: Some(4),
                shape,
            };
            let mut out = poisoned(&cuda, rows, 256, DType::Bf16);
            cuda.paged_attention(&poisoned(&cuda, rows, 512, DType::Bf16), &kv, &step, &mut out).unwrap();
            assert_eq!(read(&cuda, &out), vec![0.0; rows * 256], "{ends:?}");
            assert_untouched_around("padding", &cuda, &mut out);
        }
    }
}
