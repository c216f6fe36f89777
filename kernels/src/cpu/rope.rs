//! Rotary position embedding (Su et al. 2021) of q and k, and k and v into the cache.

use super::{Cpu, storage::Shared};
use crate::{AttentionShape, Error, KvCache, Result, Rope, Tensor, check};

/// Elements above which threads share the work.
const PARALLEL_ELEMENTS: usize = 1 << 16;
/// The same for angles, whose cosines and sines take longer.
const PARALLEL_ANGLES: usize = 1 << 12;

/// [`Backend::rope_cos_sin`](crate::Backend::rope_cos_sin).
pub(crate) fn rope_cos_sin(cpu: &Cpu, positions: &Tensor<Cpu>, inv_freq: &Tensor<Cpu>, out: &mut Tensor<Cpu>) -> Result<()> {
    check::rope_cos_sin(positions, inv_freq, out)?;
    let positions: &[i32] = positions.storage.slice(positions.elements());
    let inv_freq: &[f32] = inv_freq.storage.slice(inv_freq.elements());
    let (half, out) = (inv_freq.len(), Shared::new(out.storage.slice_mut(out.elements())));
    cpu.for_each(positions.len() * half >= PARALLEL_ANGLES, positions.len(), |row| {
        // SAFETY: each row belongs to one tile.
        let (cos, sin) = unsafe { out.part(2 * row * half..2 * (row + 1) * half) }.split_at_mut(half);
        for ((cos, sin), freq) in cos.iter_mut().zip(sin).zip(inv_freq) {
            (*sin, *cos) = (positions[row] as f32 * freq).sin_cos();
        }
    });
    Ok(())
}

/// [`Backend::rope_and_store_kv`](crate::Backend::rope_and_store_kv).
pub(crate) fn rope_and_store_kv(
    cpu: &Cpu,
    qkv: &mut Tensor<Cpu>,
    rope: Rope<'_, Cpu>,
    shape: AttentionShape,
    kv: &mut KvCache<Cpu>,
) -> Result<()> {
    check::rope_and_store_kv(cpu, qkv, rope, shape, kv)?;
    let cos_sin: &[f32] = rope.cos_sin.storage.slice(rope.cos_sin.elements());
    let slots: &[i32] = rope.slots.storage.slice(rope.slots.elements());
    let limit = kv.k.rows();
    if let Some(i) = slots.iter().position(|slot| usize::try_from(*slot).is_ok_and(|slot| slot >= limit)) {
        return Err(Error::shape("rope_and_store_kv", format!("expected slot {i} below {limit}, found {}", slots[i])));
    }
    let (rows, cols, kv_size, head_dim) = (qkv.rows(), qkv.cols(), shape.kv_size(), shape.head_dim);
    let qkv = Shared::new(qkv.storage.slice_mut(qkv.elements()));
    let k_cache: &mut [f32] = kv.k.storage.slice_mut(kv.k.elements());
    let v_cache: &mut [f32] = kv.v.storage.slice_mut(kv.v.elements());
    let rotate = |row: usize| {
        // SAFETY: each row belongs to one tile.
        let qkv = unsafe { qkv.part(row * cols..(row + 1) * cols) };
        let (heads, _) = qkv.split_at_mut(shape.q_size() + kv_size);
        rotate(heads, &cos_sin[row * head_dim..(row + 1) * head_dim]);
    };
    cpu.for_each(rows * cols >= PARALLEL_ELEMENTS, rows, rotate);
    // Serial, since two rows may name one slot: the copy is a small part of the work.
    for (row, slot) in slots.iter().enumerate() {
        if let Ok(slot) = usize::try_from(*slot) {
            // SAFETY: the tiles above are done.
            let (_, kv) = unsafe { qkv.part(row * cols..(row + 1) * cols) }.split_at(shape.q_size());
            let (k, v) = kv.split_at(kv_size);
            k_cache[slot * kv_size..(slot + 1) * kv_size].copy_from_slice(k);
            v_cache[slot * kv_size..(slot + 1) * kv_size].copy_from_slice(v);
        }
    }
    Ok(())
}

/// Rotates all heads of one token by its cosines and sines.
fn rotate(heads: &mut [f32], cos_sin: &[f32]) {
    let half = cos_sin.len() / 2;
    let (cos, sin) = cos_sin.split_at(half);
    for head in heads.chunks_exact_mut(cos_sin.len()) {
        let (a, b) = head.split_at_mut(half);
        for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}
