//! Paged attention against softmax in f64.

use crate::{
    attention::{HEAD_DIMS, assert_attends, attend, heads, starts},
    common::{Comparison, Rng},
    support::*,
};
use idefics_kernels::{AttentionShape, Backend, DType, GraphKey, KvCache, PagedAttention, Tensor, cuda::Cuda};

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

    fn launch(&self, cuda: &Cuda, step: &mut Step) {
        let attention = PagedAttention {
            positions: &step.positions,
            cu_seqlens_q: &step.cu_seqlens_q,
            block_tables: &step.block_tables,
            context_lens: &step.context_lens,
            max_seqlen_q: self.spans.iter().map(|(_, rows)| *rows).max().unwrap_or(0),
            sliding_window: self.window,
            shape: self.shape,
        };
        cuda.paged_attention(&step.qkv, &step.kv, &attention, &mut step.out).unwrap();
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
            self.launch(cuda, &mut step);
            self.assert_right(cuda, &data, &mut step);
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
            case.launch(&cuda, &mut step);
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
