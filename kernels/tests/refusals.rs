//! Whatever does not fit is refused with what was expected and found; nothing panics, nothing is read out of bounds.

mod common;

use common::*;
use idefics_kernels::{
    AttentionShape, Backend, DType, Epilogue, Error, KvCache, Matrix, PagedAttention, Pictures, Result, RmsNorm, Rope, SwigluScratch,
    Tensor, VarlenAttention,
    cpu::{Cpu, CpuOptions, Isa},
};

/// That `result` is [`Error::Shape`] with `what` in its message.
#[track_caller]
fn refused(result: Result<()>, what: &str) {
    match result {
        Err(Error::Shape { .. }) => {}
        other => panic!("expected a refusal with {what:?}, found {other:?}"),
    }
    let message = result.unwrap_err().to_string();
    assert!(message.contains(what), "expected {what:?} in {message:?}");
}

fn cpu() -> Cpu {
    Cpu::new(CpuOptions { threads: Some(1), isa: None }).unwrap()
}

fn matrix(cpu: &Cpu, shape: &[usize]) -> Matrix<Cpu> {
    weights(&mut Rng(1), DType::Bf16, &[shape]).load(cpu)
}

fn zeros(cpu: &Cpu, rows: usize, cols: usize) -> Tensor<Cpu> {
    cpu.alloc(rows, cols, DType::F32).unwrap()
}

#[test]
fn linear_refuses_what_does_not_fit() {
    let cpu = cpu();
    let (w, b) = (matrix(&cpu, &[3, 4]), matrix(&cpu, &[4]));
    let x = zeros(&cpu, 2, 4);
    let store = Epilogue::Store;
    refused(cpu.linear(&zeros(&cpu, 2, 5), &w, None, store, &mut zeros(&cpu, 2, 3)), "expected x [2, 4], found [2, 5]");
    refused(cpu.linear(&x, &w, None, store, &mut zeros(&cpu, 2, 4)), "expected out [2, 3], found [2, 4]");
    refused(cpu.linear(&x, &w, None, store, &mut zeros(&cpu, 1, 3)), "expected out [2, 3], found [1, 3]");
    refused(cpu.linear(&x, &w, Some(&b), store, &mut zeros(&cpu, 2, 3)), "expected bias [1, 3], found [1, 4]");
    refused(cpu.linear(&x, &w, None, store, &mut cpu.alloc(2, 3, DType::I32).unwrap()), "expected out in f32");
    let pretended = Matrix { rows: 1000, ..matrix(&cpu, &[3, 4]) };
    refused(cpu.linear(&x, &pretended, None, store, &mut zeros(&cpu, 2, 1000)), "found [3, 4]");
    let vectors = weights(&mut Rng(1), DType::F32, &[&[2], &[2]]).load(&cpu);
    refused(cpu.linear(&x, &vectors, None, store, &mut zeros(&cpu, 2, 1)), "stacked vectors");
}

#[test]
fn fused_products_refuse_what_does_not_fit() {
    let cpu = cpu();
    let (w, odd, norm, short) = (matrix(&cpu, &[6, 4]), matrix(&cpu, &[3, 4]), matrix(&cpu, &[4]), matrix(&cpu, &[3]));
    let linear = |x: usize, norm, normed: usize, out: usize| {
        let (mut normed, mut out) = (zeros(&cpu, 2, normed), zeros(&cpu, 2, out));
        cpu.rms_norm_linear(&zeros(&cpu, 2, x), RmsNorm { weight: norm, eps: 1e-5 }, &w, &mut normed, &mut out)
    };
    linear(4, &norm, 4, 6).unwrap();
    refused(linear(5, &norm, 4, 6), "rms_norm_linear: expected x [2, 4], found [2, 5]");
    refused(linear(4, &short, 4, 6), "expected norm.weight [1, 4], found [1, 3]");
    refused(linear(4, &norm, 3, 6), "expected normed [2, 4], found [2, 3]");
    refused(linear(4, &norm, 4, 5), "expected out [2, 6], found [2, 5]");
    let swiglu = |weight, gate_up: usize, out: usize| {
        let (mut normed, mut gate_up, mut out) = (zeros(&cpu, 2, 4), zeros(&cpu, 2, gate_up), zeros(&cpu, 2, out));
        let scratch = SwigluScratch { normed: &mut normed, gate_up: &mut gate_up };
        cpu.rms_norm_swiglu(&zeros(&cpu, 2, 4), RmsNorm { weight: &norm, eps: 1e-5 }, weight, scratch, &mut out)
    };
    swiglu(&w, 6, 3).unwrap();
    refused(swiglu(&odd, 6, 3), "expected as many rows of gate as of up, found 3 in all");
    refused(swiglu(&w, 5, 3), "rms_norm_swiglu: expected gate_up [2, 6], found [2, 5]");
    refused(swiglu(&w, 6, 6), "expected out [2, 3], found [2, 6]");
}

#[test]
fn weights_that_do_not_stack_are_refused() {
    let cpu = cpu();
    let rng = &mut Rng(1);
    let (a, b, c) = (weights(rng, DType::F32, &[&[2, 3]]), weights(rng, DType::F32, &[&[2, 4]]), weights(rng, DType::F16, &[&[2, 3]]));
    let vector = weights(rng, DType::F32, &[&[3]]);
    for other in [&b, &c, &vector] {
        let parts = [a.views[0].clone(), other.views[0].clone()];
        refused(cpu.load_weight(&parts).map(|_| ()), "cannot be stacked");
    }
    refused(cpu.load_weight(&[]).map(|_| ()), "at least one part");
}

#[test]
fn indices_out_of_range_are_refused() {
    let cpu = cpu();
    let table = matrix(&cpu, &[3, 4]);
    for id in [3, -1, i32::MAX, i32::MIN] {
        let ids = indices(&cpu, &[0, id]);
        refused(cpu.embed(&table, &ids, &mut zeros(&cpu, 2, 4)), "expected id 1 in 0..3");
        refused(cpu.gather_rows(&zeros(&cpu, 3, 4), &ids, &mut zeros(&cpu, 2, 4)), "expected row 1 in 0..3");
        refused(cpu.scatter_rows(&zeros(&cpu, 2, 4), &ids, &mut zeros(&cpu, 3, 4)), "expected row 1 in 0..3");
    }
    let float = zeros(&cpu, 2, 1);
    refused(cpu.embed(&table, &float, &mut zeros(&cpu, 2, 4)), "expected ids in i32, found f32");
}

#[test]
fn norms_gates_and_patches_refuse_what_does_not_fit() {
    let cpu = cpu();
    let w = matrix(&cpu, &[4]);
    refused(cpu.rms_norm(&zeros(&cpu, 2, 5), &w, 1e-5, &mut zeros(&cpu, 2, 5)), "expected weight [1, 5], found [1, 4]");
    refused(cpu.rms_norm(&zeros(&cpu, 2, 4), &w, 1e-5, &mut zeros(&cpu, 3, 4)), "expected out [2, 4], found [3, 4]");
    refused(cpu.layer_norm(&zeros(&cpu, 2, 4), &w, &matrix(&cpu, &[3]), 1e-5, &mut zeros(&cpu, 2, 4)), "expected bias [1, 4]");
    refused(cpu.silu_and_mul(&zeros(&cpu, 2, 7), &mut zeros(&cpu, 2, 4)), "expected x [2, 8], found [2, 7]");
    let pixels = cpu.alloc(24, 3, DType::U8).unwrap();
    let patchify = |table: [usize; 2], origins: &[i32], cols| {
        let (origins, widths) = (indices(&cpu, origins), indices(&cpu, &[6, 6]));
        let table = &zeros(&cpu, table[0], table[1]);
        let pictures = Pictures { pixels: &pixels, origins: &origins, widths: &widths, table, patch_size: 2 };
        cpu.patchify(&pictures, &mut zeros(&cpu, 2, cols))
    };
    patchify([3, 256], &[0, 16], 12).unwrap();
    refused(patchify([3, 256], &[0, 17], 12), "expected patches within 24 pixels, found patch 1 from pixel 17 on in rows of 6");
    refused(patchify([3, 256], &[-1, 0], 12), "found patch 0 from pixel -1 on");
    refused(patchify([1, 256], &[0, 0], 4), "expected pixels [24, 1], found [24, 3]");
    refused(patchify([3, 255], &[0, 0], 12), "expected table [3, 256]");
    refused(patchify([3, 256], &[0, 0], 11), "expected out [2, 12], found [2, 11]");
}

const SHAPE: AttentionShape = AttentionShape { num_heads: 2, num_kv_heads: 1, head_dim: 4 };

fn cache(cpu: &Cpu) -> KvCache<Cpu> {
    KvCache { k: zeros(cpu, 8, 4), v: zeros(cpu, 8, 4), block_size: 4 }
}

#[test]
fn rotation_refuses_slots_beyond_the_cache() {
    let cpu = cpu();
    let rope = |slots: &[i32], shape| {
        let rope = Rope { cos_sin: &zeros(&cpu, 2, 4), slots: &indices(&cpu, slots) };
        cpu.rope_and_store_kv(&mut zeros(&cpu, 2, 16), rope, shape, &mut cache(&cpu))
    };
    refused(rope(&[0, 8], SHAPE), "expected slot 1 below 8, found 8");
    refused(rope(&[0], SHAPE), "expected slots [2, 1], found [1, 1]");
    refused(rope(&[0, 1], AttentionShape { head_dim: 5, ..SHAPE }), "even head_dim");
    refused(rope(&[0, 1], AttentionShape { num_kv_heads: 0, ..SHAPE }), "whole groups");
    let angles = |rows, cols| cpu.rope_cos_sin(&indices(&cpu, &[0, 1]), &zeros(&cpu, 1, 2), &mut zeros(&cpu, rows, cols));
    refused(angles(2, 3), "expected out [2, 4], found [2, 3]");
    refused(angles(3, 4), "expected out [2, 4], found [3, 4]");
}

#[test]
fn paged_attention_refuses_tables_that_lead_out_of_the_cache() {
    let cpu = cpu();
    let attend = |ends: &[i32], table_values: &[i32], len: i32, window: Option<usize>| {
        let step = PagedAttention {
            positions: &indices(&cpu, &[3, 4]),
            cu_seqlens_q: &indices(&cpu, ends),
            block_tables: &table(&cpu, 1, table_values.len(), table_values),
            context_lens: &indices(&cpu, &[len]),
            max_seqlen_q: 2,
            sliding_window: window,
            shape: SHAPE,
        };
        cpu.paged_attention(&zeros(&cpu, 2, 16), &cache(&cpu), &step, &mut zeros(&cpu, 2, 8))
    };
    attend(&[0, 2], &[1, 0], 5, None).unwrap();
    for block in [2, -1, i32::MAX] {
        refused(attend(&[0, 2], &[0, block], 5, None), "expected blocks of sequence 0 in 0..2");
    }
    refused(attend(&[0, 2], &[0], 5, None), "expected 2 blocks for 5 positions");
    refused(attend(&[0, 3], &[0, 1], 5, None), "expected cu_seqlens_q to ascend from 0 to at most 2");
    refused(attend(&[2, 0], &[0, 1], 5, None), "expected cu_seqlens_q to ascend");
    refused(attend(&[-1, 2], &[0, 1], 5, None), "expected cu_seqlens_q to ascend");
    refused(attend(&[0, 1, 2], &[0, 1], 5, None), "expected cu_seqlens_q [2, 1], found [3, 1]");
    refused(attend(&[0, 2], &[0, 1], 5, Some(0)), "window of 1 or more");
    // What no row sees is not asked for.
    attend(&[0, 2], &[-1, 1], 5, Some(1)).unwrap_err();
    attend(&[0, 2], &[0, -1], 4, None).unwrap();
}

#[test]
fn packed_attention_refuses_lengths_that_do_not_fit() {
    let cpu = cpu();
    let attend = |offset: usize, ends_q: &[i32], ends_k: &[i32]| {
        let (q, kv) = (zeros(&cpu, 3, 8), zeros(&cpu, 5, 8));
        let attention = VarlenAttention {
            q: q.columns(0),
            k: kv.columns(0),
            v: kv.columns(offset),
            cu_seqlens_q: &indices(&cpu, ends_q),
            cu_seqlens_k: &indices(&cpu, ends_k),
            max_seqlen_q: 3,
            max_seqlen_k: 5,
            shape: SHAPE,
        };
        cpu.attention_varlen(&attention, &mut zeros(&cpu, 3, 8))
    };
    attend(4, &[0, 3], &[0, 5]).unwrap();
    refused(attend(5, &[0, 3], &[0, 5]), "expected v with 4 columns from 5 on, found 8 in all");
    refused(attend(usize::MAX, &[0, 3], &[0, 5]), "expected v with 4 columns");
    refused(attend(4, &[0, 4], &[0, 5]), "expected cu_seqlens_q to ascend from 0 to at most 3");
    refused(attend(4, &[0, 3], &[0, 6]), "expected cu_seqlens_k to ascend from 0 to at most 5");
    refused(attend(4, &[0, 3], &[0, 1, 5]), "expected cu_seqlens_k [2, 1]");
    refused(attend(4, &[], &[]), "begin with 0");
}

#[test]
fn copies_of_the_wrong_length_or_type_are_refused() {
    let cpu = cpu();
    let mut t = zeros(&cpu, 2, 3);
    refused(cpu.upload(&[0f32; 5], &mut t), "expected 6 elements on the host for [2, 3], found 5");
    refused(cpu.upload(&[0i32; 6], &mut t), "found f32");
    refused(cpu.download(&t, &mut [0f32; 7]), "found 7");
    assert!(t.set_rows(3).is_err());
}

#[test]
fn memory_that_is_not_there_is_an_error() {
    let result = cpu().alloc(usize::MAX / 8, 64, DType::F32).map(|_| ());
    assert!(matches!(result, Err(Error::Device(_))), "{result:?}");
}

#[test]
fn instruction_sets_that_the_machine_lacks_are_refused() {
    for isa in Isa::ALL {
        let made = Cpu::new(CpuOptions { threads: Some(1), isa: Some(isa) });
        assert_eq!(made.is_ok(), isa.is_available());
    }
}
