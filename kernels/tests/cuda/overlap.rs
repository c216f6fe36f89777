//! Kernels start while those ahead of them still run, where the card has that: none may touch what another writes before it has
//! waited. Every op reads what kernels just ahead of it wrote, and kernels just behind it overwrite that again.

use crate::{
    common::{Rng, weights},
    support::*,
};
use half::bf16;
use idefics_kernels::{
    AttentionShape, Backend, DType, Draws, Element, Epilogue, GraphKey, KvCache, PagedAttention, Pictures, RmsNorm, Rope, SwigluScratch,
    Tensor, VarlenAttention,
    cuda::{Cuda, CudaOptions},
};
use std::mem::swap;

/// A tensor that is filled by a kernel, with one of two contents.
struct Input {
    live: Tensor<Cuda>,
    contents: [Tensor<Cuda>; 2],
    rows: Tensor<Cuda>,
}

impl Input {
    fn new<T: Element>(cuda: &Cuda, cols: usize, contents: [Vec<T>; 2]) -> Self {
        let rows = contents[0].len() / cols;
        let identity: Vec<i32> = (0..rows as i32).collect();
        let contents = contents.map(|content| elements(cuda, rows, cols, &content));
        Self { live: poisoned(cuda, rows, cols, T::DTYPE), contents, rows: indices(cuda, &identity) }
    }

    /// Activations in -1..1.
    fn units(cuda: &Cuda, rows: usize, cols: usize) -> Self {
        let content = |seed| units(&mut Rng(seed), rows * cols).into_iter().map(bf16::from_f32).collect::<Vec<bf16>>();
        Self::new(cuda, cols, [1, 2].map(content))
    }

    /// A column of indices.
    fn indices<const N: usize>(cuda: &Cuda, contents: [[i32; N]; 2]) -> Self {
        Self::new(cuda, 1, contents.map(Vec::from))
    }

    fn fill(&mut self, cuda: &Cuda, content: usize) {
        cuda.gather_rows(&self.contents[content], &self.rows, &mut self.live).unwrap();
    }
}

fn bits(cuda: &Cuda, tensor: &Tensor<Cuda>) -> Vec<u32> {
    if tensor.dtype() != DType::I32 {
        return read(cuda, tensor).into_iter().map(f32::to_bits).collect();
    }
    let mut out = vec![0u32; tensor.rows() * tensor.cols()];
    cuda.download(tensor, bytemuck::cast_slice_mut::<u32, i32>(&mut out)).unwrap();
    out
}

type Op<'a> = dyn FnMut(&mut [Input], &mut Tensor<Cuda>) + 'a;

/// That `op` gives what it gives by itself when its inputs are written just before it and just after it.
#[track_caller]
fn check(cuda: &Cuda, name: &str, inputs: &mut [Input], out: &mut Tensor<Cuda>, op: &mut Op<'_>) {
    let alone = [0, 1].map(|content| {
        inputs.iter_mut().for_each(|input| input.fill(cuda, content));
        cuda.synchronize().unwrap();
        op(inputs, out);
        bits(cuda, out)
    });
    assert!(alone[0] != alone[1], "{name}: both contents give the same");
    // The emulation starts one block early, each time another one, and not before all kernels ahead: inputs take turns in being
    // filled last.
    for turn in 0..8 {
        let (content, other, len) = (turn % 2, 1 - turn % 2, inputs.len());
        (0..len).for_each(|i| inputs[(turn + i) % len].fill(cuda, other));
        op(inputs, out);
        cuda.synchronize().unwrap();
        (0..len).for_each(|i| inputs[(turn + i) % len].fill(cuda, content));
        op(inputs, out);
        (0..len).for_each(|i| inputs[(turn + i) % len].fill(cuda, other));
        assert!(bits(cuda, out) == alone[content], "{name}, turn {turn}");
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn products_wait_for_the_kernels_ahead() {
    let cuda = &open();
    for (n, k) in [(1, 136), (12, 1096), (5, 75), (20, 136)] {
        let weight = weights(&mut Rng(3), DType::Bf16, &[&[35, k]]).load(cuda);
        let mut out = poisoned(cuda, n, 35, DType::Bf16);
        let name = format!("linear of {n} rows of {k}");
        check(cuda, &name, &mut [Input::units(cuda, n, k)], &mut out, &mut |inputs, out| {
            cuda.linear(&inputs[0].live, &weight, None, Epilogue::Store, out).unwrap();
        });
        // What is added to was written just ahead, too.
        check(cuda, &name, &mut [Input::units(cuda, n, k), Input::units(cuda, n, 35)], &mut out, &mut |inputs, out| {
            let [x, sum] = inputs else { unreachable!("two inputs") };
            cuda.linear(&x.live, &weight, None, Epilogue::Accumulate, &mut sum.live).unwrap();
            cuda.gather_rows(&sum.live, &sum.rows, out).unwrap();
        });
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn fused_products_wait_for_the_kernels_ahead() {
    let cuda = &open();
    for (n, k) in [(1, 136), (12, 1096), (5, 75), (20, 136)] {
        let rng = &mut Rng(3);
        let (norm, weight) = (weights(rng, DType::Bf16, &[&[k]]).load(cuda), weights(rng, DType::Bf16, &[&[34, k]]).load(cuda));
        let (mut normed, mut gate_up) = (poisoned(cuda, n, k, DType::Bf16), poisoned(cuda, n, 34, DType::Bf16));
        let x = &mut [Input::units(cuda, n, k)];
        let name = format!("{n} rows of {k}");
        check(cuda, &name, x, &mut poisoned(cuda, n, 34, DType::F32), &mut |x, out| {
            cuda.rms_norm_linear(&x[0].live, RmsNorm { weight: &norm, eps: 1e-5 }, &weight, &mut normed, out).unwrap();
        });
        check(cuda, &name, x, &mut poisoned(cuda, n, 17, DType::Bf16), &mut |x, out| {
            let scratch = SwigluScratch { normed: &mut normed, gate_up: &mut gate_up };
            cuda.rms_norm_swiglu(&x[0].live, RmsNorm { weight: &norm, eps: 1e-5 }, &weight, scratch, out).unwrap();
        });
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn norms_and_functions_wait_for_the_kernels_ahead() {
    let cuda = &open();
    let rng = &mut Rng(3);
    let (weight, bias) = (weights(rng, DType::Bf16, &[&[144]]).load(cuda), weights(rng, DType::Bf16, &[&[144]]).load(cuda));
    let mut out = poisoned(cuda, 5, 144, DType::Bf16);
    let x = &mut [Input::units(cuda, 5, 144)];
    check(cuda, "rms_norm", x, &mut out, &mut |x, out| cuda.rms_norm(&x[0].live, &weight, 1e-5, out).unwrap());
    check(cuda, "layer_norm", x, &mut out, &mut |x, out| cuda.layer_norm(&x[0].live, &weight, &bias, 1e-5, out).unwrap());
    let x = &mut [Input::units(cuda, 5, 288)];
    check(cuda, "silu_and_mul", x, &mut out, &mut |x, out| cuda.silu_and_mul(&x[0].live, out).unwrap());
    let pixels = [1, 2].map(|seed| (0..5 * 144).map(|i| (i * seed) as u8).collect::<Vec<u8>>());
    let tables = [1, 2].map(|seed| Rng(seed).units(256));
    let inputs = &mut [
        Input::new(cuda, 1, pixels),
        Input::new(cuda, 256, tables),
        Input::indices(cuda, [[0, 144, 12, 300, 7], [5, 0, 288, 20, 100]]),
        Input::indices(cuda, [[12, 24, 12, 13, 30], [14, 12, 20, 36, 12]]),
    ];
    check(cuda, "patchify", inputs, &mut out, &mut |inputs, out| {
        let [pixels, table, origins, widths] = inputs else { unreachable!("four inputs") };
        let pictures = Pictures { pixels: &pixels.live, origins: &origins.live, widths: &widths.live, table: &table.live, patch_size: 12 };
        cuda.patchify(&pictures, out).unwrap();
    });
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn copies_of_rows_wait_for_the_kernels_ahead() {
    let cuda = &open();
    let table = weights(&mut Rng(3), DType::Bf16, &[&[7, 24]]).load(cuda);
    let mut out = poisoned(cuda, 4, 24, DType::Bf16);
    let ids = &mut [Input::indices(cuda, [[3, 1, 6, 0], [0, 2, 5, 4]])];
    check(cuda, "embed", ids, &mut out, &mut |ids, out| cuda.embed(&table, &ids[0].live, out).unwrap());
    let inputs = &mut [Input::units(cuda, 4, 24), Input::indices(cuda, [[3, 1, 2, 0], [0, 3, 2, 1]])];
    check(cuda, "gather_rows", inputs, &mut out, &mut |inputs, out| cuda.gather_rows(&inputs[0].live, &inputs[1].live, out).unwrap());
    check(cuda, "scatter_rows", inputs, &mut out, &mut |inputs, out| cuda.scatter_rows(&inputs[0].live, &inputs[1].live, out).unwrap());
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn attention_waits_for_the_kernels_ahead() {
    let cuda = &open();
    let shape = AttentionShape { num_heads: 4, num_kv_heads: 2, head_dim: 64 };
    let (q_size, kv_size) = (shape.q_size(), shape.kv_size());
    // One row behind 700 keys, which are split, and 40 rows that are prefill's; rotated by a kernel ahead or by attention itself.
    for (rows, past, fused) in [(1, 700, false), (1, 700, true), (40, 9, false)] {
        let keys = rows + past;
        let cached = || Input::units(cuda, keys, kv_size);
        let positions = |shift: usize| (past - shift..keys - shift).map(|position| position as i32).collect::<Vec<i32>>();
        let lens = |shift: usize| vec![(keys - shift) as i32];
        let (k, v) = (cached(), cached());
        let inputs = &mut [
            Input::units(cuda, rows, q_size + 2 * kv_size),
            Input::new(cuda, 1, [0, 3].map(positions)),
            Input::new(cuda, 1, [0, 3].map(positions)),
            Input::new(cuda, 1, [0, 3].map(lens)),
            k,
            v,
        ];
        let inv_freq = elements(cuda, 1, 32, &[0.01; 32]);
        let (cu_seqlens_q, block_tables) = (indices(cuda, &[0, rows as i32]), indices(cuda, &[0]));
        let mut kv = [(); 2].map(|()| poisoned(cuda, keys, kv_size, DType::Bf16)).into_iter();
        let mut kv = KvCache { k: kv.next().unwrap(), v: kv.next().unwrap(), block_size: keys };
        let mut cos_sin = poisoned(cuda, rows, shape.head_dim, DType::F32);
        let mut out = poisoned(cuda, rows, q_size, DType::Bf16);
        check(cuda, &format!("attention of {rows} rows, fused: {fused}"), inputs, &mut out, &mut |inputs, out| {
            let [qkv, positions, slots, context_lens, k, v] = inputs else { unreachable!("six inputs") };
            cuda.gather_rows(&k.live, &k.rows, &mut kv.k).unwrap();
            cuda.gather_rows(&v.live, &v.rows, &mut kv.v).unwrap();
            cuda.rope_cos_sin(&positions.live, &inv_freq, &mut cos_sin).unwrap();
            let rope = Rope { cos_sin: &cos_sin, slots: &slots.live };
            let step = PagedAttention {
                positions: &positions.live,
                cu_seqlens_q: &cu_seqlens_q,
                block_tables: &block_tables,
                context_lens: &context_lens.live,
                max_seqlen_q: rows,
                sliding_window: None,
                shape,
            };
            if fused {
                cuda.rope_and_paged_attention(&mut qkv.live, rope, &mut kv, &step, out).unwrap();
            } else {
                cuda.rope_and_store_kv(&mut qkv.live, rope, shape, &mut kv).unwrap();
                cuda.paged_attention(&qkv.live, &kv, &step, out).unwrap();
            }
        });
    }

    let inputs = &mut [
        Input::units(cuda, 70, q_size),
        Input::units(cuda, 70, 2 * kv_size),
        Input::indices(cuda, [[0, 30, 70], [0, 50, 70]]),
        Input::indices(cuda, [[0, 20, 70], [0, 60, 70]]),
    ];
    let mut out = poisoned(cuda, 70, q_size, DType::Bf16);
    check(cuda, "attention_varlen", inputs, &mut out, &mut |inputs, out| {
        let attention = VarlenAttention {
            q: inputs[0].live.columns(0),
            k: inputs[1].live.columns(0),
            v: inputs[1].live.columns(kv_size),
            cu_seqlens_q: &inputs[2].live,
            cu_seqlens_k: &inputs[3].live,
            max_seqlen_q: 50,
            max_seqlen_k: 60,
            shape,
        };
        cuda.attention_varlen(&attention, out).unwrap();
    });
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn sampling_waits_for_the_kernels_ahead() {
    let cuda = &open();
    let logits = [1, 2].map(|seed| Rng(seed).units(3 * 100));
    let inputs = &mut [
        Input::new(cuda, 100, logits),
        Input::new(cuda, 1, [vec![1f32; 3], vec![0.2; 3]]),
        Input::indices(cuda, [[50, 10, 5], [4, 70, 90]]),
        Input::new(cuda, 1, [vec![0.9f32; 3], vec![0.5; 3]]),
        Input::new(cuda, 2, [vec![i32::MAX; 6], vec![77_777_777; 6]]),
        Input::new(cuda, 4, [vec![0x0f0f_0f0f; 4], vec![0x7070_7070; 4]]),
    ];
    check(cuda, "sample", inputs, &mut poisoned(cuda, 3, 1, DType::I32), &mut |inputs, out| {
        let [logits, temperature, top_k, top_p, random, banned] = inputs else { unreachable!("six inputs") };
        let draws =
            Draws { temperature: &temperature.live, top_k: &top_k.live, top_p: &top_p.live, random: &random.live, banned: &banned.live };
        cuda.sample(&logits.live, &draws, out).unwrap();
    });

    let inputs = &mut [Input::new(cuda, 100, [1, 2].map(|seed| Rng(seed).units(3 * 100))), Input::indices(cuda, [[5, 50, 99], [0, 7, 61]])];
    let mut top_ids = poisoned(cuda, 3, 4, DType::I32);
    check(cuda, "logprobs", inputs, &mut poisoned(cuda, 3, 5, DType::F32), &mut |inputs, out| {
        cuda.logprobs(&inputs[0].live, 100, &inputs[1].live, &mut top_ids, out).unwrap();
    });
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn recorded_kernels_wait_for_those_ahead() {
    let cuda = &open();
    let weight = weights(&mut Rng(3), DType::Bf16, &[&[144]]).load(cuda);
    let mut normed = poisoned(cuda, 5, 144, DType::Bf16);
    let mut out = poisoned(cuda, 5, 72, DType::Bf16);
    let key = GraphKey { name: "overlap", sizes: [0; 3] };
    check(cuda, "graph", &mut [Input::units(cuda, 5, 144)], &mut out, &mut |x, out| {
        let mut ops = || {
            cuda.rms_norm(&x[0].live, &weight, 1e-5, &mut normed)?;
            cuda.silu_and_mul(&normed, out)
        };
        cuda.graphed(key, &mut ops).unwrap();
    });
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn kernels_start_early_only_with_early_launch() {
    for early_launch in [false, true] {
        let cuda = &Cuda::open(&CudaOptions { early_launch, ..CudaOptions::default() }).unwrap();
        let (x, ones) = (tensor(cuda, 1, 8, &[1.0; 8]), tensor(cuda, 16, 8, &[1.0; 16 * 8]));
        let rows: Vec<i32> = (0..16).collect();
        let rows = indices(cuda, &rows);
        let mut written = cuda.alloc(16, 8, DType::Bf16).unwrap();
        let mut weight = weights(&mut Rng(3), DType::Bf16, &[&[16, 8]]).load(cuda);
        let mut out = poisoned(cuda, 1, 16, DType::Bf16);
        let does = cuda.device_name() == "host emulation" && cuda.compute_capability() >= (9, 0);
        let mut early = [false; 3];
        // Another test that gives memory back makes the emulation do all work at once, so once is not enough.
        for attempt in 0..50 {
            let key = GraphKey { name: "early launch", sizes: [attempt, 0, 0] };
            // A product fetches weights before it waits. No op writes any, so that this one sees whether the kernel ahead had ended.
            for is_early in &mut early {
                write(cuda, &[0.0; 16 * 8], &mut written);
                let mut ops = || {
                    cuda.gather_rows(&ones, &rows, &mut written)?;
                    swap(&mut written.storage, &mut weight.storage);
                    let queued = cuda.linear(&x, &weight, None, Epilogue::Store, &mut out);
                    swap(&mut written.storage, &mut weight.storage);
                    queued
                };
                cuda.graphed(key, &mut ops).unwrap();
                *is_early |= read(cuda, &out) != [8.0; 16];
            }
            if !early_launch || !does || early == [true; 3] {
                break;
            }
        }
        // Launched, recorded and replayed. A card may start kernels early, its emulation does.
        assert!(early_launch || early == [false; 3], "{early:?}");
        assert!(!early_launch || !does || early == [true; 3], "{early:?}");
    }
}
