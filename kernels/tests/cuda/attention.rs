//! Packed attention against softmax in f64, and what packed and paged attention have in common.

use crate::{
    common::{Comparison, Rng},
    paged_attention::{Paged, paged},
    support::*,
};
use idefics_kernels::{
    AttentionShape, Backend, DType, Error, KvCache, PagedAttention, Rope, VarlenAttention,
    cuda::{AttentionKernels, Cuda, CudaOptions},
};

/// An exact result, and the sum of the magnitudes of which it is made.
#[derive(Clone, Copy)]
pub(crate) struct Expected {
    value: f64,
    magnitude: f64,
}

/// Probabilities are rounded to bf16 before they meet the values, and the result is rounded; f32 does the rest, with errors below
/// 1e-5 of the scores, which the exponential turns into relative ones.
fn tolerance(expected: Expected, largest_score: f64) -> f64 {
    BF16_ROUNDING * (expected.magnitude + expected.value.abs()) + (1e-4 + 4e-6 * largest_score) * expected.magnitude
}

/// Softmax of the scores of one query over `keys`, applied to their values; and the largest magnitude of a score.
pub(crate) fn attend(q: &[f32], keys: &[&[f32]], values: &[&[f32]]) -> (Vec<Expected>, f64) {
    let scale = 1.0 / (q.len() as f64).sqrt();
    let dot = |k: &[f32]| q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>() * scale;
    let scores: Vec<f64> = keys.iter().map(|k| dot(k)).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
    let sum: f64 = weights.iter().sum::<f64>().max(f64::MIN_POSITIVE);
    let column = |j: usize| {
        let products = weights.iter().zip(values).map(|(weight, v)| weight / sum * f64::from(v[j]));
        products.fold(Expected { value: 0.0, magnitude: 0.0 }, |a, x| Expected { value: a.value + x, magnitude: a.magnitude + x.abs() })
    };
    ((0..q.len()).map(column).collect(), scores.iter().fold(0.0, |a, b| a.max(b.abs())))
}

/// Adds one query of one head, which stands at `place`.
pub(crate) fn assert_attends(
    comparison: &mut Comparison,
    place: std::fmt::Arguments<'_>,
    found: &[f32],
    (expected, largest_score): (Vec<Expected>, f64),
) {
    for (j, (found, expected)) in found.iter().zip(expected).enumerate() {
        comparison.add(format_args!("{place} column {j}"), *found, expected.value, tolerance(expected, largest_score));
    }
}

pub(crate) fn heads(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> AttentionShape {
    AttentionShape { num_heads, num_kv_heads, head_dim }
}

/// Every head size that has kernels.
pub(crate) const HEAD_DIMS: [usize; 5] = [64, 72, 80, 96, 128];

pub(crate) fn starts(first: usize, lens: impl Iterator<Item = usize>) -> Vec<i32> {
    let mut starts = vec![first as i32];
    lens.for_each(|len| starts.push(starts[starts.len() - 1] + len as i32));
    starts
}

/// A packed case: lengths of queries and keys, rows of no sequence before and after the queries, and the size of q.
struct Packed<'a> {
    shape: AttentionShape,
    lens: &'a [(usize, usize)],
    rest: (usize, usize),
    size: f32,
}

impl Packed<'_> {
    fn run(&self, cuda: &Cuda) {
        let Self { shape, lens, rest, size } = *self;
        let rng = &mut Rng(lens.len() as u64 + 7);
        let AttentionShape { num_heads, num_kv_heads, head_dim } = shape;
        let (ends_q, ends_k) = (starts(rest.0, lens.iter().map(|l| l.0)), starts(0, lens.iter().map(|l| l.1)));
        let (rows_q, rows_k) = (ends_q[lens.len()] as usize + rest.1, ends_k[lens.len()] as usize);
        // q, k and v begin within their rows; what is beside them is poison.
        let (pad_q, pad_k) = (8, 16);
        let (cols_q, cols_kv) = (shape.q_size() + pad_q, 2 * shape.kv_size() + pad_k);
        let mut q: Vec<f32> = units(rng, rows_q * cols_q).iter().map(|x| round(size * x)).collect();
        let mut kv = units(rng, rows_k * cols_kv);
        q.chunks_mut(cols_q).for_each(|row| row[..pad_q].fill(f32::NAN));
        kv.chunks_mut(cols_kv).for_each(|row| row[..pad_k].fill(f32::NAN));

        let name = format!("{shape:?} {lens:?}");
        let (q_tensor, kv_tensor) = (tensor(cuda, rows_q, cols_q, &q), tensor(cuda, rows_k, cols_kv, &kv));
        let mut out = poisoned(cuda, rows_q, shape.q_size(), DType::Bf16);
        let attention = VarlenAttention {
            q: q_tensor.columns(pad_q),
            k: kv_tensor.columns(pad_k),
            v: kv_tensor.columns(pad_k + shape.kv_size()),
            cu_seqlens_q: &indices(cuda, &ends_q),
            cu_seqlens_k: &indices(cuda, &ends_k),
            max_seqlen_q: lens.iter().map(|(q, _)| *q).max().unwrap_or(0),
            max_seqlen_k: lens.iter().map(|(_, k)| *k).max().unwrap_or(0),
            shape,
        };
        cuda.attention_varlen(&attention, &mut out).unwrap();
        assert_untouched_around(&name, cuda, &mut out);
        let found = read(cuda, &out);
        let covered = ends_q[0] as usize * shape.q_size()..ends_q[lens.len()] as usize * shape.q_size();
        assert!(found[..covered.start].iter().chain(&found[covered.end..]).all(|x| *x == 0.0), "{name}: rows of no sequence");
        let mut comparison = Comparison::new(&format!("attention_varlen {name}"));
        for i in 0..lens.len() {
            let at = |row: i32, start: usize| &kv[row as usize * cols_kv + start..][..head_dim];
            for (row, head) in (ends_q[i]..ends_q[i + 1]).flat_map(|row| (0..num_heads).map(move |head| (row as usize, head))) {
                let first = pad_k + head / (num_heads / num_kv_heads) * head_dim;
                let keys: Vec<&[f32]> = (ends_k[i]..ends_k[i + 1]).map(|t| at(t, first)).collect();
                let values: Vec<&[f32]> = (ends_k[i]..ends_k[i + 1]).map(|t| at(t, first + shape.kv_size())).collect();
                let expected = attend(&q[row * cols_q + pad_q + head * head_dim..][..head_dim], &keys, &values);
                let found = &found[row * shape.q_size() + head * head_dim..][..head_dim];
                assert_attends(&mut comparison, format_args!("row {row} head {head}"), found, expected);
            }
        }
    }
}

fn packed(cuda: &Cuda, shape: AttentionShape, lens: &[(usize, usize)]) {
    Packed { shape, lens, rest: (0, 0), size: 4.0 }.run(cuda);
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn packed_sequences_do_not_see_each_other() {
    for cuda in open_each() {
        for head_dim in HEAD_DIMS {
            packed(&cuda, heads(2, 2, head_dim), &[(1, 1), (37, 37), (2, 130), (70, 9)]);
        }
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn many_short_sequences_share_a_batch() {
    let lens: Vec<_> = (0..70).map(|i| (i % 5, 3 + i % 7)).collect();
    for cuda in open_each() {
        packed(&cuda, heads(2, 1, 64), &lens);
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn tiles_of_queries_and_keys_end_anywhere() {
    for cuda in open_each() {
        packed(&cuda, heads(1, 1, 72), &[(127, 63), (128, 64), (129, 65), (33, 31), (32, 32), (31, 33), (16, 200), (200, 16)]);
        packed(&cuda, heads(1, 1, 72), &[(191, 95), (192, 96), (193, 97), (64, 191), (65, 192), (1, 193)]);
        packed(&cuda, heads(1, 1, 80), &[(193, 385), (7, 480), (3, 577)]);
        // Many tiles for one block: every stage is filled several times.
        packed(&cuda, heads(4, 4, 64), &[(5, 1250)]);
        packed(&cuda, heads(4, 4, 128), &[(70, 1000)]);
        packed(&cuda, heads(1, 1, 128), &[(127, 31), (128, 32), (129, 33), (1, 64), (2, 65), (3, 95)]);
        packed(&cuda, heads(1, 1, 128), &[(127, 63), (128, 64), (129, 65), (64, 128), (1, 129), (2, 400)]);
        packed(&cuda, heads(6, 2, 64), &[(43, 129), (42, 128)]);
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn few_latents_of_grouped_heads_see_a_long_context() {
    for cuda in open_each() {
        packed(&cuda, heads(16, 4, 96), &[(64, 300), (64, 70)]);
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn few_tiles_share_a_long_context() {
    for cuda in open_each() {
        // The emulation has 4 multiprocessors: up to 8 splits of one tile, 4 of two.
        packed(&cuda, heads(1, 1, 72), &[(5, 2100)]);
        packed(&cuda, heads(2, 1, 96), &[(9, 1300), (70, 255), (3, 0)]);
        // Of five tiles, four are whole and the last is split.
        packed(&cuda, heads(5, 5, 72), &[(10, 1000)]);
        paged(&cuda, heads(4, 1, 128), 16, None, &[(1300, 9)]);
        paged(&cuda, heads(4, 1, 64), 16, Some(700), &[(1000, 40), (3, 9)]);
    }
}

/// A picture of 980 x 980 has 4,900 patches; the Perceiver sees them, and its own 64 latents, with heads of 96 in groups of 4.
#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn keys_of_the_largest_picture_are_seen() {
    for cuda in open_each() {
        packed(&cuda, heads(1, 1, 72), &[(200, 4900), (1, 4900)]);
        packed(&cuda, heads(4, 1, 96), &[(64, 4964)]);
    }
}

/// Which block is the last to finish differs from run to run. All weights are equal and the values cancel, so that what is left is
/// the rounding of their sums.
#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn splits_give_the_same_bits_in_any_order() {
    for cuda in open_each() {
        let (rng, shape, rows) = (&mut Rng(5), heads(1, 1, 72), 2100);
        let half = units(rng, rows / 2 * shape.head_dim);
        let values: Vec<f32> = half.iter().copied().chain(half.iter().map(|x| -x)).collect();
        let zeros = tensor(&cuda, rows, shape.head_dim, &vec![0.0; values.len()]);
        let (values, ends_q, ends_k) =
            (tensor(&cuda, rows, shape.head_dim, &values), indices(&cuda, &[0, 9]), indices(&cuda, &[0, rows as i32]));
        let run = || {
            let (q, k, v) = (zeros.columns(0), values.columns(0), values.columns(0));
            let (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) = (&ends_q, &ends_k, 9, rows);
            let attention = VarlenAttention { q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, shape };
            let mut out = poisoned(&cuda, rows, shape.q_size(), DType::Bf16);
            cuda.attention_varlen(&attention, &mut out).unwrap();
            read(&cuda, &out)
        };
        let first = run();
        (0..8).for_each(|_| assert_eq!(run(), first));
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn rows_of_no_sequence_and_rows_without_keys_are_zeros() {
    for cuda in open_each() {
        let lens = [(0, 0), (3, 4), (0, 7), (5, 0), (2, 2), (0, 0)];
        Packed { shape: heads(2, 1, 64), lens: &lens, rest: (2, 3), size: 4.0 }.run(&cuda);
        Packed { shape: heads(2, 1, 72), lens: &[], rest: (1, 4), size: 4.0 }.run(&cuda);
        Packed { shape: heads(2, 1, 72), lens: &[(0, 3)], rest: (0, 0), size: 4.0 }.run(&cuda);
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn scores_beyond_the_range_of_exponentials_give_finite_results() {
    for cuda in open_each() {
        for size in [100.0, 1e4] {
            Packed { shape: heads(2, 1, 72), lens: &[(40, 150)], rest: (0, 0), size }.run(&cuda);
            Packed { shape: heads(2, 1, 128), lens: &[(40, 150)], rest: (0, 0), size }.run(&cuda);
            let spans = vec![(20, 30), (200, 1)];
            Paged { shape: heads(2, 1, 128), block_size: 16, window: None, spans, size, seed: 9 }.run(&cuda);
        }
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn columns_that_16_byte_copies_cannot_reach_are_refused() {
    let cuda = open();
    let run = |head_dim: usize, cols: usize, offset: usize| {
        let shape = heads(1, 1, head_dim);
        let (x, ends) = (poisoned(&cuda, 3, cols, DType::Bf16), indices(&cuda, &[0, 3]));
        let [q, k, v] = [x.columns(offset), x.columns(0), x.columns(0)];
        let (max_seqlen_q, max_seqlen_k) = (3, 3);
        let attention = VarlenAttention { q, k, v, cu_seqlens_q: &ends, cu_seqlens_k: &ends, max_seqlen_q, max_seqlen_k, shape };
        cuda.attention_varlen(&attention, &mut poisoned(&cuda, 3, head_dim, DType::Bf16))
    };
    run(64, 72, 8).unwrap();
    for (head_dim, cols, offset) in [(64, 68, 0), (64, 72, 4), (40, 72, 0)] {
        let error = run(head_dim, cols, offset).unwrap_err();
        assert!(matches!(&error, Error::Shape { .. }), "{head_dim} {cols} {offset}: {error}");
    }
}

/// Small numbers that may be rows or blocks, and extremes that are not.
fn garbage(rng: &mut Rng, len: usize, limit: usize) -> Vec<i32> {
    let one = |rng: &mut Rng| match rng.below(6) {
        0 => rng.next() as i32,
        1 => [-1, i32::MAX, i32::MIN][rng.below(3)],
        _ => rng.below(limit + 1) as i32,
    };
    (0..len).map(|_| one(rng)).collect()
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn indices_that_make_no_sense_harm_no_other_memory() {
    for cuda in open_each() {
        let rng = &mut Rng(11);
        for case in 0..30 {
            let shape = heads(1 + case % 3, 1, HEAD_DIMS[case % 5]);
            let (sequences, rows, width, block_size, blocks) =
                (1 + rng.below(3), rng.below(40), rng.below(4), 1 + rng.below(7), rng.below(5));
            let data = |rng: &mut Rng, rows: usize, cols: usize| tensor(&cuda, rows, cols, &units(rng, rows * cols));
            let mut qkv = data(rng, rows, shape.q_size() + 2 * shape.kv_size());
            let [k, v] = [0, 1].map(|_| data(rng, blocks * block_size, shape.kv_size()));
            let mut kv = KvCache { k, v, block_size };
            let starts = indices(&cuda, &garbage(rng, sequences + 1, rows));
            let step = PagedAttention {
                positions: &indices(&cuda, &garbage(rng, rows, width * block_size)),
                cu_seqlens_q: &starts,
                block_tables: &elements(&cuda, sequences, width, &garbage(rng, sequences * width, blocks)),
                context_lens: &indices(&cuda, &garbage(rng, sequences, width * block_size)),
                max_seqlen_q: rows,
                sliding_window: (case % 2 == 0).then_some(7),
                shape,
            };
            let mut out = poisoned(&cuda, rows, shape.q_size(), DType::Bf16);
            cuda.paged_attention(&qkv, &kv, &step, &mut out).unwrap();
            assert_untouched_around("paged_attention", &cuda, &mut out);
            // With rows that are few enough to be rotated on the way.
            let rope = Rope {
                cos_sin: &elements(&cuda, rows, shape.head_dim, &rng.units(rows * shape.head_dim)),
                slots: &indices(&cuda, &garbage(rng, rows, blocks * block_size)),
            };
            let step = PagedAttention { max_seqlen_q: rows.min(1 + case % 8), ..step };
            cuda.rope_and_paged_attention(&mut qkv, rope, &mut kv, &step, &mut out).unwrap();
            for (name, tensor) in [("out", &mut out), ("k", &mut kv.k), ("v", &mut kv.v)] {
                assert_untouched_around(name, &cuda, tensor);
            }
            let attention = VarlenAttention {
                q: qkv.columns(0),
                k: kv.k.columns(0),
                v: kv.v.columns(0),
                cu_seqlens_q: &starts,
                cu_seqlens_k: &indices(&cuda, &garbage(rng, sequences + 1, blocks * block_size)),
                max_seqlen_q: rows,
                max_seqlen_k: blocks * block_size,
                shape,
            };
            cuda.attention_varlen(&attention, &mut out).unwrap();
            assert_untouched_around("attention_varlen", &cuda, &mut out);
        }
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn attention_that_the_card_cannot_run_is_refused() {
    let wgmma = CudaOptions { attention: AttentionKernels::Wgmma, ..CudaOptions::default() };
    let (found, opened) = (open().compute_capability(), Cuda::open(&wgmma));
    if found == (9, 0) {
        opened.unwrap();
    } else {
        let message = opened.err().unwrap().to_string();
        assert!(message.contains("needs compute capability 9.0") && message.contains("take auto or mma"), "{message}");
    }
}
