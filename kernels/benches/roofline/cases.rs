//! The cases: sizes of Idefics2-8B.

use super::{AnyResult, Bench, Bound, WeightFile, widened};
use idefics_kernels::{
    AttentionShape, Backend, DType, Element, Epilogue, KvCache, PagedAttention, Rope, Tensor, VarlenAttention, cpu::Cpu,
};

/// Weights are read from memory, not from a cache, if there are this many bytes of them.
const COLD_BYTES: usize = 192 << 20;

const HEADS: AttentionShape = AttentionShape { num_heads: 32, num_kv_heads: 8, head_dim: 128 };

pub(crate) fn run(bench: &mut Bench) -> AnyResult {
    for (rows, cols) in [(4096, 4096), (14336, 4096), (4096, 14336), (32003, 4096)] {
        linear(bench, &[1], rows, cols)?;
    }
    linear(bench, &[2, 4, 8], 4096, 4096)?;
    linear(bench, &[8], 4096, 14336)?;
    linear(bench, &[9, 16, 32, 64, 320, 2048], 4096, 4096)?;
    linear(bench, &[64, 320], 14336, 4096)?;
    linear(bench, &[64, 320], 4096, 14336)?;
    linear(bench, &[729, 4900], 1152, 1152)?;
    linear(bench, &[729, 4900], 4304, 1152)?;
    linear(bench, &[729, 4900], 1152, 4304)?;
    for rows in [729, 4900] {
        varlen(bench, &format!("siglip {rows}"), rows, rows, AttentionShape { num_heads: 16, num_kv_heads: 16, head_dim: 72 })?;
    }
    let perceiver = AttentionShape { num_heads: 16, num_kv_heads: 4, head_dim: 96 };
    varlen(bench, "perceiver 64 of 793", 64, 793, perceiver)?;
    varlen(bench, "perceiver 64 of 4964", 64, 4964, perceiver)?;
    for (sequences, context) in [(1, 512), (1, 4096), (8, 512)] {
        paged(bench, "decode", sequences, 1, context)?;
    }
    for rows in [320, 2048] {
        paged(bench, "prefill", 1, rows, rows)?;
    }
    row_ops(bench)
}

fn filled(cpu: &Cpu, rows: usize, cols: usize) -> AnyResult<Tensor<Cpu>> {
    let mut state = 7u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let mut tensor = cpu.alloc(rows, cols, DType::F32)?;
    cpu.upload(&(0..rows * cols).map(|_| next()).collect::<Vec<_>>(), &mut tensor)?;
    Ok(tensor)
}

fn indices(cpu: &Cpu, values: &[i32]) -> AnyResult<Tensor<Cpu>> {
    let mut tensor = cpu.alloc(values.len(), 1, DType::I32)?;
    cpu.upload(values, &mut tensor)?;
    Ok(tensor)
}

fn read<T: Element>(cpu: &Cpu, tensor: &Tensor<Cpu>) -> AnyResult<Vec<T>> {
    let mut values = vec![bytemuck::Zeroable::zeroed(); tensor.rows() * tensor.cols()];
    cpu.download(tensor, &mut values)?;
    Ok(values)
}

/// Products with `n` rows of `x` and weights `[features, k]`.
fn linear(bench: &Bench, ns: &[usize], features: usize, k: usize) -> AnyResult {
    let name = |n: usize| format!("linear bf16 {features}x{k} n={n}");
    if !ns.iter().any(|n| bench.wants(&name(*n))) {
        return Ok(());
    }
    let cpu = &bench.cpu;
    let copies = COLD_BYTES.div_ceil(2 * features * k).min(16);
    let file = WeightFile::new(copies, features, k)?;
    let weights = file.load(cpu)?;
    let wide: Vec<Vec<f32>> = file.views().iter().take(copies.min(4)).map(widened).collect();
    for n in ns.iter().copied().filter(|n| bench.wants(&name(*n))) {
        let x = filled(cpu, n, k)?;
        let mut out = cpu.alloc(n, features, DType::F32)?;
        let mut weights = weights.iter().cycle();
        let ours = || {
            if let Some(weight) = weights.next() {
                cpu.linear(&x, weight, None, Epilogue::Store, &mut out).unwrap_or_else(|e| println!("{e}"));
            }
        };
        let x_peer: Vec<f32> = read(cpu, &x)?;
        let mut out_peer = vec![0f32; n * features];
        let mut wide = wide.iter().cycle();
        let threads = cpu.threads();
        let mut peer = || {
            let Some(weight) = wide.next() else { return };
            let parallelism = if threads == 1 { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(threads) };
            // SAFETY: `out` is `[n, features]`, `x` `[n, k]` and the weight `[features, k]`, read as its transpose.
            unsafe {
                gemm::gemm(
                    n,
                    features,
                    k,
                    out_peer.as_mut_ptr(),
                    1,
                    features as isize,
                    false,
                    x_peer.as_ptr(),
                    1,
                    k as isize,
                    weight.as_ptr(),
                    k as isize,
                    1,
                    0.0,
                    1.0,
                    false,
                    false,
                    false,
                    parallelism,
                );
            }
        };
        let bound = if n <= 4 { Bound::Bytes((2 * features * k) as f64) } else { Bound::Flops((2 * n * features * k) as f64) };
        bench.report(&name(n), bound, ours, Some(&mut peer));
        let difference = read::<f32>(cpu, &out)?.iter().zip(&out_peer).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        if copies == 1 && difference > 1e-2 * (k as f32).sqrt() {
            println!("{}: differs from the peer by {difference}", name(n));
        }
    }
    Ok(())
}

/// One packed sequence of `rows` queries and `keys` keys.
fn varlen(bench: &Bench, name: &str, rows: usize, keys: usize, shape: AttentionShape) -> AnyResult {
    let name = format!("attention_varlen {name}");
    if !bench.wants(&name) {
        return Ok(());
    }
    let cpu = &bench.cpu;
    let (q, kv) = (filled(cpu, rows, shape.q_size())?, filled(cpu, keys, 2 * shape.kv_size())?);
    let mut out = cpu.alloc(rows, shape.q_size(), DType::F32)?;
    let attention = VarlenAttention {
        q: q.columns(0),
        k: kv.columns(0),
        v: kv.columns(shape.kv_size()),
        cu_seqlens_q: &indices(cpu, &[0, rows as i32])?,
        cu_seqlens_k: &indices(cpu, &[0, keys as i32])?,
        max_seqlen_q: rows,
        max_seqlen_k: keys,
        shape,
    };
    let ours = || cpu.attention_varlen(&attention, &mut out).unwrap_or_else(|e| println!("{e}"));
    bench.report(&name, Bound::Flops((4 * rows * keys * shape.q_size()) as f64), ours, None);
    Ok(())
}

/// `sequences` of `context` positions, of which the last `rows` are this step's.
fn paged(bench: &Bench, name: &str, sequences: usize, rows: usize, context: usize) -> AnyResult {
    let name = format!("paged_attention {name} {sequences} x {rows} of {context}");
    if !bench.wants(&name) {
        return Ok(());
    }
    const BLOCK: usize = 16;
    let cpu = &bench.cpu;
    let blocks = sequences * context.div_ceil(BLOCK);
    // Several layers, so that a step does not find its keys in a cache.
    let layers = COLD_BYTES.div_ceil(2 * blocks * BLOCK * HEADS.kv_size() * 4).min(24);
    let layers = if rows > 1 { 1 } else { layers };
    let layer = || -> AnyResult<KvCache<Cpu>> {
        let part = || filled(cpu, blocks * BLOCK, HEADS.kv_size());
        Ok(KvCache { k: part()?, v: part()?, block_size: BLOCK })
    };
    let caches: Vec<_> = (0..layers).map(|_| layer()).collect::<AnyResult<_>>()?;
    let qkv = filled(cpu, sequences * rows, HEADS.q_size() + 2 * HEADS.kv_size())?;
    let mut out = cpu.alloc(sequences * rows, HEADS.q_size(), DType::F32)?;
    // Blocks of the sequences take turns, as they do when sequences grow side by side.
    let width = blocks / sequences;
    let table: Vec<i32> = (0..sequences).flat_map(|i| (0..width).map(move |j| (j * sequences + i) as i32)).collect();
    let mut block_tables = cpu.alloc(sequences, width, DType::I32)?;
    cpu.upload(&table, &mut block_tables)?;
    let positions: Vec<i32> = (0..sequences).flat_map(|_| (context - rows) as i32..context as i32).collect();
    let step = PagedAttention {
        positions: &indices(cpu, &positions)?,
        cu_seqlens_q: &indices(cpu, &(0..=sequences).map(|i| (i * rows) as i32).collect::<Vec<_>>())?,
        block_tables: &block_tables,
        context_lens: &indices(cpu, &vec![context as i32; sequences])?,
        max_seqlen_q: rows,
        sliding_window: Some(4096),
        shape: HEADS,
    };
    let mut caches = caches.iter().cycle();
    let ours = || {
        if let Some(kv) = caches.next() {
            cpu.paged_attention(&qkv, kv, &step, &mut out).unwrap_or_else(|e| println!("{e}"));
        }
    };
    let bound = if rows == 1 {
        Bound::Bytes((sequences * context * 2 * HEADS.kv_size() * 4) as f64)
    } else {
        Bound::Flops((4 * sequences * rows * (context - rows + rows.div_ceil(2)) * HEADS.q_size()) as f64)
    };
    bench.report(&name, bound, ours, None);
    Ok(())
}

/// Ops that pass over rows.
fn row_ops(bench: &Bench) -> AnyResult {
    let cpu = &bench.cpu;
    let vector = |cols: usize| -> AnyResult<_> {
        let file = WeightFile::new(1, 1, cols)?;
        Ok((file.load(cpu)?.remove(0), file))
    };
    for (rows, cols) in [(1, 4096), (320, 4096), (4900, 1152)] {
        let (weight, _file) = vector(cols)?;
        let x = filled(cpu, rows, cols)?;
        let mut out = cpu.alloc(rows, cols, DType::F32)?;
        let bound = Bound::Bytes((2 * rows * cols * 4) as f64);
        let name = format!("rms_norm {rows} x {cols}");
        if bench.wants(&name) {
            bench.report(&name, bound, || cpu.rms_norm(&x, &weight, 1e-5, &mut out).unwrap_or_else(|e| println!("{e}")), None);
        }
        let name = format!("layer_norm {rows} x {cols}");
        if bench.wants(&name) {
            bench.report(&name, bound, || cpu.layer_norm(&x, &weight, &weight, 1e-5, &mut out).unwrap_or_else(|e| println!("{e}")), None);
        }
    }
    for (rows, cols) in [(1, 14336), (320, 14336)] {
        let x = filled(cpu, rows, 2 * cols)?;
        let mut out = cpu.alloc(rows, cols, DType::F32)?;
        let name = format!("silu_and_mul {rows} x {cols}");
        if bench.wants(&name) {
            let bound = Bound::Bytes((3 * rows * cols * 4) as f64);
            bench.report(&name, bound, || cpu.silu_and_mul(&x, &mut out).unwrap_or_else(|e| println!("{e}")), None);
        }
    }
    for rows in [1, 320] {
        let name = format!("rope_and_store_kv {rows}");
        if bench.wants(&name) {
            let mut qkv = filled(cpu, rows, HEADS.q_size() + 2 * HEADS.kv_size())?;
            let inv_freq: Vec<f32> = (0..64).map(|i| 10000f32.powf(-f32::from(i as u8) / 64.0)).collect();
            let mut freq = cpu.alloc(1, 64, DType::F32)?;
            cpu.upload(&inv_freq, &mut freq)?;
            let mut kv = KvCache { k: filled(cpu, 512, HEADS.kv_size())?, v: filled(cpu, 512, HEADS.kv_size())?, block_size: 16 };
            let rows_i = indices(cpu, &(0..rows as i32).collect::<Vec<_>>())?;
            let bound = Bound::Bytes((2 * rows * (HEADS.q_size() + 2 * HEADS.kv_size()) * 4) as f64);
            let mut cos_sin = cpu.alloc(rows, 128, DType::F32)?;
            cpu.rope_cos_sin(&rows_i, &freq, &mut cos_sin)?;
            let rope = Rope { cos_sin: &cos_sin, slots: &rows_i };
            let ours = || cpu.rope_and_store_kv(&mut qkv, rope, HEADS, &mut kv).unwrap_or_else(|e| println!("{e}"));
            bench.report(&name, bound, ours, None);
        }
    }
    Ok(())
}
