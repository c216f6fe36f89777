//! Rotary position embedding (Su et al. 2021) of q and k, and k and v into the cache.

use super::{
    Cpu,
    storage::{Scratch, Shared, scratch},
};
use crate::{AttentionShape, Error, KvCache, Result, Tensor, check};

/// Elements above which threads share the work.
const PARALLEL_ELEMENTS: usize = 1 << 16;

/// [`Backend::rope_and_store_kv`](crate::Backend::rope_and_store_kv).
pub(crate) fn rope_and_store_kv(
    cpu: &Cpu,
    qkv: &mut Tensor<Cpu>,
    positions: &Tensor<Cpu>,
    slots: &Tensor<Cpu>,
    inv_freq: &Tensor<Cpu>,
    shape: AttentionShape,
    kv: &mut KvCache<Cpu>,
) -> Result<()> {
    check::rope_and_store_kv(cpu, qkv, positions, slots, inv_freq, shape, kv)?;
    let positions: &[i32] = positions.storage.slice(positions.elements());
    let slots: &[i32] = slots.storage.slice(slots.elements());
    let limit = kv.k.rows();
    if let Some(i) = slots.iter().position(|slot| usize::try_from(*slot).is_ok_and(|slot| slot >= limit)) {
        return Err(Error::shape("rope_and_store_kv", format!("expected slot {i} below {limit}, found {}", slots[i])));
    }
    let inv_freq: &[f32] = inv_freq.storage.slice(inv_freq.elements());
    let (rows, cols, kv_size) = (qkv.rows(), qkv.cols(), shape.kv_size());
    let qkv = Shared::new(qkv.storage.slice_mut(qkv.elements()));
    let k_cache: &mut [f32] = kv.k.storage.slice_mut(kv.k.elements());
    let v_cache: &mut [f32] = kv.v.storage.slice_mut(kv.v.elements());
    let rotate = |row: usize| {
        // SAFETY: each row belongs to one tile.
        let qkv = unsafe { qkv.part(row * cols..(row + 1) * cols) };
        let (heads, _) = qkv.split_at_mut(shape.q_size() + kv_size);
        rotate(heads, positions[row], inv_freq, shape.head_dim);
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

/// Rotates all heads of one token. Angles are products in f32, as in the reference.
fn rotate(heads: &mut [f32], position: i32, inv_freq: &[f32], head_dim: usize) {
    let half = head_dim / 2;
    scratch(Scratch::Sliver, head_dim, |angles| {
        let (cos, sin) = angles.split_at_mut(half);
        for ((cos, sin), freq) in cos.iter_mut().zip(sin.iter_mut()).zip(inv_freq) {
            (*sin, *cos) = (position as f32 * freq).sin_cos();
        }
        for head in heads.chunks_exact_mut(head_dim) {
            let (a, b) = head.split_at_mut(half);
            for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(&*cos).zip(&*sin) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    });
}
