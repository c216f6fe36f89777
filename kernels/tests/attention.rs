//! Attention over packed sequences and over the paged cache, against softmax in f64.

mod common;

use common::*;
use idefics_kernels::{AttentionShape, Backend, DType, KvCache, PagedAttention, VarlenAttention, cpu::Cpu};

/// Scores are sums of `head_dim` products below 1, scaled by `1 / sqrt(head_dim)`: their rounding errors add up like a random
/// walk to below `sqrt(head_dim) * 2^-24 * 4`; the exponential turns them into relative errors of the weights, and has 3e-7 of
/// its own; values are at most 1. Measured: 1e-6.
const TOLERANCE: f64 = 6e-6;

/// Softmax of the scores of one query over `keys`, applied to their values.
fn attend(q: &[f32], keys: &[&[f32]], values: &[&[f32]]) -> Vec<f64> {
    let scale = 1.0 / (q.len() as f64).sqrt();
    let dot = |k: &[f32]| q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>() * scale;
    let scores: Vec<f64> = keys.iter().map(|k| dot(k)).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let column = |j: usize| weights.iter().zip(values).map(|(weight, v)| weight * f64::from(v[j])).sum::<f64>();
    (0..q.len()).map(|j| if keys.is_empty() { 0.0 } else { column(j) / sum }).collect()
}

/// One packed case: lengths of queries and keys, and where q, k and v begin in their rows.
fn varlen(shape: AttentionShape, lens: &[(usize, usize)], seed: u64) {
    let rng = &mut Rng(seed);
    let AttentionShape { num_heads, num_kv_heads, head_dim } = shape;
    let (rows_q, rows_k): (usize, usize) = lens.iter().fold((0, 0), |(a, b), (q, k)| (a + q, b + k));
    let (pad_q, pad_k) = (3, 5);
    let (cols_q, cols_kv) = (shape.q_size() + pad_q, 2 * shape.kv_size() + pad_k);
    // Scores well apart, so that maxima move from block to block.
    let q: Vec<f32> = rng.units(rows_q * cols_q).iter().map(|x| 4.0 * x).collect();
    let kv = rng.units(rows_k * cols_kv);
    let mut ends_q = vec![0i32];
    let mut ends_k = vec![0i32];
    for (q, k) in lens {
        ends_q.push(ends_q.last().unwrap() + *q as i32);
        ends_k.push(ends_k.last().unwrap() + *k as i32);
    }

    let mut expected = vec![0.0; rows_q * shape.q_size()];
    for i in 0..lens.len() {
        let at = |row: i32, start: usize| &kv[row as usize * cols_kv + start..][..head_dim];
        for row in ends_q[i]..ends_q[i + 1] {
            for head in 0..num_heads {
                let kv_head = head / (num_heads / num_kv_heads) * head_dim;
                let keys: Vec<&[f32]> = (ends_k[i]..ends_k[i + 1]).map(|t| at(t, pad_k + kv_head)).collect();
                let values: Vec<&[f32]> = (ends_k[i]..ends_k[i + 1]).map(|t| at(t, pad_k + shape.kv_size() + kv_head)).collect();
                let q = &q[row as usize * cols_q + pad_q + head * head_dim..][..head_dim];
                let to = row as usize * shape.q_size() + head * head_dim;
                expected[to..to + head_dim].copy_from_slice(&attend(q, &keys, &values));
            }
        }
    }

    let mut previous: Option<(Cpu, Vec<f32>)> = None;
    for cpu in backends() {
        let name = format!("{shape:?} {lens:?} on {}", describe(&cpu));
        let (q, kv) = (tensor(&cpu, rows_q, cols_q, &q), tensor(&cpu, rows_k, cols_kv, &kv));
        let (ends_q, ends_k) = (indices(&cpu, &ends_q), indices(&cpu, &ends_k));
        let mut out = poisoned(&cpu, rows_q, shape.q_size());
        let attention = VarlenAttention {
            q: q.columns(pad_q),
            k: kv.columns(pad_k),
            v: kv.columns(pad_k + shape.kv_size()),
            cu_seqlens_q: &ends_q,
            cu_seqlens_k: &ends_k,
            max_seqlen_q: lens.iter().map(|(q, _)| *q).max().unwrap_or(0),
            max_seqlen_k: lens.iter().map(|(_, k)| *k).max().unwrap_or(0),
            shape,
        };
        cpu.attention_varlen(&attention, &mut out).unwrap();
        let found = read::<f32>(&cpu, &out);
        assert_close(&name, &found, &expected, |_| TOLERANCE);
        assert!(read_around(&cpu, &mut out).iter().all(|value| value.is_nan()), "{name}: wrote outside of the window");
        if let Some((other, bits_of_other)) = &previous
            && other.isa() == cpu.isa()
        {
            assert_eq!(bits(bits_of_other), bits(&found), "{name}: bits depend on threads");
        }
        previous = Some((cpu, found));
    }
}

fn heads(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> AttentionShape {
    AttentionShape { num_heads, num_kv_heads, head_dim }
}

#[test]
fn packed_sequences_do_not_see_each_other() {
    for head_dim in [72, 96, 128, 64, 1, 5, 33] {
        varlen(heads(2, 2, head_dim), &[(1, 1), (37, 37), (2, 130), (70, 9)], head_dim as u64);
    }
}

#[test]
fn long_sequences_cross_blocks_of_keys() {
    for keys in [119, 120, 121, 240, 241, 400] {
        varlen(heads(3, 1, 72), &[(33, keys)], keys as u64);
    }
    varlen(heads(2, 2, 72), &[(300, 300)], 1);
}

#[test]
fn few_latents_of_grouped_heads_see_a_long_context() {
    varlen(heads(16, 4, 96), &[(64, 300), (64, 70)], 3);
}

#[test]
fn empty_sequences_are_passed_over_and_no_keys_give_zeros() {
    varlen(heads(2, 1, 16), &[(0, 0), (3, 4), (0, 7), (5, 0), (2, 2), (0, 0)], 4);
    varlen(heads(2, 1, 16), &[], 4);
}

/// A sequence of a paged step: how many tokens came before, and how many rows it has now.
type Span = (usize, usize);

struct Paged {
    shape: AttentionShape,
    block_size: usize,
    window: Option<usize>,
    spans: Vec<Span>,
    seed: u64,
}

/// Numbers of a paged case: q of every row, keys and values of every sequence, shuffled blocks.
struct Data {
    qkv: Vec<f32>,
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
    k_cache: Vec<f32>,
    v_cache: Vec<f32>,
    tables: Vec<i32>,
    width: usize,
}

impl Paged {
    fn data(&self) -> Data {
        let rng = &mut Rng(self.seed);
        let kv_size = self.shape.kv_size();
        let lens: Vec<usize> = self.spans.iter().map(|(before, rows)| before + rows).collect();
        let rows: usize = self.spans.iter().map(|(_, rows)| rows).sum();
        let width = lens.iter().map(|len| len.div_ceil(self.block_size)).max().unwrap_or(0) + 1;
        let blocks = width * lens.len() + 2;
        let mut order: Vec<i32> = (0..blocks as i32).collect();
        for i in (1..blocks).rev() {
            order.swap(i, rng.below(i + 1));
        }
        // What no sequence owns is poison: nothing of it may be read.
        let mut k_cache = vec![f32::NAN; blocks * self.block_size * kv_size];
        let mut v_cache = k_cache.clone();
        let (mut k, mut v, mut tables) = (Vec::new(), Vec::new(), Vec::new());
        for (i, len) in lens.iter().enumerate() {
            let used = len.div_ceil(self.block_size);
            let mut table: Vec<i32> = order[i * width..i * width + used].to_vec();
            k.push(rng.units(len * kv_size));
            v.push(rng.units(len * kv_size));
            for t in 0..*len {
                let slot = table[t / self.block_size] as usize * self.block_size + t % self.block_size;
                k_cache[slot * kv_size..][..kv_size].copy_from_slice(&k[i][t * kv_size..][..kv_size]);
                v_cache[slot * kv_size..][..kv_size].copy_from_slice(&v[i][t * kv_size..][..kv_size]);
            }
            table.resize(width, -1);
            tables.extend(table);
        }
        let qkv = rng.units(rows * (self.shape.q_size() + 2 * kv_size)).iter().map(|x| 4.0 * x).collect();
        Data { qkv, k, v, k_cache, v_cache, tables, width }
    }

    fn expected(&self, data: &Data) -> Vec<f64> {
        let AttentionShape { num_heads, num_kv_heads, head_dim } = self.shape;
        let (cols, kv_size) = (self.shape.q_size() + 2 * self.shape.kv_size(), self.shape.kv_size());
        let mut out = Vec::new();
        let mut row = 0;
        for (i, (before, rows)) in self.spans.iter().enumerate() {
            for position in *before..before + rows {
                let first = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
                for head in 0..num_heads {
                    let start = head / (num_heads / num_kv_heads) * head_dim;
                    let at = |data: &'_ Vec<f32>, t: usize| data[t * kv_size + start..][..head_dim].to_vec();
                    let keys: Vec<Vec<f32>> = (first..=position).map(|t| at(&data.k[i], t)).collect();
                    let values: Vec<Vec<f32>> = (first..=position).map(|t| at(&data.v[i], t)).collect();
                    let keys: Vec<&[f32]> = keys.iter().map(Vec::as_slice).collect();
                    let values: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
                    out.extend(attend(&data.qkv[row * cols + head * head_dim..][..head_dim], &keys, &values));
                }
                row += 1;
            }
        }
        out
    }

    fn run_on(&self, cpu: &Cpu, data: &Data) -> Vec<f32> {
        let kv_size = self.shape.kv_size();
        let slots = data.k_cache.len() / kv_size;
        let rows: usize = self.spans.iter().map(|(_, rows)| rows).sum();
        let mut ends = vec![0];
        for (_, rows) in &self.spans {
            ends.push(ends.last().unwrap() + *rows as i32);
        }
        let positions: Vec<i32> = self.spans.iter().flat_map(|(before, rows)| *before as i32..(before + rows) as i32).collect();
        let lens: Vec<i32> = self.spans.iter().map(|(before, rows)| (before + rows) as i32).collect();
        let qkv = tensor(cpu, rows, self.shape.q_size() + 2 * kv_size, &data.qkv);
        let kv = KvCache {
            k: tensor(cpu, slots, kv_size, &data.k_cache),
            v: tensor(cpu, slots, kv_size, &data.v_cache),
            block_size: self.block_size,
        };
        let step = PagedAttention {
            positions: &indices(cpu, &positions),
            cu_seqlens_q: &indices(cpu, &ends),
            block_tables: &table(cpu, self.spans.len(), data.width, &data.tables),
            context_lens: &indices(cpu, &lens),
            max_seqlen_q: self.spans.iter().map(|(_, rows)| *rows).max().unwrap_or(0),
            sliding_window: self.window,
            shape: self.shape,
        };
        let mut out = poisoned(cpu, rows, self.shape.q_size());
        cpu.paged_attention(&qkv, &kv, &step, &mut out).unwrap();
        assert!(read_around(cpu, &mut out).iter().all(|value| value.is_nan()), "wrote outside of the window");
        read(cpu, &out)
    }

    fn run(&self) {
        let data = self.data();
        let expected = self.expected(&data);
        let mut previous: Option<(Cpu, Vec<f32>)> = None;
        for cpu in backends() {
            let name = format!("{:?} {:?} window {:?} on {}", self.shape, self.spans, self.window, describe(&cpu));
            let found = self.run_on(&cpu, &data);
            assert_close(&name, &found, &expected, |_| TOLERANCE);
            if let Some((other, bits_of_other)) = &previous
                && other.isa() == cpu.isa()
            {
                assert_eq!(bits(bits_of_other), bits(&found), "{name}: bits depend on threads");
            }
            previous = Some((cpu, found));
        }
    }
}

#[test]
fn decoding_sees_all_of_a_shuffled_cache() {
    for (num_heads, num_kv_heads, head_dim) in [(4, 1, 128), (4, 4, 72), (6, 2, 96), (8, 1, 33), (10, 2, 16), (2, 2, 1)] {
        for block_size in [1, 16] {
            let spans = vec![(0, 1), (15, 1), (16, 1), (100, 1)];
            Paged { shape: heads(num_heads, num_kv_heads, head_dim), block_size, window: None, spans, seed: 1 }.run();
        }
    }
}

#[test]
fn long_contexts_are_split_and_put_together() {
    let spans = vec![(510, 1), (511, 1), (512, 1), (1500, 1), (1024, 2)];
    Paged { shape: heads(8, 2, 64), block_size: 16, window: None, spans, seed: 2 }.run();
}

#[test]
fn windows_hide_what_is_too_far_back() {
    for window in [1, 5, 16, 130, 600, 5000] {
        let spans = vec![(0, 1), (700, 1), (3, 40), (600, 2), (200, 150)];
        Paged { shape: heads(4, 2, 24), block_size: 16, window: Some(window), spans, seed: 3 }.run();
    }
}

#[test]
fn prompts_and_chunks_see_the_past_and_themselves() {
    for head_dim in [128, 72, 5] {
        let spans = vec![(0, 130), (1, 3), (125, 20), (0, 9), (300, 33)];
        Paged { shape: heads(4, 1, head_dim), block_size: 16, window: None, spans, seed: 4 }.run();
    }
}

#[test]
fn groups_wider_than_a_decoding_tile_work() {
    Paged { shape: heads(24, 2, 40), block_size: 4, window: None, spans: vec![(140, 1), (0, 1), (20, 7)], seed: 5 }.run();
}

#[test]
fn chunks_give_the_same_bits_as_the_whole_prompt() {
    let shape = heads(4, 2, 72);
    let whole = Paged { shape, block_size: 16, window: Some(100), spans: vec![(0, 300)], seed: 6 };
    let data = whole.data();
    let cols = shape.q_size() + 2 * shape.kv_size();
    for cpu in backends() {
        let all = whole.run_on(&cpu, &data);
        for chunk in [20usize, 120, 121, 299] {
            let spans = vec![(chunk, 300 - chunk)];
            let part = Paged { shape, block_size: 16, window: Some(100), spans, seed: 6 };
            let rows = Data { qkv: data.qkv[chunk * cols..].to_vec(), ..part_of(&data) };
            let expected = &all[chunk * shape.q_size()..];
            if 300 - chunk > 4 {
                assert_eq!(bits(&part.run_on(&cpu, &rows)), bits(expected), "from {chunk} on {}", describe(&cpu));
            } else {
                let expected: Vec<f64> = expected.iter().map(|x| f64::from(*x)).collect();
                assert_close("a single row", &part.run_on(&cpu, &rows), &expected, |_| TOLERANCE);
            }
        }
    }
}

fn part_of(data: &Data) -> Data {
    Data {
        qkv: Vec::new(),
        k: data.k.clone(),
        v: data.v.clone(),
        k_cache: data.k_cache.clone(),
        v_cache: data.v_cache.clone(),
        tables: data.tables.clone(),
        width: data.width,
    }
}

#[test]
fn sequences_without_rows_or_context_do_not_disturb_others() {
    Paged { shape: heads(4, 2, 16), block_size: 8, window: None, spans: vec![(0, 0), (30, 1), (12, 0), (0, 20)], seed: 7 }.run();
    for cpu in backends() {
        // Padding of a step: no context, position 0, blocks that are not there.
        let shape = heads(2, 1, 8);
        let kv = KvCache { k: poisoned(&cpu, 16, 8), v: poisoned(&cpu, 16, 8), block_size: 8 };
        for ends in [[0, 1], [0, 3], [1, 2]] {
            let step = PagedAttention {
                positions: &indices(&cpu, &[0, 0, 0]),
                cu_seqlens_q: &indices(&cpu, &ends),
                block_tables: &table(&cpu, 1, 1, &[-1]),
                context_lens: &indices(&cpu, &[0]),
                max_seqlen_q: 3,
                sliding_window: Some(4),
                shape,
            };
            let mut out = poisoned(&cpu, 3, 16);
            cpu.paged_attention(&poisoned(&cpu, 3, 32), &kv, &step, &mut out).unwrap();
            assert_eq!(read::<f32>(&cpu, &out), vec![0.0; 48]);
        }
        assert_eq!(kv.k.dtype(), DType::F32);
    }
}
